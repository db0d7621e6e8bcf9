"""YOLO's annotation format (one txt file an image) → index."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import yaml

from raydet.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from raydet.data.index import Array, Index, index_of_images
from raydet.data.problems import Problems
from raydet.data.scan import each, image_sizes, is_image, present
from raydet.data.store import Store
from raydet.errors import RaydetError

TOLERANCE = 1e-3  # how far coordinates of 0 to 1 may lie outside by rounding

_ALIASES = {"val": ("val", "valid")}


def load_yolo(store: Store, split: str, images: str | None = None, problems: Problems | None = None) -> Index:
    """Read a data set of YOLO's txt files.

    The images of a split are, unless `images` says, those that a *.yaml (or darknet's *.data) in the root names: a
    folder, several, or a txt file that lists images; else those of images/{split}, {split}/images or {split}.txt. The
    classes are those of that file, else of obj.names, classes.txt or another *.names. A path that leads out of the root
    is taken from the root on, as such files are often copied from elsewhere.

    The objects of an image are in the txt file of its name, in the folder `labels` in place of the last `images` of its
    path, or beside it; without such a file it has none. A line is `class cx cy w h`, or `class x1 y1 x2 y2 x3 y3 …`, a
    polygon, whose bounding box is taken: in shares of the image's width and height, up to 0.001 outside 0 to 1. Image
    ids number the images by path, from 0; sizes are read from the images.

    A problem is a listed image outside the root, or one that is missing or no image: it is left out. So is a line that
    is neither form, has a number that is not finite, farther outside or a negative side, or an unknown class; and all
    lines of a file that is no text.

    Args:
        store: the root.
        split: "train" or "val" (also found as "valid").
        images: folder of the split's images, or txt file that lists them; None: found as said above.
        problems: gets what is wrong with images and lines; None: the first problem stops.

    Raises:
        RaydetError: images or classes are not found, or no image has a label file; or see `problems`.
    """
    problems = problems or Problems()
    config = _config(store)
    class_names = _class_names(store, config)
    lengths = _images(store, _sources(store, split, images, config), problems)
    sizes = image_sizes(store, list(lengths), lengths, problems)
    labels_of = _label_files(store, sizes)
    if sizes and not labels_of:
        raise RaydetError(f"{store.root}: none of the {len(sizes)} images of {split} has a txt file with its objects")
    texts = dict(zip(labels_of, each(store.text, list(labels_of.values()), "labels"), strict=True))
    objects = []
    for name, size in sizes.items():
        text = texts.get(name, "")
        if isinstance(text, RaydetError):
            problems.add(str(text))
            text = ""
        objects.append(_objects(text, size, len(class_names), store.path(labels_of.get(name, "")), problems))
    return index_of_images(
        [(image_id, name, *size) for image_id, (name, size) in enumerate(sizes.items())],
        objects,
        root=store.root,
        class_names=class_names,
    )


def _config(store: Store) -> dict[str, Any]:
    """Return what the root's data.yaml, or another *.yaml or *.data of that kind, says."""
    for name in sorted(store.files(), key=lambda name: (name != "data.yaml", name)):
        if name.endswith((".yaml", ".yml")):
            try:
                config = yaml.load(store.text(name), yaml.BaseLoader)  # all text: a class may be called no, or 007
            except yaml.YAMLError as error:
                raise RaydetError(f"{store.path(name)} is not YAML: {error}") from None
            if isinstance(config, dict) and ("names" in config or isinstance(config.get("train"), str | list)):
                return config
        elif name.endswith(".data"):
            pairs = [line.split("=", 1) for line in store.text(name).splitlines() if "=" in line]
            return {key.strip(): value.strip() for key, value in pairs}
    return {}


def _class_names(store: Store, config: dict[str, Any]) -> list[str]:
    names = config.get("names")
    if isinstance(names, dict):
        names = [names.get(str(label)) for label in range(len(names))]
    elif not isinstance(names, list):
        files = [name for name in store.files() if name.endswith(".names") or name == "classes.txt"]
        files.sort(key=lambda name: (name != "obj.names", name))
        file = _find(store, str(names)) if names else next(iter(files), None)
        if file is None:
            raise RaydetError(
                f"{store.root}: found no names of classes in data.yaml, obj.names, classes.txt or *.names"
            )
        names = store.text(file).strip().splitlines()
    count = config.get("nc", config.get("classes", len(names)))
    if not names or None in names or len(set(names)) < len(names) or str(count) != str(len(names)):
        raise RaydetError(f"{store.root}: the names of the {count} classes are not so many different ones: {names}")
    return [str(name).strip() for name in names]


def _sources(store: Store, split: str, images: str | None, config: dict[str, Any]) -> list[str]:
    """Return the folders and lists that the images of a split are in."""
    aliases = _ALIASES.get(split, (split,))
    entries = images or next((config[key] for key in aliases if config.get(key)), None)
    if entries is None:
        usual = [name for key in aliases for name in (f"images/{key}", f"{key}/images", f"{key}.txt")]
        found = next((name for name in usual if store.kind(name)), None)
        if found is None:
            raise RaydetError(
                f"{store.root}: found no images of {split}; looked for {split} in data.yaml, {', '.join(usual)}; "
                f"name their folder or list with data.{split}_annotations"
            )
        return [found]
    return [_find(store, entry, config.get("path")) for entry in ([entries] if isinstance(entries, str) else entries)]


def _candidates(store: Store, entry: str, *folders: str | None) -> list[str]:
    """Return where below the root a path may point to that starts from one of some folders, or from the root."""
    path = str(entry).strip().replace("\\", "/").removeprefix(f"{store.root}/")
    starts = [folder or "" for folder in (*folders, "")]
    # An absolute path's ".." end at the root. Darknet's lists start from the folder above `data`.
    return [
        posixpath.normpath(f"/{start}/{name}").lstrip("/")
        for name in (path, path.removeprefix("data/"))
        for start in starts
    ]


def _find(store: Store, entry: str, *folders: str | None) -> str:
    candidates = _candidates(store, entry, *folders)
    found = next((name for name in candidates if store.kind(name)), None)
    if found is None:
        raise RaydetError(f"{store.path(candidates[0])}: no such file or folder (it is called {entry})")
    return found


def _images(store: Store, sources: Sequence[str], problems: Problems) -> dict[str, int]:
    """Return the paths of the images in folders and lists, sorted, with the lengths of the files in bytes."""
    found: dict[str, int] = {}
    for source in sources:
        if store.kind(source) == "folder":
            files = store.files(source, recursive=True)
            found |= {os.path.join(source, name): length for name, (length, _) in files.items() if is_image(name)}
            continue
        lines = [line for line in store.text(source).splitlines() if line.strip()]
        candidates = [_candidates(store, line, os.path.dirname(source)) for line in lines]
        there = present(store, [name for names in candidates for name in names])
        for line, names in zip(lines, candidates, strict=True):
            name = next((name for name in names if name in there), None)
            if name is None:
                problems.add(f"{store.path(source)}: there is no image {line} in {store.root}")
            else:
                found[name] = there[name]
    return dict(sorted(found.items()))


def _label_files(store: Store, images: Iterable[str]) -> dict[str, str]:
    """Return the txt file of each image that has one."""
    candidates = {}
    for image in images:
        *folders, name = image.split("/")
        file = os.path.splitext(name)[0] + ".txt"
        beside = "/".join([*folders, file])
        candidates[image] = [beside]
        if "images" in folders:
            last = len(folders) - 1 - folders[::-1].index("images")
            candidates[image].insert(0, "/".join([*folders[:last], "labels", *folders[last + 1 :], file]))
    there = present(store, [name for names in candidates.values() for name in names])
    found = {image: next((name for name in names if name in there), None) for image, names in candidates.items()}
    return {image: name for image, name in found.items() if name is not None}


def _objects(
    text: str, size: tuple[int, int], num_classes: int, source: str, problems: Problems
) -> tuple[Array, Array, Array]:
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                rows.append(_parse(line, num_classes))
            except ValueError as error:
                problems.add(f"{source}, line {number}: {error}")
    table = np.array(rows).reshape(-1, 5)
    return cxcywh_to_xyxy(table[:, 1:]) * (size * 2), table[:, 0].astype(np.int64), np.zeros(len(table), bool)


def _parse(line: str, num_classes: int) -> list[float]:
    """Return the class and cx, cy, w, h in shares of the image."""
    label, *numbers = map(float, line.split())
    if len(numbers) != 4 and (len(numbers) < 6 or len(numbers) % 2):
        raise ValueError(f"{line.strip()!r} is neither class cx cy w h nor a polygon, class x1 y1 x2 y2 x3 y3 …")
    if label % 1 or not 0 <= label < num_classes:  # nor is NaN
        raise ValueError(f"class {label:g} is not one of 0 to {num_classes - 1}")
    if not all(-TOLERANCE <= number <= 1 + TOLERANCE for number in numbers):  # nor is NaN
        raise ValueError(f"{line.strip()!r} has numbers that are not between 0 and 1")
    numbers = [min(max(number, 0.0), 1.0) for number in numbers]
    if len(numbers) > 4:
        xs, ys = numbers[::2], numbers[1::2]
        numbers = xyxy_to_cxcywh(np.array([min(xs), min(ys), max(xs), max(ys)])).tolist()
    return [label, *numbers]
