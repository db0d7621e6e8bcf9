"""Denoising queries (Zhang et al., DINO, 2022): objects with noise, which a decoder learns to put right.

They stand in front of the queries that detect. G is the most objects of an image; in each group G positives, each near
its object, are followed by G negatives, each further from it. Images with fewer objects have padding in their place.
"""

from __future__ import annotations

from functools import partial
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
    def draw(seeds: Tensor, queries: int, num_classes: int) -> Noise:
        """Draw on the CPU, so that every device has the same noise; that of an image follows from its seed alone.

        Args:
            seeds: [B] int64, a seed for each image.
            queries: N.
            num_classes: C.
        """
        drawn = []
        for seed in seeds.tolist():
            generator = torch.Generator().manual_seed(seed)
            uniform, integer = partial(torch.rand, generator=generator), partial(torch.randint, generator=generator)
            drawn.append(
                (uniform(queries), integer(num_classes, (queries,)), integer(2, (queries, 4)), uniform(queries, 4))
            )
        return Noise(*(torch.stack(part) for part in zip(*drawn, strict=True)))


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
    targets: Tensor,
    seeds: Tensor,
    num_classes: int,
    queries: int,
    most_objects: int | None = None,
    positives: int = QUERIES,
) -> Denoising | None:
    """Make the queries of a batch; None: it has no objects.

    Args:
        targets: [N, 6] image, class, cx, cy, w, h in shares of the image.
        seeds: [B] int64, a seed for the noise of each image.
        num_classes: C.
        queries: Q, those that detect.
        most_objects: G; None: that of these images. Parts of a batch are given that of the whole.
        positives: number of positives of an image that the number of groups is chosen for.
    """
    device, image = targets.device, targets[:, 0].long()
    slot = slots(image)
    if most_objects is None:
        most_objects = int(slot.max()) + 1 if len(slot) else 0
    if not most_objects:
        return None
    images, groups = len(seeds), max(1, positives // most_objects)
    count = 2 * most_objects * groups
    noise = Noise.draw(seeds, count, num_classes)
    relabel, label, sign, move = (part.to(device, non_blocking=True) for part in noise)

    labels = torch.full((images, most_objects), num_classes, device=device)
    labels[image, slot] = targets[:, 1].long()
    boxes = targets.new_zeros(images, most_objects, 4)
    boxes[image, slot] = targets[:, 2:]
    labels, boxes = labels.repeat(1, 2 * groups), boxes.repeat(1, 2 * groups, 1)
    labels = torch.where((relabel < _LABEL_NOISE) & (labels < num_classes), label, labels)
    negative = (torch.arange(count, device=device) // most_objects % 2)[:, None]
    half = boxes[..., 2:].repeat(1, 1, 2) / 2
    corners = cxcywh_to_xyxy(boxes) + (2 * sign - 1) * (move + negative) * half
    moved = xyxy_to_cxcywh(corners.clamp(0, 1)).abs()  # a side may have passed the other

    group = torch.arange(count + queries, device=device) // (2 * most_objects)
    group[count:] = groups
    blocked = (group[:, None] != group) & (group < groups)
    return Denoising(labels, logit(moved), blocked, groups)
