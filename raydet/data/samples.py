"""Training data as a pure function of (settings, seed, position), and the blocks in which it travels.

Position p counts samples since the start of a run: with N images, it is image permutation(seed, p // N)[p % N], and
each random choice made for it comes from a generator seeded by (seed, p). Samples are made by the *chunk*, `chunk_size`
consecutive positions that start at a multiple of it whatever the batch size or the number of workers, so that a sample
can be composed of others of its chunk without reading them twice and is the same in every run.

Nothing here knows Ray or torch: the same functions run in a Ray Data task and in a debugger.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raydet.boxes import clip
from raydet.data.index import Index
from raydet.data.render import Renderer, SourceImages
from raydet.data.transforms import Composition, Sample, SamplePlan, SampleTransform, Transform, sanitise
from raydet.errors import RaydetError

Array = npt.NDArray[Any]

# Families of random numbers that never share a seed.
_PERMUTATION, _SAMPLE, _OWN = 0, 1, 2


@dataclass(frozen=True)
class Samples:
    """Samples of an index by position.

    Args:
        index: the images.
        transforms: transforms, applied in turn; the last must leave pictures of `image_size`.
        image_size: (height, width) of every sample in pixels, multiples of 32.
        chunk_size: number of positions that a task makes at a time.
        seed: seed of the permutations and of the transforms.
        shuffle: give each epoch an order of its own; without it, position p is row p, as in validation.
        close_at: position from which on `closed` is applied in place of `transforms`; None: never.
        closed: transforms at the end of a training.
        own: transforms of the user's own, applied to the pixels last.
        window: number of neighbouring images of shards that are shuffled among themselves.
        on_error: what happens to an image that cannot be read: "raise" stops the stream, "skip" shows another image of
            the chunk in its place, or in validation a grey one.
    """

    index: Index
    transforms: tuple[Transform | Composition, ...]
    image_size: tuple[int, int]
    chunk_size: int = 64
    seed: int = 0
    shuffle: bool = True
    close_at: int | None = None
    closed: tuple[Transform | Composition, ...] = ()
    own: tuple[SampleTransform, ...] = ()
    window: int = 4096
    on_error: Literal["raise", "skip"] = "raise"
    _orders: dict[int, Array] = field(default_factory=dict, init=False, repr=False, compare=False)

    def rows(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Index rows of positions start … stop - 1, across epochs."""
        if not self.shuffle:
            return np.arange(start, stop)
        size = len(self.index)
        epochs = range(start // size, -(-stop // size))
        order = np.concatenate([self._order(epoch) for epoch in epochs])
        return order[start - epochs.start * size : stop - epochs.start * size]

    def chunk_rows(self, position: int) -> list[int]:
        """Return the index rows of all positions of the chunk that a position is in."""
        low = position // self.chunk_size * self.chunk_size
        high = low + self.chunk_size if self.shuffle else min(low + self.chunk_size, len(self.index))
        return self.rows(low, high).tolist()  # type: ignore[no-any-return]

    def plan(
        self,
        position: int,
        rows: Sequence[int],
        broken: frozenset[int] = frozenset(),
        images: dict[int, SamplePlan] | None = None,
    ) -> SamplePlan:
        """Decide what a sample shows.

        Args:
            position: position of the sample.
            rows: rows of the images of its chunk, by position.
            broken: rows whose images cannot be read; each gives way to the next.
            images: whole images by row, which a mosaic needs again and again; those that are missing are added.
        """
        known = {} if images is None else images

        def image(slot: int) -> SamplePlan:
            row = rows[slot]
            if row in broken:
                row = next(row for row in (*rows[slot:], *rows[:slot]) if row not in broken)
            if row not in known:
                objects, (width, height) = self.index.annotations(row), self.index.size(row)
                boxes = clip(objects.boxes, width, height)
                seen = ~objects.crowd & (boxes[:, 2:] > boxes[:, :2]).all(1)
                known[row] = SamplePlan.of(row, width, height, boxes[seen], objects.labels[seen])
            return known[row]

        rng = np.random.default_rng((self.seed, _SAMPLE, position))
        shown = [position % self.chunk_size]
        picture = image(shown[0])
        open_ = self.close_at is None or position < self.close_at
        for transform in self.transforms if open_ else self.closed:
            if partners := getattr(transform, "partners", 0):
                others = [_draw_other(rng, len(rows), shown) for _ in range(partners)]
                picture = transform(picture, rng, [image(slot) for slot in others])  # type: ignore[call-arg]
            else:
                picture = transform(picture, rng)  # type: ignore[call-arg]
        return picture

    def blocks(
        self, positions: Sequence[int], block_size: int | None = None, failed: Mapping[int, str] | None = None
    ) -> Iterator[pa.Table]:
        """Make samples of one chunk as Arrow tables.

        Columns: position, row (in the index), image (uint8, height * width * 3: BGR), boxes (xyxy in pixels of the
        sample), labels, errors (what could not be read for it).

        Args:
            positions: positions of the samples, ascending, all in one chunk.
            block_size: largest number of rows in a table; None: all positions are in one.
            failed: rows of the index whose images are not to be decoded, and why.

        Raises:
            RaydetError: an image cannot be read, or a transform of the user's own fails.
        """
        cv2.setNumThreads(0)  # tasks run side by side: one thread each
        rows, low = self.chunk_rows(positions[0]), positions[0] // self.chunk_size * self.chunk_size
        # The whole chunk is planned, whatever part of it is asked for: how an image is decoded depends on all its uses.
        images: dict[int, SamplePlan] = {}
        pictures = [self.plan(position, rows, images=images) for position in range(low, low + len(rows))]
        sources = SourceImages(self.index, pictures, [pictures[position - low] for position in positions])
        sources.failed |= {row: f"{self.index.path(row)}: {reason}" for row, reason in (failed or {}).items()}
        renderer = Renderer(self.image_size)
        size, told = block_size or len(positions), 0
        try:
            for first in range(0, len(positions), size):
                block = np.array(positions[first : first + size])
                pixels = np.empty((len(block), *self.image_size, 3), np.uint8)
                samples, errors = [], []
                for position, out in zip(block.tolist(), pixels, strict=True):
                    samples.append(self._sample(position, pictures[position - low], rows, sources, renderer, out))
                    errors.append(list(sources.failed.values())[told:])
                    told = len(sources.failed)
                yield _table(block, np.array(rows)[block - low], pixels, samples, errors)
        finally:
            sources.close()

    def sample(self, position: int) -> Sample:
        """Make one sample, for looking at it."""
        (block,) = self.blocks([position])
        image = block["image"].combine_chunks().flatten().to_numpy().reshape(*self.image_size, 3)
        boxes = block["boxes"].combine_chunks().flatten().flatten().to_numpy().reshape(-1, 4)
        return Sample(image, boxes, block["labels"].combine_chunks().flatten().to_numpy())

    def _sample(
        self,
        position: int,
        picture: SamplePlan,
        rows: Sequence[int],
        sources: SourceImages,
        renderer: Renderer,
        out: Array,
    ) -> Sample:
        """Render a picture to `out`, and what is on it."""
        shown = picture
        while True:
            try:
                renderer(shown, sources, out)
                break
            except RaydetError:
                if self.on_error == "raise" or sources.failed.keys() >= set(rows):
                    raise
            if self.shuffle:
                shown = self.plan(position, rows, frozenset(sources.failed))
            else:  # an image that cannot be seen: its objects will count as missed
                shown = replace(picture, layers=((),))
            sources.expect(shown)
        for finished in {id(picture): picture, id(shown): shown}.values():
            sources.done(finished)
        sample = Sample(out, *sanitise(shown.boxes, shown.labels, self.image_size))
        if self.own:
            sample = self._apply_own(position, sample)
            np.copyto(out, sample.image)
            sample = Sample(out, *sanitise(sample.boxes, sample.labels, self.image_size))
        return sample

    def _apply_own(self, position: int, sample: Sample) -> Sample:
        rng = np.random.default_rng((self.seed, _OWN, position))
        for transform in self.own:
            name = type(transform).__name__
            try:
                sample = transform(sample, rng)
                shape, kind = sample.image.shape, sample.image.dtype
            except Exception as error:
                raise RaydetError(f"augment.transforms: {name}: {type(error).__name__}: {error}") from error
            if shape != (*self.image_size, 3) or kind != np.uint8 or len(sample.boxes) != len(sample.labels):
                raise RaydetError(
                    f"augment.transforms: {name} returned an image {shape} of {kind} with {len(sample.boxes)} boxes "
                    f"and {len(sample.labels)} labels; it must be {(*self.image_size, 3)} of uint8, and a label a box"
                )
        return sample

    def _order(self, epoch: int) -> Array:
        """Return the rows of an epoch in its order; the last two orders are kept."""
        if epoch not in self._orders:
            rng = np.random.default_rng((self.seed, _PERMUTATION, epoch))
            shards = self.index.shards
            if (shards < 0).all():
                order = rng.permutation(len(self.index))
            else:
                # Shards in random order, then each window of neighbours shuffled: images read together lie together.
                names, number = np.unique(shards, return_inverse=True)
                order = np.argsort(rng.permutation(len(names))[number], kind="stable")
                for first in range(0, len(order), self.window):
                    rng.shuffle(order[first : first + self.window])
            while len(self._orders) > 1:
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = order
        return self._orders[epoch]


def _draw_other(rng: np.random.Generator, count: int, shown: list[int]) -> int:
    """Draw one of `count` that was not drawn before, as long as there is one, and add it to those."""
    slot = int(rng.integers(count))
    while slot in shown and len(shown) < count:
        slot = int(rng.integers(count))
    shown.append(slot)
    return slot


def _table(positions: Array, rows: Array, images: Array, samples: list[Sample], errors: list[list[str]]) -> pa.Table:
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
            "errors": pa.array(errors, pa.list_(pa.string())),
        }
    )
