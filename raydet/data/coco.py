"""COCO's annotation format (instances_*.json) → index. Our own reader: no pycocotools at run time."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from raydet.boxes import xywh_to_xyxy
from raydet.data.index import Index, make_index
from raydet.data.problems import Problems
from raydet.data.scan import present
from raydet.data.store import Store, inside
from raydet.errors import RaydetError

# Polygons are most of a file and of the time to parse it, and nothing here uses them. What looks like their key is it:
# within a JSON string the quotes would be escaped.
_POLYGONS = re.compile(rb'"segmentation"\s*:\s*\[[^"{}]*\]')

_OBJECT = np.dtype([("bbox", "f8", 4), ("label", "i4"), ("crowd", "?"), ("area", "f8"), ("image", "i8")])

_LEFT_OUT = -1


def load_coco(
    annotations: str | Path, images: str | Path, problems: Problems | None = None, store: Store | None = None
) -> Index:
    """Read a COCO annotation file.

    Labels number the file's categories in the order of their ids. Crowds are kept as such (without `iscrowd`, an object
    is none), images without objects are kept, and boxes stay as annotated, also where they have no area or lie outside
    their image: COCO's metric counts those, and training drops them.

    A problem is an image whose id is no whole number or occurs before, whose file name leaves the folder, which has no
    valid size, or whose file is missing: it is left out, and its annotations with it. So is an annotation of an unknown
    category or of an image that is not listed, without numbers for a bbox, with one that is not finite or has a
    negative side, or whose id occurs before.

    Args:
        annotations: path of the JSON file.
        images: folder that its `file_name`s start from.
        problems: gets what is wrong with images and annotations; None: the first problem stops.
        store: what the paths start from; None: they are local.

    Raises:
        RaydetError: the file or folder is missing, is not COCO, or its categories make no sense; or see `problems`. The
            message names the file and the record.
    """
    problems, store = problems or Problems(), store or Store(".")
    folder, source = store.below(str(images)), store.path(str(annotations))
    if folder.kind() != "folder":
        raise RaydetError(f"{folder.root}: no such folder of images")
    if store.kind(str(annotations)) != "file":
        raise RaydetError(f"{source}: no such annotation file")
    content = _parse(store.read(str(annotations)), source)

    name_of = _categories(content["categories"], source)
    label_of = {category_id: label for label, category_id in enumerate(name_of)}
    kept, position_of = _images(content["images"], folder, source, problems)
    objects = np.fromiter(_objects(content["annotations"], label_of, position_of, source, problems), _OBJECT)
    return make_index(
        kept,
        xywh_to_xyxy(objects["bbox"]),
        objects["label"],
        objects["crowd"],
        objects["area"],
        objects["image"],
        root=folder.root,
        class_names=list(name_of.values()),
        category_ids=list(name_of),
    )


def _parse(content: bytes, source: str) -> Any:
    try:
        parsed = json.loads(_POLYGONS.sub(b'"segmentation":0', content))
    except ValueError as error:
        raise RaydetError(f"{source} is not JSON: {error}") from None
    for key in ("images", "categories", "annotations"):
        if not isinstance(parsed, dict) or not isinstance(parsed.get(key), list):
            raise RaydetError(f"{source} is not a COCO annotation file: it has no list '{key}'")
    for key in ("images", "categories"):
        if not parsed[key]:
            raise RaydetError(f"{source}: the list '{key}' is empty")
    return parsed


def _categories(records: list[Any], source: str) -> dict[int, str]:
    """Return category id → name, in the order of the ids."""
    for record in records:
        if not isinstance(record, dict) or not {"id", "name"} <= record.keys():
            raise RaydetError(f"{source}: a category has no 'id' or no 'name': {str(record)[:120]}")
        if not isinstance(record["id"], int) or record["id"] < 0:
            raise RaydetError(f"{source}: category id {record['id']!r} is not a whole number of 0 or more")
    for key in ("id", "name"):
        value, count = Counter(str(record[key]) for record in records).most_common(1)[0]
        if count > 1:
            raise RaydetError(f"{source}: category {key} {value} occurs more than once")
    return {record["id"]: str(record["name"]) for record in sorted(records, key=lambda record: record["id"])}


def _images(
    records: list[Any], folder: Store, source: str, problems: Problems
) -> tuple[list[tuple[int, str, int, int]], dict[int | str, int]]:
    """Return the images to keep, and the position of each listed id among them, `_LEFT_OUT` if it is not."""
    images = {}
    broken = []
    for record in records:
        try:
            image = _image(record)
            if image[0] in images:
                raise ValueError("its id occurs more than once")
            images[image[0]] = image
        except ValueError as error:
            problems.add(f"{source}: image {_get(record, 'file_name')} (id {_get(record, 'id')}): {error}")
            broken += [image_id] if isinstance(image_id := _get(record, "id"), int | str) else []
    there = present(folder, [path for _, path, *_ in images.values()])
    missing = [image for image in images.values() if image[1] not in there]
    for image_id, path, *_ in missing:
        problems.add(
            f"{source}: image {path} (id {image_id}): it is not in {folder.root} "
            f"({len(missing)} of {len(images)} are not)"
        )
    kept = [image for image in images.values() if image[1] in there]
    left_out = dict.fromkeys([*broken, *(image_id for image_id, *_ in missing)], _LEFT_OUT)
    return kept, left_out | {image_id: position for position, (image_id, *_) in enumerate(kept)}


def _image(record: Any) -> tuple[int, str, int, int]:
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
    return image_id, inside(str(record["file_name"])), width, height


def _objects(
    records: list[Any],
    label_of: Mapping[int, int],
    position_of: Mapping[int | str, int],
    source: str,
    problems: Problems,
) -> Iterator[tuple[Any, ...]]:
    """Yield the fields of `_OBJECT` of each annotation to keep."""
    seen = set()
    for record in records:
        try:
            values = _object(record, label_of, position_of)
            if record.get("id") in seen:
                raise ValueError("its id occurs more than once")
        except (TypeError, ValueError) as error:  # the former: an id that is a list
            problems.add(f"{source}: annotation {_get(record, 'id')} of image {_get(record, 'image_id')}: {error}")
            continue
        if record.get("id") is not None:
            seen.add(record["id"])
        if values[-1] != _LEFT_OUT:
            yield values


def _object(record: Any, label_of: Mapping[int, int], position_of: Mapping[int | str, int]) -> tuple[Any, ...]:
    _require(record, "image_id", "category_id", "bbox")
    image_id, category_id = record["image_id"], record["category_id"]
    if not isinstance(image_id, int | str) or image_id not in position_of:
        raise ValueError(f"image_id {image_id!r} is not in the file's images")
    position = position_of[image_id]
    if position == _LEFT_OUT:
        return (position,)
    if not isinstance(category_id, int) or category_id not in label_of:
        raise ValueError(f"category_id {category_id!r} is not in the file's categories")
    try:
        x, y, width, height = record["bbox"]
        area = record.get("area", width * height)
        finite = math.isfinite(x + y + width + height + area)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"bbox {record['bbox']} or area {record.get('area')} is not of numbers") from None
    if not finite or width < 0 or height < 0:
        raise ValueError(f"bbox {record['bbox']} or area {area} is not finite, or has a negative side")
    return (x, y, width, height), label_of[category_id], record.get("iscrowd", 0) in (1, "1"), area, position


def _require(record: Any, *keys: str) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"it is no object: {str(record)[:120]}")
    for key in keys:
        if key not in record:
            raise ValueError(f"it has no {key}")


def _get(record: Any, key: str) -> Any:
    return record.get(key, "?") if isinstance(record, dict) else "?"
