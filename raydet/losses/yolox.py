"""The two losses of YOLOX: that of the paper, and the faster variant of SuperGradients.

Both assign anchor points to objects by SimOTA (Ge et al., 2021): an object takes the k points that cost it least, k
being the sum of its best IoUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from raydet.boxes import cxcywh_to_xyxy, giou, iou
from raydet.losses.assignment import Assignment, Best, Rows, assign_once, first_of, overlaps, parts
from raydet.losses.base import DetectionLoss, Terms
from raydet.outputs import YOLOX, anchor_cells, decode_yolox, raw_of, shapes

# Constants of the paper's assignment.
_TOP_IOUS = 10
_IOU_COST = 3.0
_OUTSIDE_COST = 1e5


class Predictions(NamedTuple):
    """The raw maps as one list of anchor points: float32, grid order, levels from fine to coarse.

    Attributes:
        raw_boxes: [B, A, 4] box outputs before decoding.
        boxes: [B, A, 4] boxes, xyxy in pixels.
        objectness: [B, A] objectness logits.
        classes: [B, A, C] class logits.
        cells: [A, 2] column and row of each anchor point.
        strides: [A, 1] stride of each anchor point in pixels.
    """

    raw_boxes: Tensor
    boxes: Tensor
    objectness: Tensor
    classes: Tensor
    cells: Tensor
    strides: Tensor


class YoloXDetectionLoss(DetectionLoss):
    """YOLOX's loss: IoU, objectness, class and, at the end of a training, L1 on the raw boxes.

    Every sum is divided by the number of assigned anchor points, over all ranks of a distributed run: given the same
    outputs, N ranks with a batch of B learn what one with N·B does. Candidates for an object are the points inside
    any object of the image or near its centre.

    Args:
        strides: stride of each of the three maps, in pixels.
        num_classes: number of classes, C.
        use_l1: add the L1 term on the raw boxes.
        l1_last_epochs: number of last epochs with the L1 term; 0: `use_l1` decides for all epochs.
        center_sampling_radius: distance from an object's centre, in strides, within which points are candidates.
        iou_type: "iou" for 1 - IoU², "giou" for 1 - GIoU.
        iou_weight: weight of the box term.
        obj_weight: weight of the objectness term.
        cls_weight: weight of the classification term.
        cls_pos_weight: weight of the positives in the classification term: one number, or one for each class.
    """

    component_names = ("iou", "obj", "cls", "l1", "num_fg", "Loss")

    def __init__(
        self,
        strides: Sequence[int] = (8, 16, 32),
        num_classes: int = 80,
        use_l1: bool = False,
        center_sampling_radius: float = 2.5,
        iou_type: str = "iou",
        iou_weight: float = 5.0,
        obj_weight: float = 1.0,
        cls_weight: float = 1.0,
        cls_pos_weight: float | Sequence[float] | None = None,
        l1_last_epochs: int = 0,
    ):
        super().__init__()
        if isinstance(cls_pos_weight, Sequence) and len(cls_pos_weight) != num_classes:
            raise ValueError(f"cls_pos_weight has {len(cls_pos_weight)} numbers for {num_classes} classes")
        if iou_type not in ("iou", "giou"):
            raise ValueError(f"iou_type is {iou_type!r}: it is 'iou' or 'giou'")
        self.strides = tuple(strides)
        self.num_classes = num_classes
        self.use_l1 = use_l1
        self.l1_last_epochs = l1_last_epochs
        self.center_sampling_radius = center_sampling_radius
        self.iou_type = iou_type
        self.iou_weight = iou_weight
        self.obj_weight = obj_weight
        self.cls_weight = cls_weight
        self.cls_pos_weight: Tensor | None
        self.register_buffer(
            "cls_pos_weight", None if cls_pos_weight is None else torch.tensor(cls_pos_weight), persistent=False
        )

    @property
    def weights(self) -> tuple[float, ...]:
        """Weights of iou, obj, cls and l1."""
        return self.iou_weight, self.obj_weight, self.cls_weight, 1.0

    def at_epoch(self, epoch: int, epochs: int) -> None:
        """Add the L1 term when its time has come."""
        if self.l1_last_epochs:
            self.use_l1 = epoch >= epochs - self.l1_last_epochs

    def components(self, divided: Tensor, weighted: Tensor, terms: Terms) -> Tensor:
        """Return the terms before weighting, assigned points an object, and the loss."""
        num_fg = terms.normaliser / terms.counts[0].clamp(min=1)
        return torch.cat((divided, torch.stack((num_fg, weighted.sum()))))

    def terms(self, outputs: Any, targets: Tensor) -> Terms:
        """Return the sums of iou, obj, cls and l1, the assigned points, and (objects, all points) as counts."""
        predictions = flatten(self._raw_maps(outputs), self.strides)
        targets = targets.to(predictions.boxes.device, torch.float32, non_blocking=True)
        with torch.no_grad():
            assigned, _ = self.assign(predictions, targets).enough(predictions.objectness.numel())
        images, points = predictions.objectness.shape
        weight = assigned.keep.float()
        objects = targets[assigned.objects]
        # An entry that does not count is compared with itself, so that it is finite whatever was predicted there.
        wanted = cxcywh_to_xyxy(objects[:, 2:])
        boxes = torch.where(assigned.keep[:, None], predictions.boxes.reshape(-1, 4)[assigned.points], wanted)
        box_loss = 1 - iou(boxes, wanted) ** 2 if self.iou_type == "iou" else 1 - giou(boxes, wanted).clamp(-1, 1)

        ious = iou(predictions.boxes.detach().reshape(-1, 4)[assigned.points], wanted)
        labels = F.one_hot(objects[:, 1].long(), self.num_classes) * ious[:, None]
        logits = predictions.classes.reshape(-1, self.num_classes)[assigned.points]
        cls_loss = _bce(logits, labels, pos_weight=self.cls_pos_weight).sum(1)

        positive = torch.zeros(images * points, device=weight.device).index_add_(0, assigned.points, weight)
        obj_loss = _bce(predictions.objectness, positive.reshape(images, points)).sum(1)

        l1_loss = torch.zeros_like(box_loss)
        if self.use_l1:
            point = assigned.points % points
            stride = predictions.strides[point]
            offset = objects[:, 2:4] / stride - predictions.cells[point]
            raw_wanted = torch.cat((offset, torch.log(objects[:, 4:] / stride + 1e-8)), dim=1)
            raw = predictions.raw_boxes.reshape(-1, 4)[assigned.points]
            l1_loss = torch.where(assigned.keep[:, None], (raw - raw_wanted).abs(), 0.0).sum(1)

        of_image = box_loss.new_zeros(images, 3).index_add_(
            0, objects[:, 0].long(), torch.stack((box_loss, cls_loss, l1_loss), dim=1) * weight[:, None]
        )
        per_image = torch.stack((of_image[:, 0], obj_loss, of_image[:, 1], of_image[:, 2]), dim=1)
        counts = [torch.full((), float(count), device=weight.device) for count in (len(targets), images * points)]
        return Terms(per_image, weight.sum(), torch.stack(counts))

    def assign(self, predictions: Predictions, targets: Tensor) -> Assignment:
        """SimOTA over the batch. Targets: [M, 6] on the predictions' device."""
        image, (images, points) = targets[:, 0].long(), predictions.objectness.shape
        cut = parts(len(targets), points)

        @lru_cache(maxsize=1)  # where there is one part only, both loops look at it
        def places(number: int) -> tuple[Tensor, Tensor]:
            return self._near_and_inside(predictions, targets[cut[number]])

        near_any = torch.zeros_like(predictions.objectness, dtype=torch.int32)
        for number, part in enumerate(cut):
            near, inside = places(number)
            near_any.index_add_(0, image[part], (near | inside).int())
        absent, found = _absent(predictions), Rows(len(targets))
        best = Best((images, points), len(targets), image.device)
        for number, part in enumerate(cut):
            near, inside = places(number)
            candidate = near_any[image[part]] > 0
            cost, ious = _cost(predictions, absent, targets[part], near & inside, candidate)
            found.put(part, *_cheapest(cost, _dynamic_k(ious, candidate, 1.0), most=_TOP_IOUS)[1:])
            best.put(part, image[part], -cost)
        cheapest, chosen = found.columns
        return assign_once(cheapest, chosen, image, best.objects)

    def _raw_maps(self, outputs: Any) -> Sequence[Tensor]:
        maps: Sequence[Tensor] = raw_of(outputs, YOLOX, type(self).__name__)
        if len(maps) != len(self.strides) or any(m.shape[-1] != 5 + self.num_classes for m in maps):
            raise ValueError(
                f"{type(self).__name__} for {self.num_classes} classes takes {len(self.strides)} maps "
                f"[B, 1, H, W, {5 + self.num_classes}], not {shapes(maps)}"
            )
        return maps

    def _near_and_inside(self, predictions: Predictions, targets: Tensor) -> tuple[Tensor, Tensor]:
        """[M, A] each: is the point near the object's centre, is it inside the object."""
        x, y = ((predictions.cells + 0.5) * predictions.strides).unbind(-1)
        across, down = (x - targets[:, 2:3]).abs_(), (y - targets[:, 3:4]).abs_()
        radius = self.center_sampling_radius * predictions.strides[:, 0]
        return (
            (across < radius) & (down < radius),
            (across < targets[:, 4:5] / 2) & (down < targets[:, 5:6] / 2),
        )


