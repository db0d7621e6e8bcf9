"""The losses against naive ones, written from the definitions with loops over images, objects and points."""

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from raydet.boxes import cxcywh_to_xyxy
from raydet.losses import PPYoloELoss, SSDLoss, YoloXDetectionLoss, YoloXFastDetectionLoss, assignment
from raydet.outputs import DFLOutput, ssd_default_boxes

CLASSES, BINS = 3, 17
KINDS = ("any", "crowd", "tiny", "whole", "edge", "outside", "twin")


# Scenes: objects of all kinds at places without a pattern, and outputs of a model that has half learned them.


def scene(size, kinds, seed):
    """Targets [N, 6] with an object of each of `kinds[image]` in images of (height, width)."""
    generator, (height, width), rows = torch.Generator().manual_seed(seed), size, []
    for image, names in enumerate(kinds):
        for name in names:
            x, y, w, h, label = torch.rand(5, generator=generator).tolist()
            boxes = {
                "any": (x * width, y * height, (0.1 + 0.5 * w) * width, (0.1 + 0.5 * h) * height),
                "crowd": ((0.4 + 0.2 * x) * width, (0.4 + 0.2 * y) * height, 20 + 20 * w, 20 + 20 * h),
                "tiny": (x * width, y * height, 0.5 + 4 * w, 0.5 + 4 * h),
                "whole": (width / 2 + x, height / 2 + y, (0.95 + 0.1 * w) * width, (0.95 + 0.1 * h) * height),
                "edge": (x * width, 8 * y - 4, 10 + 40 * w, 10 + 40 * h),
                "outside": ((1.5 + x) * width, (y - 1.5) * height, 10 + 40 * w, 10 + 40 * h),
            }
            last = rows[-1] if rows and rows[-1][0] == image else [image, 0.0, *boxes["any"]]
            twins = {"twin": last, "rival": [image, (last[1] + 1) % CLASSES, *last[2:]]}
            rows.append(twins[name] if name in twins else [image, int(label * CLASSES), *boxes[name]])
    return torch.tensor(rows).reshape(-1, 6)


