"""The two losses of YOLOX: that of the paper, and the faster variant of SuperGradients.

Both assign anchor points to objects by SimOTA (Ge et al., 2021): an object takes the k points that cost it least, k
being the sum of its best IoUs. The whole batch is assigned at once. Its matrices are [M, A]: M objects of the batch, A
anchor points of an image; shapes depend on nothing that is on the device, so that a GPU never waits for the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydet.anchors import anchor_cells, decode_yolox
from raydet.boxes import cxcywh_to_xyxy, giou, iou
from raydet.losses.distributed import sum_over_ranks

# Constants of the paper's assignment.
_TOP_IOUS = 10
_IOU_COST = 3.0
_OUTSIDE_COST = 1e5


class Predictions(NamedTuple):
    """The raw maps as one list of anchor points: float32, grid order, levels from fine to coarse.

    Attributes:
        raw_boxes: [B, A, 4] before decoding.
        boxes: [B, A, 4] xyxy in pixels.
        objectness: [B, A] logits.
        classes: [B, A, C] logits.
        cells: [A, 2] column and row.
        strides: [A, 1] in pixels.
    """

    raw_boxes: Tensor
    boxes: Tensor
    objectness: Tensor
    classes: Tensor
    cells: Tensor
    strides: Tensor


class Assignment(NamedTuple):
    """Which anchor points learn which objects: E entries, of which those in `keep` count.

    Attributes:
        points: [E] anchor point in the batch, image · A + point.
        objects: [E] row of the targets.
        ious: [E] of the prediction and the object.
        keep: [E] bool; a point is kept at most once.
    """

    points: Tensor
    objects: Tensor
    ious: Tensor
    keep: Tensor


class Terms(NamedTuple):
    """What the loss of a batch is made of, before any division.

    Attributes:
        per_image: [B, 4] sums of iou, obj, cls and l1 over each image.
        foreground: [] assigned anchor points.
        objects: [] objects.
    """

    per_image: Tensor
    foreground: Tensor
    objects: Tensor


class YoloXDetectionLoss(nn.Module):
    """YOLOX's loss: IoU, objectness, class and, at the end of a training, L1 on the raw boxes.

    Every sum is divided by the number of assigned anchor points, over all ranks of a distributed run: given the same
    outputs, N ranks with a batch of B learn what one with N·B does. Candidates for an object are the points inside
    any object of the image or near its centre.

    Args:
        strides: of the three maps, in pixels.
        num_classes: C.
        use_l1: add the L1 term.
        center_sampling_radius: how near an object's centre, in strides.
        iou_type: "iou" for 1 - IoU², "giou" for 1 - GIoU.
        iou_weight: weight of the box term.
        obj_weight: weight of the objectness term.
        cls_weight: weight of the class term.
        cls_pos_weight: weight of the positives in the class term, one number or one a class.
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
    ):
        super().__init__()
        if iou_type not in ("iou", "giou"):
            raise ValueError(f"iou_type is {iou_type!r}: it is 'iou' or 'giou'")
        self.strides = tuple(strides)
        self.num_classes = num_classes
        self.use_l1 = use_l1
        self.center_sampling_radius = center_sampling_radius
        self.iou_type = iou_type
        self.iou_weight = iou_weight
        self.obj_weight = obj_weight
        self.cls_weight = cls_weight
        self.cls_pos_weight: Tensor | None
        self.register_buffer(
            "cls_pos_weight", None if cls_pos_weight is None else torch.tensor(cls_pos_weight), persistent=False
        )

    def forward(self, outputs: Sequence[Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss and its components.

        Args:
            outputs: the model's output, in training mode (three raw maps [B, 1, H, W, 5 + C]) or in evaluation mode.
            targets: [N, 6] image index, class, cx, cy, w, h in pixels, on any device.

        Returns:
            The loss, a scalar to call backward on, and the components in the order of `component_names`, detached: the
            terms before weighting, assigned points an object, the loss; the same on every rank.
        """
        terms = self.terms(outputs, targets)
        sums = terms.per_image.sum(0)
        totals, world_size = sum_over_ranks(torch.cat((sums, torch.stack((terms.foreground, terms.objects)))))
        weights = sums.new_tensor([self.iou_weight, self.obj_weight, self.cls_weight, 1.0])
        divisors = self.divisors(totals[4].clamp(min=1), outputs, world_size)
        # Ranks average their gradients, so each multiplies its share by their number.
        loss = (sums * weights / divisors).sum() * world_size
        components = totals[:4] / divisors
        logged = ((components * weights).sum(), totals[4] / totals[5].clamp(min=1))
        return loss, torch.cat((components, torch.stack((logged[1], logged[0]))))

    def divisors(self, foreground: Tensor, outputs: Sequence[Tensor], world_size: int) -> Tensor:
        """Return what each of the four sums is divided by, over all ranks [4]."""
        return foreground.expand(4)

    def terms(self, outputs: Sequence[Tensor], targets: Tensor) -> Terms:
        """Return this rank's sums, undivided and unweighted, and what to divide them by."""
        predictions = flatten(raw_maps(outputs, self.num_classes), self.strides)
        targets = targets.to(predictions.boxes.device, torch.float32, non_blocking=True)
        with torch.no_grad():
            assigned = self.assign(predictions, targets)
        images, points = predictions.objectness.shape
        weight = assigned.keep.float()
        objects = targets[assigned.objects]
        # An entry that does not count is compared with itself, so that it is finite whatever was predicted there.
        wanted = cxcywh_to_xyxy(objects[:, 2:])
        boxes = torch.where(assigned.keep[:, None], predictions.boxes.reshape(-1, 4)[assigned.points], wanted)
        box_loss = 1 - iou(boxes, wanted) ** 2 if self.iou_type == "iou" else 1 - giou(boxes, wanted).clamp(-1, 1)

        labels = F.one_hot(objects[:, 1].long(), self.num_classes) * assigned.ious[:, None]
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
        return Terms(per_image, weight.sum(), weight.new_tensor(float(len(targets))))

    def assign(self, predictions: Predictions, targets: Tensor) -> Assignment:
        """SimOTA over the batch. Targets: [M, 6] on the predictions' device."""
        image = targets[:, 0].long()
        near, inside = self._near_and_inside(predictions, targets)
        candidate = torch.zeros_like(predictions.objectness, dtype=torch.int32)
        candidate = candidate.index_add_(0, image, (near | inside).int())[image] > 0
        cost, ious = _cost(predictions, targets, near & inside, candidate)
        _, points, chosen = _cheapest(cost, _dynamic_k(ious, candidate, 1.0), most=_TOP_IOUS)

        # A point that several objects chose goes to the object of the image which it costs least, chosen or not.
        flat = image[:, None] * cost.shape[1] + points
        times = torch.zeros(predictions.objectness.numel(), dtype=torch.int32, device=flat.device)
        times.index_add_(0, flat.reshape(-1), chosen.reshape(-1).int())
        row = image[:, None].expand_as(cost)
        lowest = torch.full_like(predictions.objectness, torch.inf).scatter_reduce_(0, row, cost, "amin")
        number = torch.arange(len(targets), device=flat.device)
        mine = torch.where(cost == lowest[image], number[:, None], len(targets))
        owner = torch.full_like(lowest, len(targets), dtype=torch.int64).scatter_reduce_(0, row, mine, "amin")
        objects = torch.where(times[flat] > 1, owner.reshape(-1)[flat], number[:, None])
        keep = chosen & _first(flat, chosen, times.numel())
        matched = objects.clamp(max=max(len(targets) - 1, 0))
        return Assignment(flat.reshape(-1), matched.reshape(-1), ious[matched, points].reshape(-1), keep.reshape(-1))

    def _near_and_inside(self, predictions: Predictions, targets: Tensor) -> tuple[Tensor, Tensor]:
        """[M, A] each: is the point near the object's centre, is it inside the object."""
        centres = (predictions.cells + 0.5) * predictions.strides
        distance = (centres - targets[:, None, 2:4]).abs()
        near = (distance < self.center_sampling_radius * predictions.strides).all(-1)
        return near, (distance < targets[:, None, 4:6] / 2).all(-1)


class YoloXFastDetectionLoss(YoloXDetectionLoss):
    """SuperGradients' faster variant: an object's candidates are its own points only.

    As it then has fewer of them, k is raised by `dynamic_ks_bias`; a point that several objects chose goes to the one
    of these which it costs least.

    Args:
        dynamic_ks_bias: factor on the sum of IoUs that gives k.
        obj_loss_fix: divide the objectness term by the number of all anchor points instead.
        **settings: those of YoloXDetectionLoss.
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
        )
        self.dynamic_ks_bias = dynamic_ks_bias
        self.obj_loss_fix = obj_loss_fix

    def divisors(self, foreground: Tensor, outputs: Sequence[Tensor], world_size: int) -> Tensor:
        """Return what each of the four sums is divided by, over all ranks [4]."""
        divisors = super().divisors(foreground, outputs, world_size)
        if self.obj_loss_fix:
            points = sum(raw[..., 0].numel() for raw in raw_maps(outputs, self.num_classes))
            divisors = torch.where(torch.arange(4, device=divisors.device) == 1, float(points * world_size), divisors)
        return divisors

    def assign(self, predictions: Predictions, targets: Tensor) -> Assignment:
        """The variant of SimOTA described above. Targets: [M, 6] on the predictions' device."""
        image = targets[:, 0].long()
        near, inside = self._near_and_inside(predictions, targets)
        candidate = near | inside
        cost, ious = _cost(predictions, targets, near & inside, candidate)
        most = int(_TOP_IOUS * self.dynamic_ks_bias)
        best, points, chosen = _cheapest(cost, _dynamic_k(ious, candidate, self.dynamic_ks_bias), most)

        flat = image[:, None] * cost.shape[1] + points
        offer = torch.where(chosen, best, torch.inf)
        lowest = torch.full((predictions.objectness.numel(),), torch.inf, device=flat.device)
        lowest.scatter_reduce_(0, flat.reshape(-1), offer.reshape(-1), "amin")
        chosen = chosen & (best == lowest[flat])
        keep = chosen & _first(flat, chosen, lowest.numel())
        objects = torch.arange(len(targets), device=flat.device)[:, None].expand_as(flat)
        return Assignment(flat.reshape(-1), objects.reshape(-1), ious.gather(1, points).reshape(-1), keep.reshape(-1))


def raw_maps(outputs: Sequence[Tensor], num_classes: int) -> Sequence[Tensor]:
    """Return the three raw maps of a YOLOX output in either mode.

    Raises:
        ValueError: the output is not of a YOLOX with this number of classes.
    """
    maps = outputs[1] if len(outputs) == 2 else outputs
    shapes = [tuple(m.shape) if isinstance(m, Tensor) else type(m).__name__ for m in maps]
    if len(shapes) != 3 or any(not isinstance(s, tuple) or len(s) != 5 or s[-1] != 5 + num_classes for s in shapes):
        raise ValueError(
            f"a YOLOX loss for {num_classes} classes takes three maps [B, 1, H, W, {5 + num_classes}], not {shapes}"
        )
    return maps  # type: ignore[return-value]


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


def _cost(predictions: Predictions, targets: Tensor, central: Tensor, candidate: Tensor) -> tuple[Tensor, Tensor]:
    """What each point costs each object, infinite where it is no candidate, and their IoU: [M, A] each."""
    image, label = targets[:, 0].long(), targets[:, 1].long()
    ious = iou(cxcywh_to_xyxy(targets[:, None, 2:]), predictions.boxes[image])
    # Class cost: the binary cross-entropy of √(p_class · p_object) with the one-hot class, summed over classes. All
    # classes but the object's own are the same for every object, so the sum is made once a point.
    objectness = predictions.objectness.sigmoid()
    joint = (predictions.classes.sigmoid() * objectness[..., None]).sqrt_()
    absent = joint.neg_().log1p_().clamp_(min=-100).sum(-1)
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


def _first(flat: Tensor, chosen: Tensor, size: int) -> Tensor:
    """Of the chosen entries [M, K] with the same point, True for the first."""
    number = torch.arange(flat.numel(), device=flat.device)
    first = torch.full((size,), flat.numel(), device=flat.device)
    first.scatter_reduce_(0, flat.reshape(-1), torch.where(chosen.reshape(-1), number, flat.numel()), "amin")
    return (first[flat.reshape(-1)] == number).reshape(flat.shape)


def _bce(logits: Tensor, targets: Tensor, pos_weight: Tensor | None = None) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none", pos_weight=pos_weight)
