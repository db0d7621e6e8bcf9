"""COCO's annotation format (instances_*.json) → index. Our own reader: no pycocotools at run time."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from raydet.boxes import xywh_to_xyxy
from raydet.data.index import Index, make_index
from raydet.errors import RaydetError


def load_coco(annotations: str | Path, images: str | Path) -> Index:
    """Read a COCO annotation file.

    Labels number the file's categories in the order of their ids. Crowds are kept as such, images without objects are
    kept, and boxes stay as annotated.

    Args:
        annotations: path of the JSON file.
        images: folder that its `file_name`s start from.

    Raises:
        RaydetError: the file or folder is missing, is not COCO, or holds a record that makes no sense; the message
            names the file and the record.
    """
    annotations, images = Path(annotations), Path(images)
    if not images.is_dir():
        raise RaydetError(f"{images}: no such folder of images")
    content = _read(annotations)

    for category in content["categories"]:
        if not isinstance(category["id"], int) or category["id"] < 0:
            raise RaydetError(f"{annotations}: category id {category['id']!r} is not a whole number of 0 or more")
    categories = sorted(content["categories"], key=lambda c: c["id"])
    category_ids = [c["id"] for c in categories]
    class_names = [str(c["name"]) for c in categories]
    _refuse_duplicates(category_ids, f"{annotations}: category id")
    _refuse_duplicates(class_names, f"{annotations}: category name")
    label_of = {category_id: label for label, category_id in enumerate(category_ids)}

    records = [_image(image, annotations) for image in content["images"]]
    _refuse_duplicates([image_id for image_id, *_ in records], f"{annotations}: image id")
    position_of = {image_id: position for position, (image_id, *_) in enumerate(records)}
    _require_files([path for _, path, *_ in records], images, annotations)

    boxes = np.empty((len(content["annotations"]), 4))
    labels, crowd, area, image_of_box = [], [], [], []
    for row, record in enumerate(content["annotations"]):
        if not isinstance(record, dict):
            raise RaydetError(f"{annotations}: an annotation is no object: {str(record)[:120]}")
        for key, known in (("category_id", label_of), ("image_id", position_of)):
            if not isinstance(record.get(key), int) or record[key] not in known:
                what = "categories" if key == "category_id" else "images"
                raise RaydetError(f"{_name(record, annotations)}: {key} {record.get(key)} is not in the file's {what}")
        try:
            x, y, width, height = record["bbox"]
            boxes[row] = x, y, width, height
            area.append(float(record.get("area", boxes[row, 2] * boxes[row, 3])))
        except (KeyError, TypeError, ValueError):
            raise RaydetError(f"{_name(record, annotations)}: bbox or area is missing or not of numbers") from None
        labels.append(label_of[record["category_id"]])
        image_of_box.append(position_of[record["image_id"]])
        crowd.append(record.get("iscrowd", 0) in (1, True, "1"))
    bad = np.flatnonzero(~np.isfinite(boxes).all(1) | (boxes[:, 2:] < 0).any(1))
    if len(bad):
        record = content["annotations"][bad[0]]
        raise RaydetError(
            f"{_name(record, annotations)}: bbox {record['bbox']} has a negative or infinite side "
            f"({len(bad)} such annotations); correct or remove them"
        )
    return make_index(
        records,
        xywh_to_xyxy(boxes),
        np.array(labels),
        np.array(crowd),
        np.array(area),
        np.array(image_of_box),
        root=str(images.resolve()),
        class_names=class_names,
        category_ids=category_ids,
    )


def _read(path: Path) -> Any:
    if not path.is_file():
        raise RaydetError(f"{path}: no such annotation file")
    try:
        content: Any = json.loads(path.read_bytes())
    except ValueError as error:
        raise RaydetError(f"{path} is not JSON: {error}") from None
    for key, fields in (("images", ("id", "file_name", "width", "height")), ("categories", ("id", "name"))):
        if not isinstance(content, dict) or not isinstance(content.get(key), list) or not content[key]:
            raise RaydetError(f"{path} is not a COCO annotation file: it has no list '{key}', or an empty one")
        for record in content[key]:
            missing = [field for field in fields if field not in record] if isinstance(record, dict) else list(fields)
            if missing:
                raise RaydetError(f"{path}: a record of '{key}' has no '{missing[0]}': {str(record)[:120]}")
    if not isinstance(content.get("annotations"), list):
        raise RaydetError(f"{path} is not a COCO annotation file: it has no list 'annotations'")
    return content


def _image(record: dict[str, Any], source: Path) -> tuple[int, str, int, int]:
    name, image_id = str(record["file_name"]), record["id"]
    if not isinstance(image_id, int):
        raise RaydetError(f"{source}: image id {image_id!r} of {name} is not a whole number")
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise RaydetError(f"{source}: file name {name!r} (image id {image_id}) leaves the folder of images")
    try:
        width, height = int(record["width"]), int(record["height"])
    except (TypeError, ValueError):
        width = height = 0
    if width <= 0 or height <= 0:
        raise RaydetError(f"{source}: image {name} (id {image_id}) has no valid width and height")
    return image_id, str(path), width, height


def _require_files(paths: list[str], folder: Path, source: Path) -> None:
    listing = {parent: _names(folder / parent) for parent in {os.path.dirname(path) for path in paths}}
    missing = [path for path in paths if os.path.basename(path) not in listing[os.path.dirname(path)]]
    if missing:
        raise RaydetError(
            f"{folder}: {len(missing)} of the {len(paths)} images that {source.name} lists are not there, "
            f"the first is {missing[0]}"
        )


def _names(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.is_dir() else set()


def _refuse_duplicates(ids: list[Any], what: str) -> None:
    twice = [value for value, count in Counter(ids).items() if count > 1]
    if twice:
        raise RaydetError(f"{what} {twice[0]} occurs more than once")


def _name(record: dict[str, Any], source: Path) -> str:
    return f"{source}: annotation {record.get('id', '(without id)')} of image {record.get('image_id', '(unknown)')}"
