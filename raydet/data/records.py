"""Records of a user's own, one an image → index."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from raydet.data.index import Array, Index, index_of_images
from raydet.data.problems import Problems, refuse_shares
from raydet.data.scan import image_sizes, present
from raydet.data.store import Store, check_encoding, inside

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
            yield Described(name, str(record["path"]), size, partial(_objects, record))


def _objects(record: Mapping[str, Any], *_: int) -> Objects:
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
