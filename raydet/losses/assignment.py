"""Which anchor points learn which objects: what the assigners share.

The whole batch is assigned at once. Its matrices are [M, A]: M objects of the batch, A anchor points of an image;
shapes depend on nothing that is on the device, so that a GPU never waits for the host. They are made coordinate by
coordinate: a last axis of two or four is several times slower on a CPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from raydet.boxes import EPS


class Assignment(NamedTuple):
    """E entries, of which those in `keep` count.

    Attributes:
        points: [E] anchor point in the batch, image · A + point.
        objects: [E] row of the targets.
        keep: [E] bool; a point is kept at most once.
    """

    points: Tensor
    objects: Tensor
    keep: Tensor


def overlaps(objects: Tensor, boxes: Tensor, image: Tensor | None = None) -> Tensor:
    """IoU [M, A] of objects and boxes, xyxy, as `raydet.boxes.iou` computes it.

    Args:
        objects: [M, 4].
        boxes: [B, A, 4], or [A, 4] without `image`.
        image: [M] of each object, whose boxes it is compared with.
    """
    left, top, right, bottom = (side if image is None else side[image] for side in boxes.unbind(-1))
    x1, y1, x2, y2 = objects[:, None].unbind(-1)
    across = (right.minimum(x2) - left.maximum(x1)).clamp_(min=0)
    down = (bottom.minimum(y2) - top.maximum(y1)).clamp_(min=0)
    areas = (right - left).clamp_(min=0) * (bottom - top).clamp_(min=0)
    intersection = across * down
    return intersection / ((x2 - x1).clamp(min=0) * (y2 - y1).clamp(min=0) + areas - intersection + EPS)


def assign_once(points: Tensor, chosen: Tensor, image: Tensor, score: Tensor, images: int) -> Assignment:
    """Make sure that a point learns one object: of those that several chose, the one with which it scores highest.

    That may be any object of the image, also one that did not choose the point.

    Args:
        points: [M, K] anchor points that objects may choose.
        chosen: [M, K] whether they do.
        image: [M] of each object.
        score: [M, A] of each object and point.
        images: B.
    """
    flat = image[:, None] * score.shape[1] + points
    size = images * score.shape[1]
    times = torch.zeros(size, dtype=torch.int32, device=flat.device)
    times.index_add_(0, flat.reshape(-1), chosen.reshape(-1).int())
    number = torch.arange(len(image), device=flat.device)[:, None]
    objects = torch.where(times[flat] > 1, best_objects(score, image, images).reshape(-1)[flat], number)
    keep = chosen & first_of(flat, chosen, size)
    # Where a point scores with nothing, it belongs to nobody; an index must be valid all the same.
    matched = objects.clamp(max=max(len(image) - 1, 0))
    return Assignment(flat.reshape(-1), matched.reshape(-1), keep.reshape(-1))


def best_objects(score: Tensor, image: Tensor, images: int) -> Tensor:
    """[M, A] scores → [B, A] the object of the image that has the highest, the first of equals; M if there is none."""
    row = image[:, None].expand_as(score)
    highest = score.new_full((images, score.shape[1]), -torch.inf).scatter_reduce_(0, row, score, "amax")
    number = torch.arange(len(image), device=image.device)[:, None]
    mine = torch.where(score == highest[image], number, len(image))
    best = torch.full_like(highest, len(image), dtype=torch.int64)
    return best.scatter_reduce_(0, row, mine, "amin")


def first_of(flat: Tensor, chosen: Tensor, size: int) -> Tensor:
    """Of the chosen entries [M, K] with the same point, True for the first; points are below `size`."""
    number = torch.arange(flat.numel(), device=flat.device)
    first = torch.full((size,), flat.numel(), device=flat.device)
    first.scatter_reduce_(0, flat.reshape(-1), torch.where(chosen.reshape(-1), number, flat.numel()), "amin")
    return (first[flat.reshape(-1)] == number).reshape(flat.shape)
