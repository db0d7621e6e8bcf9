"""Post-prediction: decoded predictions → detections [n, 6] = x1, y1, x2, y2, score, class, best first.

Boxes are in pixels of the model's input and are not clipped. torchvision, which takes two seconds, is imported by those
processes only that detect something: neither by the driver of a training nor by Ray Train's controller.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from raydet.boxes import cxcywh_to_xyxy
from raydet.outputs import DFINE, PPYOLOE, SSD, YOLOX, decoded_of

NmsType = Literal["iterative", "matrix"]

_MATRIX_SIGMA = 3.0
_FEW = 128  # boxes of a class: more are quicker suppressed by torchvision, one class after the other


class Candidates(NamedTuple):
    """What of an image enters NMS: boxes [n, 4] xyxy, scores [n], labels [n], and the point [n] each is from."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    points: Tensor


class PostPrediction:
    """What the callbacks share: candidates of each image, then non-maximum suppression (NMS).

    Args:
        conf: lowest score of a candidate.
        iou: IoU threshold of NMS: of two boxes of a class that overlap more, only the one with the higher score stays.
        max_predictions: largest number of detections in an image, best scores first.
        class_agnostic_nms: overlapping boxes of different classes suppress each other as well.
        multi_label_per_box: let one box be detected as several classes; false: as its best class only.
        nms_top_k: largest number of boxes of an image that enter NMS, best scores first; None: all.
    """

    kind: ClassVar[str]
    has_nms: ClassVar[bool] = True

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

    @classmethod
    def of(cls, **settings: Any) -> PostPrediction:
        """Build from settings under the names that all families share, those of this class."""
        return cls(**settings)

    @torch.no_grad()
    def __call__(self, outputs: Any) -> list[Tensor]:
        """Detect.

        Args:
            outputs: the model's output in evaluation mode, or (decoded, None).

        Returns:
            For each image [n, 6], possibly [0, 6].

        Raises:
            ValueError: the output is of another family's model, or of one in training mode.
        """
        return [self.suppress(found) for found in self.candidates(outputs)]

    @torch.no_grad()
    def candidates(self, outputs: Any) -> list[Candidates]:
        """Return what of each image enters NMS; arguments and errors as of a call."""
        decoded = decoded_of(outputs, self.kind, type(self).__name__)
        images = zip(*decoded, strict=True) if isinstance(decoded, list | tuple) else ((image,) for image in decoded)
        return [self._candidates(*(part.float() for part in image)) for image in images]

    def suppress(self, found: Candidates) -> Tensor:
        """Return the detections [n, 6] that NMS leaves of an image's candidates."""
        kept = self.keep(found)
        return _rows(found.boxes[kept], found.scores[kept], found.labels[kept])

    def keep(self, found: Candidates) -> Tensor:
        """Return which [n] of an image's candidates NMS leaves, the best first."""
        boxes, scores, labels = found[:3]
        best = None
        if self.nms_top_k is not None and len(scores) > self.nms_top_k:
            scores, best = scores.topk(self.nms_top_k)
            boxes, labels = boxes[best], labels[best]
        if self.class_agnostic_nms:
            from torchvision import ops

            kept = ops.nms(boxes, scores, self.iou)
        else:
            kept = _nms_of_each_class(boxes, scores, labels, self.iou)
        kept = kept[: self.max_predictions]
        return kept if best is None else best[kept]

    def _candidates(self, *decoded: Tensor) -> Candidates:
        raise NotImplementedError


