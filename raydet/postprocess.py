"""Post-prediction: decoded predictions → detections [n, 6] = x1, y1, x2, y2, score, class, best first.

Boxes are in pixels of the model's input and are not clipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import batched_nms, nms

from raydet.boxes import cxcywh_to_xyxy


class YoloXPostPredictionCallback:
    """Detections of YOLOX: score = objectness · class probability, then NMS.

    Args:
        conf: lowest objectness, and lowest score, to go on with.
        iou: of two boxes of a class that overlap more, NMS keeps the better.
        max_predictions: the best so many of an image are kept.
        class_agnostic_nms: boxes of different classes suppress each other too.
        multi_label_per_box: a box may be detected as several classes; otherwise as its best.
        nms_top_k: only the best so many of an image enter NMS; None: all.
    """

    def __init__(
        self,
        conf: float = 0.001,
        iou: float = 0.6,
        max_predictions: int = 300,
        class_agnostic_nms: bool = False,
        multi_label_per_box: bool = True,
        nms_top_k: int | None = None,
    ):
        self.conf = conf
        self.iou = iou
        self.max_predictions = max_predictions
        self.class_agnostic_nms = class_agnostic_nms
        self.multi_label_per_box = multi_label_per_box
        self.nms_top_k = nms_top_k

    @torch.no_grad()
    def __call__(self, outputs: Sequence[Any]) -> list[Tensor]:
        """Detect.

        Args:
            outputs: the model's output in evaluation mode; its first item is [B, L, 5 + C]: cx, cy, w, h, objectness,
                class probabilities.

        Returns:
            For each image [n, 6], possibly [0, 6].
        """
        decoded = outputs[0]
        if not isinstance(decoded, Tensor) or decoded.ndim != 3:
            raise ValueError("YoloXPostPredictionCallback takes a YOLOX's output in evaluation mode: call model.eval()")
        return [self._image(image) for image in decoded.float()]

    def _image(self, image: Tensor) -> Tensor:
        image = image[image[:, 4] > self.conf]
        scores = image[:, 5:] * image[:, 4:5]
        if self.multi_label_per_box:
            point, label = (scores > self.conf).nonzero(as_tuple=True)
            score = scores[point, label]
        else:
            score, label = scores.max(dim=1)
            point = (score > self.conf).nonzero().squeeze(1)
            score, label = score[point], label[point]
        boxes = cxcywh_to_xyxy(image[point, :4])
        return suppress(boxes, score, label, self.iou, self.max_predictions, self.class_agnostic_nms, self.nms_top_k)


def suppress(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    iou: float,
    max_predictions: int,
    class_agnostic: bool,
    top_k: int | None,
) -> Tensor:
    """Non-maximum suppression of one image's candidates: boxes [n, 4] xyxy, scores [n], labels [n] → [m, 6]."""
    if top_k is not None and len(scores) > top_k:
        scores, best = scores.topk(top_k)
        boxes, labels = boxes[best], labels[best]
    keep = nms(boxes, scores, iou) if class_agnostic else batched_nms(boxes, scores, labels, iou)
    keep = keep[:max_predictions]
    return torch.cat((boxes[keep], scores[keep, None], labels[keep, None].to(boxes.dtype)), dim=1)
