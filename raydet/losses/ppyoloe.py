"""The loss of PP-YOLOE (Xu et al., 2022) and YOLO-NAS: class scores that foretell the box's quality, GIoU, DFL.

Anchor points are assigned to objects by ATSS (Zhang et al., 2020), which looks at the boxes alone and suits a young
model, or by TOOD's task-aligned assigner (Feng et al., 2021), which asks the model which points predict an object best.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from raydet.boxes import cxcywh_to_xyxy, giou, iou
from raydet.losses.assignment import Assignment, Best, Rows, assign_once, overlaps, parts
from raydet.losses.base import DetectionLoss, Terms
from raydet.outputs import PPYOLOE, DFLOutput, decode_dfl, raw_of

# Constants of the two papers.
_ATSS_POINTS_A_LEVEL = 9
_TAL_POINTS, _TAL_BETA = 13, 6
_INSIDE = 1e-9  # pixels from the edge of an object at which a point is inside
_EPS = 1e-9  # added to alignments: an object whose best is not much larger gets little quality
# Constants of varifocal and focal loss.
_ALPHA, _FOCAL_ALPHA, _GAMMA = 0.75, 0.25, 2


class Predictions(NamedTuple):
    """A model's output in float32.

    Attributes:
        logits: [B, L, C] class logits.
        distances: [B, L, 4 · (reg_max + 1)] logits of the distances, before the softmax.
        boxes: [B, L, 4] boxes, xyxy in pixels, without gradient.
        anchors: [L, 4] anchor boxes, xyxy in pixels.
        points: [L, 2] anchor points in pixels.
        strides: [L, 1] stride of each anchor point in pixels.
        levels: number of anchor points of each level.
    """

    logits: Tensor
    distances: Tensor
    boxes: Tensor
    anchors: Tensor
    points: Tensor
    strides: Tensor
    levels: list[int]


class PPYoloELoss(DetectionLoss):
    """Classification against the quality of the assigned box, GIoU, and distribution focal loss (DFL).

    Each is divided by the sum of the assigned qualities. That of a point is the IoU of its box with ATSS; with the
    task-aligned assigner it is the alignment (score · IoU⁶), scaled so that an object's best point has its best IoU.

    Args:
        num_classes: number of classes, C.
        use_varifocal_loss: classification term: true: varifocal loss (Zhang et al., 2020), false: quality focal loss.
        use_static_assigner: assignment of anchor points: true: ATSS, false: the task-aligned assigner.
        reg_max: longest distance that the model can express, in strides; None: any.
        classification_loss_weight: weight of the classification term.
        iou_loss_weight: weight of the GIoU term.
        dfl_loss_weight: weight of the DFL term.
        static_assigner_end_epoch: number of first epochs with ATSS, after which the task-aligned assigner takes over;
            None: `use_static_assigner` decides for all epochs.
    """

    component_names = ("loss_cls", "loss_iou", "loss_dfl", "loss")

    def __init__(
        self,
        num_classes: int = 80,
        use_varifocal_loss: bool = True,
        use_static_assigner: bool = False,
        reg_max: int | None = None,
        classification_loss_weight: float = 1.0,
        iou_loss_weight: float = 2.5,
        dfl_loss_weight: float = 0.5,
        static_assigner_end_epoch: int | None = None,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.use_varifocal_loss = use_varifocal_loss
        self.use_static_assigner = use_static_assigner
        self.reg_max = reg_max
        self.static_assigner_end_epoch = static_assigner_end_epoch
        self.classification_loss_weight = classification_loss_weight
        self.iou_loss_weight = iou_loss_weight
        self.dfl_loss_weight = dfl_loss_weight

    @property
    def weights(self) -> tuple[float, ...]:
        """Weights of loss_cls, loss_iou and loss_dfl."""
        return self.classification_loss_weight, self.iou_loss_weight, self.dfl_loss_weight

    def at_epoch(self, epoch: int, epochs: int) -> None:
        """Go over to the task-aligned assigner when its time has come."""
        if self.static_assigner_end_epoch is not None:
            self.use_static_assigner = epoch < self.static_assigner_end_epoch

    def components(self, divided: Tensor, weighted: Tensor, terms: Terms) -> Tensor:
        """Return the terms after weighting, and the loss."""
        return torch.cat((weighted, weighted.sum().view(1)))

    def terms(self, outputs: Any, targets: Tensor) -> Terms:
        """Return the sums of the class, IoU and DFL terms, and the sum of the assigned qualities."""
        predictions = self._predictions(outputs)
        targets = targets.to(predictions.logits.device, torch.float32, non_blocking=True)
        objects = cxcywh_to_xyxy(targets[:, 2:])
        with torch.no_grad():
            if self.use_static_assigner:
                assigned, quality = _atss(predictions, targets, objects)
            else:
                assigned, quality = _task_aligned(predictions, targets, objects)
        # The class term of a background point needs no target: all points are taken for that, and those that learn an
        # object are corrected.
        label = targets[assigned.objects, 1].long()
        logits = predictions.logits.flatten(0, 1)[assigned.points, label]
        positive = (self._class_loss(logits, quality, 1.0) - self._class_loss(logits, 0.0, 0.0)) * assigned.keep
        background = self._class_loss(predictions.logits, 0.0, 0.0).sum((1, 2))
        images, points = predictions.logits.shape[:2]
        cls_loss = torch.zeros_like(background).index_add_(0, assigned.points // points, positive)

        # The box terms need many numbers an entry.
        counting, which = assigned.enough(images * points)
        point, weight = counting.points % points, quality[which]
        stride, centre, wanted = predictions.strides[point], predictions.points[point], objects[counting.objects]
        distances = predictions.distances.flatten(0, 1)[counting.points]
        # An entry that does not count is compared with itself, so that it is finite whatever was predicted there.
        boxes = torch.where(counting.keep[:, None], decode_dfl(distances, centre, stride), wanted)
        box_loss = (1 - giou(boxes, wanted)) * weight
        sides = torch.cat((centre - wanted[:, :2], wanted[:, 2:] - centre), dim=1) / stride
        dfl_loss = _distribution_focal(distances, sides) * weight
        of_boxes = background.new_zeros(images, 2).index_add_(
            0, counting.points // points, torch.stack((box_loss, dfl_loss), 1)
        )
        per_image = torch.cat(((cls_loss + background)[:, None], of_boxes), dim=1)
        return Terms(per_image, quality.sum(), quality.new_zeros(0))

    def _class_loss(self, logits: Tensor, quality: Tensor | float, label: float) -> Tensor:
        """Loss of logits whose target is `quality` where they are of the object's class (label 1), else 0."""
        probability = logits.sigmoid()
        entropy = F.softplus(logits) - quality * logits
        if self.use_varifocal_loss:
            weight = quality if label else _ALPHA * probability**_GAMMA
            return weight * entropy
        weight = (probability - quality) ** _GAMMA
        if self.use_static_assigner:
            weight = weight * (_FOCAL_ALPHA * quality + (1 - _FOCAL_ALPHA) * (1 - quality))
        return weight * entropy

    def _predictions(self, outputs: Any) -> Predictions:
        name = type(self).__name__
        raw = DFLOutput(*raw_of(outputs, PPYOLOE, name))
        bins = raw.reg_logits.shape[-1] // 4
        if raw.cls_logits.shape[-1] != self.num_classes:
            raise ValueError(f"{name} is for {self.num_classes} classes, the output has {raw.cls_logits.shape[-1]}")
        if self.reg_max is not None and bins != self.reg_max + 1:
            raise ValueError(f"{name} has reg_max {self.reg_max}, the output that of {bins - 1}")
        distances = raw.reg_logits.float()
        with torch.no_grad():
            boxes = decode_dfl(distances, raw.anchor_points, raw.stride)
        return Predictions(
            raw.cls_logits.float(),
            distances,
            boxes,
            raw.anchors,
            raw.anchor_points,
            raw.stride,
            list(raw.num_anchors_list),
        )