class _WithMatrix(PostPrediction):
    """Adds Matrix NMS (Wang et al., SOLOv2, 2020): scores decay by overlap instead of boxes being dropped.

    Args:
        nms_type: "iterative", or "matrix": a box counts as its best class, the best `max_predictions` of an image decay
            each other's scores, those that stay above `conf` are kept, and `iou` and `nms_top_k` have no part in it.
        **settings: arguments of PostPrediction.
    """

    def __init__(
        self,
        conf: float = 0.001,
        iou: float = 0.6,
        max_predictions: int = 300,
        class_agnostic_nms: bool = False,
        multi_label_per_box: bool = True,
        nms_top_k: int | None = None,
        nms_type: NmsType = "iterative",
    ):
        super().__init__(conf, iou, max_predictions, class_agnostic_nms, multi_label_per_box, nms_top_k)
        if nms_type not in ("iterative", "matrix"):
            raise ValueError(f"nms_type is {nms_type!r}: it is 'iterative' or 'matrix'")
        self.nms_type = nms_type

    def _candidates(self, *decoded: Tensor) -> Candidates:
        boxes, scores = self._scores(decoded[0])
        multi = self.multi_label_per_box and self.nms_type == "iterative"
        point, score, label = _above(scores, self.conf, multi)
        return Candidates(cxcywh_to_xyxy(boxes[point]), score, label, point)

    def _scores(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Decoded rows [L, 5 + C] → boxes [n, 4] cxcywh, scores [n, C]."""
        raise NotImplementedError

    def suppress(self, found: Candidates) -> Tensor:
        """Return the detections [n, 6] that NMS leaves of an image's candidates."""
        if self.nms_type == "iterative":
            return super().suppress(found)
        from torchvision import ops

        boxes, scores, labels = found[:3]
        scores, best = scores.topk(min(self.max_predictions, len(scores)))
        boxes, labels = boxes[best], labels[best]
        # The overlap of boxes that are not finite is nan, which must not reach other classes.
        overlap = ops.box_iou(boxes, boxes).nan_to_num_(0).triu(1)  # [better, worse]
        if not self.class_agnostic_nms:
            overlap = overlap * (labels[:, None] == labels)
        if len(scores):
            # A box that a better one overlaps has less to say.
            most = overlap.amax(0)[:, None]
            scores = scores * torch.exp(_MATRIX_SIGMA * (most**2 - overlap**2)).amin(0)
        scores, order = scores.sort(descending=True, stable=True)
        order = order[scores > self.conf]
        return _rows(boxes[order], scores[: len(order)], labels[order])


class YoloXPostPredictionCallback(_WithMatrix):
    """Detections of YOLOX: score = objectness · class probability; a box of an objectness below `conf` is none.

    Decoded: [B, L, 5 + C] = cx, cy, w, h, objectness, class probabilities. Arguments: those of PostPrediction, and
    `nms_type`, "iterative" or "matrix".
    """

    kind = YOLOX

    def _scores(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        rows = rows[rows[:, 4] > self.conf]
        return rows[:, :4], rows[:, 5:] * rows[:, 4:5]


class SSDPostPredictCallback(_WithMatrix):
    """Detections of SSD: score = class probability.

    Decoded: [B, A, 5 + C] = cx, cy, w, h, the highest class probability, class probabilities. Arguments: those of
    PostPrediction, and `nms_type`, "iterative" or "matrix".
    """

    kind = SSD

    def _scores(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        rows = rows[rows[:, 4] > self.conf]
        return rows[:, :4], rows[:, 5:]


class PPYoloEPostPredictionCallback(PostPrediction):
    """Detections of PP-YOLOE and YOLO-NAS. Decoded: (boxes [B, L, 4] xyxy, scores [B, L, C]), as traced models give.

    Args:
        score_threshold: lowest score of a candidate.
        nms_threshold: IoU threshold of NMS: of two boxes of a class that overlap more, only the one with the higher
            score stays.
        nms_top_k: largest number of boxes of an image that enter NMS, best scores first; None: all.
        max_predictions: largest number of detections in an image, best scores first.
        multi_label_per_box: let one box be detected as several classes; false: as its best class only.
        class_agnostic_nms: overlapping boxes of different classes suppress each other as well.
    """

    kind = PPYOLOE

    def __init__(
        self,
        *,
        score_threshold: float = 0.01,
        nms_threshold: float = 0.7,
        nms_top_k: int | None = 1000,
        max_predictions: int = 300,
        multi_label_per_box: bool = True,
        class_agnostic_nms: bool = False,
    ):
        super().__init__(
            score_threshold, nms_threshold, max_predictions, class_agnostic_nms, multi_label_per_box, nms_top_k
        )

    @classmethod
    def of(cls, **settings: Any) -> PostPrediction:
        """Build from settings under the names that all families share, those of PostPrediction."""
        for ours, shared in (("score_threshold", "conf"), ("nms_threshold", "iou")):
            if shared in settings:
                settings[ours] = settings.pop(shared)
        return cls(**settings)

    def _candidates(self, *decoded: Tensor) -> Candidates:
        boxes, scores = decoded
        point, score, label = _above(scores, self.conf, self.multi_label_per_box)
        return Candidates(boxes[point], score, label, point)


class DFinePostPredictionCallback(PostPrediction):
    """Detections of D-FINE: the best scores over boxes and classes together, without NMS.

    Decoded: (boxes [B, Q, 4] xyxy, scores [B, Q, C]), as traced models give.

    Args:
        conf: lowest score of a detection.
        max_predictions: the best so many of an image are kept.
        multi_label_per_box: a box may be detected as several classes; otherwise as its best.
    """

    kind = DFINE
    has_nms = False

    def __init__(self, conf: float = 0.001, max_predictions: int = 300, multi_label_per_box: bool = True):
        super().__init__(conf, max_predictions=max_predictions, multi_label_per_box=multi_label_per_box)

    @classmethod
    def of(cls, **settings: Any) -> PostPrediction:
        """Build from settings under the names that all families share; those of NMS have no part in it."""
        for name in ("iou", "class_agnostic_nms", "nms_top_k"):
            settings.pop(name, None)
        return cls(**settings)

    def keep(self, found: Candidates) -> Tensor:
        """Return which [n] of an image's candidates are the best, the best first and of equals the first."""
        return found.scores.argsort(descending=True, stable=True)[: self.max_predictions]

    def _candidates(self, *decoded: Tensor) -> Candidates:
        boxes, scores = decoded
        query, score, label = _above(scores, self.conf, self.multi_label_per_box)
        return Candidates(boxes[query], score, label, query)


def _nms_of_each_class(boxes: Tensor, scores: Tensor, labels: Tensor, iou: float) -> Tensor:
    """Return which [n] boxes NMS keeps, each class by itself, the best first and of equals the first.

    torchvision's batched_nms moves classes apart by large numbers, which rounds the boxes, or makes a call a class, for
    each of which a GPU is waited for. Here the classes of few boxes are done together: all pairs of a class are
    compared, by torchvision's very arithmetic, and then decided in rounds. A box that no undecided one can suppress is
    kept, and those that it suppresses are not. It is done on the host, so that every device finds the same.
    """
    best = np.argsort(-scores.cpu().numpy(), kind="stable")
    label = labels.cpu().numpy()[best]
    by_class = np.argsort(label, kind="stable")
    label, boxes_of = label[by_class], boxes.cpu().numpy()[best[by_class]]
    end, follows = np.searchsorted(label, label, side="right"), np.arange(1, len(label) + 1)
    after = end - follows  # so many of its class are worse
    kept = np.ones(len(label), bool)
    if after.max(initial=0) >= _FEW:
        from torchvision import ops

        for high in np.unique(end[after >= _FEW]).tolist():
            low = int(np.searchsorted(label, label[high - 1]))
            mine = torch.from_numpy(boxes_of[low:high])
            after[low:high], kept[low:high] = 0, False
            kept[low + ops.nms(mine, torch.arange(high - low, 0, -1).to(mine), iou).numpy()] = True
    better = np.repeat(follows - 1, after)
    worse = np.arange(len(better)) + np.repeat(follows - after.cumsum() + after, after)
    left, top, right, bottom = np.ascontiguousarray(boxes_of.T)
    with np.errstate(all="ignore"):  # boxes need not be finite: their IoU is nan, which is not above a threshold
        area = (right - left) * (bottom - top)
        shared = np.minimum(np.repeat(right, after), right[worse])
        shared -= np.maximum(np.repeat(left, after), left[worse])
        down = np.minimum(np.repeat(bottom, after), bottom[worse])
        down -= np.maximum(np.repeat(top, after), top[worse])
        np.maximum(shared, 0, out=shared)
        shared *= np.maximum(down, 0, out=down)
        whole = np.repeat(area, after)
        whole += area[worse]
        whole -= shared
        above = shared / whole > np.float64(iou)
    better, worse = better[above], worse[above]
    while len(better):
        threatened = np.zeros(len(kept), bool)
        threatened[worse] = True
        undecided = threatened[better]
        kept[worse[~undecided]] = False
        undecided &= kept[better]
        undecided &= kept[worse]
        better, worse = better[undecided], worse[undecided]
    of_best = np.empty_like(kept)
    of_best[by_class] = kept
    return torch.from_numpy(best[of_best]).to(boxes.device)


def _above(scores: Tensor, threshold: float, multi_label: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [L, C] above a threshold, all of a point's or the best: point [n], score [n], label [n]."""
    kept = (scores.amax(1) > threshold).nonzero().squeeze(1)  # few of many, and quicker than to look at all twice
    scores = scores[kept]
    if multi_label:
        row, label = (scores > threshold).nonzero(as_tuple=True)
        return kept[row], scores[row, label], label
    score, label = scores.max(dim=1)
    return kept, score, label


def _rows(boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
    return torch.cat((boxes, scores[:, None], labels[:, None].to(boxes.dtype)), dim=1)
