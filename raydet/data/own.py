"""Data sets of the user's own → index: classes with SuperGradients' two hooks, functions, and their registry."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np

from raydet.boxes import cxcywh_to_xyxy, xywh_to_xyxy, xyxy_to_cxcywh, xyxy_to_xywh
from raydet.data.coco import load_coco
from raydet.data.index import Array, Index, index_of_images
from raydet.data.problems import Problems, refuse_shares
from raydet.data.scan import image_sizes, present
from raydet.data.transform_list import TransformList
from raydet.errors import RaydetError, did_you_mean
from raydet.plugins import accepts, call, is_own, locate
from raydet.store import Store, check_encoding, inside, is_uri

__all__ = [
    "COCODetectionDataset",
    "DetectionDataset",
    "TargetFormat",
    "find_dataset",
    "index_of_records",
    "load_own",
    "register_dataset",
]

Factory = TypeVar("Factory", bound=Callable[..., Any])

BUILT_IN = ("auto", "coco", "shards", "voc", "yolo")
REGISTERED: dict[str, Callable[..., Any]] = {}


class DetectionDataset(ABC):
    """A data set that a subclass reads, by SuperGradients' two hooks: `_setup_data_source` and `_load_annotation`.

    A subclass sets what the hooks need and calls this constructor last: it calls `_setup_data_source`.

    Args:
        data_dir: folder of the data set, a local path or a URI.
        original_target_format: format of the targets that `_load_annotation` returns, or its name.
        all_classes_list: name of each label; None: the property `_all_classes` has them.
        input_dim: (rows, columns), or one number for both, to which `_load_annotation` scales its boxes, if it does.
        max_num_samples: largest number of samples to use, from the beginning; None: all.
        class_inclusion_list: classes to keep, numbered in this order; None: all.
        ignore_empty_annotations: leave out images without objects.
        transforms: names of SuperGradients' transforms, {name: arguments}, or objects of your own, which are called
            with a `Sample` and a generator. In training they are all the augmentation that there is, in the order that
            the recipe's has; a list that only fits images to the model leaves it to the recipe.

    Raises:
        RaydetError: a transform or one of its arguments has no meaning here; it is named.
    """

    def __init__(
        self,
        data_dir: str | Path,
        original_target_format: TargetFormat | str,
        all_classes_list: Sequence[str] | None = None,
        input_dim: int | tuple[int, int] | None = None,
        max_num_samples: int | None = None,
        class_inclusion_list: Sequence[str] | None = None,
        ignore_empty_annotations: bool = False,
        transforms: Sequence[Any] = (),
    ):
        self.transforms = TransformList.read(transforms)
        self.data_dir = str(data_dir)
        self.original_target_format = TargetFormat(original_target_format)
        self.all_classes_list = list(all_classes_list or ())
        self.input_dim = (input_dim, input_dim) if isinstance(input_dim, int) else input_dim
        self.max_num_samples = max_num_samples
        self.class_inclusion_list = class_inclusion_list
        self.ignore_empty_annotations = ignore_empty_annotations
        self.num_samples = self._setup_data_source()

    @abstractmethod
    def _setup_data_source(self) -> int:
        """Find the samples, and return how many there are."""

    @abstractmethod
    def _load_annotation(self, sample_id: int) -> Mapping[str, Any]:
        """Return what is known of a sample, 0 … number of samples - 1.

        Returns:
            `img_path`; `target` [n, 5] in the target format; perhaps `crowd_target` [m, 5] likewise;
            perhaps `initial_img_shape`, (height, width) of the image (else read from it); and `resized_img_shape`,
            the same after scaling to `input_dim`, if the targets are in its pixels.
        """

    @property
    def _all_classes(self) -> Sequence[str]:
        return self.all_classes_list

    def index(self, problems: Problems | None = None) -> Index:
        """Read all annotations.

        Args:
            problems: gets what is wrong with samples, as `index_of_records` says; None: the first problem stops.

        Raises:
            RaydetError: see `problems`; or a sample has no `img_path` or no `target`, or a class is unknown.
        """
        count = min(self.num_samples, self.max_num_samples or self.num_samples)
        described = map(self._describe, range(count))
        index = index_of_described(described, self._all_classes, self.data_dir, problems or Problems())
        return _select(index, self.class_inclusion_list, self.ignore_empty_annotations)

    def _describe(self, sample_id: int) -> Described:
        annotation = self._load_annotation(sample_id)
        name = f"sample {sample_id} of {type(self).__name__}"
        missing = [key for key in ("img_path", "target") if key not in annotation]
        if missing:
            raise RaydetError(f"{name}: _load_annotation returned no {missing[0]}, only {', '.join(annotation)}")
        path = os.fspath(annotation["img_path"])
        if not is_uri(path) and os.path.isfile(path):  # from the current folder on, as SuperGradients opens it
            path = os.path.abspath(path)
        shape = annotation.get("initial_img_shape")
        size = None if shape is None else (int(shape[1]), int(shape[0]))
        return Described(name, path, size, partial(self._objects, annotation))

    def _objects(self, annotation: Mapping[str, Any], width: int, height: int) -> Objects:
        crowd_target = annotation.get("crowd_target")
        targets = [annotation["target"], () if crowd_target is None else crowd_target]
        (boxes, labels), (crowds, crowd_labels) = (
            self.original_target_format.to_xyxy(target, width, height) for target in targets
        )
        boxes = np.concatenate((boxes, crowds)) / self._scale(annotation.get("resized_img_shape"), width, height)
        return boxes, np.concatenate((labels, crowd_labels)), np.repeat([False, True], [len(labels), len(crowds)])

    def _scale(self, resized: Sequence[int] | None, width: int, height: int) -> Array:
        """Return by what the subclass has multiplied its boxes."""
        if self.input_dim is None or resized is None or self.original_target_format.is_normalized:
            return np.ones(4)
        ratio = min(self.input_dim[0] / height, self.input_dim[1] / width)
        if (int(height * ratio), int(width * ratio)) == tuple(resized[:2]):  # sides are whole pixels, boxes are not
            return np.full(4, ratio)
        return np.array([resized[1] / width, resized[0] / height] * 2)


class COCODetectionDataset:
    """COCO in SuperGradients' layout: data_dir/annotations/json_file, and images in data_dir/subdir.

    Args:
        data_dir: folder of the data set, a local path or a URI.
        subdir: folder of the images in `data_dir`.
        json_file: JSON file in the folder `annotations` of `data_dir`.
        max_num_samples: largest number of images to use, from the beginning; None: all.
        class_inclusion_list: classes to keep, numbered in this order; None: all.
        ignore_empty_annotations: leave out images without objects.
    """

    def __init__(
        self,
        data_dir: str | Path,
        subdir: str = "images/train2017",
        json_file: str = "instances_train2017.json",
        max_num_samples: int | None = None,
        class_inclusion_list: Sequence[str] | None = None,
        ignore_empty_annotations: bool = False,
    ):
        self.data_dir = str(data_dir)
        self.subdir = subdir
        self.json_file = json_file
        self.max_num_samples = max_num_samples
        self.class_inclusion_list = class_inclusion_list
        self.ignore_empty_annotations = ignore_empty_annotations

    def index(self, problems: Problems | None = None) -> Index:
        """Read the annotations, as `load_coco` does."""
        index = load_coco(f"annotations/{self.json_file}", self.subdir, problems, Store(self.data_dir))
        index = index.head(self.max_num_samples or len(index))
        return _select(index, self.class_inclusion_list, self.ignore_empty_annotations)


@overload
def register_dataset(name: Factory) -> Factory: ...


@overload
def register_dataset(
    name: str | None = None, class_names: Sequence[str] | None = None
) -> Callable[[Factory], Factory]: ...


def register_dataset(name: Any = None, class_names: Sequence[str] | None = None) -> Any:
    """Make a data set known by a name, for `data.format` of a recipe; the module that does so must be imported.

    What is decorated is a subclass of `DetectionDataset`, a function that returns an `Index`, or one that yields
    records (see `index_of_records`). It is called with those of these arguments that it takes: `root` and `data_dir`,
    the recipe's data.root; `split`, "train" or "val"; `annotations` and `images`, the recipe's for that split;
    `problems`.

    Args:
        name: name of the data set; None: the name of the class or function.
        class_names: name of each label, for a function that yields records.

    Raises:
        RaydetError: the name is taken.
    """
    if callable(name):
        return register_dataset()(name)

    def register(factory: Factory) -> Factory:
        key = name or factory.__name__
        earlier = REGISTERED.get(key, factory)
        again = (earlier.__module__, earlier.__qualname__) == (factory.__module__, factory.__qualname__)  # a reload
        if key in BUILT_IN or not again:
            raise RaydetError(f"register_dataset: the name {key} is taken: choose another")
        REGISTERED[key] = factory
        if class_names is not None:
            factory.class_names = tuple(class_names)  # type: ignore[attr-defined]
        return factory

    return register


def find_dataset(name: str) -> Callable[..., Any]:
    """Return what a recipe's `data.format` names: a registered data set, or `package.module:name`.

    Raises:
        RaydetError: there is none.
    """
    if is_own(name):
        found = locate(name, "data.format")
        if not callable(found):
            raise RaydetError(f"data.format: {name} is no class and no function")
        return found  # type: ignore[no-any-return]
    if name not in REGISTERED:
        known = (*BUILT_IN, *sorted(REGISTERED))
        raise RaydetError(
            f"data.format: {name} is none of {', '.join(known)}{did_you_mean(name, known)}; one of your own is "
            "package.module:name, or the name that an imported module gave it by register_dataset"
        )
    return REGISTERED[name]


def load_own(
    store: Store,
    name: str,
    split: str,
    annotations: str | None = None,
    images: str | None = None,
    problems: Problems | None = None,
    params: Mapping[str, Any] | None = None,
) -> Index:
    """Read a data set of the user's own.

    Args:
        store: store of data.root.
        name: name of the data set, data.format.
        split: "train" or "val".
        annotations: the recipe's annotations of this split.
        images: the recipe's images of this split.
        problems: gets what is wrong with samples; None: the first problem stops.
        params: the recipe's arguments for this split, data.train_params or data.val_params.

    Raises:
        RaydetError: there is none of this name, or it gives no index; or see `DetectionDataset.index`.
    """
    factory, problems = find_dataset(name), problems or Problems()
    made = _make(store, name, split, annotations, images, params, problems)
    if isinstance(made, DetectionDataset | COCODetectionDataset):
        made = made.index(problems)
    if isinstance(made, Index):
        return made
    class_names = getattr(factory, "class_names", None)
    if not isinstance(made, Iterable):
        raise RaydetError(
            f"data.format: {name} gives {type(made).__name__}, not an Index, records or a DetectionDataset"
        )
    if class_names is None:
        raise RaydetError(f"data.format: {name} gives records: decorate it with register_dataset(class_names=…)")
    return index_of_records(made, class_names, store.root, problems)


def listed_transforms(
    store: Store, name: str, annotations: str | None, images: str | None, params: Mapping[str, Any]
) -> TransformList:
    """Return what a data set of the user's own has as the transforms of its training images.

    Raises:
        RaydetError: there is no data set of this name, or it cannot be made.
    """
    factory = find_dataset(name)
    if not (isinstance(factory, type) and issubclass(factory, DetectionDataset)):
        return TransformList()
    made: DetectionDataset = _make(store, name, "train", annotations, images, params, Problems())
    return made.transforms


def _make(
    store: Store,
    name: str,
    split: str,
    annotations: str | None,
    images: str | None,
    params: Mapping[str, Any] | None,
    problems: Problems,
) -> Any:
    """Call a data set's class or function with those arguments that it takes; it must take those of the recipe."""
    factory = find_dataset(name)
    offered: dict[str, Any] = {"root": store.root, "data_dir": store.root, "split": split}
    offered |= {"annotations": annotations, "images": images, "problems": problems}
    taken = {key: value for key, value in offered.items() if accepts(factory, key)}
    return call(factory, f"data.format: {name}", **{**taken, **(params or {})})


