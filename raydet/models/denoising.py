"""Denoising queries (Zhang et al., DINO, 2022): objects with noise, which a decoder learns to put right.

They stand in front of the queries that detect. G is the most objects of an image; in each group G positives, each near
its object, are followed by G negatives, each further from it. Images with fewer objects have padding in their place.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from raydet.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from raydet.outputs import logit, slots

QUERIES = 100  # about so many positives an image, or one group
_LABEL_NOISE = 0.25  # share of the objects that get a label at random


class Noise(NamedTuple):
    """What is drawn for the N queries of each image, padding too.

    Attributes:
        relabel: [B, N] uniform in 0..1: the lowest get a label at random.
        label: [B, N] that label.
        sign: [B, N, 4] 0 or 1: which way a side moves.
        move: [B, N, 4] uniform in 0..1: how far, in half sides of the box.
    """

    relabel: Tensor
    label: Tensor
    sign: Tensor
    move: Tensor

    @staticmethod
    def draw(images: int, queries: int, num_classes: int) -> Noise:
        """Draw on the CPU, so that every device has the same noise."""
        return Noise(
            torch.rand(images, queries),
            torch.randint(num_classes, (images, queries)),
            torch.randint(2, (images, queries, 4)),
            torch.rand(images, queries, 4),
        )


class Denoising(NamedTuple):
    """Denoising queries.

    Attributes:
        labels: [B, N] class of each, the number of classes for padding.
        boxes: [B, N, 4] logits of cx, cy, w, h in shares of the image.
        blocked: [N + Q, N + Q] True where a query (row) does not see another (column).
        groups: number of groups.
    """

    labels: Tensor
    boxes: Tensor
    blocked: Tensor
    groups: int


def denoising_queries(
    targets: Tensor, images: int, num_classes: int, queries: int, noise: Noise | None = None, most: int = QUERIES
) -> Denoising | None:
    """Make the queries of a batch; None: it has no objects.

    Args:
        targets: [N, 6] image, class, cx, cy, w, h in shares of the image.
        images: B.
        num_classes: C.
        queries: Q, those that detect.
        noise: what to use in place of new random numbers.
        most: positives of an image that the number of groups is chosen for.
    """
    if not len(targets):
        return None
    device, image = targets.device, targets[:, 0].long()
    slot = slots(image)
    largest = int(slot.max()) + 1
    groups = max(1, most // largest)
    count = 2 * largest * groups
    noise = Noise.draw(images, count, num_classes) if noise is None else noise
    relabel, label, sign, move = (part.to(device, non_blocking=True) for part in noise)

    labels = torch.full((images, largest), num_classes, device=device)
    labels[image, slot] = targets[:, 1].long()
    boxes = targets.new_zeros(images, largest, 4)
    boxes[image, slot] = targets[:, 2:]
    labels, boxes = labels.repeat(1, 2 * groups), boxes.repeat(1, 2 * groups, 1)
    labels = torch.where((relabel < _LABEL_NOISE) & (labels < num_classes), label, labels)
    negative = (torch.arange(count, device=device) // largest % 2)[:, None]
    half = boxes[..., 2:].repeat(1, 1, 2) / 2
    corners = cxcywh_to_xyxy(boxes) + (2 * sign - 1) * (move + negative) * half
    moved = xyxy_to_cxcywh(corners.clamp(0, 1)).abs()  # a side may have passed the other

    group = torch.arange(count + queries, device=device) // (2 * largest)
    group[count:] = groups
    blocked = (group[:, None] != group) & (group < groups)
    return Denoising(labels, logit(moved), blocked, groups)
