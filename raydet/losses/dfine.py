"""The loss of D-FINE (Peng et al., 2024), and with `classification="mal"` that of DEIM (Huang et al., CVPR 2025).

Each decoder layer, the boxes before the first, the selection of the queries and the denoising queries have terms of
their own. A component is the sum over them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from raydet.boxes import cxcywh_to_xyxy, giou, iou
from raydet.losses.base import DetectionLoss, Terms
from raydet.losses.hungarian import Pairs, assign
from raydet.outputs import DFINE, DFineOutput, full, raw_of, slots

_ALPHA, _GAMMA = 0.75, 2.0  # of varifocal loss
_TEMPERATURE = 5.0  # of the distillation
_EPS = 1e-16
_KINDS = ("vfl", "bbox", "giou", "fgl", "ddf", "ddf_rest")


class Output(NamedTuple):
    """One of the outputs that have terms, of N queries.

    Attributes:
        name: the reference's ending of the names of its components, such as _aux_0; empty: the last layer.
        logits: [B, N, C].
        boxes: [B, N, 4] cx, cy, w, h in shares of the image.
        corners: [B, N, 4 · bins]; None: its boxes are no distributions.
        teacher: corners and logits of the last layer, from which it learns too; None: it does not.
    """

    name: str
    logits: Tensor
    boxes: Tensor
    corners: Tensor | None = None
    teacher: tuple[Tensor, Tensor] | None = None


class DFineLoss(DetectionLoss):
    """Class scores that foretell the box's IoU, L1, GIoU, and two terms on the distributions of the boxes' sides.

    These are FGL, cross entropy with the two bins beside the true distance, and DDF, by which earlier layers learn from
    the last one: on the queries with an object (loss_ddf) and on the others (loss_ddf_rest). The class term is divided
    by the number of objects, the box terms by that of the pairs in the union of all matchings, those of denoising
    queries by the number of their objects.

    Args:
        num_classes: C.
        classification: "vfl", varifocal loss (Zhang et al., 2020), or "mal", the matchability-aware loss of DEIM.
        vfl_weight: weight of the class term.
        bbox_weight: weight of the L1 term.
        giou_weight: weight of the GIoU term.
        fgl_weight: weight of FGL.
        ddf_weight: weight of DDF.
        mal_gamma: exponent of "mal".
        mal_alpha: with "mal", factor on the term of the classes that an object is not; None: 1.
        giou_by_iou: multiply the GIoU term of a box by its IoU.
    """

    has_divisors = True
    component_names = (
        *(f"loss_{kind}" for kind in _KINDS),
        *(f"loss_dn_{kind}" for kind in _KINDS),
        "loss",
    )

    def __init__(
        self,
        num_classes: int = 80,
        classification: Literal["vfl", "mal"] = "vfl",
        vfl_weight: float = 1.0,
        bbox_weight: float = 5.0,
        giou_weight: float = 2.0,
        fgl_weight: float = 0.15,
        ddf_weight: float = 1.5,
        mal_gamma: float = 1.5,
        mal_alpha: float | None = None,
        giou_by_iou: bool = False,
    ):
        super().__init__()
        if classification not in ("vfl", "mal"):
            raise ValueError(f"classification is {classification!r}: it is 'vfl' or 'mal'")
        self.num_classes = num_classes
        self.classification = classification
        self.mal_gamma, self.mal_alpha, self.giou_by_iou = mal_gamma, mal_alpha, giou_by_iou
        self._weights = (vfl_weight, bbox_weight, giou_weight, fgl_weight, ddf_weight, ddf_weight)

    @property
    def weights(self) -> tuple[float, ...]:
        """Weights of the terms, those of the queries that detect before those of the denoising queries."""
        return self._weights * 2

    def divisors(self, terms: Terms) -> Tensor:
        """Return what each of the 12 sums is divided by; `terms` holds the totals of all ranks."""
        union, matched, rest, dn_matched, dn_rest = terms.counts.unbind()
        objects, union = terms.normaliser.clamp(min=1), union.clamp(min=1)
        # The two means of DDF are weighted by the roots of how many queries each is over; denoising queries take the
        # roots of the others.
        share = matched.sqrt() + rest.sqrt()
        roots = matched.sqrt(), rest.sqrt()

        def ddf(*counted: Tensor) -> list[Tensor]:
            return [_no_zero(count * share, root) for count, root in zip(counted, roots, strict=True)]

        of_each = (objects, union, union, union, *ddf(matched, rest), *(objects,) * 4, *ddf(dn_matched, dn_rest))
        return torch.stack(of_each)

    def components(self, divided: Tensor, weighted: Tensor, terms: Terms) -> Tensor:
        """Return the terms after weighting, and the loss."""
        return torch.cat((weighted, weighted.sum().view(1)))

    def terms(self, outputs: Any, targets: Tensor) -> Terms:
        """Return the sums of the six kinds of terms over all outputs, and over those of the denoising queries."""
        each, normaliser, counts = self.by_output(outputs, targets)
        first = next(iter(each.values()))
        sums = [torch.zeros_like(first[:, 0]) for _ in range(2 * len(_KINDS))]
        for name, values in each.items():
            offset = len(_KINDS) if name.startswith("_dn") else 0
            for kind, value in enumerate(values.unbind(1)):
                sums[offset + kind] = sums[offset + kind] + value
        return Terms(torch.stack(sums, dim=1), normaliser, counts)

    def by_output(self, outputs: Any, targets: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Return the sums [B, 6] of each output by its name, the number of objects, and the counts [5].

        Arguments and errors as in `DetectionLoss.forward`.
        """
        given = raw_of(outputs, DFINE, type(self).__name__)
        parts: list[Any] = [full(part) if isinstance(part, Tensor) else part for part in given]
        raw = DFineOutput(*parts)
        classes = raw.logits.shape[-1]
        if classes != self.num_classes:
            raise ValueError(f"the model tells {classes} classes apart, and the loss {self.num_classes}")
        with torch.autocast(raw.logits.device.type, enabled=False):
            return self._by_output(raw, targets)

    def _by_output(self, raw: DFineOutput, targets: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        height, width = raw.image_size
        targets = targets.to(raw.boxes.device, raw.boxes.dtype, non_blocking=True)
        # By numbers: a tensor of them would have to be copied to the device.
        columns = zip(targets.unbind(1), (1, 1, width, height, width, height), strict=True)
        targets = torch.stack([column / side for column, side in columns], dim=1)
        queries = raw.selected_logits.shape[1]
        detecting = list(_outputs(raw, slice(-queries, None), ""))
        detecting.append(Output("_enc_0", raw.selected_logits, raw.selected_boxes))
        with torch.no_grad():
            logits, boxes = (torch.stack([getattr(one, part) for one in detecting]) for part in ("logits", "boxes"))
            matches, union = assign(logits, boxes, targets)
        result: dict[str, Tensor] = {}
        base = raw.initial_boxes[:, -queries:].detach()
        bins = self._bins(raw, base, union, targets)
        for output, pairs in zip(detecting, matches, strict=True):
            result[output.name] = self._terms_of(output, pairs, union, targets, bins)
        images = len(raw.selected_logits)
        counts = [len(union.query), 4 * len(union.query), 4 * (images * queries - len(union.query)), 0, 0]
        if raw.groups:
            noisy = raw.logits.shape[2] - queries
            pairs = _denoised(targets, noisy, raw.groups)
            bins = self._bins(raw, raw.initial_boxes[:, :noisy].detach(), pairs, targets)
            for output in _outputs(raw, slice(0, noisy), "_dn"):
                values = self._terms_of(output, pairs, pairs, targets, bins)
                # An object has as many denoising queries as there are groups; DDF has a divisor of its own.
                result[output.name] = torch.cat((values[:, :4] / raw.groups, values[:, 4:]), dim=1)
            counts[3:] = [4 * len(pairs.query), 4 * (images * noisy - len(pairs.query))]
        made = [torch.full((), float(count), device=targets.device) for count in (len(targets), *counts)]
        return result, made[0], torch.stack(made[1:])

    def _bins(self, raw: DFineOutput, base: Tensor, pairs: Pairs, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the bin [P, 4] below the distance of each side of the pairs, its weight and that of the next bin."""
        centre, size = base[pairs.image, pairs.query].chunk(2, dim=-1)
        wanted = cxcywh_to_xyxy(targets[pairs.target, 2:])
        unit = size / raw.reg_scale + _EPS
        away = torch.cat(((centre - wanted[:, :2]) / unit, (wanted[:, 2:] - centre) / unit), dim=1)
        distance = away - 0.5 * raw.reg_scale
        bins = raw.distances
        low = (torch.searchsorted(bins, distance.contiguous(), right=True) - 1).clamp(0, len(bins) - 2)
        upper = ((distance - bins[low]) / (bins[low + 1] - bins[low])).clamp(0, 1)
        return low, 1 - upper, upper

    def _terms_of(
        self, output: Output, pairs: Pairs, union: Pairs, targets: Tensor, bins: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        """Return an output's sums [B, 6]: `pairs` learn classes, and the pairs of the union boxes."""
        images, queries = output.logits.shape[:2]
        boxes, wanted = output.boxes[union.image, union.query], targets[union.target, 2:]
        corners, wanted_corners = cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(wanted)
        quality = iou(corners.detach(), wanted_corners)
        zeros = output.logits.new_zeros(images)

        def per_image(values: Tensor) -> Tensor:
            return zeros.index_add(0, union.image, values)

        away = 1 - giou(corners, wanted_corners)
        terms = [
            self._class_term(output, pairs, targets),
            per_image((boxes - wanted).abs().sum(1)),
            per_image(away * quality if self.giou_by_iou else away),
        ]
        if output.corners is None:
            return torch.stack((*terms, zeros, zeros, zeros), dim=1)
        sides = output.corners.reshape(images, queries, 4, output.corners.shape[2] // 4)
        shares = sides[union.image, union.query].log_softmax(-1)
        low, lower, upper = bins
        entropy = -(
            shares.gather(-1, low[..., None])[..., 0] * lower + shares.gather(-1, low[..., None] + 1)[..., 0] * upper
        )
        terms.append(per_image(entropy.sum(1) * quality))
        if output.teacher is None:
            return torch.stack((*terms, zeros, zeros), dim=1)
        teacher, logits = (part.detach() for part in output.teacher)
        mine = (sides / _TEMPERATURE).log_softmax(-1)
        theirs = (teacher.reshape(sides.shape) / _TEMPERATURE).log_softmax(-1)
        apart = F.kl_div(mine, theirs, reduction="none", log_target=True).sum((2, 3)) * _TEMPERATURE**2
        has_object = torch.zeros(images, queries, dtype=torch.bool, device=apart.device)
        has_object[union.image, union.query] = True
        weight = logits.sigmoid().amax(2).index_put((union.image, union.query), quality)
        apart = apart * weight
        terms += [(apart * has_object).sum(1), (apart * ~has_object).sum(1)]
        return torch.stack(terms, dim=1)

    def _class_term(self, output: Output, pairs: Pairs, targets: Tensor) -> Tensor:
        """Return the class term [B] of an output."""
        where = pairs.image, pairs.query, targets[pairs.target, 1].long()
        quality = iou(cxcywh_to_xyxy(output.boxes.detach()[where[:2]]), cxcywh_to_xyxy(targets[pairs.target, 2:]))
        score = output.logits.detach().sigmoid()
        wanted = torch.zeros_like(score)
        if self.classification == "vfl":
            weight = (_ALPHA * score**_GAMMA).index_put(where, quality)
            wanted[where] = quality
        else:
            factor = 1.0 if self.mal_alpha is None else self.mal_alpha
            weight = (factor * score**self.mal_gamma).index_put(where, torch.ones_like(quality))
            wanted[where] = quality**self.mal_gamma
        loss = F.binary_cross_entropy_with_logits(output.logits, wanted, weight, reduction="none")
        return loss.sum((1, 2))


def _outputs(raw: DFineOutput, queries: slice, prefix: str) -> Iterator[Output]:
    """Give the outputs of some queries: of the last layer, of those before it, and of the boxes that all refine."""
    logits, boxes, corners = raw.logits[:, :, queries], raw.boxes[:, :, queries], raw.corners[:, :, queries]
    last = len(logits) - 1
    teacher = corners[last], logits[last]
    for layer in (last, *range(last)):
        aux = f"_aux_{layer}" if layer < last else ""
        name = f"{prefix}_{layer}" if prefix else aux
        taught = teacher if layer < last else None
        yield Output(name, logits[layer], boxes[layer], corners[layer], taught)
    yield Output(f"{prefix}_pre", raw.initial_logits[:, queries], raw.initial_boxes[:, queries])


def _denoised(targets: Tensor, queries: int, groups: int) -> Pairs:
    """Return the pairs of the positive denoising queries and their objects, group by group."""
    image = targets[:, 0].long()
    size = queries // groups  # positives, then as many negatives
    group = torch.arange(groups, device=targets.device)[:, None]
    target = torch.arange(len(targets), device=targets.device).repeat(groups)
    return Pairs(image.repeat(groups), (slots(image) + size * group).flatten(), target)


def _no_zero(above: Tensor, below: Tensor) -> Tensor:
    """Return a quotient; 1 where it would divide a sum of nothing."""
    result = above / below.clamp(min=_EPS)
    return torch.where(result > 0, result, 1.0)
