"""The index: one Arrow table with a row an image. Every annotation format becomes this, and the stream reads only this.

It is all that a task needs to make any sample, it goes into Ray's shared memory once a node, and it is sorted by
image id, so that a row means the same image on every host.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from raydet.errors import RaydetError, did_you_mean
from raydet.store import parquet, store

Array = npt.NDArray[Any]

COLUMNS = pa.schema(
    [
        ("image_id", pa.int64()),
        ("path", pa.string()),  # relative to the root; of an image in a shard, the path that it had
        ("width", pa.int32()),  # pixels, as the annotations state
        ("height", pa.int32()),
        ("boxes", pa.list_(pa.list_(pa.float64(), 4))),  # xyxy in pixels, as annotated: not clipped, perhaps empty
        ("labels", pa.list_(pa.int32())),  # 0 … number of classes - 1
        ("crowd", pa.list_(pa.uint8())),  # 1: a crowd, never trained on and never a false negative
        ("area", pa.list_(pa.float64())),  # pixels²; COCO's is the segment's, by which it tells small from large
        # Number of the image's shard, and where its bytes are in that file. -1: the image is a file of its own.
        ("shard", pa.int32()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
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
        root: folder that the paths start from, a local path or a URI.
        class_names: name of each label.
        category_ids: the annotation file's own id of each label, for results in its terms.
    """

    def __init__(self, table: pa.Table, root: str, class_names: Sequence[str], category_ids: Sequence[int]):
        self.table = table.select(COLUMNS.names).cast(COLUMNS).combine_chunks()
        self.root = root
        self.class_names = tuple(class_names)
        self.category_ids = tuple(category_ids)
        column = {name: self.table[name].chunk(0) for name in COLUMNS.names} if len(table) else {}
        self.image_ids: Array = column["image_id"].to_numpy() if column else np.empty(0, np.int64)
        self._offsets = column["labels"].offsets.to_numpy() if column else np.zeros(1, np.int32)
        self._size = [column[name].to_numpy() for name in ("width", "height")] if column else []
        places = ("shard", "offset", "length")
        self._place: list[Array] = [column[name].to_numpy() if column else self.image_ids for name in places]
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
        """Full path or address of an image, for messages; one in a shard is named with its shard."""
        name, shard = self.table["path"][row].as_py(), int(self._place[0][row])
        return store(self.root).path(name if shard < 0 else f"{shard_name(shard)}:{name}")

    def read(self, row: int) -> bytes:
        """Read an image's file.

        Raises:
            RaydetError: it is missing or cannot be read.
        """
        shard, offset, length = (int(values[row]) for values in self._place)
        if shard < 0:
            return store(self.root).read(self.table["path"][row].as_py())
        return store(self.root).read(shard_name(shard), offset, length)

    @property
    def shards(self) -> Array:
        """Number of the shard that holds each image, -1 where none does."""
        return self._place[0]

    def size(self, row: int) -> tuple[int, int]:
        """Width and height of an image in pixels."""
        return int(self._size[0][row]), int(self._size[1][row])

    @property
    def pixels(self) -> Array:
        """Number of pixels of each image."""
        return self._size[0].astype(np.int64) * self._size[1] if self._size else np.empty(0, np.int64)

    def annotations(self, row: int) -> Annotations:
        """Objects of an image, crowds included."""
        part = slice(self._offsets[row], self._offsets[row + 1])
        boxes, labels, crowd, area = (values[part] for values in self._flat)
        return Annotations(boxes, labels, crowd.astype(bool), area)

    def objects(self) -> tuple[Array, Annotations]:
        """The objects of all images, crowds included, and the row that each is in."""
        boxes, labels, crowd, area = self._flat
        rows = np.repeat(np.arange(len(self)), np.diff(self._offsets))
        return rows, Annotations(boxes, labels, crowd.astype(bool), area)

    def head(self, count: int) -> Index:
        """Return the first `count` images."""
        return self.take(np.arange(min(count, len(self))))

    def take(self, rows: Array) -> Index:
        """Return the images of the given rows, in that order."""
        # Rebuilt, not sliced: a sliced list column keeps the offsets and the values of the whole.
        return Index(self.table.take(rows), self.root, self.class_names, self.category_ids)

    def without_empty(self) -> Index:
        """Return the images that have an object to learn: a crowd is none."""
        real = np.concatenate(([0], np.cumsum(self._flat[2] == 0)))[self._offsets]
        return self.take(np.flatnonzero(np.diff(real)))

    def with_classes(self, names: Sequence[str]) -> Index:
        """Return all images with the objects of these classes only, whose labels number `names` in their order.

        Raises:
            RaydetError: a name is unknown or occurs twice.
        """
        unknown = [name for name in names if name not in self.class_names]
        if unknown:
            raise RaydetError(f"there is no class {unknown[0]}{did_you_mean(unknown[0], self.class_names)}")
        if len(set(names)) < len(names):
            raise RaydetError("a class is named twice")
        label_of = np.full(len(self.class_names), -1)
        old = [self.class_names.index(name) for name in names]
        label_of[old] = np.arange(len(names))
        boxes, labels, crowd, area = self._flat
        labels = label_of[labels.astype(np.int64)]
        keep = labels >= 0
        counts = np.concatenate(([0], np.cumsum(keep)))[self._offsets]
        columns = _object_columns(counts, boxes[keep], labels[keep], crowd[keep], area[keep])
        table = self.table
        for name, column in columns.items():
            table = table.set_column(table.schema.get_field_index(name), name, column)
        return Index(table, self.root, names, [self.category_ids[label] for label in old])

    def save(self) -> memoryview:
        """Return the index as a Parquet file, which `load` reads."""
        about = {"root": self.root, "class_names": self.class_names, "category_ids": self.category_ids}
        sink = pa.BufferOutputStream()
        pq.write_table(self.table.replace_schema_metadata({"raydet": json.dumps(about)}), sink, compression="zstd")
        return memoryview(sink.getvalue())  # of a large index, not another copy

    @staticmethod
    def load(source: bytes | memoryview | Path, root: str | None = None) -> Index:
        """Read what `save` gave.

        Args:
            source: content of the Parquet file, or its path.
            root: where the images are now; None: where they were.

        Raises:
            OSError: the file cannot be opened.
            ValueError: it is no index.
        """
        with parquet(source) as file:
            about = json.loads((file.schema_arrow.metadata or {}).get(b"raydet", b"null"))
            if about is None:
                raise ValueError("it is no index of raydet")
            columns = {field.name: _read_column(file, field) for field in file.schema_arrow}
        return Index(pa.table(columns), root or about["root"], about["class_names"], about["category_ids"])


