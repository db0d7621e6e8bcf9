"""How a data set of the user's own states its objects."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import numpy as np

from raydet.boxes import cxcywh_to_xyxy, xywh_to_xyxy, xyxy_to_cxcywh, xyxy_to_xywh
from raydet.data.index import Array


class TargetFormat(str, Enum):
    """What the five columns of a target [n, 5] are, under SuperGradients' names.

    Boxes are in pixels or, NORMALIZED, in shares of the image's width and height.
    """

    XYXY_LABEL = "XYXY_LABEL"
    XYWH_LABEL = "XYWH_LABEL"
    CXCYWH_LABEL = "CXCYWH_LABEL"
    LABEL_XYXY = "LABEL_XYXY"
    LABEL_XYWH = "LABEL_XYWH"
    LABEL_CXCYWH = "LABEL_CXCYWH"
    NORMALIZED_XYXY_LABEL = "NORMALIZED_XYXY_LABEL"
    NORMALIZED_XYWH_LABEL = "NORMALIZED_XYWH_LABEL"
    NORMALIZED_CXCYWH_LABEL = "NORMALIZED_CXCYWH_LABEL"
    LABEL_NORMALIZED_XYXY = "LABEL_NORMALIZED_XYXY"
    LABEL_NORMALIZED_XYWH = "LABEL_NORMALIZED_XYWH"
    LABEL_NORMALIZED_CXCYWH = "LABEL_NORMALIZED_CXCYWH"

    def to_xyxy(self, target: Array, width: float, height: float) -> tuple[Array, Array]:
        """Split a target [n, 5] of an image of the given size into boxes [n, 4] xyxy in pixels and labels [n].

        Raises:
            ValueError: it is of another shape, or a label is no number.
        """
        target = np.asarray(target, np.float64)
        if target.size and (target.ndim != 2 or target.shape[1] != 5):
            raise ValueError(f"a target is of shape {list(target.shape)}, not [n, 5]")
        target = target.reshape(-1, 5)
        boxes, labels = (target[:, 1:], target[:, 0]) if self._label_first else (target[:, :4], target[:, 4])
        if not np.isfinite(labels).all():
            raise ValueError("a label of a target is not finite")
        return _BOX[self._box][0](boxes * self._scale(width, height)), labels.astype(np.int64)

    def from_xyxy(self, boxes: Array, labels: Array, width: float, height: float) -> Array:
        """Join boxes [n, 4] xyxy in pixels and labels [n] to a target [n, 5]: the inverse of `to_xyxy`."""
        boxes = _BOX[self._box][1](np.asarray(boxes, np.float64).reshape(-1, 4)) / self._scale(width, height)
        column = np.asarray(labels, np.float64).reshape(-1, 1)
        return np.concatenate((column, boxes) if self._label_first else (boxes, column), axis=1)

    @property
    def is_normalized(self) -> bool:
        """Are boxes in shares of the image's size, not in pixels?"""
        return "NORMALIZED" in self.value

    @property
    def _label_first(self) -> bool:
        return self.value.startswith("LABEL")

    @property
    def _box(self) -> str:
        return next(part for part in self.value.split("_") if part in _BOX)

    def _scale(self, width: float, height: float) -> Array:
        return np.array([width, height] * 2 if self.is_normalized else [1.0] * 4)


# Each to xyxy, and from it.
_BOX: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "XYXY": (np.copy, np.copy),
    "XYWH": (xywh_to_xyxy, xyxy_to_xywh),
    "CXCYWH": (cxcywh_to_xyxy, xyxy_to_cxcywh),
}
