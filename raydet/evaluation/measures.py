"""COCO's numbers of parts of a data set, each by itself: of every batch of a validation, or of every image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from raydet.errors import RaydetError, did_you_mean
from raydet.evaluation.coco import IOUS, MAIN_METRIC, MAX_DETS, RECALLS
from raydet.evaluation.matching import BoxTable, Floats, Ints, Matches, average_precision, match, operating

_AP, _AR = "AP@0.50:0.95_", "AR@0.50:0.95_max="
_ALL, _LOWEST = slice(None), slice(0, 1)  # slices of IOUS
_LEVELS = {MAIN_METRIC: _ALL, "mAP@0.50": _LOWEST, "mAP@0.75": slice(5, 6)}
_POINT = ("Precision@0.50", "Recall@0.50", "F1@0.50")


def names(class_names: Sequence[str], max_dets: int = MAX_DETS) -> list[str]:
    """Return the metrics that `measure` knows."""
    return [*_LEVELS, *(f"{_AR}{most}" for most in (1, 10, max_dets)), *_POINT, *(_AP + name for name in class_names)]


def check(name: str, class_names: Sequence[str], key: str, max_dets: int = MAX_DETS) -> None:
    """Raise RaydetError, which names the recipe's key, where `measure` does not know a metric."""
    if name not in (known := names(class_names, max_dets)):
        hint = did_you_mean(name, known) or f"; there are {', '.join(names((), max_dets))} and {_AP}{{class}}"
        raise RaydetError(f"{key}: a batch has no metric {name}{hint}")


@dataclass(frozen=True)
class Measured:
    """Images with their objects and their detections; images are numbered from 0.

    Attributes:
        truth: the objects.
        found: the detections, by image.
        class_names: name of each class.
        max_dets: largest number of detections of each class in an image that count, best scores first.
    """

    truth: BoxTable
    found: BoxTable
    class_names: Sequence[str]
    max_dets: int = MAX_DETS

    @cached_property
    def _matches(self) -> Matches:
        return match(self.truth, self.found, len(self.class_names), IOUS, self.max_dets)

    def measure(self, name: str, group: Ints) -> Floats:
        """Return a metric of each group of images, as `CocoEvaluation.compute` gives it of these images alone.

        Args:
            name: name of the metric.
            group: [images] number of each image's group, from 0.

        Returns:
            [groups]; nan for a group without objects of the class, or of any.
        """
        groups = int(group.max(initial=-1)) + 1
        matches = self._matches.at(_ALL if name.startswith((_AP, _AR)) else _LEVELS.get(name, _LOWEST))
        if name.startswith(_AR):
            # Better detections have chosen before: without the worse ones they have the same objects.
            matches = matches[matches.rank < int(name.removeprefix(_AR))]
        pairs, kept = self._by_pair(matches, group)
        owner = pairs // len(self.class_names)  # the group of each pair of group and class
        chosen = np.ones(len(pairs), bool)
        if name.startswith(_AP):
            chosen = pairs % len(self.class_names) == list(self.class_names).index(name.removeprefix(_AP))
        if name in _POINT:
            point = operating(kept, RECALLS)
            values = {_POINT[0]: point.precision[0], _POINT[1]: point.recall[0], _POINT[2]: point.f1[0]}
            best = _means(values[_POINT[2]], owner, groups).argmax(axis=1)  # nan only where all are
            at_best: Floats = _means(values[name], owner, groups)[np.arange(groups), best]
            return at_best
        if name.startswith(_AR):
            found = np.stack([np.bincount(kept.label[right], minlength=len(pairs)) for right in kept.right])
            values_of_pairs = (found / kept.objects).mean(axis=0)
        else:
            values_of_pairs = average_precision(kept, RECALLS).mean(axis=0)
        return _means(values_of_pairs[chosen, None], owner[chosen], groups)[:, 0]

    def _by_pair(self, matches: Matches, group: Ints) -> tuple[Ints, Matches]:
        """Return the pairs of group and class that have objects, and the matches as if each pair were a class."""
        truth = self.truth if self.truth.crowd is None else self.truth[~self.truth.crowd]
        classes = len(self.class_names)
        pairs, objects = np.unique(group[truth.image] * classes + truth.label, return_counts=True)
        pair = group[matches.image] * classes + matches.label
        mine = np.isin(pair, pairs)
        kept = matches[mine]
        return pairs, replace(kept, label=np.searchsorted(pairs, pair[mine]), objects=objects)


def _means(values: Floats, owner: Ints, groups: int) -> npt.NDArray[np.float64]:
    """Means [groups, n] of rows [m, n] that each belong to a group; nan for a group without rows."""
    sums = np.zeros((groups, values.shape[1]))
    np.add.at(sums, owner, values)
    counts = np.bincount(owner, minlength=groups)[:, None]
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
