"""The three kinds of raw output that the detectors have, told apart by their shapes.

Losses and post-prediction callbacks take their inputs apart here, so that an output of another family is refused with
the names of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

YOLOX, PPYOLOE, SSD = "YOLOX", "PP-YOLOE or YOLO-NAS", "SSD"


class DFLOutput(NamedTuple):
    """What PP-YOLOE and YOLO-NAS return in training: L anchor points on several levels.

    Attributes:
        cls_logits: [B, L, C].
        reg_logits: [B, L, 4 · bins], the distances left, top, right, bottom as distributions over whole strides.
        anchors: [L, 4] anchor boxes, xyxy in pixels.
        anchor_points: [L, 2] in pixels.
        num_anchors_list: points of each level.
        stride: [L, 1] in pixels.
    """

    cls_logits: Tensor
    reg_logits: Tensor
    anchors: Tensor
    anchor_points: Tensor
    num_anchors_list: list[int]
    stride: Tensor


def kind_of(outputs: Any) -> str:
    """Return whose training or evaluation output this is, `YOLOX`, `PPYOLOE` or `SSD`; if nobody's, its shapes."""
    raw = outputs[1] if _is_decoded(outputs) else outputs
    if isinstance(raw, list | tuple):
        dimensions = [item.ndim if isinstance(item, Tensor) else None for item in raw]
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
        outputs: of a model.
        kind: whose they must be.
        wanted_by: name of the loss or callback, for the message.

    Raises:
        ValueError: they are another family's.
    """
    if (found := kind_of(outputs)) != kind:
        raise ValueError(f"{wanted_by} takes the output of {kind}; this is that of {found}")
    return outputs[1] if _is_decoded(outputs) else outputs


def decoded_of(outputs: Any, kind: str, wanted_by: str) -> Any:
    """Return the decoded part of an evaluation output; in `(decoded, None)` decoded is taken at its word.

    PP-YOLOE and YOLO-NAS give boxes and scores alone when they are traced.

    Raises:
        ValueError: they are another family's, or a training output.
    """
    if isinstance(outputs, list | tuple) and len(outputs) == 2 and outputs[1] is None:
        return outputs[0]
    if kind == PPYOLOE and _is_traced(outputs):
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