def _select(index: Index, class_inclusion_list: Sequence[str] | None, ignore_empty_annotations: bool) -> Index:
    if class_inclusion_list is not None:
        index = index.with_classes(class_inclusion_list)
    return index.without_empty() if ignore_empty_annotations else index


Objects = tuple[Any, Any, Any]  # boxes [n, 4] xyxy in pixels, labels [n], crowd [n]


class Described(NamedTuple):
    """An image, and how to learn what is on it."""

    name: str  # for messages
    path: str  # from the root, or absolute
    size: tuple[int, int] | None  # width and height in pixels; None: read from the image
    objects: Callable[[int, int], Objects]  # called with its width and height


def index_of_records(
    records: Iterable[Mapping[str, Any]], class_names: Sequence[str], root: str | Path, problems: Problems | None = None
) -> Index:
    """Build an index from records, one an image, in any order; image ids number them by path, from 0.

    A record is a mapping with

    - `path` of the image, from the root or absolute;
    - `boxes` [n, 4] xyxy in pixels of the image;
    - `labels` [n], numbers or names of classes;
    - `crowd` [n], true for what is a crowd (without it, nothing is);
    - `width` and `height` of the image in pixels (without them, they are read from it).

    A problem is a record without path, boxes or labels, of which these do not match, or with an image that is missing,
    no image or, by `..`, outside the root: the image is left out. So is an object of an unknown class, or with a box
    that is not finite or whose corners are swapped.

    Args:
        records: the images.
        class_names: name of each label.
        root: folder that the paths start from, a local path or a URI.
        problems: gets what is wrong with records; None: the first problem stops.

    Raises:
        RaydetError: all boxes look like shares of their images; or see `problems`. The message names the record and
            the image.
    """
    problems = problems or Problems()
    return index_of_described(_described(records, problems), class_names, root, problems)


