"""Data sets of the user's own → index: classes with SuperGradients' two hooks, functions, and their registry."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np

from raydet.data.coco import load_coco
from raydet.data.index import Array, Index
from raydet.data.problems import Problems
from raydet.data.records import Described, Objects, index_of_described, index_of_records
from raydet.data.store import Store, is_uri
from raydet.data.target_format import TargetFormat
from raydet.errors import RaydetError, did_you_mean
from raydet.plugins import accepts, call, is_own, locate

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

    A subclass sets what the hooks need and calls this constructor last: it calls `_setup_data_source`. Transforms
    are not the data set's: the recipe has them.

    Args:
        data_dir: folder of the data set, a local path or a URI.
        original_target_format: of the targets that `_load_annotation` returns, or its name.
        all_classes_list: name of each label; None: the property `_all_classes` says.
        input_dim: (rows, columns), or one number for both, to which `_load_annotation` scales its boxes, if it does.
        max_num_samples: the first so many of the source; None: all.
        class_inclusion_list: classes to keep, numbered in this order; None: all.
        ignore_empty_annotations: leave out images without objects.
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
    ):
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
        subdir: folder of the images in it.
        json_file: file of its folder `annotations`.
        max_num_samples: the first so many; None: all.
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
        name: of the data set; None: that of the class or function.
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
) -> Index:
    """Read a data set of the user's own.

    Args:
        store: data.root.
        name: data.format.
        split: "train" or "val".
        annotations: what the recipe says for this split.
        images: likewise.
        problems: gets what is wrong with samples; None: the first problem stops.

    Raises:
        RaydetError: there is none of this name, or it gives no index; or see `DetectionDataset.index`.
    """
    factory, problems = find_dataset(name), problems or Problems()
    offered: dict[str, Any] = {"root": store.root, "data_dir": store.root, "split": split}
    offered |= {"annotations": annotations, "images": images, "problems": problems}
    taken = {key: value for key, value in offered.items() if accepts(factory, key)}
    made = call(factory, f"data.format: {name}", **taken)
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


def _select(index: Index, class_inclusion_list: Sequence[str] | None, ignore_empty_annotations: bool) -> Index:
    if class_inclusion_list is not None:
        index = index.with_classes(class_inclusion_list)
    return index.without_empty() if ignore_empty_annotations else index