class YoloXFastDetectionLoss(YoloXDetectionLoss):
    """SuperGradients' faster variant: an object's candidates are its own points only.

    As it then has fewer of them, k is raised by `dynamic_ks_bias`; a point that several objects chose goes to the one
    of these which it costs least.

    Args:
        dynamic_ks_bias: factor on the sum of IoUs, which gives k.
        obj_loss_fix: divide the objectness term by the number of all anchor points instead of the assigned ones.
        **settings: arguments of YoloXDetectionLoss.
    """

    def __init__(
        self,
        strides: Sequence[int] = (8, 16, 32),
        num_classes: int = 80,
        use_l1: bool = False,
        center_sampling_radius: float = 2.5,
        iou_type: str = "iou",
        iou_weight: float = 5.0,
        obj_weight: float = 1.0,
        cls_weight: float = 1.0,
        cls_pos_weight: float | Sequence[float] | None = None,
        dynamic_ks_bias: float = 1.1,
        obj_loss_fix: bool = False,
        l1_last_epochs: int = 0,
    ):
        super().__init__(
            strides,
            num_classes,
            use_l1,
            center_sampling_radius,
            iou_type,
            iou_weight,
            obj_weight,
            cls_weight,
            cls_pos_weight,
            l1_last_epochs,
        )
        self.dynamic_ks_bias = dynamic_ks_bias
        self.obj_loss_fix = obj_loss_fix

    def divisors(self, terms: Terms) -> Tensor:
        """Return what each of the four sums is divided by: [], with `obj_loss_fix` [4]."""
        foreground = super().divisors(terms)
        if not self.obj_loss_fix:
            return foreground
        return torch.stack((foreground, terms.counts[1].clamp(min=1), foreground, foreground))

    def assign(self, predictions: Predictions, targets: Tensor) -> Assignment:
        """The variant of SimOTA described above. Targets: [M, 6] on the predictions' device."""
        image, absent, found = targets[:, 0].long(), _absent(predictions), Rows(len(targets))
        most = max(1, int(_TOP_IOUS * self.dynamic_ks_bias))
        for part in parts(len(targets), predictions.objectness.shape[1]):
            near, inside = self._near_and_inside(predictions, targets[part])
            candidate = near | inside
            cost, ious = _cost(predictions, absent, targets[part], near & inside, candidate)
            found.put(part, *_cheapest(cost, _dynamic_k(ious, candidate, self.dynamic_ks_bias), most))
        best, points, chosen = found.columns

        flat = image[:, None] * predictions.objectness.shape[1] + points
        offer = torch.where(chosen, best, torch.inf)
        lowest = torch.full((predictions.objectness.numel(),), torch.inf, device=flat.device)
        lowest.scatter_reduce_(0, flat.reshape(-1), offer.reshape(-1), "amin")
        chosen = chosen & (best == lowest[flat])
        keep = chosen & first_of(flat, chosen, lowest.numel())
        objects = torch.arange(len(targets), device=flat.device)[:, None].expand_as(flat)
        return Assignment(flat.reshape(-1), objects.reshape(-1), keep.reshape(-1))


