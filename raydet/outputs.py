"""The four kinds of raw output that the detectors have, told apart by their shapes.

Losses and post-prediction callbacks take their inputs apart here, so that an output of another family is refused with
the names of both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

YOLOX, PPYOLOE, SSD, DFINE = "YOLOX", "PP-YOLOE or YOLO-NAS", "SSD", "D-FINE"


class DFLOutput(NamedTuple):
    """What PP-YOLOE and YOLO-NAS return in training: L anchor points on several levels.

    Attributes:
        cls_logits: [B, L, C] class logits.
        reg_logits: [B, L, 4 · bins], the distances left, top, right, bottom as distributions over whole strides.
        anchors: [L, 4] anchor boxes, xyxy in pixels.
        anchor_points: [L, 2] anchor points in pixels.
        num_anchors_list: number of anchor points of each level.
        stride: [L, 1] stride of each anchor point in pixels.
    """

    cls_logits: Tensor
    reg_logits: Tensor
    anchors: Tensor
    anchor_points: Tensor
    num_anchors_list: list[int]
    stride: Tensor


class DFineOutput(NamedTuple):
    """What D-FINE returns in training: N queries, of which the last Q detect and those before them are denoising.

    All boxes are cx, cy, w, h in shares of the image. D is the number of decoder layers.

    Attributes:
        logits: [D, B, N, C] class logits after each layer.
        boxes: [D, B, N, 4] boxes after each layer.
        corners: [D, B, N, 4 · bins] distances left, top, right, bottom as distributions, before the softmax.
        initial_logits: [B, N, C] class logits of the first layer without the estimate of the box's quality.
        initial_boxes: [B, N, 4] boxes that all layers refine.
        selected_logits: [B, Q, C] class logits by which the queries were selected.
        selected_boxes: [B, Q, 4] boxes of the selected positions.
        distances: [bins] distance that each bin stands for.
        reg_scale: [1] length of a box's side in units of the distances.
        groups: groups of denoising queries, each of 2 · G queries; 0: there are none.
        image_size: (height, width) of the input in pixels.
    """

    logits: Tensor
    boxes: Tensor
    corners: Tensor
    initial_logits: Tensor
    initial_boxes: Tensor
    selected_logits: Tensor
    selected_boxes: Tensor
    distances: Tensor
    reg_scale: Tensor
    groups: int
    image_size: tuple[int, int]


def kind_of(outputs: Any) -> str:
    """Return whose training or evaluation output this is, such as `YOLOX`; if nobody's, its shapes."""
    raw = outputs[1] if _is_decoded(outputs) else outputs
    if isinstance(raw, list | tuple):
        dimensions = [item.ndim if isinstance(item, Tensor) else None for item in raw]
        if len(raw) == 11 and dimensions[:7] == [4, 4, 4, 3, 3, 3, 3]:
            return DFINE
        if len(raw) == 6 and dimensions[:2] == [3, 3]:
            return PPYOLOE
        if raw and all(d == 5 for d in dimensions):
            return YOLOX
        if dimensions == [3, 3] and raw[0].shape[1] == 4 and raw[0].shape[2] == raw[1].shape[2]:
            return SSD
    return f"something else: {shapes(outputs)}"


def raw_of(outputs: Any, kind: str, wanted_by: str) -> Any:
    """Return the raw part of an output in either mode.

    Args:
        outputs: output of a model.
        kind: family of models that the output must be from.
        wanted_by: name of the loss or callback, for the message.

    Raises:
        ValueError: they are another family's.
    """
    if (found := kind_of(outputs)) != kind:
        raise ValueError(f"{wanted_by} takes the output of {kind}; this is that of {found}")
    return outputs[1] if _is_decoded(outputs) else outputs


