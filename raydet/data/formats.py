"""The data that a recipe names → index, whatever its format."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from raydet.data.cache import cached
from raydet.data.coco import load_coco
from raydet.data.header import check_pixels
from raydet.data.index import Index
from raydet.data.own import BUILT_IN, find_dataset, listed_transforms, load_own
from raydet.data.problems import Problems
from raydet.data.transform_list import TransformList
from raydet.data.voc import load_voc
from raydet.data.yolo import load_yolo
from raydet.errors import RaydetError
from raydet.plugins import accepts
from raydet.store import Store

if TYPE_CHECKING:
    from raydet.recipe import Data

Split = Literal["train", "val"]

# Names of a split's own folder; exports of Roboflow say valid.
_FOLDERS: dict[Split, tuple[str, ...]] = {"train": ("train",), "val": ("val", "valid")}


class SplitReader(NamedTuple):
    """How to read a split: `load(store=…, **settings, problems=…)`."""

    load: Callable[..., Index]
    settings: dict[str, Any]
    reads: tuple[str, ...]  # see `cached`; without any, it is not
    code: str = ""  # code of the user's own module


def load_index(data: Data, split: Split, problems: Problems | None = None) -> Index:
    """Read the images and objects of a split as a recipe says.

    Of the images in the order of their ids, `max_num_samples` are taken, then objects of classes that are not in
    `class_inclusion_list` left out, then, to train, images without objects if `ignore_empty_annotations` says so. What
    is read is kept on disk for the next time (see `raydet.data.cache`).

    Args:
        data: the section of the recipe.
        split: "train" or "val".
        problems: gets what cannot be used; None: as `data.on_error` says.

    Raises:
        RaydetError: the folder, format, annotations or images are not found, nothing is left; or see the format's
            loader.
    """
    problems = problems or Problems(data.on_error, data.max_errors)
    index = _without_too_large(_read(data, split, problems), data.max_pixels, problems)
    if data.max_num_samples is not None:
        index = index.head(data.max_num_samples)
    if data.class_inclusion_list is not None:
        try:
            index = index.with_classes(data.class_inclusion_list)
        except RaydetError as error:
            raise RaydetError(f"data.class_inclusion_list: {error}") from None
    if data.ignore_empty_annotations and split == "train":
        index = index.without_empty()
    if not len(index):
        raise RaydetError(f"data.root: no image of {split} is left of {data.root}")
    return index


def own_transforms(data: Data) -> TransformList:
    """Return the transforms that the recipe's data set brings for its training images: only one's own class has any.

    Raises:
        RaydetError: the data set cannot be made, or a transform has no meaning here.
    """
    if data.format in BUILT_IN:
        return TransformList()
    return listed_transforms(Store(data.root), data.format, *_paths(data, "train"), _params(data, "train"))


def _without_too_large(index: Index, max_pixels: int, problems: Problems) -> Index:
    too_large = index.pixels > max_pixels
    if not too_large.any():
        return index
    for row in np.flatnonzero(too_large).tolist():
        try:
            check_pixels(index.size(row), index.path(row), max_pixels)
        except RaydetError as error:
            problems.add(str(error))
    return index.take(np.flatnonzero(~too_large))


def detect(store: Store) -> str:
    """Return the format of what a folder holds: shards, coco, voc or yolo, the first of these that it could be.

    Raises:
        RaydetError: it could be none; the message says what was looked for.
    """
    folders = [folder for folders in _FOLDERS.values() for folder in folders]
    places = {
        "shards": [f"{folder}/index.parquet" for folder in folders],
        "coco": [file for split in _FOLDERS for file, _ in _coco_places(split)],
        "voc": ["Annotations", *(f"{folder}/Annotations" for folder in folders)],
        "yolo": ["data.yaml", "labels", *(f"{folder}/labels" for folder in folders), "obj.names", "classes.txt"],
    }
    for name, looked_for in places.items():
        if any(store.kind(place) for place in looked_for):
            return name
    raise RaydetError(
        f"data.root: {store.root} holds nothing that tells its format (shards: train/index.parquet; coco: "
        "annotations/instances_train.json or train/_annotations.coco.json; voc: Annotations; yolo: data.yaml or "
        "labels); pass data.format=…"
    )


def _read(data: Data, split: Split, problems: Problems) -> Index:
    store = Store(data.root)
    if data.format in BUILT_IN and store.kind() != "folder":
        raise RaydetError(f"data.root: {data.root} is not a folder; pass data.root=FOLDER")
    annotations, images = _paths(data, split)
    name = data.format
    if name == "auto":
        name = "coco" if (annotations or "").endswith(".json") else detect(store)
    if name == "shards":
        return _shards(store.below(split))
    if name == "coco":
        source = _coco(store, split, annotations, images)
    elif name == "voc":
        source = _voc(store, data, split)
    elif name == "yolo":
        source = SplitReader(load_yolo, {"split": split, "images": annotations or images}, ("",))
    else:
        source = _own(store, data, split)
    settings = [source.load.__name__, source.settings, source.code]
    build = partial(source.load, store=store, **source.settings)
    return cached(build, store, source.reads, settings, problems) if source.reads else build(problems=problems)


def _paths(data: Data, split: Split) -> tuple[str | None, str | None]:
    """Return what the recipe says of a split: its annotations and its images."""
    return getattr(data, f"{split}_annotations"), getattr(data, f"{split}_images")


def _params(data: Data, split: Split) -> dict[str, Any]:
    """Return the arguments for the data set's own class; its input_dim is the recipe's, if it takes one."""
    given: dict[str, Any] = getattr(data, f"{split}_params")
    input_dim = {"input_dim": list(data.image_size)} if accepts(find_dataset(data.format), "input_dim") else {}
    return {**input_dim, **given}


def _shards(store: Store) -> Index:
    path = store.path("index.parquet")
    try:
        return Index.load(Path(path) if store.is_local else store.read("index.parquet"), store.root)
    except OSError as error:
        raise RaydetError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise RaydetError(f"{path} cannot be read: {error}; ingest the data set again") from None


def _coco(store: Store, split: Split, annotations: str | None, images: str | None) -> SplitReader:
    if annotations is None:
        places = [(file, images or folder) for file, folder in _coco_places(split)]
    else:
        name = PurePosixPath(annotations).stem.removeprefix("instances_")
        folders = [images] if images else [name, f"images/{name}", "images", os.path.dirname(annotations)]
        places = [(annotations, folder) for folder in folders]
    there = [place for place in places if store.kind(place[0]) == "file" and store.kind(place[1]) == "folder"]
    if not there and len(places) > 1:
        looked_for = ", ".join(f"{file} with {folder}" for file, folder in places)
        raise RaydetError(
            f"{store.root}: found no COCO annotations of {split} with images; looked for {looked_for}; "
            f"pass data.{split}_annotations=FILE data.{split}_images=FOLDER"
        )
    file, folder = [*there, *places][0]
    settings = {"annotations": file, "images": folder, "images_key": f"data.{split}_images"}
    return SplitReader(load_coco, settings, (file, folder))


def _coco_places(split: Split) -> Iterator[tuple[str, str]]:
    """Yield where a split's annotation file and the folder of its images usually are."""
    for name in (f"{split}2017", split):
        for folder in (name, f"images/{name}"):
            yield f"annotations/instances_{name}.json", folder
    for folder in _FOLDERS[split]:
        yield f"{folder}/_annotations.coco.json", folder


