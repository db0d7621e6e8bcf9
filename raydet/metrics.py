"""How good detections are: COCO's numbers, over hotcoco, and the true precision and recall at a score threshold.

Detections are collected as they come, on every rank; what was found by all is measured once.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import hotcoco
import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from raydet.boxes import cxcywh_to_xyxy, xyxy_to_xywh
from raydet.data.index import Index
from raydet.errors import RaydetError
from raydet.matching import Boxes, match, operating

MAIN_METRIC = "mAP@0.50:0.95"
IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
BEST_THRESHOLD = "Best_score_threshold"

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
_OPERATING = ("Precision@0.50", "Recall@0.50", "F1@0.50", BEST_THRESHOLD)


def metric_names(index: Index) -> list[str]:
    """Return the names of all metrics that a validation on an index may give."""
    return [*_TWELVE, *_OPERATING, *(f"AP@0.50:0.95_{name}" for name in index.class_names)]


class CocoEvaluation:
    """Evaluation of detections against an index.

    Args:
        index: the ground truth. Crowds count as in the COCO API: a detection on one is neither right nor wrong.
    """

    def __init__(self, index: Index):
        self._index = index
        self._rows: list[int] = []
        self._found: list[npt.NDArray[np.float64]] = [np.empty((0, 7))]

    def update(self, rows: Sequence[int], detections: Sequence[npt.NDArray[np.floating]]) -> None:
        """Take the detections of some images.

        Args:
            rows: the images, as rows of the index; an image is given once, and once only.
            detections: for each image [n, 6]: x1, y1, x2, y2 in pixels of the original image, score, class.
        """
        self._rows += rows
        self._found += [
            np.column_stack((np.full(len(boxes), row), boxes)) for row, boxes in zip(rows, detections, strict=True)
        ]

    def to_bytes(self) -> bytes:
        """Return the state, for `merge_bytes` in another process."""
        buffer = io.BytesIO()
        np.savez(buffer, rows=np.array(self._rows, int), found=np.concatenate(self._found))
        return buffer.getvalue()

    def merge_bytes(self, shards: Iterable[bytes]) -> None:
        """Take over the images of other evaluations of the same index, in place of the own ones."""
        parts = [np.load(io.BytesIO(shard)) for shard in shards]
        self._rows = [row for part in parts for row in part["rows"].tolist()]
        self._found = [part["found"] for part in parts]

    @property
    def found(self) -> Boxes:
        """The detections by rows of the index: by image, in each as they were given."""
        return detected(np.concatenate(self._found))

    @property
    def truth(self) -> Boxes:
        """The objects of the images that were given, by rows of the index."""
        return objects(self._index, np.array(self._rows, int))

    def coco(self) -> Any:
        """Return hotcoco's COCOeval, evaluated and accumulated, with the image and category ids of the data set."""
        return coco_eval(
            self._index.image_ids[sorted(self._rows)],
            self._index.category_ids,
            self._index.class_names,
            self._in_ids(self.truth),
            self._in_ids(self.found),
        )

    def results(self) -> list[dict[str, Any]]:
        """Return the detections as COCO's results, with the image and category ids of the data set."""
        found = self._in_ids(self.found)
        columns = (found.image, np.asarray(self._index.category_ids)[found.label], found.xywh, found.score)
        keys = ("image_id", "category_id", "bbox", "score")
        return [
            dict(zip(keys, row, strict=True))
            for row in zip(*(np.asarray(part).tolist() for part in columns), strict=True)
        ]

    def compute(self) -> dict[str, float]:
        """Return the metrics by name.

        COCO's twelve, as far as the ground truth has boxes of the size (their keys are missing otherwise);
        `AP@0.50:0.95_{class}` of each class that it has; `Best_score_threshold`, of a hundred, at which the mean F1 of
        the classes at IoU 0.50 is highest, and there the mean `F1@0.50`, `Precision@0.50` and `Recall@0.50`.

        Raises:
            RaydetError: the images have no objects, so that there is nothing to measure.
        """
        truth = self.truth
        _check_truth(truth, len(self._rows))
        evaluation = self.coco()
        metrics = _twelve(evaluation) | {
            f"AP@0.50:0.95_{self._index.class_names[label]}": value for label, value in _class_means(evaluation).items()
        }
        matches = match(truth, self.found, len(self._index.class_names), np.array([0.5]))
        at = operating(matches, RECALLS)
        means = [np.nanmean(values, axis=(0, 1)) for values in (at.precision, at.recall, at.f1)]
        best = int(means[2].argmax())
        point = [*(float(values[best]) for values in means), float(RECALLS[best])]
        return metrics | dict(zip(_OPERATING, point, strict=True))

    def _in_ids(self, boxes: Boxes) -> Boxes:
        return Boxes(self._index.image_ids[boxes.image], *list(vars(boxes).values())[1:])


def objects(index: Index, rows: npt.NDArray[np.integer] | None = None) -> Boxes:
    """Return the objects of an index, or of some of its rows; images are numbered by row."""
    image, (boxes, labels, crowd, area) = index.objects()
    truth = Boxes(image, labels, xyxy_to_xywh(boxes), crowd=crowd, area=area)
    return truth if rows is None else truth[np.isin(image, rows)]


