"""Anchor points: the cells of a model's feature maps, as one list from the finest level to the coarsest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def anchor_cells(
    sizes: Sequence[tuple[int, int]], strides: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return each cell's column and row [A, 2] and its level's stride in pixels [A, 1], row by row.

    Args:
        sizes: (height, width) of each level in cells.
        strides: of each level in pixels.
        device: of the result.
    """
    cells, steps = [], []
    for (height, width), stride in zip(sizes, strides, strict=True):
        row, column = torch.meshgrid(
            torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
        )
        cells.append(torch.stack((column, row), dim=-1).reshape(-1, 2))
        steps.append(torch.full((height * width, 1), float(stride), device=device))
    return torch.cat(cells).float(), torch.cat(steps)


def decode_yolox(raw: Tensor, cells: Tensor, strides: Tensor) -> Tensor:
    """YOLOX's raw boxes [..., A, 4] → cx, cy, w, h in pixels: an offset from the cell, and the size's logarithm."""
    return torch.cat(((raw[..., :2] + cells) * strides, raw[..., 2:].exp() * strides), dim=-1)