def index_of_described(
    described: Iterable[Described], class_names: Sequence[str], root: str | Path, problems: Problems
) -> Index:
    """Do the same for images of which the size must be known to say what is on them."""
    store = Store(root)
    listed = []
    for image in described:
        try:
            listed.append(image._replace(path=_from_root(image.path, root, store)))
        except ValueError as error:
            problems.add(f"{image.name}: {error}")
    listed.sort(key=lambda image: image.path)
    lengths = present(store, [image.path for image in listed])
    unsized = [image.path for image in listed if image.path in lengths and image.size is None]
    sizes = image_sizes(store, unsized, lengths, problems)

    label_of = {each: label for label, name in enumerate(class_names) for each in (label, name)}
    kept: list[tuple[int, str, int, int]] = []
    objects = []
    for image in listed:
        size = image.size or sizes.get(image.path)
        name = f"{image.name}, {store.path(image.path)}"
        if image.path not in lengths:
            problems.add(f"{name}: there is no such image")
        elif size is not None:
            try:
                objects.append(_usable(image.objects(*size), label_of, name, problems))
                kept.append((len(kept), image.path, *size))
            except (TypeError, ValueError) as error:
                problems.add(f"{name}: {error}")
    refuse_shares(np.concatenate([np.empty((0, 4)), *(boxes for boxes, *_ in objects)]), str(root))
    return index_of_images(kept, objects, root=store.root, class_names=class_names)


