"""Which anchor points learn which objects: what the assigners share.

The whole batch is assigned at once, or in parts where its objects are many. Matrices are [M, A]: M objects of the
batch or of a part, A anchor points of an image; shapes depend on nothing that is on the device, so that a GPU never
waits for the host. They are made coordinate by coordinate: a last axis of two or four is several times slower on a CPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from raydet.boxes import EPS

_ENTRIES_AT_ONCE = 2**22  # size of a matrix of objects and anchor points: 16 MB, and about twenty are needed


class Assignment(NamedTuple):
    """E entries, of which those in `keep` count.

    Attributes:
        points: [E] number of the anchor point in the batch, image · A + point.
        objects: [E] row of the object in the targets.
        keep: [E] bool, does the entry count? A point is kept at most once.
    """

    points: Tensor
    objects: Tensor
    keep: Tensor

    def enough(self, points: int) -> tuple[Assignment, Tensor | slice]:
        """Return the entries without those too many, and which they are.

        More than there are points cannot count. Of more, those that do are left, in their order, and some of the rest.

        Args:
            points: number of anchor points of the batch.
        """
        if len(self.keep) <= points:
            return self, slice(None)
        which = self.keep.byte().argsort(descending=True, stable=True)[:points]
        return Assignment(*(part[which] for part in self)), which


def parts(objects: int, points: int) -> list[slice]:
    """Divide objects so that the matrices of a part with all anchor points are bounded; no objects are a part too."""
    # 64 is more than the instructions of any CPU take at once: a rest would be rounded by other instructions.
    rows = max(1, _ENTRIES_AT_ONCE // points // 64) * 64
    return [slice(first, min(first + rows, objects)) for first in range(0, max(objects, 1), rows)]


class Rows:
    """Tensors [M, …] that are computed part by part. They are there from the first part on: memory stays in one piece.

    Args:
        objects: number of objects, M.
    """

    def __init__(self, objects: int):
        self._objects = objects
        self.columns: list[Tensor] = []

    def put(self, part: slice, *values: Tensor) -> None:
        """Put what was computed of a part of the objects."""
        if not self.columns:
            self.columns = [value.new_empty(self._objects, *value.shape[1:]) for value in values]
        for column, value in zip(self.columns, values, strict=True):
            column[part] = value


class Best:
    """The object of its image with which each anchor point scores highest, found part by part.

    Args:
        shape: (number of images B, number of anchor points A).
        objects: number of objects, M.
        device: device of the scores.
        values: how many further numbers are kept for each anchor point.

    Attributes:
        score: [B, A] score with that object; -inf: there is no object, or its score is -inf.
        objects: [B, A] row of the targets, the first of equals; M where the score is -inf.
        values: [B, A] each, further numbers of the object and the point.
    """

    def __init__(self, shape: tuple[int, int], objects: int, device: torch.device, values: int = 0):
        self.score = torch.full(shape, -torch.inf, device=device)
        self.objects = torch.full(shape, objects, device=device)
        self.values = [torch.zeros(shape, device=device) for _ in range(values)]

    def put(self, part: slice, image: Tensor, score: Tensor, *values: Tensor) -> None:
        """Look at a part of the objects.

        Args:
            part: rows of the targets.
            image: [m] image of each object.
            score: [m, A] score of each object and point.
            *values: [m, A] further numbers of each object and point.
        """
        if not len(image):
            return
        row = image[:, None].expand_as(score)
        highest = torch.full_like(self.score, -torch.inf).scatter_reduce_(0, row, score, "amax")
        number = torch.arange(len(image), device=image.device)[:, None]
        mine = torch.where(score == highest[image], number, len(image) - 1)
        best = torch.full_like(self.objects, len(image) - 1).scatter_reduce_(0, row, mine, "amin")
        better = highest > self.score  # among equals the first stays
        chosen = best, torch.arange(score.shape[1], device=image.device)
        found = highest, best + part.start, *(value[chosen] for value in values)
        for kept, new in zip((self.score, self.objects, *self.values), found, strict=True):
            kept.copy_(torch.where(better, new, kept))


def overlaps(objects: Tensor, boxes: Tensor, image: Tensor | None = None) -> Tensor:
    """IoU [M, A] of objects and boxes, xyxy, as `raydet.boxes.iou` computes it.

    Args:
        objects: [M, 4] boxes of the objects, xyxy.
        boxes: [B, A, 4], or [A, 4] without `image`.
        image: [M] image of each object, whose boxes the object is compared with.
    """
    left, top, right, bottom = (side if image is None else side[image] for side in boxes.unbind(-1))
    x1, y1, x2, y2 = objects[:, None].unbind(-1)
    across = (right.minimum(x2) - left.maximum(x1)).clamp_(min=0)
    down = (bottom.minimum(y2) - top.maximum(y1)).clamp_(min=0)
    areas = (right - left).clamp_(min=0) * (bottom - top).clamp_(min=0)
    intersection = across * down
    return intersection / ((x2 - x1).clamp(min=0) * (y2 - y1).clamp(min=0) + areas - intersection + EPS)


def assign_once(points: Tensor, chosen: Tensor, image: Tensor, best: Tensor) -> Assignment:
    """Make sure that a point learns one object: of those that several chose, the one with which it scores highest.

    That may be any object of the image, also one that did not choose the point.

    Args:
        points: [M, K] anchor points that objects may choose.
        chosen: [M, K] whether they do.
        image: [M] image of each object.
        best: [B, A] the object with which each point scores highest.
    """
    flat = image[:, None] * best.shape[1] + points
    times = torch.zeros(best.numel(), dtype=torch.int32, device=flat.device)
    times.index_add_(0, flat.reshape(-1), chosen.reshape(-1).int())
    number = torch.arange(len(image), device=flat.device)[:, None]
    objects = torch.where(times[flat] > 1, best.reshape(-1)[flat], number)
    keep = chosen & first_of(flat, chosen, best.numel())
    # Where a point scores with nothing, it belongs to nobody; an index must be valid all the same.
    matched = objects.clamp(max=max(len(image) - 1, 0))
    return Assignment(flat.reshape(-1), matched.reshape(-1), keep.reshape(-1))


def first_of(flat: Tensor, chosen: Tensor, size: int) -> Tensor:
    """Return [M, K], True for the first of the chosen entries with the same point; points are below `size`."""
    number = torch.arange(flat.numel(), device=flat.device)
    first = torch.full((size,), flat.numel(), device=flat.device)
    first.scatter_reduce_(0, flat.reshape(-1), torch.where(chosen.reshape(-1), number, flat.numel()), "amin")
    return (first[flat.reshape(-1)] == number).reshape(flat.shape)
