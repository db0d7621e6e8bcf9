"""The outputs of PP-YOLOE and YOLO-NAS: class logits, and distances to a box's sides as distributions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raydet.anchors import anchor_cells, decode_dfl
from raydet.outputs import DFLOutput

REG_MAX = 16  # the longest distance, in strides
PRIOR_LOGIT = -math.log((1 - 0.01) / 0.01)  # a fresh model's: nearly all points are background (Lin et al., 2017)
_ANCHOR_BOX = 5.0  # side of an anchor box, in strides


def dfl_output(
    cls_maps: Sequence[Tensor], reg_maps: Sequence[Tensor], strides: Sequence[int], module: nn.Module
) -> Any:
    """Join the maps of all levels into a head's output.

    Args:
        cls_maps: [B, C, H, W] each.
        reg_maps: [B, 4 · (REG_MAX + 1), H, W] each.
        strides: of the levels, in pixels.
        module: the head, whose mode decides.

    Returns:
        In training mode the DFLOutput; in evaluation mode ((boxes [B, L, 4] xyxy in pixels, scores [B, L, C]), the
        same); while traced, boxes and scores alone.
    """
    cls_logits = torch.cat([level.flatten(2).transpose(1, 2) for level in cls_maps], dim=1)
    reg_logits = torch.cat([level.flatten(2).transpose(1, 2) for level in reg_maps], dim=1)
    sizes = [(level.shape[2], level.shape[3]) for level in cls_maps]
    cells, steps = anchor_cells(sizes, strides, cls_logits.device)
    points = (cells + 0.5) * steps
    half = steps * _ANCHOR_BOX / 2
    raw = DFLOutput(
        cls_logits,
        reg_logits,
        torch.cat((points - half, points + half), dim=1),
        points,
        [height * width for height, width in sizes],
        steps,
    )
    if module.training:
        return raw
    traced: bool = torch.jit.is_tracing()  # type: ignore[no-untyped-call, attr-defined]
    return decode(raw)[0] if traced else decode(raw)


def decode(raw: DFLOutput) -> tuple[tuple[Tensor, Tensor], DFLOutput]:
    """Training output → evaluation output, see `dfl_output`."""
    boxes = decode_dfl(raw.reg_logits, raw.anchor_points, raw.stride)
    return (boxes, raw.cls_logits.float().sigmoid()), raw
