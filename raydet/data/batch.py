"""Batches: blocks of samples as tensors, and the stream in one process without Ray."""

from __future__ import annotations

from collections.abc import Generator, Iterator
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
        positions: int64 [B], the samples' places in the stream.
        rows: int64 [B], their rows in the index.
        errors: what could not be read for them, where that is skipped.
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


def local_train_batches(samples: Samples, start: int, stop: int, batch_size: int) -> Generator[Batch, None, None]:
    """Yield the batches of positions start … stop - 1, made in this very thread, where a breakpoint stops."""
    block_size = gcd(batch_size, samples.chunk_size, start)
    waiting: list[pa.Table] = []
    for low, high in _by_chunk(start, stop, samples.chunk_size):
        for block in samples.blocks(low, high, block_size):
            waiting.append(block)
            if len(waiting) * block_size == batch_size:
                yield to_batch(waiting, samples.image_size)
                waiting = []


def local_eval_batches(samples: Samples, batch_size: int) -> Iterator[Batch]:
    """Yield every image of the index once, in order, made in this thread."""
    for low, high in _by_chunk(0, len(samples.index), samples.chunk_size):
        for block in samples.blocks(low, high, batch_size):
            yield to_batch([block], samples.image_size)


def _by_chunk(start: int, stop: int, chunk_size: int) -> list[tuple[int, int]]:
    edges = [start, *range((start // chunk_size + 1) * chunk_size, stop, chunk_size), stop]
    return list(pairwise(edges))
