"""The search for a model's thresholds: what counts as a detection, without running the model again.

Candidates are computed once. A score threshold, or a limit to the detections of an image, takes away detections
that are worse than all that stay, which changes neither NMS nor COCO's matching of those: both are done once for all
settings that differ in no more than that.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from raydet.errors import RaydetError
from raydet.evaluation.coco import IOUS, MAIN_METRIC, MAX_DETS, RECALLS, objects
from raydet.evaluation.matching import Floats, Matches, average_precision, counts, match, operating
from raydet.postprocess import DFinePostPredictionCallback, PostPrediction
from raydet.tuning.candidates import FLOOR, TOP_K, CandidateSet

OBJECTIVES = (MAIN_METRIC, "mAP@0.50", "mAP@0.75", "F1@0.50")
SPACE: dict[str, tuple[Any, ...]] = {
    "score": (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7),
    "iou": tuple(round(0.3 + 0.05 * step, 2) for step in range(13)),
    "nms_top_k": (300, 1000, TOP_K),
    "max_detections": (100, 300),
    "multi_label": (False, True),
    "class_agnostic": (False, True),
}
_AFTER_NMS = ("score", "max_detections")  # a tenth of the work: each NMS is measured with several
OF_NMS = ("iou", "nms_top_k", "class_agnostic")  # without meaning for a model that has no NMS
_FOR_EACH_NMS = 4
RESAMPLES = 300
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Setting:
    """What counts as a detection; the meaning of each is that of the recipe's section `eval`."""

    score: float
    iou: float
    nms_top_k: int
    max_detections: int
    multi_label: bool
    class_agnostic: bool

    @classmethod
    def of(cls, thresholds: Any) -> Setting:
        """Return a recipe's or a checkpoint's, within the candidates that are kept."""
        given = {name: getattr(thresholds, name) for name in cls.__dataclass_fields__}
        given["nms_top_k"] = min(given["nms_top_k"] or TOP_K, TOP_K)
        given["score"] = max(given["score"], FLOOR)
        return cls(**given)

    def chosen(self, has_nms: bool) -> dict[str, Any]:
        """Return the settings that a search has chosen, by name: without NMS those of NMS are not among them."""
        return {name: value for name, value in asdict(self).items() if has_nms or name not in OF_NMS}


@dataclass(frozen=True)
class Comparison:
    """The winner beside the default on images that had no part in the search.

    Attributes:
        default: value of the objective with the default thresholds.
        winner: value of the objective with the winner's thresholds.
        gain: (low, middle, high) of the winner's value minus the default's; the middle is measured on the images as
            they are, low and high bound 95 % of the bootstrap's resamples of the images.
    """

    default: float
    winner: float
    gain: tuple[float, float, float]

    @property
    def is_better(self) -> bool:
        """Is the winner the better of the two?"""
        return self.winner > self.default


