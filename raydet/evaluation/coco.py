"""How good the detections of a data set are: COCO's numbers, and the true precision and recall.

Detections are collected as they come, on every rank; what was found by all is measured once. torch is not imported
here, so that commands that only read a run's numbers start at once.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import hotcoco
import numpy as np
import numpy.typing as npt

from raydet.boxes import coco_results, xywh_to_xyxy, xyxy_to_xywh
from raydet.errors import RaydetError
from raydet.evaluation.matching import BoxTable, Floats, Matching, interpolated, operating

if TYPE_CHECKING:
    from raydet.data.index import Index

MAIN_METRIC = "mAP@0.50:0.95"
IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
BEST_THRESHOLD = "Best_score_threshold"

MAX_DETS = 100  # COCO's: the best so many detections of each class in an image count

# Areas of objects in pixels², smallest and largest.
AREAS = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}


def twelve_names(max_dets: int = MAX_DETS) -> dict[str, tuple[str, float | None, str, int]]:
    """Return COCO's twelve numbers by name, where `max_dets` detections of each class in an image count.

    Each is what it is, its IoU threshold or None for the mean over ten, the area, and the place of its number of
    detections among 1, 10 and `max_dets`, as the COCO API has them.
    """
    return {
        MAIN_METRIC: ("precision", None, "all", 2),
        "mAP@0.50": ("precision", 0.50, "all", 2),
        "mAP@0.75": ("precision", 0.75, "all", 2),
        "mAP@0.50:0.95_area=small": ("precision", None, "small", 2),
        "mAP@0.50:0.95_area=medium": ("precision", None, "medium", 2),
        "mAP@0.50:0.95_area=large": ("precision", None, "large", 2),
        "AR@0.50:0.95_max=1": ("recall", None, "all", 0),
        "AR@0.50:0.95_max=10": ("recall", None, "all", 1),
        f"AR@0.50:0.95_max={max_dets}": ("recall", None, "all", 2),
        "AR@0.50:0.95_area=small": ("recall", None, "small", 2),
        "AR@0.50:0.95_area=medium": ("recall", None, "medium", 2),
        "AR@0.50:0.95_area=large": ("recall", None, "large", 2),
    }


TWELVE = twelve_names()
_OPERATING = ("Precision@0.50", "Recall@0.50", "F1@0.50", BEST_THRESHOLD)


def metric_names(index: Index, max_dets: int = MAX_DETS) -> list[str]:
    """Return the names of all metrics that a validation on an index may give."""
    return [*twelve_names(max_dets), *_OPERATING, *(f"AP@0.50:0.95_{name}" for name in index.class_names)]


class CocoEvaluation:
    """Evaluation of detections against an index.

    Args:
        index: the ground truth. Crowds count as in the COCO API: a detection on one is neither right nor wrong.
        max_dets: largest number of detections of each class in an image that count, best scores first.
    """

    def __init__(self, index: Index, max_dets: int = MAX_DETS):
        self.max_dets = max_dets
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
        found = np.concatenate(self._found)
        np.savez(buffer, rows=np.array(self._rows, int), found=found, max_dets=self.max_dets)
        return buffer.getvalue()

    def merge_bytes(self, shards: Iterable[bytes]) -> None:
        """Take over the images, and `max_dets`, of other evaluations of the same index, in place of the own ones."""
        parts = [np.load(io.BytesIO(shard)) for shard in shards]
        self.max_dets = int(parts[0]["max_dets"])
        self._rows = [row for part in parts for row in part["rows"].tolist()]
        self._found = [part["found"] for part in parts]

    @classmethod
    def from_bytes(cls, index: Index, state: bytes) -> CocoEvaluation:
        """Return the evaluation on an index that `to_bytes` gave the state of."""
        evaluation = cls(index)
        evaluation.merge_bytes([state])
        return evaluation

    @property
    def found(self) -> BoxTable:
        """The detections by rows of the index: by image, in each as they were given."""
        return detected(np.concatenate(self._found))

    @property
    def truth(self) -> BoxTable:
        """The objects of the images that were given, by rows of the index."""
        return objects(self._index, np.array(self._rows, int))

    def coco(self) -> Any:
        """Return hotcoco's COCOeval, evaluated and accumulated, with the image and category ids of the data set."""
        truth, found = (self._in_ids(boxes) for boxes in (self.truth, self.found))
        assert truth.crowd is not None
        assert found.score is not None
        names = self._index.class_names
        categories = np.asarray(self._index.category_ids)
        expected = hotcoco.COCO.from_arrays(
            [{"id": int(number)} for number in self._index.image_ids[sorted(self._rows)]],
            [{"id": number, "name": name} for number, name in zip(self._index.category_ids, names, strict=True)],
            truth.image,
            categories[truth.label],
            truth.xywh,
            area=truth.area,
            iscrowd=truth.crowd.astype(int),
        )
        results = expected.load_res(np.column_stack((found.image, found.xywh, found.score, categories[found.label])))
        evaluation = hotcoco.COCOeval(expected, results, "bbox")
        evaluation.params.max_dets = [1, 10, self.max_dets]
        evaluation.evaluate()
        evaluation.accumulate()
        return evaluation

    def results(self) -> list[dict[str, Any]]:
        """Return the detections as COCO's results, with the image and category ids of the data set."""
        found = self._in_ids(self.found)
        categories = np.asarray(self._index.category_ids)[found.label]
        assert found.score is not None
        return coco_results(found.image.tolist(), categories.tolist(), found.xywh, found.score)

    def compute(self) -> dict[str, float]:
        """Return the metrics by name.

        COCO's twelve, as far as the ground truth has boxes of the size (their keys are missing otherwise);
        `AP@0.50:0.95_{class}` of each class that it has; `Best_score_threshold`, of a hundred, at which the mean F1 of
        the classes at IoU 0.50 is highest, and there the mean `F1@0.50`, `Precision@0.50` and `Recall@0.50`.

        Raises:
            RaydetError: the images have no objects, so that there is nothing to measure.
        """
        truth = self.truth
        check_truth(truth, len(self._rows))
        found = self.found
        numbers = self._index.image_ids[found.image]
        if (np.diff(numbers) < 0).any():  # of equal scores the COCO API takes the lower id first
            found = found[np.argsort(numbers, kind="stable")]
        matching = Matching(truth, found, len(self._index.class_names), IOUS, self.max_dets)
        averages = accumulate(matching, self.max_dets)
        metrics = twelve(averages, self.max_dets) | {
            f"AP@0.50:0.95_{self._index.class_names[label]}": value
            for label, value in class_means(averages.precision[..., 0]).items()
        }
        at = operating(matching.matches.at(slice(0, 1)), RECALLS)
        means = [np.nanmean(values, axis=(0, 1)) for values in (at.precision, at.recall, at.f1)]
        best = int(means[2].argmax())
        point = [*(float(values[best]) for values in means), float(RECALLS[best])]
        return metrics | dict(zip(_OPERATING, point, strict=True))

    def _in_ids(self, boxes: BoxTable) -> BoxTable:
        return BoxTable(self._index.image_ids[boxes.image], *list(vars(boxes).values())[1:])


