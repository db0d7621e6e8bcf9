"""Batches: blocks of samples as tensors, and the stream in one process without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raydet.boxes import xyxy_to_cxcywh
from raydet.data.samples import Samples


@dataclass(frozen=True)
class Batch:
    """What a training or validation step gets, on the CPU.

    Attributes:
        images: uint8 [B, 3, H, W], BGR; these and the targets in pinned memory where asked for.
        targets: float32 [N, 6]: image in the batch, class, cx, cy, w, h in pixels.
        positions: int64 [B], the samples' places in the stream.
        rows: int64 [B], their rows in the index.
    """

    images: Tensor
    targets: Tensor
    positions: Tensor
    rows: Tensor


def to_batch(blocks: list[pa.Table], image_size: tuple[int, int], pin_memory: bool = False) -> Batch:
    """Join blocks of samples into a batch."""
    count = sum(len(block) for block in blocks)
    images = torch.empty((count, 3, *image_size), dtype=torch.uint8, pin_memory=pin_memory)
    pixels = images.numpy()
    start = 0
    for block in blocks:
        stop = start + len(block)
        pixels[start:stop] = block["image"].combine_chunks().flatten().to_numpy().reshape(-1, 3, *image_size)
        start = stop
    table = pa.concat_tables([block.drop(["image"]) for block in blocks]).combine_chunks()
    boxes = table["boxes"].chunk(0)
    corners = boxes.flatten().flatten().to_numpy().reshape(-1, 4)
    targets_tensor = torch.empty((len(corners), 6), dtype=torch.float32, pin_memory=pin_memory)
    targets = targets_tensor.numpy()
    targets[:, 0] = np.repeat(np.arange(count), boxes.value_lengths().to_numpy())
    targets[:, 1] = table["labels"].chunk(0).flatten().to_numpy()
    targets[:, 2:] = xyxy_to_cxcywh(corners)
    positions, rows = (torch.tensor(table[name].to_numpy()) for name in ("position", "row"))
    return Batch(images, targets_tensor, positions, rows)


def local_train_batches(samples: Samples, start: int, stop: int, batch_size: int) -> Iterator[Batch]:
    """Yield the batches of positions start … stop - 1, made in this very thread, where a breakpoint stops."""
    for first in range(start, stop, batch_size):
        chunks = _by_chunk(first, first + batch_size, samples.chunk_size)
        blocks = [block for low, high in chunks for block in samples.blocks(low, high, batch_size)]
        yield to_batch(blocks, samples.image_size)


def local_eval_batches(samples: Samples, batch_size: int) -> Iterator[Batch]:
    """Yield every image of the index once, in order, made in this thread."""
    for low, high in _by_chunk(0, len(samples.index), samples.chunk_size):
        for block in samples.blocks(low, high, batch_size):
            yield to_batch([block], samples.image_size)


def _by_chunk(start: int, stop: int, chunk_size: int) -> list[tuple[int, int]]:
    edges = [start, *range((start // chunk_size + 1) * chunk_size, stop, chunk_size), stop]
    return list(pairwise(edges))