def decoded_of(outputs: Any, kind: str, wanted_by: str) -> Any:
    """Return the decoded part of an evaluation output; in `(decoded, None)` decoded is taken at its word.

    PP-YOLOE, YOLO-NAS and D-FINE give boxes and scores alone when they are traced.

    Raises:
        ValueError: they are another family's, or a training output.
    """
    if isinstance(outputs, list | tuple) and len(outputs) == 2 and outputs[1] is None:
        return outputs[0]
    if kind in (PPYOLOE, DFINE) and _is_traced(outputs):
        return outputs
    if (found := kind_of(outputs)) != kind:
        raise ValueError(f"{wanted_by} takes the output of {kind}; this is that of {found}")
    if not _is_decoded(outputs):
        raise ValueError(f"{wanted_by} takes the output of {kind} in evaluation mode: call model.eval()")
    return outputs[0]


def shapes(outputs: Any) -> str:
    """Return the shapes of a nested output as text."""
    if isinstance(outputs, Tensor):
        return "x".join(map(str, outputs.shape))
    if isinstance(outputs, list | tuple):
        return "[" + ", ".join(map(shapes, outputs)) + "]"
    return str(outputs)


def _is_traced(outputs: Any) -> bool:
    """Are these boxes [B, L, 4] and scores [B, L, C]?"""
    if not isinstance(outputs, list | tuple) or len(outputs) != 2:
        return False
    shapes = [tuple(item.shape) if isinstance(item, Tensor) else () for item in outputs]
    return all(len(shape) == 3 for shape in shapes) and shapes[0][1:] == (shapes[1][1], 4)


def _is_decoded(outputs: Any) -> bool:
    """In evaluation mode each family returns (decoded, raw outputs), and raw outputs are several tensors."""
    return isinstance(outputs, Sequence) and len(outputs) == 2 and isinstance(outputs[1], list | tuple)


# SSD's default boxes (Liu et al., 2016) as SuperGradients sets them for 320 pixels: a side each level and the one after
# the last, as a share of the image, and aspect ratios beside 1. Offsets from them are in units of these variances.
SSD_SCALES = tuple(side / 320 for side in (32, 82, 133, 184, 235, 285, 336))
SSD_ASPECTS = (2, 3)
SSD_VARIANCES = (0.1, 0.2)