def _voc(store: Store, data: Data, split: Split) -> SplitReader:
    places = {each: _voc_place(store, _paths(data, each)[0], each) for each in _FOLDERS}
    place = places[split]
    if place is None:
        raise RaydetError(
            f"{store.root}: found no VOC annotations of {split}; looked for ImageSets/Main/{split}.txt, "
            f"{'/Annotations, '.join(_FOLDERS[split])}/Annotations; pass data.{split}_annotations=LIST, or the folder "
            "of XML files"
        )
    split_file, annotations = place
    parent = os.path.dirname(annotations)
    usual = [os.path.join(parent, name) for name in ("JPEGImages", "images")]
    images = _paths(data, split)[1] or next((name for name in usual if store.kind(name) == "folder"), annotations)
    folders = sorted({each[1] for each in places.values() if each is not None})
    settings = {"split_file": split_file, "annotations": annotations, "images": images, "difficult": data.difficult}
    reads = (*folders, images, *([split_file] if split_file else []))
    return SplitReader(load_voc, {**settings, "folders": folders}, reads)


def _voc_place(store: Store, given: str | None, split: Split) -> tuple[str | None, str] | None:
    """Return the list of a split's names, None for all, and the folder of its XML files."""
    if given is not None and store.kind(given) == "folder":
        return None, given
    listed = given or f"ImageSets/Main/{split}.txt"
    if given is not None or store.kind(listed) == "file":
        above, found, _ = listed.partition("ImageSets")
        return listed, os.path.join(above if found else "", "Annotations")
    folders = [f"{folder}/Annotations" for folder in _FOLDERS[split]]
    return next(((None, folder) for folder in folders if store.kind(folder) == "folder"), None)


def _own(store: Store, data: Data, split: Split) -> SplitReader:
    """Cached if it reads below the root, so that a change of its data is seen, and its own code is known."""
    factory = find_dataset(data.format)
    try:
        code = inspect.getsource(sys.modules[factory.__module__])
    except (OSError, TypeError):
        code = ""
    reads_root = (accepts(factory, "root") or accepts(factory, "data_dir")) and store.kind() == "folder"
    annotations, images = _paths(data, split)
    settings: dict[str, Any] = {"name": data.format, "split": split, "annotations": annotations, "images": images}
    settings["params"] = _params(data, split)
    return SplitReader(load_own, settings, ("",) if code and reads_root else (), code)
