"""The loss of SSD (Liu et al., 2016): smooth L1 on matched default boxes, cross-entropy with hard negatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from raydet.boxes import cxcywh_to_xyxy
from raydet.losses.assignment import Best, overlaps, parts
from raydet.losses.base import DetectionLoss, Terms
from raydet.outputs import SSD, encode_ssd, raw_of


class SSDLoss(DetectionLoss):
    """Boxes and classes of the default boxes that match an object, and the hardest of the others as background.

    A default box matches the object with which its IoU is highest, if above a threshold; each object also gets the
    default box that overlaps it most. Sums are divided by the number of matches image by image, then by that of images.

    Args:
        default_boxes: [A, 4] = cx, cy, w, h as fractions of the image's sides.
        image_size: (height, width) of the images in pixels.
        num_classes: number of classes, C, without the background, which is class 0 of the model.
        alpha: weight of the classification term; the weight of the box term is 2 - alpha.
        iou_thresh: lowest IoU of a default box and the object that it is matched with.
        neg_pos_ratio: number of background boxes for each matched box.
    """

    component_names = ("smooth_l1", "closs", "Loss")

    def __init__(
        self,
        default_boxes: Tensor,
        image_size: Sequence[int],
        num_classes: int = 80,
        alpha: float = 1.0,
        iou_thresh: float = 0.5,
        neg_pos_ratio: float = 3.0,
    ):
        super().__init__()
        self.default_boxes: Tensor
        self.register_buffer("default_boxes", default_boxes.detach().clone(), persistent=False)
        self.image_size = tuple(image_size)
        self.num_classes = num_classes
        self.alpha = alpha
        self.iou_thresh = iou_thresh
        self.neg_pos_ratio = neg_pos_ratio

    @property
    def weights(self) -> tuple[float, ...]:
        """Weights of smooth_l1 and closs."""
        return 2 - self.alpha, self.alpha

    def components(self, divided: Tensor, weighted: Tensor, terms: Terms) -> Tensor:
        """Return the terms summed over an image, in the mean over images, and the loss."""
        return torch.cat((terms.counts / terms.normaliser.clamp(min=1), weighted.sum().view(1)))

    def terms(self, outputs: Any, targets: Tensor) -> Terms:
        """Return the sums of the terms, each image's over its matches; the images; sums without that division."""
        raw_boxes, logits = self._raw(outputs)
        images = len(raw_boxes)
        targets = targets.to(raw_boxes.device, torch.float32, non_blocking=True)
        height, width = self.image_size
        centres, sizes = targets[:, 2::2] / width, targets[:, 3::2] / height
        objects = torch.stack((centres[:, 0], sizes[:, 0], centres[:, 1], sizes[:, 1]), dim=1)
        with torch.no_grad():
            owner = self._match(objects, targets[:, 0].long(), images)
        matched = owner >= 0
        if len(targets):
            wanted = encode_ssd(objects[owner.clamp(min=0)], self.default_boxes)
            labels = torch.where(matched, targets[:, 1].long()[owner.clamp(min=0)] + 1, 0)
        else:
            wanted, labels = torch.zeros_like(raw_boxes), torch.zeros_like(owner)
        box_loss = torch.where(matched[..., None], F.smooth_l1_loss(raw_boxes, wanted, reduction="none"), 0.0)

        entropy = F.cross_entropy(logits, labels, reduction="none")
        matches = matched.sum(1)
        hardest = entropy.masked_fill(matched, 0.0).sort(dim=1, descending=True).values
        rank = torch.arange(hardest.shape[1], device=hardest.device)
        negatives = torch.where(rank < (self.neg_pos_ratio * matches)[:, None], hardest, 0.0)
        cls_loss = torch.where(matched, entropy, 0.0).sum(1) + negatives.sum(1)

        sums = torch.stack((box_loss.sum((1, 2)), cls_loss), dim=1)
        normaliser = torch.full((), float(images), device=sums.device)
        return Terms(sums / matches.clamp(min=1)[:, None], normaliser, sums.detach().sum(0))

    def _match(self, objects: Tensor, image: Tensor, images: int) -> Tensor:
        """Row of the targets for each default box of each image [B, A]; -1: background."""
        corners, defaults = cxcywh_to_xyxy(objects), cxcywh_to_xyxy(self.default_boxes)
        best = Best((images, len(defaults)), len(objects), image.device)
        forced = torch.full((images * len(defaults),), -1, device=image.device)
        for part in parts(len(objects), len(defaults)):
            overlap = overlaps(corners[part], defaults)
            overlapping = torch.where(overlap > self.iou_thresh, overlap, -torch.inf)
            best.put(part, image[part], overlapping)
            # Each object gets its best default box; where that is the best of several, the last of them gets it.
            # One that overlaps none, outside the image, gets none.
            highest, where = overlap.max(1)
            number = torch.where(highest > 0, torch.arange(part.start, part.stop, device=image.device), -1)
            forced.scatter_reduce_(0, image[part] * len(defaults) + where, number, "amax")
        owner = torch.where(best.score > -torch.inf, best.objects, -1)
        forced = forced.reshape(owner.shape)
        return torch.where(forced >= 0, forced, owner)

    def _raw(self, outputs: Any) -> tuple[Tensor, Tensor]:
        """Boxes [B, A, 4] and logits [B, C + 1, A] in float32."""
        name = type(self).__name__
        boxes, logits = raw_of(outputs, SSD, name)
        if logits.shape[1] != self.num_classes + 1:
            raise ValueError(f"{name} is for {self.num_classes} classes, the output has {logits.shape[1] - 1}")
        if boxes.shape[2] != len(self.default_boxes):
            raise ValueError(
                f"{name} has {len(self.default_boxes)} default boxes for {self.image_size[0]}x{self.image_size[1]} "
                f"pixels, the output has {boxes.shape[2]}: build model and loss for the same image size"
            )
        return boxes.transpose(1, 2).float(), logits.float()