def detected(rows: npt.NDArray[np.floating]) -> Boxes:
    """Return detections [n, 7]: image, x1, y1, x2, y2, score, class; by image, in each in their order."""
    rows = rows[np.argsort(rows[:, 0], kind="stable")].astype(np.float64)
    return Boxes(rows[:, 0].astype(int), rows[:, 6].astype(int), xyxy_to_xywh(rows[:, 1:5]), score=rows[:, 5])


def coco_eval(
    images: Sequence[int] | npt.NDArray[np.integer],
    category_ids: Sequence[int],
    class_names: Sequence[str],
    truth: Boxes,
    found: Boxes,
    parameters: Callable[[Any], None] | None = None,
) -> Any:
    """Return hotcoco's COCOeval, evaluated and accumulated.

    Args:
        images: ids of all images.
        category_ids: of the labels.
        class_names: of the labels.
        truth: objects, their images by id.
        found: detections, their images by id.
        parameters: changes hotcoco's parameters.
    """
    categories = np.asarray(category_ids)
    crowd = np.zeros(len(truth), int) if truth.crowd is None else truth.crowd.astype(int)
    area = truth.xywh[:, 2] * truth.xywh[:, 3] if truth.area is None else truth.area
    expected = hotcoco.COCO.from_arrays(
        [{"id": int(number)} for number in images],
        [{"id": number, "name": name} for number, name in zip(category_ids, class_names, strict=True)],
        truth.image,
        categories[truth.label],
        truth.xywh,
        area=area,
        iscrowd=crowd,
    )
    assert found.score is not None
    results = expected.load_res(np.column_stack((found.image, found.xywh, found.score, categories[found.label])))
    evaluation = hotcoco.COCOeval(expected, results, "bbox")
    if parameters is not None:
        parameters(evaluation.params)
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


def _check_truth(truth: Boxes, images: int) -> None:
    if truth.crowd is None or truth.crowd.all():
        raise RaydetError(
            f"there are no objects (crowds are none) in the {images} images to measure on: check data.val_annotations"
        )


def _twelve(evaluation: Any) -> dict[str, float]:
    """Return COCO's twelve numbers, those that there are objects for."""
    found = evaluation.eval
    arrays = {
        "precision": np.asarray(found["precision"]),  # [IoU, recall, class, area, detections]
        "recall": np.asarray(found["recall"]),  # [IoU, class, area, detections]
    }
    metrics = {}
    for name, (what, iou, area, detections) in _TWELVE.items():
        values = arrays[what][..., _AREAS.index(area), _DETECTIONS.index(detections)]
        values = values if iou is None else values[np.isclose(IOUS, iou)]
        if (values > -1).any():  # -1: no ground truth
            metrics[name] = float(values[values > -1].mean())
    return metrics


def _class_means(evaluation: Any) -> dict[int, float]:
    """Return the mean precision of each label that there are objects of, of all sizes."""
    precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]
    return {
        label: float(precision[:, :, label].mean())
        for label in range(precision.shape[2])
        if (precision[:, :, label] > -1).all()
    }


class DetectionMetrics:
    """Precision, recall, F1 and AP of detections in the model's input, and COCO's twelve: SuperGradients' interface.

    Its numbers are COCO's: a detection is right from the IoU threshold on, boxes are not clipped, and precision and
    recall are the true ones at the score threshold, not interpolated.

    Args:
        num_cls: number of classes.
        post_prediction_callback: makes detections of the model's output; None: `update` gets detections.
        normalize_targets: as SuperGradients has it, whose name misleads: True: targets are in pixels, False: they are
            shares of the input's sides. None: `target_units` says.
        iou_thres: lowest IoU of a right detection: a number, or (lowest, highest) of a range in steps of 0.05.
        recall_thres: at which AP takes the precision; None: 0, 0.01, … 1.
        score_thres: of precision, recall and F1.
        top_k_predictions: the best so many detections of each class in an image count.
        calc_best_score_thresholds: find the score thresholds of the highest F1.
        include_classwise_ap: AP, and best threshold, of each class too.
        class_names: of the labels; None: class_0, class_1, …
        target_units: of the boxes that `update` gets: "pixels" of the input or "normalized" by its sides.

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
            inputs: [B, 3, H, W] the batch, for the sides that normalised targets are shares of.
            crowd_targets: [N, 6] as target.

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
                rows[:, 2:] *= torch.tensor([width, height, width, height])
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
        truth = Boxes(truth.image, truth.label, truth.xywh, crowd=truth.score > 0)
        found = detected(np.concatenate(self._found))
        _check_truth(truth, self._images)
        given = (range(self._images), range(1, self.num_cls + 1), self.class_names, truth, found)
        standard = coco_eval(*given)
        is_standard = self.at == "0.50:0.95" and np.array_equal(self.recalls, RECALLS) and self.top_k_predictions == 100
        averages = _class_means(standard if is_standard else coco_eval(*given, parameters=self._parameters))
        matches = match(truth, found, self.num_cls, self.ious, self.top_k_predictions)
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
        return _twelve(standard) | metrics

    def _parameters(self, parameters: Any) -> None:
        parameters.iou_thrs = self.ious.tolist()
        parameters.rec_thrs = self.recalls.tolist()
        parameters.max_dets = [self.top_k_predictions]
        parameters.area_rng, parameters.area_rng_lbl = [[0, 1e10]], ["all"]


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
