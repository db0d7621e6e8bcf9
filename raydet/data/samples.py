"""Training data as a pure function of (settings, seed, position), and the blocks in which it travels.

Position p counts samples since the start of a run: with N images, it is image permutation(seed, p // N)[p % N], and
each random choice made for it comes from a generator seeded by (seed, p). Samples are made by the *chunk*, `chunk_size`
consecutive positions that start at a multiple of it whatever the batch size or the number of workers, so that a sample
can be composed of others of its chunk without reading them twice and is the same in every run.

Nothing here knows Ray or torch: the same functions run in a Ray Data task and in a debugger.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raydet.data.index import Index
from raydet.data.transforms import Sample, Transform, sanitise
from raydet.errors import RaydetError

# Two families of random numbers that never share a seed.
_PERMUTATION, _SAMPLE = 0, 1


@dataclass(frozen=True)
class Samples:
    """Samples of an index by position.

    Args:
        index: the images.
        transforms: applied in turn; the last must leave images of `image_size`.
        image_size: (height, width) of every sample in pixels, multiples of 32.
        chunk_size: positions a task makes at a time.
        seed: of the permutations and of the transforms.
        shuffle: each epoch in an order of its own; without it, position p is row p, as in validation.
    """

    index: Index
    transforms: tuple[Transform, ...]
    image_size: tuple[int, int]
    chunk_size: int = 64
    seed: int = 0
    shuffle: bool = True

    def rows(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Index rows of positions start … stop - 1, across epochs."""
        if not self.shuffle:
            return np.arange(start, stop)
        size = len(self.index)
        epochs = range(start // size, -(-stop // size))
        order = np.concatenate([_permutation(self.seed, epoch, size) for epoch in epochs])
        return order[start - epochs.start * size : stop - epochs.start * size]

    def sample(self, position: int, row: int) -> Sample:
        """Make one sample: read, decode, transform."""
        sample = read(self.index, row)
        rng = np.random.default_rng((self.seed, _SAMPLE, position))
        for transform in self.transforms:
            sample = transform(sample, rng)
        return sanitise(sample)

    def blocks(self, start: int, stop: int, block_size: int) -> Iterator[pa.Table]:
        """Make positions start … stop - 1, which lie in one chunk, as Arrow tables of at most `block_size` rows.

        Columns: position, row (in the index), image (uint8, 3 * height * width: channels first, BGR), boxes (xyxy in
        pixels of the sample), labels.
        """
        cv2.setNumThreads(0)  # tasks run side by side: one thread each
        rows = self.rows(start, stop)
        for first in range(start, stop, block_size):
            positions = np.arange(first, min(first + block_size, stop))
            images = np.empty((len(positions), 3, *self.image_size), np.uint8)
            samples = []
            for slot, position in enumerate(positions):
                sample = self.sample(int(position), int(rows[position - start]))
                images[slot] = sample.image.transpose(2, 0, 1)
                samples.append(sample)
            yield _table(positions, rows[first - start : first - start + len(positions)], images, samples)


def read(index: Index, row: int) -> Sample:
    """Read and decode an image with its objects, but for crowds.

    Raises:
        RaydetError: the file is missing, is no image, or has another size than its annotation says; it is named.
    """
    path = index.path(row)
    image = imread(path)
    height, width = image.shape[:2]
    if (width, height) != index.size(row):
        expected = "x".join(map(str, index.size(row)))
        raise RaydetError(f"{path} has {width}x{height} pixels, its annotation says {expected}: mend one of them")
    objects = index.annotations(row)
    return Sample(image, objects.boxes[~objects.crowd].astype(np.float32), objects.labels[~objects.crowd])


def imread(path: str) -> npt.NDArray[np.uint8]:
    """Read an image file as uint8 [H, W, 3] BGR.

    Raises:
        RaydetError: it is missing or not an image.
    """
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise RaydetError(f"{path}: cannot be read ({error.strerror})") from None
    image: Any = cv2.imdecode(content, cv2.IMREAD_COLOR) if len(content) else None
    if image is None:
        raise RaydetError(f"{path} is not an image that can be decoded ({len(content)} bytes)")
    return image  # type: ignore[no-any-return]


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng((seed, _PERMUTATION, epoch)).permutation(size)


def _table(positions: Any, rows: Any, images: npt.NDArray[np.uint8], samples: list[Sample]) -> pa.Table:
    counts = [len(sample.labels) for sample in samples]
    offsets = pa.array(np.concatenate(([0], np.cumsum(counts))), pa.int32())
    boxes = np.concatenate([sample.boxes for sample in samples]).reshape(-1)
    labels = np.concatenate([sample.labels for sample in samples])
    return pa.table(
        {
            "position": pa.array(positions, pa.int64()),
            "row": pa.array(rows, pa.int64()),
            "image": pa.FixedSizeListArray.from_arrays(pa.array(images.reshape(-1)), images[0].size),
            "boxes": pa.ListArray.from_arrays(offsets, pa.FixedSizeListArray.from_arrays(pa.array(boxes), 4)),
            "labels": pa.ListArray.from_arrays(offsets, pa.array(labels)),
        }
    )