def _described(records: Iterable[Mapping[str, Any]], problems: Problems) -> Iterable[Described]:
    for number, record in enumerate(records):
        name = f"record {number}"
        missing = [key for key in ("path", "boxes", "labels") if key not in record]
        width, height = record.get("width"), record.get("height")
        size = None if width is None or height is None else (width, height)
        if missing:
            problems.add(f"{name} has no {missing[0]}: {str(record)[:120]}")
        elif size is not None and not all(isinstance(side, int) and side > 0 for side in size):
            problems.add(f"{name} ({record['path']}) has no valid width and height: {size}")
        else:
            yield Described(name, str(record["path"]), size, partial(_objects_of, record))


def _objects_of(record: Mapping[str, Any], *_: int) -> Objects:
    return record["boxes"], record["labels"], record.get("crowd", np.zeros(len(record["labels"])))


def _from_root(path: str, root: str | Path, store: Store) -> str:
    """Return a path as one from the root on, or an absolute one that is not below it."""
    for start in (f"{root}/", f"{store.root}/"):
        path = path.removeprefix(start)
    check_encoding(path)
    return path if os.path.isabs(path) else inside(path)


def _usable(objects: Objects, label_of: Mapping[Any, int], name: str, problems: Problems) -> tuple[Array, Array, Array]:
    """Return the objects without those that cannot be used."""
    boxes = np.asarray(objects[0], np.float64).reshape(-1, 4)
    labels = np.array([label_of.get(each, -1) for each in objects[1]], np.int64)
    crowd = np.asarray(objects[2], bool)
    if not len(boxes) == len(labels) == len(crowd):
        raise ValueError(f"it has {len(boxes)} boxes, {len(labels)} labels and {len(crowd)} of crowd")
    valid = np.isfinite(boxes).all(1) & (boxes[:, 2:] >= boxes[:, :2]).all(1)
    for row in np.flatnonzero(~valid):
        problems.add(f"{name}: object {row}: box {boxes[row].tolist()} is not finite, or its corners are swapped")
    for row in np.flatnonzero(valid & (labels < 0)):
        problems.add(f"{name}: object {row}: there is no class {objects[1][row]}")
    keep = valid & (labels >= 0)
    return boxes[keep], labels[keep], crowd[keep]


