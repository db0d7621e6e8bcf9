"""COCO's annotation format (instances_*.json) → index. Our own reader: no pycocotools at run time."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from raydet.data.index import Array, Index, make_index
from raydet.data.json_lists import read_lists
from raydet.data.problems import Problems, refuse_shares
from raydet.data.scan import counted, present
from raydet.errors import RaydetError
from raydet.store import Store, inside

# Polygons are most of a file and of the time to parse it, and nothing here uses them. What looks like their key is it:
# within a JSON string the quotes would be escaped. What follows shows that one is whole.
_POLYGONS = re.compile(r'"segmentation"\s*:\s*\[[^"{}]*\](?=\s*(?:,\s*"|\}))')
_LISTS = ("images", "categories", "annotations")
_PIECE = 16 * 2**20  # bytes that are read at a time
_BLOCK = 2**16  # annotations that become arrays at a time

# An annotation. Ids of images and categories are numbered as they are met.
_OBJECT = np.dtype(
    [("bbox", "f8", 4), ("area", "f8"), ("id", "i8"), ("image", "i4"), ("category", "i4"), ("crowd", "?")]
)
_UNUSABLE, _NO_ID = -1, -(2**63)  # values of image; of id

_UNKNOWN, _LEFT_OUT = -2, -1  # values of an image's position, or of a category's label


def load_coco(
    annotations: str | Path,
    images: str | Path,
    problems: Problems | None = None,
    store: Store | None = None,
    images_key: str = "data.train_images",
) -> Index:
    """Read a COCO annotation file.

    Labels number the file's categories in the order of their ids. Crowds are kept as such (without `iscrowd`, an object
    is none), images without objects are kept, and boxes stay as annotated, also where they have no area or lie outside
    their image: COCO's metric counts those, and training drops them.

    A problem is an image whose id is no whole number or occurs before, whose file name leaves the folder, which has no
    valid size, or whose file is missing: it is left out, and its annotations with it. So is an annotation of an unknown
    category or of an image that is not listed, without numbers for a bbox, with one that is not finite or has a
    negative side, with a negative area, or whose id occurs before.

    The file is read in pieces: an annotation takes about 200 bytes of memory, its share of the images included.

    Args:
        annotations: path of the JSON file.
        images: folder that its `file_name`s start from.
        problems: gets what is wrong with images and annotations; None: the first problem stops.
        store: what the paths start from; None: they are local.
        images_key: name of the setting that `images` is from, for messages.

    Raises:
        RaydetError: the file or folder is missing, is not COCO, its categories make no sense, or its boxes are shares
            of the images; or see `problems`. The message names the file and the record.
    """
    problems, store = problems or Problems(), store or Store(".")
    folder, source = store.below(str(images)), store.path(str(annotations))
    if folder.kind() != "folder":
        raise RaydetError(f"{folder.root}: no such folder of images")
    if store.kind(str(annotations)) != "file":
        raise RaydetError(f"{source}: no such annotation file")
    pictures, categories, objects = _Images(folder, source), [], _Objects(source)
    found = set()
    try:
        for name, records in read_lists(_pieces(store, str(annotations)), _LISTS, _POLYGONS, '"segmentation":0'):
            found.add(name)
            if name == "categories":
                categories = list(records)
            else:
                (pictures if name == "images" else objects).take(records)
    except (ValueError, RecursionError) as error:
        raise RaydetError(f"{source} is not JSON: {error}") from None
    for name in _LISTS:
        if name not in found:
            raise RaydetError(f"{source} is not a COCO annotation file: it has no list '{name}'")
    if not pictures.count or not categories:
        raise RaydetError(f"{source}: the list '{'categories' if pictures.count else 'images'}' is empty")

    name_of = _categories(categories, objects.categories, source, problems)

    def remedy(path: str) -> str:
        """Say what helps if the paths of the images start from another folder."""
        for start in ("", os.path.dirname(str(images).rstrip("/")), os.path.dirname(str(annotations))):
            if store.kind(os.path.join(start, path)):
                return f"; the names start from another folder: pass {images_key}={start or '.'}"
        return ""

    kept, position_of = pictures.sift(problems, remedy)
    boxes, labels, crowd, area, image = objects.sift(list(name_of), position_of, problems)
    refuse_shares(boxes, source)
    return make_index(
        kept,
        boxes,
        labels,
        crowd,
        area,
        image,
        root=folder.root,
        class_names=list(name_of.values()),
        category_ids=list(name_of),
    )


def _pieces(store: Store, name: str) -> Iterator[bytes]:
    """Yield a file in pieces."""
    size, _ = store.files(os.path.dirname(name), hidden=True)[os.path.basename(name)]
    for start in range(0, max(size, 1), _PIECE):
        yield store.read(name, start, min(_PIECE, size - start))


def _categories(records: list[Any], used: Container[int], source: str, problems: Problems) -> dict[int, str]:
    """Return category id → name, in the order of the ids.

    Exports of Roboflow have the project's name as a first category, which others have above them and nothing is of.
    """
    for record in records:
        if not isinstance(record, dict) or not {"id", "name"} <= record.keys():
            raise RaydetError(f"{source}: a category has no 'id' or no 'name': {str(record)[:120]}")
        if not isinstance(record["id"], int) or record["id"] < 0:
            raise RaydetError(f"{source}: category id {record['id']!r} is not a whole number of 0 or more")
    nothing = (None, "", "none")
    roots = [
        record
        for record in records
        if record.get("supercategory") in nothing
        and record["name"] not in nothing
        and record["id"] not in used
        and any(other is not record and other.get("supercategory") == record["name"] for other in records)
    ]
    problems.notice(
        f"left out: {counted(roots, 'category', 'categories')} that only others have above them",
        [str(root["name"]) for root in roots],
        "nothing is of it; exports of Roboflow have such a one",
    )
    records = [record for record in records if record not in roots]
    for key in ("id", "name"):
        value, count = Counter(str(record[key]) for record in records).most_common(1)[0]
        if count > 1:
            raise RaydetError(f"{source}: category {key} {value} occurs more than once")
    return {record["id"]: str(record["name"]) for record in sorted(records, key=lambda record: record["id"])}


class _Images:
    """The images of a file."""

    def __init__(self, folder: Store, source: str):
        self.count = 0
        self._folder, self._source = folder, source
        self._images: dict[int, tuple[int, str, int, int]] = {}
        self._broken: list[int | str] = []  # ids
        self._faults: list[str] = []

    def take(self, records: Iterable[Any]) -> None:
        """Add images."""
        for record in records:
            self.count += 1
            try:
                image = self._image(record)
                if image[0] in self._images:
                    raise ValueError("its id occurs more than once")
                self._images[image[0]] = image
            except ValueError as error:
                image_id = _get(record, "id")
                self._faults.append(f"{self._source}: image {_get(record, 'file_name')} (id {image_id}): {error}")
                self._broken += [image_id] if isinstance(image_id, int | str) else []

    def _image(self, record: Any) -> tuple[int, str, int, int]:
        """Return id, path, width and height."""
        _require(record, "id", "file_name", "width", "height")
        image_id = record["id"]
        if not isinstance(image_id, int) or image_id.bit_length() > 63:
            raise ValueError(f"id {image_id!r} is not a whole number")
        try:
            width, height = int(record["width"]), int(record["height"])
        except (TypeError, ValueError, OverflowError):
            width = height = 0
        if not 0 < width < 2**31 or not 0 < height < 2**31:
            raise ValueError("it has no valid width and height")
        return image_id, inside(str(record["file_name"]).removeprefix(f"{self._folder.root}/")), width, height

    def sift(
        self, problems: Problems, remedy: Callable[[str], str]
    ) -> tuple[list[tuple[int, str, int, int]], dict[int | str, int]]:
        """Return the images to keep, and the position of each listed id among them, `_LEFT_OUT` if it is not."""
        for fault in self._faults:
            problems.add(fault)
        there = present(self._folder, [path for _, path, *_ in self._images.values()])
        missing = [image for image in self._images.values() if image[1] not in there]
        hint = remedy(missing[0][1]) if missing else ""
        for image_id, path, *_ in missing:
            problems.add(
                f"{self._source}: image {path} (id {image_id}): it is not in {self._folder.root} "
                f"({len(missing)} of {len(self._images)} are not{hint})"
            )
        kept = [image for image in self._images.values() if image[1] in there]
        left_out = dict.fromkeys([*self._broken, *(image_id for image_id, *_ in missing)], _LEFT_OUT)
        return kept, left_out | {image_id: position for position, (image_id, *_) in enumerate(kept)}


class _Objects:
    """The annotations of a file, as arrays.

    Attributes:
        categories: id of a category → its number.
    """

    def __init__(self, source: str):
        self.categories: dict[int, int] = {}
        self._source = source
        self._images: dict[int | str, int] = {}  # id of an image → its number
        self._columns: dict[str, list[Array]] = {name: [] for name in _OBJECT.fields or ()}
        self._count = 0
        self._faults: dict[int, str] = {}  # row → message
        self._odd_ids: dict[int, Any] = {}  # row → an id that is no number

    def take(self, records: Iterable[Any]) -> None:
        """Add annotations."""
        rows = map(self._row, records)
        while len(block := np.fromiter(islice(rows, _BLOCK), _OBJECT)):
            for name, column in self._columns.items():
                column.append(block[name].copy())

    def _row(self, record: Any) -> tuple[Any, ...]:
        """Return the fields of `_OBJECT`; of an annotation that cannot be used `_faults` has the reason."""
        number = self._count
        self._count += 1
        image = category = _UNUSABLE
        try:
            _require(record, "image_id", "category_id", "bbox")
            image_id, category_id, own = record["image_id"], record["category_id"], record.get("id")
            if not isinstance(image_id, (int, str)):  # twice as fast as int | str
                raise ValueError(f"image_id {image_id!r} is not in the file's images")
            image = self._images.setdefault(image_id, len(self._images))
            if not isinstance(category_id, int):
                raise ValueError(f"category_id {category_id!r} is not in the file's categories")
            category = self.categories.setdefault(category_id, len(self.categories))
            bbox, area = _bbox(record)
            if not isinstance(own, int) or own.bit_length() > 63:
                if own is not None:
                    hash(own)
                    self._odd_ids[number] = own
                own = _NO_ID
            return bbox, area, own, image, category, record.get("iscrowd", 0) in (1, "1")
        except (TypeError, ValueError) as error:  # the former: an id that is a list
            own, of = _get(record, "id"), _get(record, "image_id")
            self._faults[number] = f"{self._source}: annotation {own} of image {of}: {error}"
            return (0, 0, 0, 0), 0, _NO_ID, image, category, False

    def sift(
        self, category_ids: Sequence[int], position_of: Mapping[int | str, int], problems: Problems
    ) -> tuple[Array, Array, Array, Array, Array]:
        """Return boxes xyxy, labels, crowd, area, and positions of the images, of the annotations to keep.

        Args:
            category_ids: id of each label.
            position_of: id of an image → its position, or `_LEFT_OUT`.
            problems: gets what is wrong with the others, but for those of images that are left out.
        """
        label_of = {category_id: label for label, category_id in enumerate(category_ids)}
        # `_UNUSABLE` is the last.
        labels = np.array([*(label_of.get(each, _UNKNOWN) for each in self.categories), _UNKNOWN], np.int32)
        positions = np.array([*(position_of.get(each, _UNKNOWN) for each in self._images), _UNKNOWN], np.int32)
        own, images, categories = self._column("id"), self._column("image"), self._column("category")
        position, label = positions[images], labels[categories]
        good = (position >= 0) & (label >= 0)
        good[list(self._faults)] = False
        repeated = self._repeated(own, good | (position == _LEFT_OUT))
        bad = np.flatnonzero((position != _LEFT_OUT) & ~good | repeated)
        image_ids, all_categories = (list(self._images), list(self.categories)) if len(bad) else ([], [])
        for row in bad.tolist():
            if position[row] == _UNKNOWN and images[row] != _UNUSABLE:
                fault = f"image_id {image_ids[images[row]]!r} is not in the file's images"
            elif label[row] == _UNKNOWN and categories[row] != _UNUSABLE:
                fault = f"category_id {all_categories[categories[row]]!r} is not in the file's categories"
            elif row in self._faults:
                problems.add(self._faults[row])
                continue
            else:
                fault = "its id occurs more than once"
            shown = self._odd_ids.get(row, "?") if own[row] == _NO_ID else own[row]
            problems.add(f"{self._source}: annotation {shown} of image {image_ids[images[row]]}: {fault}")
        del own, images, categories
        good &= ~repeated
        boxes, crowd, area = self._column("bbox"), self._column("crowd"), self._column("area")
        if not good.all():
            boxes, label, crowd, area, position = (column[good] for column in (boxes, label, crowd, area, position))
        boxes[:, 2:] += boxes[:, :2]
        return boxes, label, crowd, area, position

    def _column(self, name: str) -> Array:
        """Return a column, and let go of its parts one by one."""
        kind = _OBJECT[name]
        column, place = np.empty((self._count, *kind.shape), kind.base), 0
        parts = self._columns.pop(name)[::-1]
        while parts:
            part = parts.pop()
            column[place : place + len(part)] = part
            place += len(part)
        return column

    def _repeated(self, own: Array, known: Array) -> Array:
        """Find the rows with an id that occurs before, among those that are known."""
        repeated = np.zeros(len(own), bool)
        rows = np.flatnonzero(known & (own != _NO_ID))
        ids = own[rows]
        if not (ids[1:] > ids[:-1]).all():
            order = np.argsort(ids, kind="stable")
            ids = ids[order]
            repeated[rows[order[1:][ids[1:] == ids[:-1]]]] = True
        seen = set()
        for row, value in self._odd_ids.items():
            if known[row]:
                repeated[row] = value in seen
                seen.add(value)
        return repeated


def _bbox(record: dict[str, Any]) -> tuple[tuple[float, float, float, float], float]:
    """Return the box, xywh, and the area."""
    try:
        x, y, width, height = record["bbox"]
        area = record.get("area", width * height)
        finite = math.isfinite(x + y + width + height + area)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"bbox {record['bbox']} or area {record.get('area')} is not of numbers") from None
    if not finite or width < 0 or height < 0:
        raise ValueError(f"bbox {record['bbox']} or area {area} is not finite, or has a negative side")
    if area < 0:
        raise ValueError(f"area {area} is negative: leave its sign out")
    return (x, y, width, height), area


def _require(record: Any, *keys: str) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"it is no object: {str(record)[:120]}")
    for key in keys:
        if key not in record:
            raise ValueError(f"it has no {key}")


def _get(record: Any, key: str) -> Any:
    return record.get(key, "?") if isinstance(record, dict) else "?"