def flatten(maps: Sequence[Tensor], strides: Sequence[int]) -> Predictions:
    """Join raw maps [B, 1, H, W, 5 + C] into one list of anchor points."""
    raw = torch.cat([level.flatten(1, 3) for level in maps], dim=1).float()
    cells, steps = anchor_cells([(level.shape[2], level.shape[3]) for level in maps], strides, raw.device)
    return Predictions(
        raw_boxes=raw[..., :4],
        boxes=cxcywh_to_xyxy(decode_yolox(raw[..., :4], cells, steps)),
        objectness=raw[..., 4],
        classes=raw[..., 5:],
        cells=cells,
        strides=steps,
    )


def _absent(predictions: Predictions) -> Tensor:
    """What each point costs [B, A] as if no class were the object's.

    Class cost is the binary cross-entropy of √(p_class · p_object) with the one-hot class, summed over classes. All
    classes but the object's own are the same for every object, so the sum is made once a point.
    """
    joint = (predictions.classes.sigmoid() * predictions.objectness.sigmoid()[..., None]).sqrt_()
    absent: Tensor = joint.neg_().log1p_().clamp_(min=-100).sum(-1)
    return absent


def _cost(
    predictions: Predictions, absent: Tensor, targets: Tensor, central: Tensor, candidate: Tensor
) -> tuple[Tensor, Tensor]:
    """What each point costs each object, infinite where it is no candidate, and their IoU: [M, A] each."""
    image, label = targets[:, 0].long(), targets[:, 1].long()
    ious = overlaps(cxcywh_to_xyxy(targets[:, 2:]), predictions.boxes, image)
    objectness = predictions.objectness.sigmoid()
    own = (predictions.classes[image, :, label].sigmoid() * objectness[image]).sqrt_()
    cost = torch.log1p(-own).clamp_(min=-100) - own.log().clamp_(min=-100) - absent[image]
    cost = cost - _IOU_COST * torch.log(ious + 1e-8) + _OUTSIDE_COST * ~central
    return cost.masked_fill_(~candidate, torch.inf), ious


def _dynamic_k(ious: Tensor, candidate: Tensor, factor: float) -> Tensor:
    """How many points each object takes [M]: the sum of its best IoUs, at least one."""
    best = torch.where(candidate, ious, 0.0).topk(min(_TOP_IOUS, ious.shape[1]), dim=1).values
    return (best.sum(1) * factor).int().clamp(min=1)


def _cheapest(cost: Tensor, k: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each object's `most` cheapest points: cost, point and whether it is among the first k and a candidate [M, K]."""
    best, points = cost.topk(min(most, cost.shape[1]), dim=1, largest=False)
    rank = torch.arange(best.shape[1], device=cost.device)
    return best, points, (rank < k[:, None]) & best.isfinite()


def _bce(logits: Tensor, targets: Tensor, pos_weight: Tensor | None = None) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none", pos_weight=pos_weight)