def _read_column(file: pq.ParquetFile, field: pa.Field) -> pa.Array:
    """Read a column in pieces, and give back what is left over of them: a large index must not be in memory twice."""
    groups = (file.read_row_group(number, [field.name], use_threads=False) for number in range(file.num_row_groups))
    pieces = [piece for group in groups for piece in group[field.name].chunks]
    column = pa.chunked_array(pieces, field.type).combine_chunks()
    del pieces
    pa.default_memory_pool().release_unused()
    return column


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:05d}.parquet"


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
    offsets = np.concatenate(([0], np.cumsum(np.bincount(row_of_box, minlength=len(ids)))))
    boxes, labels, crowd, area = (
        np.asarray(values)[by_row] for values in (np.asarray(boxes).reshape(-1, 4), labels, crowd, area)
    )
    nowhere = np.full(len(ids), -1)
    table = pa.table(
        {
            "image_id": ids[order],
            "path": [images[i][1] for i in order],
            "width": [images[i][2] for i in order],
            "height": [images[i][3] for i in order],
            **_object_columns(offsets, boxes, labels, crowd, area),
            "shard": nowhere,
            "offset": nowhere,
            "length": nowhere,
        }
    )
    return Index(table, root, class_names, category_ids)


def index_of_images(
    images: Sequence[tuple[int, str, int, int]],
    objects: Sequence[tuple[Array, Array, Array]],
    *,
    root: str,
    class_names: Sequence[str],
) -> Index:
    """Build an index from the objects of each image. An object's area is its box's, a label the source's own id.

    Args:
        images: (image id, path below the root, width, height), in any order; ids are unique.
        objects: for each image its boxes [n, 4] xyxy in pixels, labels [n] and crowd [n] as bool.
        root: folder of the images.
        class_names: name of each label.
    """
    none = np.empty((0, 4)), np.empty(0, np.int64), np.empty(0, bool)
    boxes, labels, crowd = (np.concatenate(column) for column in zip(none, *objects, strict=True))
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    image_of_box = np.repeat(np.arange(len(images)), [len(labels) for _, labels, _ in objects])
    ids = range(len(class_names))
    return make_index(
        images, boxes, labels, crowd, area, image_of_box, root=root, class_names=class_names, category_ids=ids
    )


def _object_columns(offsets: Array, boxes: Array, labels: Array, crowd: Array, area: Array) -> dict[str, pa.Array]:
    starts = pa.array(offsets, pa.int32())
    corners = pa.FixedSizeListArray.from_arrays(pa.array(np.asarray(boxes, np.float64).reshape(-1)), 4)
    return {
        "boxes": pa.ListArray.from_arrays(starts, corners),
        "labels": pa.ListArray.from_arrays(starts, pa.array(labels, pa.int32())),
        "crowd": pa.ListArray.from_arrays(starts, pa.array(crowd, pa.uint8())),
        "area": pa.ListArray.from_arrays(starts, pa.array(area, pa.float64())),
    }
