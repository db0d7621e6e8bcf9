"""Which detections are right: COCO's matching of all images at once, and what follows at each score threshold."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.integer]
Bools = npt.NDArray[np.bool_]

_STRICTEST = 1 - 1e-10  # the COCO API takes no IoU threshold above this
_PAIRS_AT_ONCE = 2**18  # pairs of a detection and an object: 40 MB while their IoU is computed


@dataclass(frozen=True)
class BoxTable:
    """Boxes of many images, the objects or the detections.

    Attributes:
        image: [n] any number for each image.
        label: [n] class, from 0.
        xywh: float64 [n, 4] left, top, width, height in pixels.
        score: [n] scores, of detections only.
        crowd: [n] is the object a region of many, on which a detection is neither right nor wrong? Of objects only.
        area: [n] areas in pixels², by which objects are small, medium or large. Of objects only.
    """

    image: Ints
    label: Ints
    xywh: Floats
    score: Floats | None = None
    crowd: Bools | None = None
    area: Floats | None = None

    def __getitem__(self, which: Ints | Bools) -> BoxTable:
        """Return some of them."""
        return BoxTable(*(None if part is None else part[which] for part in vars(self).values()))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.image)


@dataclass(frozen=True)
class Matches:
    """The detections that count, of each class best first, and whether they are right at each IoU threshold.

    Attributes:
        score: [n] score of each detection.
        label: [n] class of each detection.
        image: [n] image of each detection.
        right: [T, n] does the detection have an object of its own?
        ignored: [T, n] is it neither right nor wrong? It has no object, but lies on a crowd; of matches of some size
            (`Matching.of_size`) also if it has an object of another size, or has none and is of another size itself.
        objects: [C] number of objects of each class that are to be found.
        given: [n] position of each detection among those that were given.
        rank: [n] number of better detections of the same class in the same image.
    """

    score: Floats
    label: Ints
    image: Ints
    right: Bools
    ignored: Bools
    objects: Ints
    given: Ints
    rank: Ints

    def __getitem__(self, which: Ints | Bools) -> Matches:
        """Return those of some of the detections; all objects are still to be found."""
        parts = (self.score[which], self.label[which], self.image[which], self.right[:, which], self.ignored[:, which])
        return Matches(*parts, self.objects, self.given[which], self.rank[which])

    def at(self, levels: slice) -> Matches:
        """Return those at some of the IoU thresholds."""
        return replace(self, right=self.right[levels], ignored=self.ignored[levels])


def match(truth: BoxTable, found: BoxTable, num_classes: int, ious: Floats, top_k: int = 100) -> Matches:
    """Give objects to detections as the COCO API does: the matches of all sizes, see `Matching`."""
    return Matching(truth, found, num_classes, ious, top_k).matches


class Matching:
    """The matches of detections, of all sizes and of some.

    In each image and class the detections, best first, take the object that they overlap most of those that are left.
    Here all do so at once, in rounds (Gale and Shapley, 1962): a detection asks for its best object, and is sent on to
    its next when a better detection asks for the same. As all objects prefer the better detection, this ends as if
    the detections had chosen one after the other.

    Args:
        truth: the objects.
        found: the detections.
        num_classes: number of classes, C.
        ious: [T] lowest IoU of a right detection with its object, ascending.
        top_k: largest number of detections of each class in an image that count, best scores first.
    """

    def __init__(self, truth: BoxTable, found: BoxTable, num_classes: int, ious: Floats, top_k: int = 100):
        assert found.score is not None
        self._truth, self._ious = truth, np.minimum(ious, _STRICTEST)
        self._crowd = truth.crowd if truth.crowd is not None else np.zeros(len(truth), bool)
        self._classes = num_classes
        best_first = np.argsort(-found.score, kind="stable")
        given = best_first[_order(found.label[best_first])]  # by class, best first
        by_group = _order(found.image[given])  # by image and class, best first
        group = found.image[given[by_group]].astype(np.int64) * num_classes + found.label[given[by_group]]
        rank = _rank_in_group(group)
        ranks = np.empty_like(rank)
        ranks[by_group] = rank
        if not (kept := rank < top_k).all():
            counted = ranks < top_k
            given, ranks = given[counted], ranks[counted]
            by_group, group = (counted.cumsum() - 1)[by_group[kept]], group[kept]
        self._group_of_truth = truth.image.astype(np.int64) * num_classes + truth.label
        detection, object_, overlap = self._near(found, given[by_group], group)
        # Pairs of a detection and an object; then the detections that have some, and which of them each pair has.
        by_class = _order(by_group[detection])
        detection = by_group[detection][by_class]
        self._object, self._overlap = object_[by_class], overlap[by_class]
        self._near_one = detection[begins := _begins(detection)]
        self._chooser = np.repeat(np.arange(len(begins)), np.diff(begins, append=len(detection)))
        self._taken = self._choose(np.arange(len(detection)), self._crowd)
        self._given, self._rank = given, ranks
        self._score, self._label, self._image = found.score[given], found.label[given], found.image[given]
        self._area = (found.xywh[:, 2] * found.xywh[:, 3])[given]

    @property
    def matches(self) -> Matches:
        """The matches of objects of all sizes."""
        has_one = self._taken >= 0
        on_crowd = has_one & self._crowd[self._taken]
        right, ignored = np.zeros((2, len(self._ious), len(self._given)), bool)
        right[:, self._near_one], ignored[:, self._near_one] = has_one & ~on_crowd, on_crowd
        objects = self._objects(self._crowd)
        return Matches(self._score, self._label, self._image, right, ignored, objects, self._given, self._rank)

    def of_size(self, smallest: float, largest: float) -> tuple[Matches, Ints]:
        """Return the matches of objects whose area in pixels² is within limits, as the COCO API has them.

        Other objects are ignored like crowds: a detection takes one of them only if it gets none of the size. A
        detection without an object is ignored if it is of another size itself.

        Returns:
            The matches of those detections that overlap with an object enough for a threshold, and for each [n] how
            many better ones of its class overlap with none and are wrong.
        """
        truth = self._truth
        area = truth.xywh[:, 2] * truth.xywh[:, 3] if truth.area is None else truth.area
        other = self._crowd | (area < smallest) | (area > largest)
        # Where no detection of an image and class overlaps with objects of both kinds, or with ignored ones and a
        # crowd, all choose as among objects of all sizes.
        taken = self._taken
        if len(taken[0]):
            kind = (other.astype(np.int8) + self._crowd)[self._object]
            begins = _begins(self._chooser)
            differs = np.minimum.reduceat(kind, begins) != np.maximum.reduceat(kind, begins)
            group = self._group_of_truth[self._object]
            again = np.flatnonzero(np.isin(group, group[differs[self._chooser]]))
            taken = taken.copy()
            taken[:, self._chooser[again[_begins(self._chooser[again])]]] = self._choose(again, other)
        which = self._near_one
        outside = (self._area < smallest) | (self._area > largest)
        has_one = taken >= 0
        ignored = np.where(has_one, other[taken], outside[which])
        right = has_one & ~ignored
        label = self._label[which]
        alone = ~outside
        alone[which] = False
        wrong = _sums(alone)
        before = wrong[which] - wrong[np.searchsorted(self._label, np.arange(self._classes))][label]
        parts = (self._score[which], label, self._image[which], right, ignored & ~right)
        return Matches(*parts, self._objects(other), self._given[which], self._rank[which]), before

    def _objects(self, ignored: Bools) -> Ints:
        objects: Ints = np.bincount(self._truth.label[~ignored], minlength=self._classes)
        return objects

    def _near(self, found: BoxTable, rows: Ints, group: Ints) -> tuple[Ints, Ints, Floats]:
        """Return the detection, the object and the IoU of all pairs of a group that overlap enough for a threshold.

        They are by detection, each one's objects in the order of its preference: the last of equals, as the COCO API
        does.

        Args:
            found: the detections.
            rows: [n] rows of the detections, by group.
            group: [n] group of each.
        """
        order = np.argsort(self._group_of_truth, kind="stable")
        groups = self._group_of_truth[order]
        begins = _begins(group)
        first, end = (np.searchsorted(groups, group[begins], side=side) for side in ("left", "right"))
        sizes = np.diff(begins, append=len(group))
        some = np.flatnonzero(np.repeat(end > first, sizes))  # most detections have no object of their class at all
        first, counts = (np.repeat(values, sizes)[some] for values in (first, end - first))
        parts = (counts.cumsum() - counts) // _PAIRS_AT_ONCE
        ends = np.flatnonzero(np.diff(parts, prepend=-1, append=-1))
        near: list[tuple[Ints, Ints, Floats]] = [(np.empty(0, int), np.empty(0, int), np.empty(0))]
        for low, high in pairwise(ends.tolist()):
            many = counts[low:high]
            detection = np.repeat(some[low:high], many)
            object_ = order[np.repeat(first[low:high] - many.cumsum() + many, many) + np.arange(len(detection))]
            overlap = _overlap(found.xywh[rows[detection]], self._truth.xywh[object_], self._crowd[object_])
            kept = overlap >= self._ious[0]
            near.append((detection[kept], object_[kept], overlap[kept]))
        detection, object_, overlap = (np.concatenate(column) for column in zip(*near, strict=True))
        # Few detections have a choice.
        choice = np.diff(detection, prepend=-1) == 0
        choice[:-1] |= choice[1:]
        choice = np.flatnonzero(choice)
        sorted_ = choice[np.lexsort((-object_[choice], -overlap[choice], detection[choice]))]
        object_[choice], overlap[choice] = object_[sorted_], overlap[sorted_]
        return detection, object_, overlap

    def _choose(self, pairs: Ints, ignored: Bools) -> Ints:
        """Return [T, m] the object that each of the m detections of some pairs gets, -1 if none.

        Args:
            pairs: the pairs, ascending.
            ignored: [objects] which objects are taken only where no other can be had.
        """
        begins = _begins(self._chooser[pairs])
        asker = np.repeat(np.arange(len(begins)), np.diff(begins, append=len(pairs)))
        taken = np.full((len(self._ious), len(begins)), -1, np.int32)
        last = ignored[self._object[pairs]]
        for some in (~last, last):
            self._ask(asker[some], pairs[some], taken)
        return taken

    def _ask(self, asker: Ints, pairs: Ints, taken: Ints) -> None:
        """Let detections without an object ask for the objects of some pairs; writes to `taken` what they get."""
        object_, overlap, count = self._object[pairs], self._overlap[pairs], taken.shape[1]
        # A crowd has room for all who ask: to each of them it is another object.
        crowd = np.flatnonzero(self._crowd[object_])
        seats, places = object_.copy(), len(self._truth) + len(crowd)
        seats[crowd] = np.arange(len(self._truth), places)
        begin = np.searchsorted(asker, np.arange(count))
        for row, iou in zip(taken, self._ious, strict=True):
            # What a detection may ask for is the beginning of its list.
            reached = np.bincount(asker[overlap >= iou], minlength=count)
            end, next_one = begin + np.where(row < 0, reached, 0), begin.copy()
            holder = np.full(places, count)
            asking = np.flatnonzero(next_one < end)
            while len(asking):
                seat = seats[next_one[asking]]
                before = holder[seat]
                np.minimum.at(holder, seat, asking)
                after = holder[seat]
                # Who had the object before goes on too; two of those who ask may have sent the same one away.
                displaced = np.unique(before[(before != after) & (before < count)])
                asking = np.concatenate((asking[after != asking], displaced))
                next_one[asking] += 1
                asking = asking[next_one[asking] < end[asking]]
            found = np.flatnonzero(next_one < end)
            row[found] = object_[next_one[found]]


def _begins(ascending: Ints) -> Ints:
    """Return where each number begins; numbers are from 0."""
    return np.flatnonzero(np.diff(ascending, prepend=-1))


def _order(numbers: Ints) -> Ints:
    """Return the stable order of numbers from 0; numpy sorts those of 16 bits eight times faster."""
    return np.argsort(numbers.astype(np.uint16) if numbers.max(initial=0) < 2**16 else numbers, kind="stable")


def _rank_in_group(groups: Ints) -> Ints:
    """Return for each how many of its group come before it; groups lie together."""
    begins = _begins(groups)
    ranks: Ints = np.arange(len(groups)) - np.repeat(begins, np.diff(begins, append=len(groups)))
    return ranks


def _overlap(found: Floats, truth: Floats, crowd: Bools) -> Floats:
    """IoU of pairs of boxes xywh [n, 4]; with a crowd the share of the detection that is on it."""
    # A model that diverges finds infinite boxes; they overlap with nothing.
    with np.errstate(invalid="ignore"):
        right, below = (np.minimum(found[:, k] + found[:, k + 2], truth[:, k] + truth[:, k + 2]) for k in (0, 1))
        width, height = (
            np.maximum(side - np.maximum(found[:, k], truth[:, k]), 0) for k, side in ((0, right), (1, below))
        )
        shared = width * height
        area, other = (boxes[:, 2] * boxes[:, 3] for boxes in (found, truth))
        whole = np.where(crowd, area, area + other - shared)
        shares: Floats = np.divide(shared, whole, out=np.zeros_like(shared), where=whole > 0)
    return shares


def counts(matches: Matches, thresholds: Floats, weights: Floats | None = None) -> tuple[Floats, Floats]:
    """Count the right and the wrong detections of each class at and above some scores.

    Args:
        matches: which detections are right, see `match`.
        thresholds: [S] scores, ascending.
        weights: [n] how often each detection counts.

    Returns:
        Right and wrong [T, C, S]. A detection on a crowd is neither.
    """
    steps, classes = len(thresholds), len(matches.objects)
    reached = np.searchsorted(thresholds, matches.score, side="right")  # the first so many thresholds
    cell = matches.label * (steps + 1) + reached
    size = classes * (steps + 1)

    times = np.ones(len(cell)) if weights is None else weights

    def count(which: Bools) -> Floats:
        tables = np.stack([np.bincount(cell[row], times[row], size) for row in which])
        tables = tables.reshape(len(which), classes, steps + 1)
        return tables[:, :, ::-1].cumsum(2)[:, :, ::-1][:, :, 1:]

    return count(matches.right), count(~(matches.right | matches.ignored))


def interpolated(
    matches: Matches, recalls: Floats, weights: Floats | None = None, wrong_before: Ints | None = None
) -> Floats:
    """Return the precision [T, C, R] at recalls as the COCO API has it: the highest of this recall or a higher one.

    It is 0 at a recall that is not reached, and nan for a class without objects.

    Args:
        matches: which detections are right, see `match`.
        recalls: [R] recalls at which the precision is taken, ascending.
        weights: [n] how often each detection counts, whole numbers; `matches.objects` must be weighted in the same way.
        wrong_before: [n] number of better detections of the class that are wrong and not among the matches.
    """
    times = np.ones(len(matches.label), int) if weights is None else weights
    before = np.zeros(len(matches.label), int) if wrong_before is None else wrong_before
    if (np.diff(matches.label) < 0).any():
        by_class = np.argsort(matches.label, kind="stable")
        matches, times, before = matches[by_class], times[by_class], before[by_class]
    classes = np.arange(len(matches.objects))
    begin = np.searchsorted(matches.label, classes)
    highest = np.zeros((len(matches.right), len(classes), len(recalls)))
    # Recall and the highest precision from there on change at right detections alone: few of all.
    for table, right, ignored in zip(highest, matches.right, matches.ignored, strict=True):
        at = np.flatnonzero(right)
        mine = matches.label[at]
        rights, counted = _sums(times[at]), _sums(np.where(ignored, 0, times))
        hits = rights[1:] - rights[np.searchsorted(mine, classes)[mine]]
        every = counted[at + 1] - counted[begin[mine]] + before[at]
        reached = np.searchsorted(recalls, hits / matches.objects[mine], side="right")  # the first so many recalls
        some = reached > 0
        np.maximum.at(table, (mine[some], reached[some] - 1), (hits / (every + np.spacing(1)))[some])
    # In place: groups of images and classes make many rows, and a copy costs more than the maxima.
    downwards = highest[:, :, ::-1]
    np.maximum.accumulate(downwards, axis=2, out=downwards)
    highest[:, matches.objects == 0] = np.nan
    return highest


def _sums(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the sums of the first 0, 1, … n values."""
    sums = np.zeros(len(values) + 1, np.result_type(values, int))
    np.cumsum(values, out=sums[1:])
    return sums


def average_precision(matches: Matches, recalls: Floats, weights: Floats | None = None) -> Floats:
    """Return the AP [T, C] of each class at each IoU threshold, nan for one without objects; see `interpolated`."""
    means: Floats = interpolated(matches, recalls, weights).sum(axis=2) / len(recalls)
    return means


@dataclass(frozen=True)
class Operating:
    """Precision, recall and F1 [T, C, S] of classes at score thresholds; 0 where there is no detection.

    Classes without objects have no recall and are nan in all three.
    """

    precision: Floats
    recall: Floats
    f1: Floats


def operating(matches: Matches, thresholds: Floats, weights: Floats | None = None) -> Operating:
    """Return the true precision and recall, not interpolated, at some score thresholds; arguments as of `counts`."""
    right, wrong = counts(matches, thresholds, weights)
    objects = np.where(matches.objects > 0, matches.objects, np.nan)[None, :, None]
    precision = right / np.maximum(right + wrong, 1) + 0 * objects
    recall = right / objects
    both = precision + recall
    f1 = np.divide(2 * precision * recall, both, out=0 * both, where=both > 0)
    return Operating(precision, recall, f1)
