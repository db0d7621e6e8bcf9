"""Detectors as ONNX files that need no raydet: uint8 images in, detections out, NMS and all inside.

onnx, onnxscript and onnxruntime (`pip install 'raydet[export]'`) are imported when a model is exported.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from raydet.boxes import cxcywh_to_xyxy
from raydet.models.family import Detector, Preprocessing
from raydet.outputs import DFINE, PPYOLOE, YOLOX, decoded_of
from raydet.postprocess import PostPrediction

# Names of the outputs, by their form.
OUTPUTS = {"batch": ("num_detections", "boxes", "scores", "labels"), "flat": ("detections",)}
INPUT = "images"
OPSET = 18
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class MissingPackages(ImportError):
    """What an export needs is not installed."""


class Exported(nn.Module):
    """A detector with its preprocessing and post-prediction as one function of tensors, with no loop over images.

    Args:
        model: the detector, in evaluation mode.
        preprocessing: how an image becomes the model's input.
        callback: what counts as a detection; NMS is "iterative".
        form: form of the output: "batch" or "flat".
    """

    def __init__(self, model: Detector, preprocessing: Preprocessing, callback: PostPrediction, form: str):
        super().__init__()
        self.model = model
        # It takes BGR images, as raydet decodes them; an exported model takes RGB.
        self._preprocessing = replace(preprocessing, channels="BGR" if preprocessing.channels == "RGB" else "RGB")
        self._callback = callback
        self.form = form

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Detect in images, uint8 [B, 3, H, W] RGB, fitted into the model's size.

        Returns:
            "batch": number of detections [B, 1], boxes [B, M, 4] xyxy in pixels of the input, scores [B, M] and
            labels [B, M], the best first; where an image has fewer than M: zeros, and label -1.
            "flat": [N, 7] = image, x1, y1, x2, y2, score, label, by image, the best first.
        """
        callback = self._callback
        boxes, scores = _dense(self.model(self._preprocessing(images)), callback)
        scores = torch.where(scores > callback.conf, scores, 0.0)
        best, label_of = scores.max(dim=2)
        several = callback.multi_label_per_box and not callback.class_agnostic_nms
        if not callback.multi_label_per_box:
            scores = torch.where(
                torch.arange(scores.shape[2], device=scores.device) == label_of[..., None], scores, 0.0
            )
        if callback.nms_top_k is not None and callback.nms_top_k < scores[0].numel():
            flat = scores.flatten(1)
            top, where = flat.topk(callback.nms_top_k, dim=1)
            scores = torch.zeros_like(flat).scatter(1, where, top).reshape(scores.shape)
            best = scores.amax(2)
        if callback.has_nms:
            # Across classes NMS keeps no box twice: its best class is the one that stays.
            classes = best[:, :, None] if callback.class_agnostic_nms else scores
            kept = torch.ops.raydet.batched_nms(boxes, classes.transpose(1, 2), callback.iou, callback.conf)
            image, label, point = kept[:, 0], kept[:, 1], kept[:, 2]
            if several:
                left = torch.zeros_like(scores).index_put((image, point, label), scores[image, point, label]).flatten(1)
            else:
                left = torch.zeros_like(best).index_put((image, point), best[image, point])
        else:
            left = scores.flatten(1) if several else best
        score, place = left.topk(min(callback.max_predictions, left.shape[1]), dim=1)
        found = score > 0
        point = place // scores.shape[2] if several else place
        label = place % scores.shape[2] if several else label_of.gather(1, place)
        box = boxes.gather(1, point[..., None].expand(-1, -1, 4))
        if self.form == "batch":
            box, label = torch.where(found[..., None], box, 0.0), torch.where(found, label, -1)
            return found.sum(1, keepdim=True), box, score, label
        image, row = found.nonzero(as_tuple=True)
        columns = image[:, None].float(), box[image, row], score[image, row, None], label[image, row, None].float()
        return (torch.cat(columns, dim=1),)


def _dense(outputs: Any, callback: PostPrediction) -> tuple[Tensor, Tensor]:
    """Evaluation output → boxes [B, L, 4] xyxy and the scores [B, L, C] that the callback gives them."""
    decoded = decoded_of(outputs, callback.kind, type(callback).__name__)
    if callback.kind in (PPYOLOE, DFINE):
        boxes, scores = decoded
        return boxes.float(), scores.float()
    rows = decoded.float()
    scores = rows[..., 5:] * rows[..., 4:5] if callback.kind == YOLOX else rows[..., 5:]
    return cxcywh_to_xyxy(rows[..., :4]), scores


@torch.library.custom_op("raydet::batched_nms", mutates_args=())
def _batched_nms(boxes: Tensor, scores: Tensor, iou: float, threshold: float) -> Tensor:
    """Boxes [B, L, 4], scores [B, C, L] → what NMS keeps, class by class: [n, 3] = image, class, box."""
    from torchvision import ops

    kept = []
    for image in range(len(boxes)):
        for label in range(scores.shape[1]):
            above = (scores[image, label] > threshold).nonzero().squeeze(1)
            point = above[ops.nms(boxes[image, above], scores[image, label, above], iou)]
            kept.append(torch.stack((torch.full_like(point, image), torch.full_like(point, label), point), dim=1))
    return torch.cat(kept)


@_batched_nms.register_fake
def _(boxes: Tensor, scores: Tensor, iou: float, threshold: float) -> Tensor:
    return boxes.new_empty((torch.library.get_ctx().new_dynamic_size(), 3), dtype=torch.int64)


def to_onnx(module: Exported, image_size: tuple[int, int], metadata: Mapping[str, str]) -> bytes:
    """Return a detector as an ONNX file, for images of one size and batches of any.

    Args:
        module: the module to export, on the CPU.
        image_size: (height, width) in pixels.
        metadata: name → text, which is kept in the file.

    Raises:
        MissingPackages: a package is not installed.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise MissingPackages(f"{', '.join(missing)} not installed: pip install 'raydet[export]'")
    import onnx
    from onnxscript import opset18 as op

    def nms(boxes: Any, scores: Any, iou: float, threshold: float) -> Any:
        every: Any = op.Constant(value_ints=[2**31 - 1])
        limits: list[Any] = [op.Constant(value_floats=[limit]) for limit in (iou, threshold)]
        return op.NonMaxSuppression(boxes, scores, every, *limits)

    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # it warns of an empty list that it makes itself
    names = OUTPUTS[module.form]
    program = torch.onnx.export(
        module.eval(),
        (torch.zeros(2, 3, *image_size, dtype=torch.uint8),),
        dynamo=True,
        input_names=[INPUT],
        output_names=names,
        opset_version=OPSET,
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        custom_translation_table={torch.ops.raydet.batched_nms.default: nms},
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())
