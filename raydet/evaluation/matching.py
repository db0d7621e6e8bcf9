"""Which detections are right: COCO's matching of all images at once, and what follows from it at each score threshold.

hotcoco gives COCO's interpolated numbers and keeps no matches; precision and recall proper need them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

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
    """The detections that count, best first, and whether they are right at each IoU threshold.

    Attributes:
        score: [n] score of each detection.
        label: [n] class of each detection.
        image: [n] image of each detection.
        right: [T, n] does the detection have an object of its own?
        ignored: [T, n] does it have none, but lies on a crowd?
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
    """Give objects to detections as the COCO API does.

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
    crowd = truth.crowd if truth.crowd is not None else np.zeros(len(truth), bool)
    assert found.score is not None
    ious = np.minimum(ious, _STRICTEST)
    best_first = np.argsort(-found.score, kind="stable")
    found = found[best_first]
    group_of_truth, group_of_found = _groups(truth, found, num_classes)
    rank = _rank_in_group(group_of_found)
    counted = np.flatnonzero(rank < top_k)
    found, group_of_found = found[counted], group_of_found[counted]
    detection, object_, overlap = _near(truth, found, group_of_truth, group_of_found, crowd, ious[0])
    on_crowd = crowd[object_]
    right = _choose(detection[~on_crowd], object_[~on_crowd], overlap[~on_crowd], ious, len(found), len(truth))
    ignored = np.zeros_like(right)
    for level, iou in enumerate(ious):
        ignored[level, detection[on_crowd & (overlap >= iou)]] = True
    objects = np.bincount(truth.label[~crowd], minlength=num_classes)
    assert found.score is not None
    given, rank = best_first[counted], rank[counted]
    return Matches(found.score, found.label, found.image, right, ignored & ~right, objects, given, rank)


def _groups(truth: BoxTable, found: BoxTable, num_classes: int) -> tuple[Ints, Ints]:
    """Number the pairs of image and class."""
    objects, detections = (boxes.image.astype(np.int64) * num_classes + boxes.label for boxes in (truth, found))
    return objects, detections


def _rank_in_group(groups: Ints) -> Ints:
    """Return for each how many of its group come before it."""
    order = np.argsort(groups, kind="stable")
    ordered = groups[order]
    begins = np.flatnonzero(np.diff(ordered, prepend=-1))
    ranks = np.empty(len(groups), np.int64)
    ranks[order] = np.arange(len(groups)) - np.repeat(begins, np.diff(begins, append=len(groups)))
    return ranks


def _near(
    truth: BoxTable, found: BoxTable, group_of_truth: Ints, group_of_found: Ints, crowd: Bools, iou: float
) -> tuple[Ints, Ints, Floats]:
    """Return the detection, the object and the IoU of all pairs of a group that overlap so much, by detection."""
    order = np.argsort(group_of_truth, kind="stable")
    begin, end = (np.searchsorted(group_of_truth[order], group_of_found, side=side) for side in ("left", "right"))
    counts = end - begin
    parts = (counts.cumsum() - counts) // _PAIRS_AT_ONCE
    ends = np.flatnonzero(np.diff(parts, prepend=-1, append=-1))
    near: list[tuple[Ints, Ints, Floats]] = [(np.empty(0, int), np.empty(0, int), np.empty(0))]
    for low, high in pairwise(ends.tolist()):
        detection = np.repeat(np.arange(low, high), counts[low:high])
        first = np.repeat(counts[low:high].cumsum() - counts[low:high], counts[low:high])
        object_ = order[begin[detection] + np.arange(len(detection)) - first]
        overlap = _overlap(found.xywh[detection], truth.xywh[object_], crowd[object_])
        kept = overlap >= iou
        near.append((detection[kept], object_[kept], overlap[kept]))
    detection, object_, overlap = (np.concatenate(column) for column in zip(*near, strict=True))
    return detection, object_, overlap


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


def _choose(detection: Ints, object_: Ints, overlap: Floats, ious: Floats, detections: int, objects: int) -> Bools:
    """Return [T, detections]: does it have an object; detections are in the order in which they choose."""
    # Each detection's objects in the order of its preference: the last of equals, as the COCO API does.
    order = np.lexsort((-object_, -overlap, detection))
    detection, object_, overlap = detection[order], object_[order], overlap[order]
    choosers, begin, detection = np.unique(detection, return_index=True, return_inverse=True)
    levels, count = len(ious), len(choosers)
    # What a detection may ask for at each threshold is the beginning of its list.
    end = begin + np.stack([np.bincount(detection[overlap >= iou], minlength=count) for iou in ious])
    next_one = np.broadcast_to(begin, (levels, count)).copy()
    holder = np.full((levels, objects), count)
    level, asking = np.nonzero(next_one < end)
    while len(asking):
        wanted = object_[next_one[level, asking]]
        before = holder[level, wanted]
        np.minimum.at(holder, (level, wanted), asking)
        after = holder[level, wanted]
        sent_away = after != asking
        # Who had the object before goes on too; two of those who ask may have sent the same one away.
        displaced = (before != after) & (before < count)
        moved = np.unique(level[displaced] * count + before[displaced])
        level = np.concatenate((level[sent_away], moved // count))
        asking = np.concatenate((asking[sent_away], moved % count))
        next_one[level, asking] += 1
        left = next_one[level, asking] < end[level, asking]
        level, asking = level[left], asking[left]
    has_one = np.zeros((levels, detections), bool)
    has_one[:, choosers] = next_one < end
    return has_one


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


def average_precision(matches: Matches, recalls: Floats, weights: Floats | None = None) -> Floats:
    """Return the AP [T, C] of each class at each IoU threshold as the COCO API has it, nan for one without objects.

    Args:
        matches: which detections are right, see `match`.
        recalls: [R] recalls at which the precision is taken, ascending.
        weights: [n] how often each detection counts, whole numbers; `matches.objects` must be weighted in the same way.
    """
    found = np.where(matches.objects > 0, np.zeros((len(matches.right), 1)), np.nan)
    by_class = np.argsort(matches.label, kind="stable")
    label = matches.label[by_class]
    begin = np.searchsorted(label, np.arange(len(matches.objects)))
    times = np.ones(len(label)) if weights is None else weights[by_class]
    # Recall and the highest precision from there on change at right detections alone: few of all.
    for level in range(len(found)):
        right, ignored = matches.right[level, by_class], matches.ignored[level, by_class]
        rights, wrongs = (np.concatenate(([0], (which * times).cumsum())) for which in (right, ~(right | ignored)))
        at = np.flatnonzero(right)
        mine = label[at]
        hits, misses = (total[at + 1] - total[begin[mine]] for total in (rights, wrongs))
        precision = _highest_from_here(hits / (hits + misses + np.spacing(1)), mine)
        reached = np.searchsorted(recalls, hits / matches.objects[mine], side="right")  # the first so many recalls
        newly = reached - np.where(np.diff(mine, prepend=-1) == 0, np.roll(reached, 1), 0)
        values = np.repeat(precision, newly)
        last = np.flatnonzero(np.diff(mine, append=-1))
        count = reached[last]
        first = count.cumsum() - count
        for size in np.unique(count):  # rows of one length are summed at once, each as if it were alone
            rows = count == size
            found[level, mine[last[rows]]] = values[first[rows, None] + np.arange(size)].sum(axis=1) / len(recalls)
    return found


def _highest_from_here(values: Floats, group: Ints) -> Floats:
    """Return of each value the highest among those of its group from it on; groups ascend."""
    count = len(values)
    order = np.argsort(values, kind="stable")
    rank = np.empty(count, np.int64)
    rank[order] = np.arange(count)
    highest = np.maximum.accumulate((rank - group * count)[::-1])[::-1] % max(count, 1)
    from_here: Floats = values[order[highest]]
    return from_here


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
