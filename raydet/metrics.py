"""DetectionMetrics: how good detections in the model's input are, by the interface that SuperGradients' users know."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from raydet.boxes import cxcywh_to_xyxy
from raydet.errors import RaydetError
from raydet.evaluation.coco import (
    AREAS,
    BEST_THRESHOLD,
    IOUS,
    MAX_DETS,
    RECALLS,
    accumulate,
    check_truth,
    class_means,
    detected,
    twelve,
)
from raydet.evaluation.matching import BoxTable, Matching, interpolated, operating


class DetectionMetrics:
    """Precision, recall, F1 and AP of detections in the model's input, and COCO's twelve: SuperGradients' interface.

    Its numbers are COCO's: a detection is right from the IoU threshold on, boxes are not clipped, and precision and
    recall are the true ones at the score threshold, not interpolated.

    Args:
        num_cls: number of classes.
        post_prediction_callback: turns the model's output into detections; None: `update` gets detections.
        normalize_targets: SuperGradients' argument, whose name misleads: True: targets are in pixels, False: they are
            fractions of the input's sides; None: `target_units` decides.
        iou_thres: lowest IoU of a right detection: a number, or (lowest, highest) of a range in steps of 0.05.
        recall_thres: recalls at which AP takes the precision; None: 0, 0.01, … 1.
        score_thres: score threshold of precision, recall and F1.
        top_k_predictions: largest number of detections of each class in an image that count, best scores first.
        calc_best_score_thresholds: find the score thresholds with the highest F1.
        include_classwise_ap: compute AP, and the best score threshold, of each class as well.
        class_names: name of each class; None: class_0, class_1, …
        target_units: unit of the target boxes that `update` gets: "pixels" of the input or "normalized" by its sides.

    Raises:
        ValueError: an argument cannot be right.
    """

    def __init__(
        self,
        num_cls: int,
        post_prediction_callback: Callable[[Any], list[Tensor]] | None = None,
        normalize_targets: bool | None = None,
        iou_thres: float | Sequence[float] = (0.5, 0.95),
        recall_thres: Sequence[float] | Tensor | None = None,
        score_thres: float = 0.1,
        top_k_predictions: int = 100,
        calc_best_score_thresholds: bool = True,
        include_classwise_ap: bool = False,
        class_names: Sequence[str] | None = None,
        target_units: Literal["pixels", "normalized"] | None = None,
    ):
        limits = tuple(float(iou) for iou in iou_thres) if isinstance(iou_thres, Sequence) else (float(iou_thres),)
        if len(limits) not in (1, 2) or not 0 < limits[0] <= limits[-1] <= 1:
            raise ValueError(f"iou_thres is {iou_thres}: it is a number or (lowest, highest), above 0 and up to 1")
        if target_units not in (None, "pixels", "normalized"):
            raise ValueError(f"target_units is {target_units!r}: it is 'pixels' or 'normalized'")
        units = {None: target_units, True: "pixels", False: "normalized"}[normalize_targets]
        if target_units is not None and units != target_units:
            raise ValueError(f"normalize_targets={normalize_targets} means {units}, but target_units is {target_units}")
        if class_names is not None and len(class_names) != num_cls:
            raise ValueError(f"class_names has {len(class_names)} names for {num_cls} classes")
        self.num_cls = num_cls
        self.post_prediction_callback = post_prediction_callback
        self.target_units = units or "pixels"
        self.ious = np.linspace(limits[0], limits[-1], round((limits[-1] - limits[0]) / 0.05) + 1)
        self.at = ":".join(f"{limit:.2f}" for limit in dict.fromkeys(limits))
        self.recalls = RECALLS if recall_thres is None else np.asarray(recall_thres, np.float64)
        self.score_thres = score_thres
        self.top_k_predictions = top_k_predictions
        self.calc_best_score_thresholds = calc_best_score_thresholds
        self.include_classwise_ap = include_classwise_ap
        self.class_names = list(class_names or (f"class_{label}" for label in range(num_cls)))
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self._images = 0
        self._truth: list[npt.NDArray[np.float64]] = [np.empty((0, 7))]  # image, x1, y1, x2, y2, crowd, class
        self._found: list[npt.NDArray[np.float64]] = [np.empty((0, 7))]

    def update(
        self,
        preds: Any,
        target: Tensor,
        device: Any = None,
        inputs: Tensor | None = None,
        crowd_targets: Tensor | None = None,
    ) -> None:
        """Take the detections and the objects of a batch.

        Args:
            preds: the model's output, or, without a callback, for each image [n, 6]: x1, y1, x2, y2, score, class.
            target: [N, 6] image of the batch, class, cx, cy, w, h.
            device: has no effect; SuperGradients has it.
            inputs: [B, 3, H, W] images of the batch, whose sides normalised targets are fractions of.
            crowd_targets: [N, 6] crowds, given like `target`.

        Raises:
            ValueError: a target is of no image or class there is, or `inputs` is missing.
        """
        detections = self.post_prediction_callback(preds) if self.post_prediction_callback else preds
        for image, found in enumerate(detections):
            rows = found.detach().cpu().double().numpy()
            self._found.append(np.column_stack((np.full(len(rows), self._images + image), rows)))
        for crowd, given in enumerate((target, crowd_targets)):
            if given is None or not len(given):
                continue
            rows = given.detach().cpu().double()
            if self.target_units == "normalized":
                if inputs is None:
                    raise ValueError("normalised targets need inputs=, the batch whose sides they are shares of")
                height, width = inputs.shape[-2:]
                rows = rows * torch.tensor(
                    [1, 1, width, height, width, height]
                )  # not in place: they may be the caller's
            of_image, label = rows[:, 0].numpy(), rows[:, 1].numpy()
            for what, values, count in (("images", of_image, len(detections)), ("classes", label, self.num_cls)):
                if values.min() < 0 or values.max() >= count:
                    raise ValueError(f"targets are of {what} {values.min():g} to {values.max():g}; there are {count}")
            boxes = cxcywh_to_xyxy(rows[:, 2:]).numpy()
            self._truth.append(np.column_stack((self._images + of_image, boxes, np.full(len(rows), crowd), label)))
        self._images += len(detections)

    def __call__(self, preds: Any, target: Tensor, **given: Any) -> None:
        """Call `update`."""
        self.update(preds, target, **given)

    def merge(self, others: Iterable[DetectionMetrics]) -> None:
        """Take over the images of other metrics with the same settings, such as those of other ranks."""
        for other in others:
            for mine, theirs in ((self._truth, other._truth), (self._found, other._found)):
                rows = np.concatenate(theirs)
                rows[:, 0] += self._images
                mine.append(rows)
            self._images += other._images

    def compute(self) -> dict[str, float]:
        """Return the metrics of all images, of all ranks of a process group, by name.

        With `@0.50:0.95` standing for `iou_thres`: `Precision@0.50:0.95`, `Recall@…`, `mAP@…`, `F1@…`: means over IoU
        thresholds and classes with objects; `AP@…_{class}`, 0 for a class without objects; `Best_score_threshold` and
        `Best_score_threshold_{class}`; COCO's twelve, of the best 100 detections.

        Raises:
            RaydetError: there are no objects.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return self._compute()
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, (self._images, np.concatenate(self._truth), np.concatenate(self._found)))
        answer: list[Any] = [None]
        if dist.get_rank() == 0:
            whole = self._like_this()
            whole.merge(self._like_this(*state) for state in ranks)
            try:
                answer = [whole._compute()]
            except RaydetError as error:
                answer = [error]
        dist.broadcast_object_list(answer, src=0)
        if isinstance(answer[0], RaydetError):
            raise answer[0]
        metrics: dict[str, float] = answer[0]
        return metrics

    def _like_this(self, images: int = 0, truth: Any = None, found: Any = None) -> DetectionMetrics:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.reset()
        if images:
            other._images, other._truth, other._found = images, [truth], [found]
        return other

    def _compute(self) -> dict[str, float]:
        rows = np.concatenate(self._truth)
        truth = detected(rows)
        assert truth.score is not None
        truth = BoxTable(truth.image, truth.label, truth.xywh, crowd=truth.score > 0)
        found = detected(np.concatenate(self._found))
        check_truth(truth, self._images)
        coco = Matching(truth, found, self.num_cls, IOUS)
        standard = accumulate(coco)
        is_coco = np.array_equal(self.ious, IOUS) and self.top_k_predictions == MAX_DETS
        matching = coco if is_coco else Matching(truth, found, self.num_cls, self.ious, self.top_k_predictions)
        precision = standard.precision[..., 0]
        if not is_coco or not np.array_equal(self.recalls, RECALLS):
            of_all, wrong_before = matching.of_size(*AREAS["all"])
            precision = interpolated(of_all, self.recalls, wrong_before=wrong_before).transpose(0, 2, 1)
        averages = class_means(precision)
        matches = matching.matches
        point = operating(matches, np.array([self.score_thres]))
        metrics = {
            f"Precision@{self.at}": float(np.nanmean(point.precision)),
            f"Recall@{self.at}": float(np.nanmean(point.recall)),
            f"mAP@{self.at}": float(np.mean(list(averages.values()))),
            f"F1@{self.at}": float(np.nanmean(point.f1)),
        }
        if self.include_classwise_ap:
            names = enumerate(self.class_names)
            metrics |= {f"AP@{self.at}_{name}": averages.get(label, 0.0) for label, name in names}
        if self.calc_best_score_thresholds:
            thresholds = np.linspace(0, 1, len(self.recalls))
            f1 = operating(matches, thresholds).f1.mean(axis=0)  # [C, S]
            metrics[BEST_THRESHOLD] = float(thresholds[np.nanmean(f1, axis=0).argmax()])
            if self.include_classwise_ap:
                best = np.where(np.isnan(f1), 0, f1).argmax(axis=1)
                metrics |= {
                    f"{BEST_THRESHOLD}_{name}": float(thresholds[best[label]])
                    for label, name in enumerate(self.class_names)
                }
        return twelve(standard) | metrics


class DetectionMetrics_050(DetectionMetrics):
    """DetectionMetrics at IoU 0.50."""

    def __init__(self, num_cls: int, post_prediction_callback: Any = None, **settings: Any):
        super().__init__(num_cls, post_prediction_callback, iou_thres=0.5, **settings)


class DetectionMetrics_075(DetectionMetrics):
    """DetectionMetrics at IoU 0.75."""

    def __init__(self, num_cls: int, post_prediction_callback: Any = None, **settings: Any):
        super().__init__(num_cls, post_prediction_callback, iou_thres=0.75, **settings)


class DetectionMetrics_050_095(DetectionMetrics):
    """DetectionMetrics over the IoUs 0.50, 0.55, … 0.95."""

    def __init__(self, num_cls: int, post_prediction_callback: Any = None, **settings: Any):
        super().__init__(num_cls, post_prediction_callback, iou_thres=(0.5, 0.95), **settings)