class Search:
    """Values of settings on two halves of a validation set: one to search on, one to compare on.

    Args:
        candidates: candidates of the validation set.
        objective: one of `OBJECTIVES`.
        precision: settings by which a smaller share of the detections is right at IoU 0.50 are worth nothing.
        seed: seed of the halves.
        max_dets: largest number of detections of each class in an image that count, best scores first.
        has_nms: whether the detections of the model are what NMS leaves.

    Raises:
        RaydetError: there is no such objective, or a half has no objects.
    """

    def __init__(
        self,
        candidates: CandidateSet,
        objective: str = MAIN_METRIC,
        precision: float | None = None,
        seed: int = 0,
        max_dets: int = MAX_DETS,
        has_nms: bool = True,
    ):
        if objective not in OBJECTIVES:
            raise RaydetError(f"objective {objective}: it is one of {', '.join(OBJECTIVES)}")
        self.candidates, self.objective, self.precision, self.seed = candidates, objective, precision, seed
        self.max_dets, self.has_nms = max_dets, has_nms
        self.classes = len(candidates.index.class_names)
        self.truth = objects(candidates.index)
        half = np.random.default_rng(seed).permutation(len(candidates)) < len(candidates) // 2
        self.halves = {"searched": np.flatnonzero(half), "held out": np.flatnonzero(~half)}
        for name, rows in self.halves.items():
            if not self._objects(rows).sum():
                raise RaydetError(f"the {len(rows)} images of the half that is {name} have no objects")
        self._suppressed = lru_cache(maxsize=4)(self._suppress)

    def __reduce__(self) -> tuple[Any, ...]:
        return Search, (self.candidates, self.objective, self.precision, self.seed, self.max_dets, self.has_nms)

    def value(self, setting: Setting, rows: npt.NDArray[Any]) -> float:
        """Return the value of a setting on some images, rows of the index in ascending order."""
        matches = self._matches(setting)
        matches = replace(matches[np.isin(matches.image, rows)], objects=self._objects(rows))
        return self._objective(matches, setting)

    def compare(self, default: Setting, winner: Setting) -> Comparison:
        """Compare two settings on the half that is held out, with a bootstrap over its images."""
        rows = self.halves["held out"]
        per_image = np.zeros((len(self.candidates), self.classes), int)
        real = self.truth[~self.truth.crowd]  # type: ignore[operator]
        np.add.at(per_image, (real.image, real.label), 1)
        both = [self._matches(setting) for setting in (default, winner)]
        rng = np.random.default_rng(self.seed)
        gains = []
        for _ in range(RESAMPLES):
            times = np.zeros(len(self.candidates), int)
            np.add.at(times, rng.choice(rows, len(rows)), 1)
            values = []
            for matches, setting in zip(both, (default, winner), strict=True):
                drawn = np.flatnonzero(times[matches.image])
                mine = replace(matches[drawn], objects=times @ per_image)
                values.append(self._objective(mine, setting, times[mine.image].astype(float)))
            gains.append(values[1] - values[0])
        before, after = (self.value(setting, rows) for setting in (default, winner))
        low, high = np.quantile(gains, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
        return Comparison(before, after, (float(low), after - before, float(high)))

    def _objective(self, matches: Matches, setting: Setting, weights: Floats | None = None) -> float:
        score = np.array([setting.score])
        if self.precision is not None:
            right, wrong = (count[0].sum() for count in counts(matches, score, weights))
            if right < self.precision * (right + wrong):
                return 0.0
        if self.objective == "F1@0.50":
            return float(np.nanmean(operating(matches, score, weights).f1[0]))
        levels = {"mAP@0.50": slice(0, 1), "mAP@0.75": slice(5, 6)}.get(self.objective, slice(None))
        return float(np.nanmean(average_precision(matches.at(levels), RECALLS, weights)))

    def _objects(self, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        assert self.truth.crowd is not None
        mine = np.isin(self.truth.image, rows) & ~self.truth.crowd
        return np.bincount(self.truth.label[mine], minlength=self.classes)

    def _matches(self, setting: Setting) -> Matches:
        """Match a setting's detections."""
        matches, place = self._suppressed(setting.iou, setting.nms_top_k, setting.multi_label, setting.class_agnostic)
        return matches[(matches.score > setting.score) & (place < setting.max_detections)]

    def _suppress(
        self, iou: float, nms_top_k: int, multi_label: bool, class_agnostic: bool
    ) -> tuple[Matches, npt.NDArray[Any]]:
        """Return the matches of all that NMS leaves, and the place of each among those of its image."""
        callback = (
            PostPrediction(FLOOR, iou, TOP_K, class_agnostic, multi_label, nms_top_k)
            if self.has_nms
            else DFinePostPredictionCallback(FLOOR, TOP_K, multi_label)
        )
        found, places = self.candidates.detect(callback)
        matches = match(self.truth, found, self.classes, IOUS, self.max_dets)
        return matches, places[matches.given]


def groups(trials: int, default: Setting, seed: int, has_nms: bool = True) -> list[list[Setting]]:
    """Return the default and others drawn from `SPACE`, no two the same: `trials` in all, those of one NMS together.

    Without NMS what it is about stays as it is in the default.
    """
    rng = np.random.default_rng(seed)
    space = {
        name: values if has_nms or name not in OF_NMS else (getattr(default, name),) for name, values in SPACE.items()
    }

    def draw(names: Iterable[str]) -> dict[str, Any]:
        return {name: space[name][rng.integers(len(space[name]))] for name in names}

    drawn = {default: None}
    most = int(np.prod([len(values) for values in space.values()]))
    while len(drawn) < min(trials, most):
        nms = draw(name for name in space if name not in _AFTER_NMS)
        for _ in range(min(_FOR_EACH_NMS, trials - len(drawn))):
            drawn[Setting(**nms, **draw(_AFTER_NMS))] = None
    together: dict[tuple[Any, ...], list[Setting]] = {}
    for setting in drawn:
        key = (setting.iou, setting.nms_top_k, setting.multi_label, setting.class_agnostic)
        together.setdefault(key, []).append(setting)
    return list(together.values())