class Beyond(NamedTuple):
    """Objects that an evaluation cannot all count as found, for there are more of them in an image than detections.

    Attributes:
        what: has so many.
        records: each of these, with the number.
        remedy: setting to change.
    """

    what: str
    records: list[str]
    remedy: str

    def __str__(self) -> str:
        return f"{len(self.records)} {self.what}, such as {self.records[0]}: {self.remedy}"


def beyond(index: Index, max_dets: int, max_detections: int) -> list[Beyond]:
    """Return where an image has more objects than detections count: of a class `max_dets`, in all `max_detections`."""
    image, (_, label, crowd, _) = index.objects()
    image, label, classes = image[~crowd], label[~crowd], len(index.class_names)
    names = index.table["path"]
    found = []
    pairs, counts = np.unique(image * classes + label, return_counts=True)
    if len(which := np.flatnonzero(counts > max_dets)):
        which = which[np.argsort(-counts[which], kind="stable")]
        records = [f"{names[pair // classes]}: {index.class_names[pair % classes]}" for pair in pairs[which].tolist()]
        found.append(
            Beyond(
                f"images have more objects of a class than the {max_dets} that AP counts",
                [f"{record} {count}" for record, count in zip(records, counts[which].tolist(), strict=True)],
                f"set eval.max_dets={counts.max()}, or those beyond count as missed",
            )
        )
    counts = np.bincount(image, minlength=len(index))
    if len(which := np.flatnonzero(counts > max_detections)):
        which = which[np.argsort(-counts[which], kind="stable")]
        found.append(
            Beyond(
                f"images have more objects than the {max_detections} detections of an image that are kept",
                [f"{names[row]}: {counts[row]}" for row in which.tolist()],
                f"set eval.max_detections={counts.max()}, or those beyond count as missed",
            )
        )
    return found


def objects(index: Index, rows: npt.NDArray[np.integer] | None = None) -> BoxTable:
    """Return the objects of an index, or of some of its rows; images are numbered by row."""
    image, (boxes, labels, crowd, area) = index.objects()
    truth = BoxTable(image, labels, xyxy_to_xywh(boxes), crowd=crowd, area=area)
    return truth if rows is None else truth[np.isin(image, rows)]


