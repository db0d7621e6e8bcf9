"""COCO's metrics, over hotcoco: exact, streaming, mergeable across ranks.

Detections are matched as they come, image by image, in original pixels; a shard travels as bytes; the numbers are those
of the COCO API (twelve in all, and the AP of each class).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import hotcoco
import numpy as np
import numpy.typing as npt

from raydet.boxes import xyxy_to_xywh
from raydet.data.index import Index

MAIN_METRIC = "mAP@0.50:0.95"

# Name → (what, IoU threshold or None for the mean over ten, area, detections an image), as the COCO API has them.
_AREAS = ("all", "small", "medium", "large")
_DETECTIONS = (1, 10, 100)
_TWELVE = {
    MAIN_METRIC: ("precision", None, "all", 100),
    "mAP@0.50": ("precision", 0.50, "all", 100),
    "mAP@0.75": ("precision", 0.75, "all", 100),
    "mAP@0.50:0.95_area=small": ("precision", None, "small", 100),
    "mAP@0.50:0.95_area=medium": ("precision", None, "medium", 100),
    "mAP@0.50:0.95_area=large": ("precision", None, "large", 100),
    "AR@0.50:0.95_max=1": ("recall", None, "all", 1),
    "AR@0.50:0.95_max=10": ("recall", None, "all", 10),
    "AR@0.50:0.95_max=100": ("recall", None, "all", 100),
    "AR@0.50:0.95_area=small": ("recall", None, "small", 100),
    "AR@0.50:0.95_area=medium": ("recall", None, "medium", 100),
    "AR@0.50:0.95_area=large": ("recall", None, "large", 100),
}


def metric_names(index: Index) -> list[str]:
    """Return the names of all metrics that a validation on an index may give."""
    return [*_TWELVE, *(f"AP@0.50:0.95_{name}" for name in index.class_names)]


class CocoEvaluation:
    """Evaluation of detections against an index.

    Args:
        index: the ground truth. Crowds count as in the COCO API: a detection on one is neither right nor wrong.
    """

    def __init__(self, index: Index):
        self._index = index
        categories = zip(index.category_ids, index.class_names, strict=True)
        self._stream = hotcoco.StreamingEval([{"id": number, "name": name} for number, name in categories])
        self._category = np.array(index.category_ids)

    def update(self, rows: Sequence[int], detections: Sequence[npt.NDArray[np.float32]]) -> None:
        """Match the detections of some images.

        Args:
            rows: the images, as rows of the index; an image is given once, and once only.
            detections: for each image [n, 6]: x1, y1, x2, y2 in pixels of the original image, score, class.
        """
        images: list[dict[str, Any]] = []
        truth: list[dict[str, Any]] = []
        found = [np.empty((0, 7))]
        for row, boxes in zip(rows, detections, strict=True):
            image_id = int(self._index.image_ids[row])
            images.append({"id": image_id})
            objects = self._index.annotations(row)
            for box, label, crowd, area in zip(xyxy_to_xywh(objects.boxes).tolist(), *objects[1:], strict=True):
                truth.append(
                    {
                        "id": len(truth) + 1,
                        "image_id": image_id,
                        "category_id": int(self._category[label]),
                        "bbox": box,
                        "area": float(area),
                        "iscrowd": int(crowd),
                    }
                )
            rows_of_seven = np.empty((len(boxes), 7))
            rows_of_seven[:, 0] = image_id
            rows_of_seven[:, 1:5] = xyxy_to_xywh(np.asarray(boxes[:, :4], np.float64))
            rows_of_seven[:, 5] = boxes[:, 4]
            rows_of_seven[:, 6] = self._category[boxes[:, 5].astype(int)]
            found.append(rows_of_seven)
        self._stream.update(images, truth, np.concatenate(found))

    def to_bytes(self) -> bytes:
        """Return the state, for `merge_bytes` in another process."""
        state: bytes = self._stream.to_bytes()
        return state

    def merge_bytes(self, shards: Iterable[bytes]) -> None:
        """Take over the images of other evaluations of the same index, in place of the own ones."""
        self._stream = hotcoco.StreamingEval.merge(hotcoco.StreamingEval.from_bytes(shard) for shard in shards)

    def compute(self) -> dict[str, float]:
        """Return the metrics by name, once: the evaluation is used up.

        COCO's twelve, as far as the ground truth has boxes of the size (their keys are missing otherwise), and
        `AP@0.50:0.95_{class}` of each class that it has.
        """
        evaluation = self._stream.finalize()
        evaluation.accumulate()
        found = evaluation.eval
        assert found is not None
        arrays = {
            "precision": np.asarray(found["precision"]),  # [IoU, recall, class, area, detections]
            "recall": np.asarray(found["recall"]),  # [IoU, class, area, detections]
        }
        thresholds = np.linspace(0.5, 0.95, 10)
        metrics = {}
        for name, (what, iou, area, detections) in _TWELVE.items():
            values = arrays[what][..., _AREAS.index(area), _DETECTIONS.index(detections)]
            values = values if iou is None else values[np.isclose(thresholds, iou)]
            if (values > -1).any():  # -1: no ground truth
                metrics[name] = float(values[values > -1].mean())
        for label, name in enumerate(self._index.class_names):
            values = arrays["precision"][:, :, label, 0, -1]
            if (values > -1).any():
                metrics[f"AP@0.50:0.95_{name}"] = float(values[values > -1].mean())
        return metrics
