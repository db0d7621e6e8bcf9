"""No function changes its arguments: those that take numbers, called with arrays and tensors of the very types that
they compute with, which are not copied on the way."""

import copy
import inspect
import re

import numpy as np
import pytest
import torch

from raydet import boxes, metrics, models, outputs, postprocess, visualization
from raydet.data import transforms
from raydet.data.index import make_index
from raydet.data.own import TargetFormat, index_of_records
from raydet.evaluation import coco, matching, measures
from raydet.losses import PPYoloELoss, SSDLoss, YoloXDetectionLoss, YoloXFastDetectionLoss, assignment
from raydet.losses.base import PartialLoss
from raydet.outputs import DFLOutput, ssd_default_boxes
from raydet.predict.export import compare
from raydet.predict.predictor import post_prediction
from raydet.recipe import Eval
from raydet.training.loop import resized

RNG = np.random.default_rng(0)
CORNERS = np.array([[10, 10, 40, 30], [12, 9, 41, 33], [-5, 50, 300, 90], [0, 0, 6, 5]], float)
SIZES = np.array([[20, 20, 20, 10], [50, 40, 30, 60], [1, 2, 3, 4]], float)
SCORES, LABELS, IMAGES = np.array([0.9, 0.8, 0.7, 0.2]), np.array([0, 0, 1, 2]), np.array([0, 0, 0, 1])
CROWD = np.array([False, False, False, True])
TARGETS = np.column_stack(([0, 0, 1], [0, 2, 1], SIZES))  # image, class, cx, cy, w, h
SIDE, CLASSES, BINS = 64, 3, 17
MODEL = models.get("yolox_n", CLASSES).eval()
RESIZES = ("pad_bottom_right", "pad_centre", "stretch")


def some_index():
    names = ("a", "b", "c")
    images = [(1, "1.jpg", 100, 100), (2, "2.jpg", 100, 100)]
    given = CORNERS.copy(), LABELS.copy(), CROWD.copy(), np.full(4, 100.0), IMAGES.copy()
    return make_index(images, *given, root="/", class_names=names, category_ids=(1, 2, 3))


def some_boxes(kind):
    xywh = boxes.xyxy_to_xywh(CORNERS).astype(kind)
    return matching.BoxTable(IMAGES.copy(), LABELS.copy(), xywh, SCORES.astype(kind), CROWD.copy(), xywh[:, 2] * 3)


def some_matches(kind):
    found = some_boxes(kind)
    return matching.match(found, found, CLASSES, coco.IOUS)


def detections(kind):
    return [np.column_stack((CORNERS, SCORES, LABELS)).astype(kind), np.empty((0, 6), kind)]


def averages(boxes_of_both):
    return coco.accumulate(matching.Matching(boxes_of_both, boxes_of_both, CLASSES, coco.IOUS.copy()))


def evaluate(found):
    whole = coco.CocoEvaluation(some_index())
    whole.update([0, 1], found)
    return whole.compute(), whole.results(), whole.to_bytes()


def update(units, found, targets, crowds):
    numbers = metrics.DetectionMetrics(CLASSES, target_units=units)
    inputs = torch.zeros(2, 3, 50, 100)
    numbers.update(found, targets, None, inputs, crowds)
    numbers.compute()


def merge(first, second):
    whole = metrics.DetectionMetrics(CLASSES)
    whole.merge([first, second])
    whole.compute()


def merged(kind):
    numbers = metrics.DetectionMetrics(CLASSES)
    numbers.update([torch.tensor(rows) for rows in detections(kind)], torch.tensor(TARGETS.astype(kind)))
    return numbers