def detected(rows: npt.NDArray[np.floating]) -> BoxTable:
    """Return detections [n, 7]: image, x1, y1, x2, y2, score, class; by image, in each in their order."""
    if (np.diff(rows[:, 0]) < 0).any():
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
    rows = rows.astype(np.float64, copy=False)
    return BoxTable(rows[:, 0].astype(int), rows[:, 6].astype(int), xyxy_to_xywh(rows[:, 1:5]), score=rows[:, 5])


class Averages(NamedTuple):
    """What COCO's twelve numbers are means of; nan for classes without objects of the size.

    Attributes:
        precision: [T, R, C, areas] interpolated precision, of the largest number of detections.
        recall: [T, C, areas, 3] recall of the best 1, 10 and the largest number of detections.
    """

    precision: Floats
    recall: Floats


def accumulate(matching: Matching, max_dets: int = MAX_DETS) -> Averages:
    """Return what COCO's numbers are means of; `max_dets` is that of the matching."""
    precision, recall = [], []
    for limits in AREAS.values():
        matches, wrong_before = matching.of_size(*limits)
        precision.append(interpolated(matches, RECALLS, wrong_before=wrong_before).transpose(0, 2, 1))
        objects = np.where(matches.objects > 0, matches.objects, np.nan)
        cell = 3 * matches.label + (matches.rank >= 1) + (matches.rank >= 10)
        found = np.stack([np.bincount(cell[right], minlength=3 * len(objects)) for right in matches.right])
        recall.append(found.reshape(len(IOUS), len(objects), 3).cumsum(axis=2) / objects[:, None])
    return Averages(np.stack(precision, axis=3), np.stack(recall, axis=2))


def check_truth(truth: BoxTable, images: int) -> None:
    """Raise RaydetError where there is nothing to measure on."""
    if truth.crowd is None or truth.crowd.all():
        raise RaydetError(
            f"there are no objects (crowds are none) in the {images} images to measure on: check data.val_annotations"
        )


def twelve(averages: Averages, max_dets: int = MAX_DETS) -> dict[str, float]:
    """Return COCO's twelve numbers, those that there are objects for; `max_dets` is that of the averages."""
    metrics = {}
    for name, (what, iou, area, place) in twelve_names(max_dets).items():
        size = list(AREAS).index(area)
        values = averages.precision[..., size] if what == "precision" else averages.recall[:, :, size, place]
        values = values if iou is None else values[np.isclose(IOUS, iou)]
        if (known := ~np.isnan(values)).any():
            metrics[name] = float(values[known].mean())
    return metrics


def class_means(precision: Floats) -> dict[int, float]:
    """Return the mean of the interpolated precision [T, R, C] of each label that there are objects of."""
    return {
        label: float(precision[:, :, label].mean()) for label in np.flatnonzero(~np.isnan(precision[0, 0])).tolist()
    }


def read_results(path: Path, index: Index, max_dets: int = MAX_DETS) -> CocoEvaluation:
    """Read COCO's results JSON as an evaluation of an index.

    Args:
        path: JSON file with a list of {image_id, category_id, bbox: [left, top, width, height], score}.
        index: the ground truth.
        max_dets: largest number of detections of each class in an image that count, best scores first.

    Raises:
        RaydetError: the file is not that, or of other images or categories than the index.
    """
    try:
        entries = json.loads(path.read_text())
        columns = {key: np.array([entry[key] for entry in entries], int) for key in ("image_id", "category_id")}
        scores = np.array([entry["score"] for entry in entries], float)
        boxes = np.array([entry["bbox"] for entry in entries], float).reshape(len(entries), 4)
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise ValueError("a score or a side of a box is not finite")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RaydetError(
            f"{path} is not COCO's results, a list of {{image_id, category_id, bbox, score}}: "
            f"{type(error).__name__} {error}"
        ) from None
    known = {"image_id": index.image_ids, "category_id": np.array(index.category_ids)}
    for key, values in known.items():
        unknown = np.setdiff1d(columns[key], values)
        if len(unknown):
            raise RaydetError(f"{path}: the data has no {key} {unknown[0]}, and {len(unknown) - 1} others in the file")
    rows, labels = (
        np.argsort(values)[np.searchsorted(np.sort(values), columns[key])] if len(entries) else np.empty(0, int)
        for key, values in known.items()
    )
    found = np.column_stack((xywh_to_xyxy(boxes), scores, labels)) if len(entries) else np.empty((0, 6))
    by_image = np.argsort(rows, kind="stable")
    evaluation = CocoEvaluation(index, max_dets)
    evaluation.update(range(len(index)), np.split(found[by_image], rows[by_image].searchsorted(range(1, len(index)))))
    return evaluation
