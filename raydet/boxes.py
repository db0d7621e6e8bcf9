"""Boxes: the only place that converts their formats and measures their overlap.

Formats: `xyxy` = left, top, right, bottom; `cxcywh` = centre, width, height; `xywh` = left, top, width, height
(COCO's). Units are pixels; nothing is clipped unless a function says so. Conversions take tensors or numpy arrays.
torch is not imported here: every Ray Data task loads this module, and torch would cost each of them seconds and 300 MB.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

AnyBoxes = TypeVar("AnyBoxes", "Tensor", npt.NDArray[Any])

EPS = 1e-16

Resize = Literal["pad_bottom_right", "pad_centre", "stretch"]


def cxcywh_to_xyxy(boxes: AnyBoxes) -> AnyBoxes:
    """Convert [..., 4] centre and size to corners."""
    half = boxes[..., 2:] / 2
    return _join(boxes[..., :2] - half, boxes[..., :2] + half)


def xyxy_to_cxcywh(boxes: AnyBoxes) -> AnyBoxes:
    """Convert [..., 4] corners to centre and size."""
    return _join((boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2])


def xyxy_to_xywh(boxes: AnyBoxes) -> AnyBoxes:
    """Convert [..., 4] corners to COCO's left, top, width, height."""
    return _join(boxes[..., :2], boxes[..., 2:] - boxes[..., :2])


def xywh_to_xyxy(boxes: AnyBoxes) -> AnyBoxes:
    """Convert [..., 4] COCO's left, top, width, height to corners."""
    return _join(boxes[..., :2], boxes[..., :2] + boxes[..., 2:])


def coco_results(
    image_ids: Iterable[int], category_ids: Iterable[int], xywh: npt.NDArray[Any], scores: npt.NDArray[Any]
) -> list[dict[str, Any]]:
    """Return detections as entries of COCO's results file.

    Args:
        image_ids: id of each detection's image.
        category_ids: id of each detection's class.
        xywh: float64 [n, 4] left, top, width, height in pixels of the images.
        scores: float64 [n] scores.
    """
    columns = zip(image_ids, category_ids, xywh.tolist(), scores.tolist(), strict=True)
    return [dict(zip(("image_id", "category_id", "bbox", "score"), row, strict=True)) for row in columns]


def clip(boxes: npt.NDArray[Any], width: float, height: float) -> npt.NDArray[Any]:
    """Clip [..., 4] xyxy to an image of the given size in pixels."""
    # Faster than np.clip on few boxes, of which training clips millions.
    clipped: npt.NDArray[Any] = np.maximum(
        np.minimum(boxes, np.asarray([width, height, width, height], boxes.dtype)), 0
    )
    return clipped


@dataclass(frozen=True)
class Placement:
    """Where an image lies in a model's input.

    Attributes:
        width: width of the scaled image in pixels.
        height: height of the scaled image in pixels.
        left: first column of the scaled image in the input.
        top: first row of the scaled image in the input.
        scale: input pixels for each pixel of the image, (across, down).
    """

    width: int
    height: int
    left: int
    top: int
    scale: tuple[float, float]

    def undo(self, boxes: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Boxes [..., 4] xyxy in pixels of the input → of the image."""
        offsets, scales = (np.asarray(pair * 2, boxes.dtype) for pair in ((self.left, self.top), self.scale))
        original: npt.NDArray[Any] = (boxes - offsets) / scales
        return original


def place(width: int, height: int, size: tuple[int, int], resize: Resize) -> Placement:
    """Place an image of width x height pixels in an input of `size` = (height, width).

    Args:
        width: width of the image in pixels.
        height: height of the image in pixels.
        size: (height, width) of the input in pixels.
        resize: "pad_bottom_right", as YOLOX: the aspect ratio kept, sides rounded down, the image in the corner;
            "pad_centre", as YOLO-NAS: sides rounded to the nearest, the image in the middle, with 2 pixels around it;
            "stretch", as PP-YOLOE: to the whole input.
    """
    if resize == "stretch":
        return Placement(size[1], size[0], 0, 0, (size[1] / width, size[0] / height))
    if resize == "pad_bottom_right":
        scale = min(size[0] / height, size[1] / width)
        return Placement(max(1, int(width * scale)), max(1, int(height * scale)), 0, 0, (scale, scale))
    scale = min((size[0] - 4) / height, (size[1] - 4) / width)
    across, down = max(1, int(width * scale + 0.5)), max(1, int(height * scale + 0.5))
    return Placement(across, down, (size[1] - across) // 2, (size[0] - down) // 2, (across / width, down / height))


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of matched boxes [..., 4] xyxy (shapes broadcast) → [...] in [0, 1]."""
    intersection, union = _intersection_and_union(a, b)
    return intersection / (union + EPS)


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalized IoU of matched boxes [..., 4] xyxy → [...] in (-1, 1] (Rezatofighi et al., 2019)."""
    intersection, union = _intersection_and_union(a, b)
    hull = _area(a[..., :2].minimum(b[..., :2]), a[..., 2:].maximum(b[..., 2:]))
    return intersection / (union + EPS) - (hull - union) / hull.clamp(min=EPS)


def _intersection_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    intersection = _area(a[..., :2].maximum(b[..., :2]), a[..., 2:].minimum(b[..., 2:]))
    return intersection, _area(a[..., :2], a[..., 2:]) + _area(b[..., :2], b[..., 2:]) - intersection


def _area(low: Tensor, high: Tensor) -> Tensor:
    size = (high - low).clamp(min=0)
    return size[..., 0] * size[..., 1]


def _join(first: AnyBoxes, second: AnyBoxes) -> AnyBoxes:
    if isinstance(first, np.ndarray):
        return np.concatenate((first, second), axis=-1)
    import torch

    return torch.cat((first, second), dim=-1)