def grid(size, strides):
    """Column, row and stride of each point [A, 3]."""
    points = [(x, y, s) for s in strides for y in range(size[0] // s) for x in range(size[1] // s)]
    return torch.tensor(points, dtype=torch.float32)


def aims(size, batch, targets, points, generator):
    """A box for each point to predict [B, A, 4] = cx, cy, w, h: about one of the image's objects."""
    boxes = torch.tensor([size[1] / 2, size[0] / 2, 20, 20]).repeat(batch, points, 1)
    for image in targets[:, 0].unique().int():
        mine = targets[targets[:, 0] == image, 2:]
        boxes[image] = mine[torch.randint(len(mine), (points,), generator=generator)]
    noise = 0.2 * torch.randn(boxes.shape, generator=generator)
    made = torch.cat((boxes[..., :2] + noise[..., :2] * boxes[..., 2:], boxes[..., 2:] * noise[..., 2:].exp()), dim=-1)
    # Where two edges are at the same place, IoU has no gradient, and which side is taken depends on the last bit.
    ties = (cxcywh_to_xyxy(made) - cxcywh_to_xyxy(boxes)).abs().amin(-1) < 1e-3
    made[..., :2] += 0.02 * ties[..., None]
    return made


def yolox_outputs(size, batch, targets, seed):
    generator, points = torch.Generator().manual_seed(seed), grid(size, (8, 16, 32))
    boxes = aims(size, batch, targets, len(points), generator)
    scores = torch.randn(batch, len(points), 1 + CLASSES, generator=generator)
    places, sizes = boxes[..., :2] / points[:, 2:] - points[:, :2], (boxes[..., 2:] / points[:, 2:]).log()
    raw = torch.cat((places, sizes, scores), dim=-1)
    shapes = [(size[0] // s, size[1] // s) for s in (8, 16, 32)]
    levels = raw.split([rows * columns for rows, columns in shapes], dim=1)
    return [m.reshape(batch, 1, *shape, -1).clone().requires_grad_() for m, shape in zip(levels, shapes, strict=True)]


def dfl_outputs(size, batch, targets, seed, strides):
    generator, points = torch.Generator().manual_seed(seed), grid(size, strides)
    steps = points[:, 2:]
    centres = (points[:, :2] + 0.5) * steps
    boxes = aims(size, batch, targets, len(points), generator)
    middle, half = boxes[..., :2], boxes[..., 2:] / 2
    sides = torch.cat((centres - middle + half, middle + half - centres), dim=-1) / steps
    peaks = -2 * (sides.clamp(0, BINS - 1)[..., None] - torch.arange(BINS)).abs()
    return DFLOutput(
        torch.randn(batch, len(points), CLASSES, generator=generator).requires_grad_(),
        (peaks + 0.5 * torch.randn(peaks.shape, generator=generator)).flatten(2).requires_grad_(),
        torch.cat((centres - 2.5 * steps, centres + 2.5 * steps), dim=1),
        centres,
        [(size[0] // s) * (size[1] // s) for s in strides],
        steps,
    )


def ssd_outputs(size, batch, targets, seed):
    generator, anchors = torch.Generator().manual_seed(seed), len(ssd_default_boxes(size))
    return tuple(torch.randn(batch, n, anchors, generator=generator).requires_grad_() for n in (4, CLASSES + 1))


# The oracle: plain numbers decide what learns what; tensors of one box, in float64, carry the gradients.


class Tie(Exception):
    """A choice hangs on so little that rounding decides it."""


def less(a, b):
    if abs(a - b) <= 1e-5 * max(abs(a), abs(b)):
        raise Tie
    return a < b


def lowest(costs, k):
    """The k keys whose values are lowest."""
    order = sorted(costs, key=costs.get)
    if 0 < k < len(order):
        less(costs[order[k - 1]], costs[order[k]])
    return order[:k]


def highest(indices, score, objects):
    """The index of the object with the highest score; which of identical ones does not matter."""
    first = max(indices, key=score)
    for other in indices:
        if objects[other] != objects[first]:
            less(score(other), score(first))
    return first


def settle(choosers, score, objects, choosers_only=False):
    """{point: object} from {point: objects that chose it}: a point that several chose may go to any of the image."""
    owner = {}
    for p, those in choosers.items():
        rivals = those if choosers_only or len(those) == 1 else range(len(objects))
        owner[p] = highest(rivals, lambda o, p=p: score(o, p), objects)
    return owner


def objects_of(targets, image):
    """Class and xyxy of an image's objects."""
    return [
        (int(label), (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2))
        for index, label, cx, cy, w, h in targets.double().tolist()
        if index == image
    ]


def iou(a, b, generalized=False):
    """Of two boxes, each of numbers or of tensors."""
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = wide * high if wide > 0 and high > 0 else 0 * wide
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return both / union - (hull - union) / hull if generalized else both / union


def within(x, y, box):
    return less(box[0], x) and less(x, box[2]) and less(box[1], y) and less(y, box[3])


def bce(logits, wanted, pos_weight=1.0):
    return -pos_weight * wanted * F.logsigmoid(logits) - (1 - wanted) * F.logsigmoid(-logits)


def simota(boxes, scores, points, objects, fast, radius, bias):
    """{point: object}; scores are √(class · objectness)."""
    own, central, costs, choosers = [], [], [], {}
    for _, box in objects:
        inside, near = set(), set()
        for p, (column, row, s) in enumerate(points):
            x, y, cx, cy = (column + 0.5) * s, (row + 0.5) * s, (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
            inside |= {p} if within(x, y, box) else set()
            near |= {p} if less(abs(x - cx), radius * s) and less(abs(y - cy), radius * s) else set()
        own.append(inside | near)
        central.append(inside & near)
    for o, (label, box) in enumerate(objects):
        overlaps = {p: iou(boxes[p], box) for p in (own[o] if fast else set().union(*own))}
        cost = {p: -3 * math.log(overlap + 1e-8) for p, overlap in overlaps.items()}
        for p in cost:
            cost[p] -= sum(math.log(s if c == label else 1 - s) for c, s in enumerate(scores[p]))
            cost[p] += 1e3 * (p not in central[o])  # 1e5 by definition; either is more than the rest
        costs.append(cost)
        total = (bias if fast else 1) * sum(sorted(overlaps.values())[-10:])
        less(total, round(total) or 1)
        for p in lowest(cost, max(int(total), 1)):
            choosers.setdefault(p, []).append(o)
    return settle(choosers, lambda o, p: -costs[o][p], objects, choosers_only=fast)


def yolox_oracle(maps, targets, size, fast, **given):
    points, sums, foreground = grid(size, (8, 16, 32)).double(), [torch.zeros((), dtype=torch.float64)] * 4, 0
    for image in range(len(maps[0])):
        raw = torch.cat([m[image, 0].flatten(0, 1) for m in maps]).double()
        middle, half = (raw[:, :2] + points[:, :2]) * points[:, 2:], raw[:, 2:4].exp() * points[:, 2:] / 2
        boxes = torch.cat((middle - half, middle + half), dim=1)
        scores = (raw[:, 5:].sigmoid() * raw[:, 4:5].sigmoid()).sqrt()
        objects, objectness = objects_of(targets, image), torch.zeros_like(raw[:, 4])
        limits = given.get("center_sampling_radius", 2.5), given.get("dynamic_ks_bias", 1.1)
        assigned = simota(boxes.tolist(), scores.tolist(), points.tolist(), objects, fast, *limits)
        for p, o in assigned.items():
            (label, box), (x, y, s) = objects[o], points[p].tolist()
            mine, objectness[p] = boxes[p].unbind(), 1
            overlap = iou(mine, box)
            sums[0] = sums[0] + 1 - (iou(mine, box, True) if given.get("iou_type") == "giou" else overlap**2)
            wanted = F.one_hot(torch.tensor(label), CLASSES) * overlap.detach()
            sums[2] = sums[2] + bce(raw[p, 5:], wanted, given.get("cls_pos_weight", 1.0)).sum()
            if given.get("use_l1"):
                middle = (box[0] + box[2]) / 2 / s - x, (box[1] + box[3]) / 2 / s - y
                extent = math.log((box[2] - box[0]) / s + 1e-8), math.log((box[3] - box[1]) / s + 1e-8)
                sums[3] = sums[3] + abs(raw[p, :4] - torch.tensor(middle + extent)).sum()
        sums[1] = sums[1] + bce(raw[:, 4], objectness).sum()
        foreground += len(assigned)
    parts = [part / max(foreground, 1) for part in sums]
    if given.get("obj_loss_fix"):
        parts[1] = sums[1] / (len(points) * len(maps[0]))
    loss = 5 * parts[0] + sum(parts[1:])
    return loss, [*parts, torch.tensor(foreground / max(len(targets), 1)), loss]


def atss(outputs, boxes, objects):
    """{point: object} and {point: quality}."""
    anchors, points, choosers = outputs.anchors.tolist(), outputs.anchor_points.tolist(), {}
    for o, (_, box) in enumerate(objects):
        candidates, start = [], 0
        for count in outputs.num_anchors_list:
            centre = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
            candidates += lowest({p: math.dist(points[p], centre) for p in range(start, start + count)}, 9)
            start += count
        overlaps = [iou(anchors[p], box) for p in candidates]
        threshold = statistics.mean(overlaps) + statistics.stdev(overlaps)
        for p, overlap in zip(candidates, overlaps, strict=True):
            if within(*points[p], box) and less(threshold, overlap):
                choosers.setdefault(p, []).append(o)
    owner = settle(choosers, lambda o, p: iou(anchors[p], objects[o][1]), objects)
    return owner, {p: iou(boxes[p], objects[o][1]) for p, o in owner.items()}


def task_aligned(outputs, boxes, scores, objects):
    """{point: object} and {point: quality}."""
    choosers, quality = {}, {}
    overlaps = [[iou(mine, box) for mine in boxes] for _, box in objects]
    aligned = [
        [s[label] * u**6 for s, u in zip(scores, overlaps[o], strict=True)] for o, (label, _) in enumerate(objects)
    ]
    for o, (_, box) in enumerate(objects):
        inside = [p for p, point in enumerate(outputs.anchor_points.tolist()) if within(*point, box)]
        for p in lowest({p: -aligned[o][p] for p in inside}, 13):
            choosers.setdefault(p, []).append(o)
    owner = settle(choosers, lambda o, p: overlaps[o][p], objects)
    for p, o in owner.items():
        mine = [q for q in owner if owner[q] == o]
        # The reference has the 1e-9: an object that no point predicts at all well teaches less.
        share = aligned[o][p] / (max(aligned[o][q] for q in mine) + 1e-9)
        quality[p] = share * max(overlaps[o][q] for q in mine)
    return owner, quality


def dfl_oracle(outputs, targets, size, use_static_assigner, use_varifocal_loss):
    cls_sum, iou_sum, dfl_sum, total = *torch.zeros(3, dtype=torch.float64), 0.0
    for image in range(len(outputs.cls_logits)):
        logits, raw = outputs.cls_logits[image].double(), outputs.reg_logits[image].double().unflatten(-1, (4, BINS))
        sides = (raw.softmax(-1) * torch.arange(BINS)).sum(-1) * outputs.stride
        boxes = torch.cat((outputs.anchor_points - sides[:, :2], outputs.anchor_points + sides[:, 2:]), dim=1)
        objects, p, logp = objects_of(targets, image), logits.sigmoid(), raw.log_softmax(-1)
        if use_static_assigner:
            owner, qualities = atss(outputs, boxes.tolist(), objects)
        else:
            owner, qualities = task_aligned(outputs, boxes.tolist(), p.tolist(), objects)
        label, quality = torch.zeros_like(logits), torch.zeros_like(logits)
        for point, o in owner.items():
            (name, box), q, (x, y) = objects[o], qualities[point], outputs.anchor_points[point].tolist()
            label[point, name], quality[point, name] = 1, q
            iou_sum = iou_sum + q * (1 - iou(boxes[point].unbind(), box, True))
            for side, distance in enumerate((x - box[0], y - box[1], box[2] - x, box[3] - y)):
                t = min(max(distance / outputs.stride[point].item(), 0), BINS - 1 - 0.01)
                left, right = logp[point, side, int(t) : int(t) + 2]
                dfl_sum = dfl_sum - q / 4 * (left * (int(t) + 1 - t) + right * (t - int(t)))
        weight = 0.75 * p**2 * (1 - label) + quality * label
        if not use_varifocal_loss:
            weight = (p - quality) ** 2 * (0.25 * quality + 0.75 * (1 - quality) if use_static_assigner else 1)
        cls_sum = cls_sum + (weight * bce(logits, quality)).sum()
        total += sum(qualities.values())
    parts = [weight * part / max(total, 1) for weight, part in ((1, cls_sum), (2.5, iou_sum), (0.5, dfl_sum))]
    return sum(parts), [*parts, sum(parts)]


def ssd_oracle(outputs, targets, size, alpha=1.0, iou_thresh=0.5, neg_pos_ratio=3.0):
    (height, width), batch, defaults = size, len(outputs[0]), ssd_default_boxes(size).double().tolist()
    corners = [
        ((cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height)
        for cx, cy, w, h in defaults
    ]
    box_mean, class_mean, loss = torch.zeros(3, dtype=torch.float64)
    for image in range(batch):
        objects, matched = objects_of(targets, image), {}
        overlaps = [[iou(corner, box) for corner in corners] for _, box in objects]
        for d in range(len(defaults)):
            if over := [o for o, row in enumerate(overlaps) if less(iou_thresh, row[d])]:
                matched[d] = highest(over, lambda o, d=d, overlaps=overlaps: overlaps[o][d], objects)
        for o, row in enumerate(overlaps):  # the last of several wins
            matched[lowest({d: -value for d, value in enumerate(row)}, 1)[0]] = o
        entropy = -outputs[1][image].double().log_softmax(0)
        box_sum, class_sum = torch.zeros(2, dtype=torch.float64)
        for d, o in matched.items():
            (label, (x1, y1, x2, y2)), (cx, cy, w, h) = objects[o], defaults[d]
            offsets = ((x1 + x2) / 2 / width - cx) / w / 0.1, ((y1 + y2) / 2 / height - cy) / h / 0.1
            sizes = math.log((x2 - x1) / width / w) / 0.2, math.log((y2 - y1) / height / h) / 0.2
            for off in abs(outputs[0][image, :, d] - torch.tensor(offsets + sizes, dtype=torch.float64)):
                box_sum = box_sum + (off**2 / 2 if off < 1 else off - 0.5)
            class_sum = class_sum + entropy[label + 1, d]
        background = {d: -entropy[0, d].item() for d in range(len(defaults)) if d not in matched}
        for d in lowest(background, int(neg_pos_ratio * len(matched))):
            class_sum = class_sum + entropy[0, d]
        box_mean, class_mean = box_mean + box_sum / batch, class_mean + class_sum / batch
        loss = loss + ((2 - alpha) * box_sum + alpha * class_sum) / max(len(matched), 1) / batch
    return loss, [box_mean, class_mean, loss]


# Every loss and setting.


class Case(NamedTuple):
    criterion: Callable
    outputs: Callable
    oracle: Callable
    kinds: tuple[str, ...]


def case_of(loss, outputs, oracle, kinds=KINDS, **given):
    def criterion(size):
        boxes = (ssd_default_boxes(size), size) if loss is SSDLoss else ()
        return loss(*boxes, num_classes=CLASSES, **given)

    return Case(criterion, outputs, partial(oracle, **given), kinds)


def dfl_case(strides, static, varifocal):
    given = {"use_static_assigner": static, "use_varifocal_loss": varifocal}
    return case_of(PPYoloELoss, partial(dfl_outputs, strides=strides), dfl_oracle, **given)


# Left out for exact ties: rivals (one box, two classes) by all losses but YOLOX's, objects outside by SSD's.
yolox = partial(case_of, outputs=yolox_outputs, kinds=(*KINDS, "rival"))
classic = partial(yolox, YoloXDetectionLoss, oracle=partial(yolox_oracle, fast=False))
fast = partial(yolox, YoloXFastDetectionLoss, oracle=partial(yolox_oracle, fast=True))
ssd = partial(case_of, SSDLoss, ssd_outputs, ssd_oracle, tuple(kind for kind in KINDS if kind != "outside"))
OTHERS = {"use_l1": True, "iou_type": "giou", "cls_pos_weight": 2.0, "center_sampling_radius": 1.3}
CASES = {
    "YOLOX": classic(),
    "YOLOX, other settings": classic(**OTHERS),
    "YOLOX fast": fast(),
    "YOLOX fast, other settings": fast(dynamic_ks_bias=1.6, obj_loss_fix=True, **OTHERS),
    "PP-YOLOE, ATSS, varifocal": dfl_case((32, 16, 8), True, True),
    "PP-YOLOE, ATSS, focal": dfl_case((32, 16, 8), True, False),
    "PP-YOLOE, TAL, varifocal": dfl_case((32, 16, 8), False, True),
    "PP-YOLOE, TAL, focal": dfl_case((32, 16, 8), False, False),
    "YOLO-NAS, ATSS, varifocal": dfl_case((8, 16, 32), True, True),
    "YOLO-NAS, TAL, varifocal": dfl_case((8, 16, 32), False, True),
    "SSD": ssd(),
    "SSD, other settings": ssd(alpha=0.7, iou_thresh=0.35, neg_pos_ratio=2.0),
}
SCENES = {
    "no objects": [[], []],
    "an image without objects": [["any"], [], ["any"]],
    "a crowd": [["crowd"] * 8],
    "identical objects": [["any", "twin", "twin"]],
    "two classes in one box": [["any", "rival"]],
    "smaller than a cell": [["tiny"] * 2],
    "as large as the image": [["whole"], ["whole", "crowd"]],
    "partly outside": [["edge"] * 3],
    "outside": [["outside"] * 2, ["outside", "any"]],
}
all_losses = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The oracle's tensors are single boxes: handing them to threads takes longer than all the rest."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def leaves(outputs):
    return [part for part in outputs if isinstance(part, torch.Tensor) and part.requires_grad]


def check(case, size, kinds, seed):
    """Loss, components and gradients are the oracle's."""
    targets = scene(size, kinds, seed)
    outputs = case.outputs(size, len(kinds), targets, seed)
    expected, named = case.oracle(outputs, targets, size)
    loss, components = case.criterion(size)(outputs, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert components.tolist() == pytest.approx(torch.stack(named).tolist(), rel=1e-4, abs=1e-6)
    expected = expected + 0 * sum(leaf.sum() for leaf in leaves(outputs))
    gradients = torch.autograd.grad(expected, leaves(outputs))
    largest = max(gradient.abs().max().item() for gradient in gradients)
    for mine, wanted in zip(torch.autograd.grad(loss, leaves(outputs)), gradients, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-4 * largest)


@all_losses
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_loss_and_gradients_are_those_of_the_definition(case, data):
    side = st.sampled_from((64, 96, 128, 160))
    kinds = data.draw(st.lists(st.lists(st.sampled_from(case.kinds), max_size=6), min_size=1, max_size=3))
    try:
        check(case, data.draw(st.tuples(side, side)), kinds, data.draw(st.integers(0, 2**16)))
    except Tie:
        reject()


@all_losses
@pytest.mark.parametrize("kinds", SCENES.values(), ids=SCENES.keys())
def test_objects_of_a_kind(case, kinds):
    if not {kind for image in kinds for kind in image} <= {*case.kinds}:
        pytest.skip("exact ties, for which nothing is defined")
    for seed in range(100):
        try:
            return check(case, (96, 160), kinds, seed)
        except Tie:
            continue
    pytest.fail("each of 100 scenes has a tie")


@all_losses
def test_the_sums_of_an_image_do_not_depend_on_the_others(case):
    size, kinds = (96, 128), [["any", "edge", "whole"], [], ["any", "tiny", "crowd", "crowd"], ["any", "twin"]]
    targets, criterion, normaliser = scene(size, kinds, seed=1), case.criterion(size), 0
    outputs = case.outputs(size, len(kinds), targets, 1)
    terms = criterion.terms(outputs, targets)
    for image in range(len(kinds)):
        mine = targets[targets[:, 0] == image] * torch.tensor([0, 1, 1, 1, 1, 1])
        parts = (p[image : image + 1] if isinstance(p, torch.Tensor) and p.requires_grad else p for p in outputs)
        alone = criterion.terms([*parts], mine)
        torch.testing.assert_close(alone.per_image[0], terms.per_image[image])
        normaliser += alone.normaliser
    torch.testing.assert_close(normaliser, terms.normaliser)


@all_losses
@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_the_targets_does_not_matter(case, seed):
    size, kinds = (128, 96), [["any", "edge", "any"], [], ["whole", "edge"]]
    targets, criterion = scene(size, kinds, seed), case.criterion(size)
    outputs = case.outputs(size, len(kinds), targets, seed)
    shuffled = targets[torch.tensor([3, 0, 4, 2, 1])]
    torch.testing.assert_close(criterion(outputs, shuffled)[1], criterion(outputs, targets)[1])


@all_losses
@pytest.mark.parametrize("kinds", [[], ["any", "crowd"], ["tiny", "twin"], ["outside", "edge", "whole"], ["outside"]])
@pytest.mark.parametrize("value", [None, -100.0, 100.0])
def test_loss_and_gradients_are_finite(case, kinds, value):
    size = (96, 96) if case.outputs is ssd_outputs else (64, 64)
    targets = scene(size, [kinds, []], seed=2)
    outputs = case.outputs(size, 2, targets, 2)
    for part in leaves(outputs) if value else []:
        part.data[..., 4 if part.ndim == 5 else 0 :] = value  # YOLOX's sizes are exponents: only its scores saturate
    loss, components = case.criterion(size)(outputs, targets)
    assert components.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, leaves(outputs)))


class Largest(TorchDispatchMode):
    """Notes the most numbers that a tensor made meanwhile holds, but for copies of a smaller one."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, tuple | list) else (out,):
            if isinstance(part, torch.Tensor):
                self.numbers = max(self.numbers, min(part.numel(), part.untyped_storage().nbytes() // part.itemsize))
        return out


MANY = ["crowd", "any", "edge", "tiny", "any", "twin", "outside"] * 60


def results(case, size, kinds):
    """Loss, components and gradients of a scene, to the bit."""
    targets = scene(size, kinds, seed=3)
    outputs = case.outputs(size, len(kinds), targets, 3)
    loss, components = case.criterion(size)(outputs, targets)
    return [loss.detach(), components, *torch.autograd.grad(loss, leaves(outputs))]


@all_losses
@pytest.mark.parametrize("kinds", [[MANY, [], MANY[:150]], [["any"], MANY]], ids=["three images", "two images"])
def test_many_objects_are_assigned_in_parts_with_the_same_result_to_the_bit(case, kinds, monkeypatch):
    size = (96, 160)
    with monkeypatch.context() as patch:  # all at once, and no entry left out
        patch.setattr(assignment, "_ENTRIES_AT_ONCE", 2**30)
        patch.setattr(assignment.Assignment, "enough", lambda self, points: (self, slice(None)))
        expected = results(case, size, kinds)
    monkeypatch.setattr(assignment, "_ENTRIES_AT_ONCE", 1)
    for mine, other in zip(results(case, size, kinds), expected, strict=True):
        assert torch.equal(mine, other)


@all_losses
def test_no_tensor_has_a_number_for_each_of_many_objects_and_points(case, monkeypatch):
    monkeypatch.setattr(assignment, "_ENTRIES_AT_ONCE", 1)
    size = (96, 160)
    with Largest() as largest:
        results(case, size, [MANY] * 4)
    points = len(ssd_default_boxes(size)) if case.outputs is ssd_outputs else 12 * 20 + 6 * 10 + 3 * 5
    assert largest.numbers < 4 * len(MANY) * points / 2


def test_ssd_counts_a_match_once_where_the_background_boxes_are_fewer_than_wanted():
    defaults = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.52, 0.5], [0.1, 0.1, 0.1, 0.1]])
    logits = torch.randn(1, CLASSES + 1, 3, generator=torch.Generator().manual_seed(0))
    criterion, target = SSDLoss(defaults, (100, 100), CLASSES), torch.tensor([[0, 1, 50, 50, 51, 50.0]])
    _, components = criterion((torch.zeros(1, 4, 3), logits), target)
    wanted = F.cross_entropy(logits, torch.tensor([[2, 2, 0]]), reduction="sum")
    assert components[1].item() == pytest.approx(wanted.item())
