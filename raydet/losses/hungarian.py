"""Which queries learn which objects: the best one-to-one matching of each output, and the union of several (D-FINE).

Costs are computed on the device for the whole batch, copied to the host once a step, and solved there by scipy.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raydet.boxes import cxcywh_to_xyxy, giou
from raydet.outputs import slots

Ints = npt.NDArray[np.int64]

# Weights of the terms of the cost, and the constants of focal loss in it.
_CLASS, _L1, _GIOU = 2.0, 5.0, 2.0
_ALPHA, _GAMMA, _EPS = 0.25, 2.0, 1e-8


class Pairs(NamedTuple):
    """P pairs of a query and an object.

    Attributes:
        image: [P] image of both.
        query: [P] query of that image.
        target: [P] row of the targets.
    """

    image: Tensor
    query: Tensor
    target: Tensor


def costs(logits: Tensor, boxes: Tensor, targets: Tensor) -> Tensor:
    """Return what it costs that a query learns an object: [K, B, Q, G], G the most objects of an image.

    Args:
        logits: [K, B, Q, C] of K outputs.
        boxes: [K, B, Q, 4] cx, cy, w, h in shares of the image.
        targets: [N, 6] image, class, cx, cy, w, h in shares of the image.
    """
    image = targets[:, 0].long()
    slot = slots(image)
    images, most = logits.shape[1], int(slot.max()) + 1
    label = torch.zeros(images, most, dtype=torch.long, device=logits.device)
    label[image, slot] = targets[:, 1].long()
    # Padding is a box like any other; its columns are left out on the host.
    wanted = torch.full((images, most, 4), 0.5, device=logits.device, dtype=boxes.dtype)
    wanted[image, slot] = targets[:, 2:].to(boxes.dtype)
    score = logits.sigmoid()
    negative = (1 - _ALPHA) * score**_GAMMA * -(1 - score + _EPS).log()
    positive = _ALPHA * (1 - score) ** _GAMMA * -(score + _EPS).log()
    index = label[None, :, None, :].expand(*logits.shape[:3], -1)
    cost = _CLASS * (positive - negative).gather(3, index)
    mine, theirs = boxes[:, :, :, None], wanted[None, :, None]
    for side in range(4):  # a last axis of four is several times slower on a CPU
        cost = cost + _L1 * (mine[..., side] - theirs[..., side]).abs()
    cost = cost - _GIOU * giou(cxcywh_to_xyxy(mine), cxcywh_to_xyxy(theirs))
    return cost.nan_to_num(1.0)


def match(cost: npt.NDArray[np.float32], counts: Ints) -> list[list[tuple[Ints, Ints]]]:
    """Return the queries and objects [n] that belong together at the lowest cost, by output and image.

    Args:
        cost: [K, B, Q, G].
        counts: [B] objects of each image.
    """
    from scipy.optimize import linear_sum_assignment

    return [[linear_sum_assignment(one[:, :count]) for one, count in zip(each, counts, strict=True)] for each in cost]


def union(matches: list[tuple[Ints, Ints]], most: int) -> tuple[Ints, Ints]:
    """Join the matchings of an image: the pairs that most of them have come first, and the first of a query counts.

    Of pairs that are equally frequent the lower query, then the lower object, comes first.
    """
    codes = np.concatenate([query * most + target for query, target in matches])
    pair, times = np.unique(codes, return_counts=True)
    pair = pair[np.argsort(-times, kind="stable")]
    first = np.sort(np.unique(pair // most, return_index=True)[1])
    return pair[first] // most, pair[first] % most


def assign(logits: Tensor, boxes: Tensor, targets: Tensor) -> tuple[list[Pairs], Pairs]:
    """Match K outputs with the objects, one to one, and join these matchings; arguments as for `costs`."""
    device = logits.device
    if not len(targets):
        none = Pairs(*torch.empty(3, 0, dtype=torch.long, device=device))
        return [none] * len(logits), none
    image = targets[:, 0].long()
    cost = costs(logits, boxes, targets)
    read = (
        torch.cat((cost.flatten(), image.to(cost.dtype))).cpu().numpy()
    )  # the only time that the device is waited for
    cost_there, image_there = read[: cost.numel()].reshape(cost.shape), read[cost.numel() :].astype(np.int64)
    most = cost.shape[3]
    counts = np.bincount(image_there, minlength=cost.shape[1])
    order = np.argsort(image_there, kind="stable")
    start = counts.cumsum() - counts
    matches = match(cost_there, counts)
    joined = [union([each[number] for each in matches], most) for number in range(len(counts))]
    rows = []
    for of_images in (*matches, joined):
        numbers = np.repeat(np.arange(len(counts)), [len(query) for query, _ in of_images])
        query = np.concatenate([query for query, _ in of_images])
        target = np.concatenate([target for _, target in of_images])
        rows.append(np.stack((numbers, query, order[start[numbers] + target])))
    there = torch.from_numpy(np.concatenate(rows, axis=1)).to(device)
    *each, last = (Pairs(*part) for part in torch.split(there, [row.shape[1] for row in rows], dim=1))
    return each, last