def outputs_of(loss, kind):
    """What a loss takes, of two images."""
    generator = torch.Generator().manual_seed(0)

    def some(*shape):
        return torch.randn(*shape, generator=generator, dtype=kind)

    levels = [(SIDE // stride) ** 2 for stride in (8, 16, 32)]
    if issubclass(loss, YoloXDetectionLoss):
        return [some(2, 1, SIDE // stride, SIDE // stride, 5 + CLASSES) for stride in (8, 16, 32)]
    if loss is SSDLoss:
        defaults = len(ssd_default_boxes((SIDE, SIDE)))
        return some(2, 4, defaults), some(2, CLASSES + 1, defaults)
    points = torch.cat([torch.full((count, 2), 30.0) for count in levels])
    around, strides = torch.cat((points - 20, points + 20), dim=1), torch.full((sum(levels), 1), 8.0)
    return DFLOutput(some(2, sum(levels), CLASSES), some(2, sum(levels), 4 * BINS), around, points, levels, strides)


def loss_of(loss, outputs, targets, **settings):
    given = (ssd_default_boxes((SIDE, SIDE)), (SIDE, SIDE)) if loss is SSDLoss else ()
    criterion = loss(*given, num_classes=CLASSES, **settings)
    criterion(outputs, targets)
    whole = PartialLoss(criterion)
    whole.add(outputs, targets)
    whole.shares()


def detect(callback, outputs):
    found = callback.candidates(outputs)
    return callback(outputs), [callback.suppress(one) for one in found]


def decoded(kind, rows):
    """[2, 3, 5 + C] of YOLOX and SSD, or boxes and scores of PP-YOLOE."""
    scores = torch.tensor(RNG.random((2, 3, CLASSES)), dtype=kind)
    where = torch.tensor(np.stack((SIZES, SIZES)), dtype=kind)
    return (torch.cat((where, scores.amax(-1, keepdim=True), scores), -1) if rows else (where, scores), None)


def draw(image, truth, found):
    shown = visualization.Shown(image, truth, LABELS, found[:, :4], found[:, 5].astype(int), found[:, 4], "caption")
    names = ("a", "b", "c")
    for alpha in (None, 0.4):
        visualization.draw(shown, names, alpha)
        visualization.sheet([shown, shown], names, alpha)
    shown.scaled(1.0)
    visualization.grid([image, image], 2, (50, 50))
    visualization.draw_boxes(image, truth, LABELS.tolist(), names, SCORES.tolist())


def visualize(images, found, targets, units):
    call = visualization.DetectionVisualization.visualize_batch
    call(images, found, targets, 0, ("a", "b", "c"), target_units=units)


def picture(kind):
    return transforms.SamplePlan.of(0, 100, 80, CORNERS.astype(kind), LABELS.astype(np.int32))


PLANS = [
    *(transforms.Letterbox((64, 64), resize) for resize in RESIZES),
    transforms.RandomAffine((64, 64), 20, 0.1, (0.5, 1.5), 10),
    transforms.HorizontalFlip(1),
    transforms.VerticalFlip(1),
    transforms.Rotate90(1),
    transforms.HSV(1, 20, 50, 50),
    transforms.ChannelSwap(1),
]
COMPOSITIONS = [transforms.Mosaic(1, transforms.Letterbox((64, 64))), transforms.Mixup(1, (64, 64), (0.5, 1.5))]


def colour(change, image):
    change(image, np.empty_like(image[..., :3]))


def tensor(values, kind):
    return torch.tensor(values, dtype=kind)


# What is called, and what makes its arguments of a numpy type and the torch type of the same name.
CASES = {
    **{
        f"boxes.{name}": (getattr(boxes, name), lambda n, t: (SIZES.astype(n),))
        for name in ("cxcywh_to_xyxy", "xyxy_to_cxcywh", "xyxy_to_xywh", "xywh_to_xyxy")
    },
    **{
        f"boxes.{name} of tensors": (getattr(boxes, name), lambda n, t: (tensor(SIZES, t),))
        for name in ("cxcywh_to_xyxy", "xyxy_to_cxcywh", "xyxy_to_xywh", "xywh_to_xyxy")
    },
    "boxes.coco_results": (
        lambda xywh, scores: boxes.coco_results(IMAGES.tolist(), LABELS.tolist(), xywh, scores),
        lambda n, t: (CORNERS.astype(n), SCORES.astype(n)),
    ),
    "boxes.clip": (boxes.clip, lambda n, t: (CORNERS.astype(n), 50, 50)),
    **{
        f"boxes.place.undo {resize}": (boxes.place(100, 80, (64, 64), resize).undo, lambda n, t: (CORNERS.astype(n),))
        for resize in RESIZES
    },
    "boxes.iou": (boxes.iou, lambda n, t: (tensor(CORNERS, t), tensor(CORNERS[::-1].copy(), t))),
    "boxes.giou": (boxes.giou, lambda n, t: (tensor(CORNERS, t), tensor(CORNERS[::-1].copy(), t))),
    "outputs.decode_yolox": (
        outputs.decode_yolox,
        lambda n, t: (tensor(SIZES / 50, t)[None], tensor(SIZES[:, :2], t), tensor(SIZES[:, 2:3], t)),
    ),
    "outputs.decode_dfl": (
        outputs.decode_dfl,
        lambda n, t: (
            torch.ones(1, 3, 4 * BINS, dtype=t),
            tensor(SIZES[:, :2], t),
            tensor(SIZES[:, 2:3], t),
        ),
    ),
    "outputs.decode_ssd": (
        outputs.decode_ssd,
        lambda n, t: (tensor(SIZES / 50, t)[None], tensor(SIZES / 100, t), (100, 100)),
    ),
    "outputs.encode_ssd": (outputs.encode_ssd, lambda n, t: (tensor(SIZES / 50, t), tensor(SIZES / 100, t))),
    "outputs.distance_bins": (outputs.distance_bins, lambda n, t: (tensor([0.5], t), tensor([4.0], t), 9)),
    "outputs.decode_corners": (
        outputs.decode_corners,
        lambda n, t: (
            tensor(np.arange(3 * 4 * 9).reshape(3, 36) / 50, t),
            tensor(SIZES / 100, t),
            tensor(np.arange(9) - 4.0, t),
            tensor([4.0], t),
        ),
    ),
    "outputs.move_sides": (
        outputs.move_sides,
        lambda n, t: (tensor(SIZES / 100, t), tensor(SIZES / 50, t), tensor([4.0], t)),
    ),
    "outputs.full": (outputs.full, lambda n, t: (tensor(SIZES, t),)),
    "outputs.logit": (outputs.logit, lambda n, t: (tensor(SIZES / 100, t),)),
    "outputs.slots": (outputs.slots, lambda n, t: (torch.tensor([1, 0, 1, 0]),)),
    "matching.match": (
        lambda *given: matching.match(*given, CLASSES, coco.IOUS.copy()),
        lambda n, t: (some_boxes(n), some_boxes(n)),
    ),
    "matching.counts": (matching.counts, lambda n, t: (some_matches(n), coco.RECALLS.astype(n), np.ones(4, n))),
    "matching.interpolated": (
        matching.interpolated,
        lambda n, t: (some_matches(n), coco.RECALLS.astype(n), np.ones(4, n)),
    ),
    "matching.average_precision": (
        matching.average_precision,
        lambda n, t: (some_matches(n), coco.RECALLS.astype(n), np.ones(4, n)),
    ),
    "matching.operating": (
        matching.operating,
        lambda n, t: (some_matches(n), coco.RECALLS.astype(n), np.ones(4, n)),
    ),
    **{
        f"measures.Measured.measure {name}": (
            lambda one, other, group, name=name: measures.Measured(one, other, ("a", "b", "c")).measure(name, group),
            lambda n, t: (some_boxes(n), some_boxes(n), np.array([0, 1])),
        )
        for name in measures.names(("a",))
    },
    "coco.CocoEvaluation": (evaluate, lambda n, t: (detections(n),)),
    "coco.objects": (coco.objects, lambda n, t: (some_index(), np.array([0, 1]))),
    "coco.detected": (coco.detected, lambda n, t: (np.column_stack((IMAGES, *detections(n)[0].T)),)),
    "coco.accumulate": (averages, lambda n, t: (some_boxes(n),)),
    "coco.check_truth": (coco.check_truth, lambda n, t: (some_boxes(n), 2)),
    "coco.twelve": (coco.twelve, lambda n, t: (averages(some_boxes(n)),)),
    "coco.class_means": (coco.class_means, lambda n, t: (averages(some_boxes(n)).precision[..., 0],)),
    **{
        f"metrics.DetectionMetrics.update {units}": (
            update,
            lambda n, t, units=units: (
                units,
                [tensor(rows, t) for rows in detections(n)],
                tensor(TARGETS, t),
                tensor(TARGETS[:1], t),
            ),
        )
        for units in ("pixels", "normalized")
    },
    "metrics.DetectionMetrics.merge": (merge, lambda n, t: (merged(n), merged(n))),
    **{
        f"losses.{loss.__name__} {settings}": (
            lambda outputs, targets, loss=loss, settings=settings: loss_of(loss, outputs, targets, **settings),
            lambda n, t, loss=loss: (outputs_of(loss, t), tensor(TARGETS, t)),
        )
        for loss, settings in (
            (YoloXDetectionLoss, {"use_l1": True}),
            (YoloXFastDetectionLoss, {"use_l1": True, "iou_type": "giou"}),
            (PPYoloELoss, {"use_static_assigner": True}),
            (PPYoloELoss, {"use_static_assigner": False, "use_varifocal_loss": False}),
            (SSDLoss, {}),
        )
    },
    "losses.assignment.overlaps": (
        assignment.overlaps,
        lambda n, t: (tensor(CORNERS, t), tensor(CORNERS, t)[None], torch.zeros(4, dtype=torch.int64)),
    ),
    **{
        f"postprocess.{kind.__name__} {settings}": (
            detect,
            lambda n, t, kind=kind, settings=settings: (
                kind.of(conf=0.1, **settings),
                decoded(t, kind is not postprocess.PPYoloEPostPredictionCallback),
            ),
        )
        for kind in (
            postprocess.YoloXPostPredictionCallback,
            postprocess.SSDPostPredictCallback,
            postprocess.PPYoloEPostPredictionCallback,
        )
        for settings in (
            {},
            {"class_agnostic_nms": True, "nms_top_k": 4},
            *([{"nms_type": "matrix"}] if kind is not postprocess.PPYoloEPostPredictionCallback else []),
        )
    },
    "training.post_prediction": (
        post_prediction(MODEL, Eval()),
        lambda n, t: (decoded(t, rows=True),),
    ),
    "training.resized": (resized, lambda n, t: (torch.rand(2, 3, 64, 64, dtype=t), tensor(TARGETS, t), (32, 96))),
    **{
        f"models.Preprocessing {family.name}": (
            family.preprocessing,
            lambda n, t: (100 * torch.rand(2, 3, 8, 8).to(t),),
        )
        for family in models.FAMILIES
    },
    "models.Detector": (MODEL, lambda n, t: (100 * torch.rand(1, 3, 64, 64),)),
    "visualization.draw": (
        draw,
        lambda n, t: (RNG.integers(0, 256, (60, 80, 3), np.uint8), CORNERS.astype(n), detections(n)[0]),
    ),
    **{
        f"visualization.DetectionVisualization.visualize_batch {units}": (
            visualize,
            lambda n, t, units=units: (
                torch.full((2, 3, 40, 50), 90, dtype=t),
                [tensor(rows, t) for rows in detections(n)],
                tensor(TARGETS, t),
                units,
            ),
        )
        for units in ("pixels", "normalized")
    },
    **{
        f"transforms.{plan}": (
            lambda *given, plan=plan: plan(*given, np.random.default_rng(0)),
            lambda n, t: (picture(n),),
        )
        for plan in PLANS
    },
    **{
        f"mosaic.{type(made).__name__}": (
            lambda first, *others, made=made: made(first, np.random.default_rng(0), others),
            lambda n, t, made=made: tuple(picture(n) for _ in range(1 + made.partners)),
        )
        for made in COMPOSITIONS
    },
    **{
        f"transforms.{type(change).__name__}": (
            lambda *given, change=change: change(transforms.Sample(*given), np.random.default_rng(0)),
            lambda n, t: (np.full((8, 8, 3), 90, n), CORNERS.astype(n), LABELS.astype(np.int32)),
        )
        for change in (transforms.Standardize(), transforms.Normalize((1, 2, 3), (4, 5, 6)))
    },
    "transforms.ShiftHSV": (
        lambda image: colour(transforms.ShiftHSV(-5, 20, -20), image),
        lambda n, t: (RNG.integers(0, 256, (8, 8, 3), np.uint8),),
    ),
    "transforms.sanitise": (transforms.sanitise, lambda n, t: (CORNERS.astype(n), LABELS.copy(), (50, 50))),
    **{
        f"TargetFormat.{form.name}": (
            lambda target, corners, labels, form=form: (
                form.to_xyxy(target, 100, 50),
                form.from_xyxy(corners, labels, 100, 50),
            ),
            lambda n, t: (np.column_stack((LABELS, CORNERS)).astype(n), CORNERS.astype(n), LABELS.astype(n)),
        )
        for form in TargetFormat
    },
    "index_of_records": (
        lambda corners, labels: index_of_records(
            [{"path": "no.jpg", "boxes": corners, "labels": labels}], ("a", "b", "c"), "/", Anything()
        ),
        lambda n, t: (CORNERS.astype(n), LABELS.copy()),
    ),
    "make_index": (
        lambda *given: make_index(
            [(2, "2.jpg", 9, 9), (1, "1.jpg", 9, 9)],
            *given,
            root="/",
            class_names=("a", "b", "c"),
            category_ids=(1, 2, 3),
        ),
        lambda n, t: (CORNERS.astype(n), LABELS.copy(), CROWD.copy(), np.ones(4, n), IMAGES.copy()),
    ),
    "export.compare": (lambda *given: compare(*given, 0.1, 300), lambda n, t: (detections(n)[0], detections(n)[0])),
}
# What takes no numbers that it could change.
WITHOUT = {
    boxes: set(),
    outputs: {"anchor_cells", "ssd_map_sizes", "ssd_default_boxes", "decoded_of", "kind_of", "shapes", "raw_of"},
    coco: {"metric_names", "twelve_names", "beyond", "read_results"},
    matching: set(),
    transforms: {"scaling"},
}


class Anything:
    """Takes every problem."""

    def add(self, problem):
        pass


def state(value):
    """All arrays and tensors in a value, copied."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone().numpy()
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, dict):
        return {key: state(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [state(inner) for inner in value]
    return state(vars(value)) if hasattr(value, "__dict__") else copy.copy(value)


def same(one, other):
    if isinstance(one, dict):
        return all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return all(map(same, one, other))
    return np.array_equal(one, other, equal_nan=True) if isinstance(one, np.ndarray) else True


@pytest.mark.parametrize("kind", ["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_arguments_stay_as_they_were(name, kind):
    call, make = CASES[name]
    given = make(np.dtype(kind), getattr(torch, kind))
    before = state(given)
    with torch.no_grad():
        call(*given)
    assert same(before, state(given))


def test_every_function_that_takes_numbers_is_tried():
    for module, without in WITHOUT.items():
        functions = {
            name
            for name, found in vars(module).items()
            if inspect.isfunction(found) and found.__module__ == module.__name__ and not name.startswith("_")
        }
        tried = {word for case in CASES for word in re.findall(r"\w+", case)}
        assert functions - tried == without, module.__name__