def _atss(predictions: Predictions, targets: Tensor, objects: Tensor) -> tuple[Assignment, Tensor]:
    """Assign by the anchor boxes' IoU; return the assignment and the quality of its entries [E].

    An object's candidates are the points nearest to its centre, some of each level; it takes those within it whose
    anchor box overlaps it by more than the mean and a standard deviation of all of these.
    """
    image, (x, y) = targets[:, 0].long(), predictions.points.unbind(-1)
    found = Rows(len(targets))
    best = Best((len(predictions.logits), len(x)), len(targets), image.device)
    for part in parts(len(targets), len(predictions.points)):
        overlap = overlaps(objects[part], predictions.anchors)
        distance = (targets[part, 2:3] - x).square_() + (targets[part, 3:4] - y).square_()
        nearest, first = [], 0
        for size in predictions.levels:
            of_level = distance[:, first : first + size]
            nearest.append(of_level.topk(min(_ATSS_POINTS_A_LEVEL, size), dim=1, largest=False).indices + first)
            first += size
        points = torch.cat(nearest, dim=1)
        candidates = overlap.gather(1, points)
        mean = candidates.mean(1, keepdim=True)
        deviation = ((candidates - mean).square().sum(1, keepdim=True) / (points.shape[1] - 1)).sqrt()
        threshold = mean + deviation
        found.put(part, points, (candidates > threshold) & _inside(predictions.points[points], objects[part, None]))
        best.put(part, image[part], overlap)
    points, chosen = found.columns
    assigned = assign_once(points, chosen, image, best.objects)
    quality = iou(predictions.boxes.reshape(-1, 4)[assigned.points], objects[assigned.objects])
    return assigned, quality * assigned.keep


