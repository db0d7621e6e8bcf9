"""Batches: blocks of samples as tensors, and the stream in one process without Ray."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import gcd

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from raydet.boxes import xyxy_to_cxcywh
from raydet.data.samples import Samples


@dataclass(frozen=True)
class Batch:
    """What a training or validation step gets, on the CPU.

    Attributes:
        images: uint8 [B, 3, H, W], BGR, in channels-last memory, as they were decoded and as convolutions like them;
            not to be written to. These and the targets are in pinned memory where asked for.
        targets: float32 [N, 6]: image in the batch, class, cx, cy, w, h in pixels.
        positions: int64 [B], positions of the samples in the stream.
        rows: int64 [B], rows of the samples' images in the index.
        errors: what could not be read for these samples, where that is skipped.
    """

    images: Tensor
    targets: Tensor
    positions: Tensor
    rows: Tensor
    errors: tuple[str, ...] = ()


def to_batch(blocks: list[pa.Table], image_size: tuple[int, int], pin_memory: bool = False) -> Batch:
    """Join blocks of samples into a batch."""
    count = sum(len(block) for block in blocks)
    # Views of the blocks' own memory, which a batch of one block keeps: pixels are copied only to join or to pin them.
    parts = [from_dlpack(block["image"].combine_chunks().flatten()).view(-1, *image_size, 3) for block in blocks]
    if len(parts) == 1 and not pin_memory:
        (images,) = parts
    else:
        images = torch.empty((count, *image_size, 3), dtype=torch.uint8, pin_memory=pin_memory)
        torch.cat(parts, out=images)
    table = pa.concat_tables([block.drop(["image"]) for block in blocks]).combine_chunks()
    boxes = table["boxes"].chunk(0)
    corners = boxes.flatten().flatten().to_numpy().reshape(-1, 4)
    targets_tensor = torch.empty((len(corners), 6), dtype=torch.float32, pin_memory=pin_memory)
    targets = targets_tensor.numpy()
    targets[:, 0] = np.repeat(np.arange(count), boxes.value_lengths().to_numpy())
    targets[:, 1] = table["labels"].chunk(0).flatten().to_numpy()
    targets[:, 2:] = xyxy_to_cxcywh(corners)
    positions, rows = (torch.tensor(table[name].to_numpy()) for name in ("position", "row"))
    errors = tuple(table["errors"].chunk(0).flatten().to_pylist())
    return Batch(images.permute(0, 3, 1, 2), targets_tensor, positions, rows, errors)


def batches_of(parts: Iterable[pa.Table], batch_size: int, make: Callable[[list[pa.Table]], Batch]) -> Iterator[Batch]:
    """Cut or join tables of samples to batches; what is cut is a view.

    Args:
        parts: tables of samples in order, of any lengths.
        batch_size: number of samples in a batch.
        make: function that joins tables to a batch.

    Raises:
        RuntimeError: the tables end within a batch.
    """
    waiting: list[pa.Table] = []
    missing = batch_size
    for part in parts:
        rest = part
        while len(rest) >= missing:
            yield make([*waiting, rest.slice(0, missing)])
            rest, waiting, missing = rest.slice(missing), [], batch_size
        if len(rest):
            waiting.append(rest)
            missing -= len(rest)
    if waiting:
        raise RuntimeError(f"the stream ended within a batch: {missing} of its {batch_size} samples did not come")


def local_train_batches(samples: Samples, start: int, stop: int, batch_size: int) -> Generator[Batch, None, None]:
    """Yield the batches of positions start … stop - 1, made in this very thread, where a breakpoint stops."""
    chunks = _by_chunk(start, stop, samples.chunk_size)
    parts = (block for chunk in chunks for block in samples.blocks(chunk, gcd(batch_size, samples.chunk_size)))
    yield from batches_of(parts, batch_size, lambda tables: to_batch(tables, samples.image_size))


def local_eval_batches(samples: Samples, batch_size: int) -> Iterator[Batch]:
    """Yield every image of the index once, in order, made in this thread."""
    for chunk in _by_chunk(0, len(samples.index), samples.chunk_size):
        for block in samples.blocks(chunk, batch_size):
            yield to_batch([block], samples.image_size)


def _by_chunk(start: int, stop: int, chunk_size: int) -> list[range]:
    edges = [start, *range((start // chunk_size + 1) * chunk_size, stop, chunk_size), stop]
    return [range(low, high) for low, high in pairwise(edges) if low < high]