def anchor_cells(
    sizes: Sequence[tuple[int, int]], strides: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return each cell's column and row [A, 2] and its level's stride in pixels [A, 1], row by row.

    Args:
        sizes: (height, width) of each level in cells.
        strides: stride of each level in pixels.
        device: device of the result.
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


def decode_dfl(raw: Tensor, points: Tensor, strides: Tensor) -> Tensor:
    """Distributions over distances [..., A, 4 · bins] → xyxy in pixels (Li et al., Generalized Focal Loss, 2020).

    The distance to each side is the mean of a softmax over 0, 1, … strides; `points` are [A, 2] in pixels.
    """
    bins = raw.shape[-1] // 4
    distribution = raw.float().reshape(*raw.shape[:-1], 4, bins).softmax(-1)
    # No matrix product: autocast would make it in half precision.
    distances = (distribution * torch.arange(bins, device=raw.device)).sum(-1) * strides
    return torch.cat((points - distances[..., :2], points + distances[..., 2:]), dim=-1)


def ssd_map_sizes(image_size: tuple[int, int]) -> list[tuple[int, int]]:
    """Return (height, width) in cells of SSD's six maps: strides 16 and 32, then half and half again, rounded up."""
    sides = [[-(-side // 16)] for side in image_size]
    for side in sides:
        for _ in SSD_SCALES[2:]:
            side.append(-(-side[-1] // 2))
    return list(zip(*sides, strict=True))


def ssd_default_boxes(image_size: tuple[int, int]) -> Tensor:
    """Return SSD's default boxes [A, 4] = cx, cy, w, h in shares of the image's width and height, clipped to it.

    A cell has squares of its level's side and of the mean with the next level's, and a box for each aspect ratio and
    its inverse. Order: level, shape, row, column. An image that is not square gets boxes with the pixels of a square
    one of the same area.
    """
    side = math.sqrt(image_size[0] * image_size[1])
    boxes = []
    for level, (rows, columns) in enumerate(ssd_map_sizes(image_size)):
        scale, mean = SSD_SCALES[level], math.sqrt(SSD_SCALES[level] * SSD_SCALES[level + 1])
        shapes = [(scale, scale), (mean, mean)]
        for aspect in SSD_ASPECTS:
            wide, high = scale * math.sqrt(aspect), scale / math.sqrt(aspect)
            shapes += [(wide, high), (high, wide)]
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        centres = torch.stack(((column + 0.5) / columns, (row + 0.5) / rows), dim=-1).reshape(-1, 2)
        for width, height in shapes:
            size = torch.tensor([width * side / image_size[1], height * side / image_size[0]])
            boxes.append(torch.cat((centres, size.expand_as(centres)), dim=1))
    return torch.cat(boxes).clamp(0, 1)


def decode_ssd(raw: Tensor, default_boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """SSD's raw boxes [B, A, 4] → cx, cy, w, h in pixels of images of (height, width); default boxes as above."""
    centres = default_boxes[:, :2] + raw[..., :2] * SSD_VARIANCES[0] * default_boxes[:, 2:]
    sizes = default_boxes[:, 2:] * (raw[..., 2:] * SSD_VARIANCES[1]).exp()
    pixels = torch.cat((centres, sizes), dim=-1)
    height, width = image_size
    pixels[..., 0::2] *= width
    pixels[..., 1::2] *= height
    return pixels


def encode_ssd(boxes: Tensor, default_boxes: Tensor) -> Tensor:
    """Boxes [..., 4] = cx, cy, w, h in shares of the image → the raw boxes that decode to them; finite for no size."""
    centres = (boxes[..., :2] - default_boxes[..., :2]) / default_boxes[..., 2:] / SSD_VARIANCES[0]
    sizes = (boxes[..., 2:].clamp(min=1e-6) / default_boxes[..., 2:]).log() / SSD_VARIANCES[1]
    return torch.cat((centres, sizes), dim=-1)


def distance_bins(up: Tensor, reg_scale: Tensor, bins: int) -> Tensor:
    """Return the distance [bins] that each of D-FINE's bins stands for: fine about 0, coarse far from it.

    The lengths grow by a constant factor, and the outermost two are twice as far as those before them could reach
    (Peng et al., D-FINE, 2024). `up` and `reg_scale` are [1].
    """
    reach = (up * reg_scale).abs()
    step = (reach + 1) ** (2 / (bins - 3))
    half = bins // 2
    lengths = step ** torch.arange(1, half, device=up.device) - 1
    far = 2 * reach
    return torch.cat((-far, -lengths.flip(0), torch.zeros_like(up), lengths, far))


def decode_corners(corners: Tensor, base: Tensor, distances: Tensor, reg_scale: Tensor) -> Tensor:
    """D-FINE's distributions [..., 4 · bins] and base boxes [..., 4] → refined boxes [..., 4], both cx, cy, w, h."""
    bins = len(distances)
    # No matrix product: autocast would make it in half precision.
    shares = full(corners).view(*corners.shape[:-1], 4, bins).softmax(-1)
    return move_sides(base, (shares * distances).sum(-1), reg_scale)


def move_sides(base: Tensor, moves: Tensor, reg_scale: Tensor) -> Tensor:
    """Boxes [..., 4] = cx, cy, w, h, whose sides are moved outwards by [..., 4] units of size / `reg_scale`."""
    centre, size = base[..., :2], base[..., 2:]
    unit = size / reg_scale
    low = centre - (0.5 * reg_scale + moves[..., :2]) * unit
    high = centre + (0.5 * reg_scale + moves[..., 2:]) * unit
    return torch.cat(((low + high) / 2, high - low), dim=-1)


def full(values: Tensor) -> Tensor:
    """Return half precision as float32; anything else stays as it is."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def logit(shares: Tensor) -> Tensor:
    """Return the inverse of the sigmoid; of 0 and 1 it is finite."""
    shares = shares.clamp(0, 1)
    return torch.log(shares.clamp(min=1e-5) / (1 - shares).clamp(min=1e-5))


def slots(image: Tensor) -> Tensor:
    """Number the objects of each image from 0 in the order of the targets: their images [N] → [N]."""
    order = image.argsort(stable=True)
    grouped = image[order]
    first = torch.searchsorted(grouped, grouped)
    number = torch.empty_like(order)
    number[order] = torch.arange(len(image), device=image.device) - first
    return number