def _task_aligned(predictions: Predictions, targets: Tensor, objects: Tensor) -> tuple[Assignment, Tensor]:
    """Assign by score · IoU⁶; return the assignment and the quality of its entries [E]."""
    image, label = targets[:, 0].long(), targets[:, 1].long()
    found = Rows(len(targets))
    best = Best((len(predictions.logits), len(predictions.points)), len(targets), image.device, values=1)
    for part in parts(len(targets), len(predictions.points)):
        overlap = overlaps(objects[part], predictions.boxes, image[part])
        alignment = predictions.logits[image[part], :, label[part]].sigmoid() * overlap**_TAL_BETA
        within = alignment.masked_fill(~_inside(predictions.points, objects[part, None]), -1.0)
        highest, points = within.topk(min(_TAL_POINTS, within.shape[1]), dim=1)
        found.put(part, points, highest >= 0, alignment.gather(1, points), overlap.gather(1, points))
        best.put(part, image[part], overlap, alignment)
    points, chosen, *own = found.columns
    assigned = assign_once(points, chosen, image, best.objects)
    is_own = assigned.objects.view_as(points) == torch.arange(len(targets), device=image.device)[:, None]

    def of_entries(own: Tensor, of_best: Tensor) -> tuple[Tensor, Tensor]:
        """Values of the entries, and the highest of each entry's object."""
        mine = torch.where(is_own, own, of_best.reshape(-1)[assigned.points].view_as(own)).reshape(-1) * assigned.keep
        highest = mine.new_zeros(len(targets)).scatter_reduce_(0, assigned.objects, mine, "amax")
        return mine, highest[assigned.objects]

    mine, highest = of_entries(own[0], best.values[0])
    return assigned, mine / (highest + _EPS) * of_entries(own[1], best.score)[1]


def _inside(points: Tensor, boxes: Tensor) -> Tensor:
    """Are points [..., 2] within boxes [..., 4]? Shapes broadcast."""
    x, y = points.unbind(-1)
    left, top, right, bottom = boxes.unbind(-1)
    across = (x - left > _INSIDE) & (right - x > _INSIDE)
    return across & (y - top > _INSIDE) & (bottom - y > _INSIDE)


def _distribution_focal(logits: Tensor, distances: Tensor) -> Tensor:
    """DFL [E] of logits [E, 4 · bins] for distances [E, 4] in strides: cross-entropy with the two nearest bins."""
    bins = logits.shape[-1] // 4
    distances = distances.clamp(0, bins - 1 - 0.01)
    below = distances.long()
    share = distances - below
    log = logits.reshape(-1, 4, bins).log_softmax(-1)
    low, high = (log.gather(-1, index[..., None]).squeeze(-1) for index in (below, below + 1))
    loss: Tensor = -(low * (1 - share) + high * share).mean(-1)
    return loss
