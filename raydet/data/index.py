"""The index: one Arrow table with a row an image. Every annotation format becomes this, and the stream reads only this.

It is all that a task needs to make any sample, it goes into Ray's shared memory once a node, and it is sorted by
image id, so that a row means the same image on every host.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Array = npt.NDArray[Any]

COLUMNS = pa.schema(
    [
        ("image_id", pa.int64()),
        ("path", pa.string()),  # relative to the root
        ("width", pa.int32()),  # pixels, as the annotations state
        ("height", pa.int32()),
        ("boxes", pa.list_(pa.list_(pa.float64(), 4))),  # xyxy in pixels, as annotated: not clipped, perhaps empty
        ("labels", pa.list_(pa.int32())),  # 0 … number of classes - 1
        ("crowd", pa.list_(pa.uint8())),  # 1: a crowd, never trained on and never a false negative
        ("area", pa.list_(pa.float64())),  # pixels²; COCO's is the segment's, by which it tells small from large
    ]
)


class Annotations(NamedTuple):
    """The objects of one image: boxes [n, 4] xyxy in pixels, labels [n], crowd [n] as bool, area [n] in pixels²."""

    boxes: Array
    labels: Array
    crowd: Array
    area: Array


class Index:
    """Images and their objects.

    Args:
        table: the rows, with the columns of `COLUMNS`.
        root: folder that the paths start from.
        class_names: name of each label.
        category_ids: the annotation file's own id of each label, for results in its terms.
    """

    def __init__(self, table: pa.Table, root: str, class_names: Sequence[str], category_ids: Sequence[int]):
        self.table = table.select(COLUMNS.names).cast(COLUMNS).combine_chunks()
        self.root = root
        self.class_names = tuple(class_names)
        self.category_ids = tuple(category_ids)
        column = {name: self.table[name].chunk(0) for name in COLUMNS.names} if len(table) else {}
        self._offsets = column["labels"].offsets.to_numpy() if column else np.zeros(1, np.int32)
        self._size = [column[name].to_numpy() for name in ("width", "height")] if column else []
        self.image_ids: Array = column["image_id"].to_numpy() if column else np.empty(0, np.int64)
        boxes = column["boxes"].values.values.to_numpy() if column else np.empty(0)
        flat = [column[name].values.to_numpy() for name in ("labels", "crowd", "area")] if column else [np.empty(0)] * 3
        self._flat = (boxes.reshape(-1, 4), *flat)

    def __reduce__(self) -> tuple[Any, ...]:  # the views above are made anew, so that the table alone travels
        return Index, (self.table, self.root, self.class_names, self.category_ids)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def num_boxes(self) -> int:
        """All boxes, crowds included."""
        return len(self._flat[0])

    def path(self, row: int) -> str:
        """Absolute path of an image."""
        return str(Path(self.root) / self.table["path"][row].as_py())

    def size(self, row: int) -> tuple[int, int]:
        """Width and height of an image in pixels."""
        return int(self._size[0][row]), int(self._size[1][row])

    def annotations(self, row: int) -> Annotations:
        """Objects of an image, crowds included."""
        part = slice(self._offsets[row], self._offsets[row + 1])
        boxes, labels, crowd, area = (values[part] for values in self._flat)
        return Annotations(boxes, labels, crowd.astype(bool), area)

    def head(self, count: int) -> Index:
        """Return the first `count` images."""
        # Rebuilt, not sliced: a sliced list column keeps the offsets and the values of the whole.
        table = self.table.slice(0, count).take(np.arange(min(count, len(self))))
        return Index(table, self.root, self.class_names, self.category_ids)


def make_index(
    images: Sequence[tuple[int, str, int, int]],
    boxes: Array,
    labels: Array,
    crowd: Array,
    area: Array,
    image_of_box: Array,
    *,
    root: str,
    class_names: Sequence[str],
    category_ids: Sequence[int],
) -> Index:
    """Build an index from flat arrays.

    Args:
        images: (image id, path below the root, width, height), in any order; ids are unique.
        boxes: [n, 4] xyxy in pixels.
        labels: [n], crowd: [n], area: [n].
        image_of_box: [n], each box's image, as a position in `images`.
        root: folder of the images.
        class_names: name of each label.
        category_ids: the source's id of each label.
    """
    ids = np.array([image[0] for image in images], np.int64)
    order = np.argsort(ids, kind="stable")
    row_of_image = np.empty(len(ids), np.int64)
    row_of_image[order] = np.arange(len(ids))
    row_of_box = row_of_image[image_of_box] if len(image_of_box) else np.empty(0, np.int64)
    by_row = np.argsort(row_of_box, kind="stable")
    offsets = pa.array(np.concatenate(([0], np.cumsum(np.bincount(row_of_box, minlength=len(ids))))), pa.int32())

    def ragged(values: pa.Array) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, values)

    flat = pa.array(np.asarray(boxes, np.float64).reshape(-1, 4)[by_row].reshape(-1))
    table = pa.table(
        {
            "image_id": ids[order],
            "path": [images[i][1] for i in order],
            "width": [images[i][2] for i in order],
            "height": [images[i][3] for i in order],
            "boxes": ragged(pa.FixedSizeListArray.from_arrays(flat, 4)),
            "labels": ragged(pa.array(np.asarray(labels)[by_row], pa.int32())),
            "crowd": ragged(pa.array(np.asarray(crowd)[by_row], pa.uint8())),
            "area": ragged(pa.array(np.asarray(area)[by_row], pa.float64())),
        }
    )
    return Index(table, root, class_names, category_ids)