class TargetFormat(str, Enum):
    """What the five columns of a target [n, 5] are, under SuperGradients' names.

    Boxes are in pixels or, NORMALIZED, in shares of the image's width and height.
    """

    XYXY_LABEL = "XYXY_LABEL"
    XYWH_LABEL = "XYWH_LABEL"
    CXCYWH_LABEL = "CXCYWH_LABEL"
    LABEL_XYXY = "LABEL_XYXY"
    LABEL_XYWH = "LABEL_XYWH"
    LABEL_CXCYWH = "LABEL_CXCYWH"
    NORMALIZED_XYXY_LABEL = "NORMALIZED_XYXY_LABEL"
    NORMALIZED_XYWH_LABEL = "NORMALIZED_XYWH_LABEL"
    NORMALIZED_CXCYWH_LABEL = "NORMALIZED_CXCYWH_LABEL"
    LABEL_NORMALIZED_XYXY = "LABEL_NORMALIZED_XYXY"
    LABEL_NORMALIZED_XYWH = "LABEL_NORMALIZED_XYWH"
    LABEL_NORMALIZED_CXCYWH = "LABEL_NORMALIZED_CXCYWH"

    def to_xyxy(self, target: Array, width: float, height: float) -> tuple[Array, Array]:
        """Split a target [n, 5] of an image of the given size into boxes [n, 4] xyxy in pixels and labels [n].

        Raises:
            ValueError: it is of another shape, or a label is no number.
        """
        target = np.asarray(target, np.float64)
        if target.size and (target.ndim != 2 or target.shape[1] != 5):
            raise ValueError(f"a target is of shape {list(target.shape)}, not [n, 5]")
        target = target.reshape(-1, 5)
        boxes, labels = (target[:, 1:], target[:, 0]) if self._label_first else (target[:, :4], target[:, 4])
        if not np.isfinite(labels).all():
            raise ValueError("a label of a target is not finite")
        return _BOX[self._box][0](boxes * self._scale(width, height)), labels.astype(np.int64)

    def from_xyxy(self, boxes: Array, labels: Array, width: float, height: float) -> Array:
        """Join boxes [n, 4] xyxy in pixels and labels [n] to a target [n, 5]: the inverse of `to_xyxy`."""
        boxes = _BOX[self._box][1](np.asarray(boxes, np.float64).reshape(-1, 4)) / self._scale(width, height)
        column = np.asarray(labels, np.float64).reshape(-1, 1)
        return np.concatenate((column, boxes) if self._label_first else (boxes, column), axis=1)

    @property
    def is_normalized(self) -> bool:
        """Are boxes in shares of the image's size, not in pixels?"""
        return "NORMALIZED" in self.value

    @property
    def _label_first(self) -> bool:
        return self.value.startswith("LABEL")

    @property
    def _box(self) -> str:
        return next(part for part in self.value.split("_") if part in _BOX)

    def _scale(self, width: float, height: float) -> Array:
        return np.array([width, height] * 2 if self.is_normalized else [1.0] * 4)


# Each to xyxy, and from it.
_BOX: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "XYXY": (np.copy, np.copy),
    "XYWH": (xywh_to_xyxy, xyxy_to_xywh),
    "CXCYWH": (cxcywh_to_xyxy, xyxy_to_cxcywh),
}
