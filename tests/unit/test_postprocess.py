import math

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision import ops

from raydet.boxes import cxcywh_to_xyxy, iou
from raydet.postprocess import (
    Candidates,
    PPYoloEPostPredictionCallback,
    SSDPostPredictCallback,
    YoloXPostPredictionCallback,
)


def decoded(*rows):
    """[1, L, 5 + 2] of rows: cx, cy, w, h, objectness, two class probabilities."""
    return (torch.tensor([rows], dtype=torch.float32), None)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # score = objectness x probability; both classes of a box count
        ({}, [(0, 0.72), (1, 0.45), (0, 0.4), (1, 0.09)]),
        ({"multi_label_per_box": False}, [(0, 0.72), (1, 0.45)]),
        ({"conf": 0.41}, [(0, 0.72), (1, 0.45)]),
        ({"max_predictions": 1}, [(0, 0.72)]),
        ({"class_agnostic_nms": True}, [(0, 0.72), (1, 0.45)]),
        ({"nms_top_k": 3}, [(0, 0.72), (1, 0.45), (0, 0.4)]),
    ],
)
def test_settings(settings, expected):
    boxes = decoded([10, 10, 8, 8, 0.9, 0.8, 0.1], [50, 50, 10, 10, 0.5, 0.8, 0.9])
    (found,) = YoloXPostPredictionCallback(**settings)(boxes)
    assert [(int(row[5]), round(float(row[4]), 4)) for row in found] == expected
    assert found[0, :4].tolist() == [6, 6, 14, 14]


def test_overlapping_boxes_of_a_class_suppress_each_other():
    boxes = decoded([10, 10, 8, 8, 0.9, 0.8, 0], [11, 10, 8, 8, 0.8, 0.8, 0], [30, 10, 8, 8, 0.7, 0.8, 0])
    (found,) = YoloXPostPredictionCallback(iou=0.6)(boxes)
    assert found[:, 0].tolist() == [6, 26]


CALLBACKS = [YoloXPostPredictionCallback, SSDPostPredictCallback, PPYoloEPostPredictionCallback]
MATRIX = [YoloXPostPredictionCallback, SSDPostPredictCallback]


def for_callback(callback, boxes, scores):
    """Boxes [B, L, 4] cxcywh and class probabilities [B, L, C] as what a callback takes; the object is certain."""
    if callback is PPYoloEPostPredictionCallback:
        return ((cxcywh_to_xyxy(boxes), scores), None)
    objectness = (
        scores.amax(-1, keepdim=True) if callback is SSDPostPredictCallback else torch.ones(*boxes.shape[:2], 1)
    )
    return (torch.cat((boxes, objectness, scores), -1), None)


@pytest.mark.parametrize("callback", CALLBACKS)
@pytest.mark.parametrize("settings", [{}, {"multi_label_per_box": False}, {"class_agnostic_nms": True}])
@pytest.mark.parametrize("points", [0, 5])
def test_nothing_found_is_an_empty_tensor(callback, settings, points):
    outputs = for_callback(callback, torch.zeros(2, points, 4), torch.zeros(2, points, 3))
    assert [tuple(found.shape) for found in callback(**settings)(outputs)] == [(0, 6), (0, 6)]


@pytest.mark.parametrize("callback", MATRIX)
@pytest.mark.parametrize("points", [0, 5])
def test_nothing_found_by_matrix_nms_is_an_empty_tensor(callback, points):
    outputs = for_callback(callback, torch.zeros(2, points, 4), torch.zeros(2, points, 3))
    assert [tuple(found.shape) for found in callback(nms_type="matrix")(outputs)] == [(0, 6), (0, 6)]


def some_candidates(seed, count, classes, wild):
    """Boxes about some objects: in tenths of a pixel, so that some overlap by just a threshold; equal scores."""
    generator = torch.Generator().manual_seed(seed)

    def some(*shape):
        return torch.rand(*shape, generator=generator)

    objects = torch.cat((600 * some(12, 2), 20 + 200 * some(12, 2)), dim=1)
    around = objects[torch.randint(12, (count,), generator=generator)]
    around = around + 0.15 * (some(count, 4) - 0.5) * around[:, [2, 3, 2, 3]]
    boxes = cxcywh_to_xyxy(around)
    boxes = torch.where(some(count, 1) < 0.3, (10 * boxes).round() / 10, boxes)
    for number in range(min(len(wild), count)):
        boxes[number * count // len(wild), number % 4] = wild[number]
    scores = torch.where(some(count) < 0.3, 0.5, some(count))
    labels = torch.randint(classes, (count,), generator=generator)
    return Candidates(boxes, scores, labels, torch.arange(count))


def class_by_class(found, iou):
    """Which NMS of each class by itself keeps, the best first."""
    kept = [torch.empty(0, dtype=torch.int64)]
    for label in found.labels.unique():
        mine = (found.labels == label).nonzero().squeeze(1)
        kept.append(mine[ops.nms(found.boxes[mine], found.scores[mine], iou)])
    kept = torch.cat(kept).sort().values
    return kept[found.scores[kept].argsort(descending=True, stable=True)]


@given(
    seed=st.integers(0, 10_000),
    count=st.sampled_from([0, 1, 2, 60, 700, 1500]),
    classes=st.sampled_from([1, 3, 80, 1203]),
    wild=st.sampled_from([(), (200_000.0,), (-3e7, 5e5), (math.inf, -math.inf), (math.nan,), (1e30, 1e-30, math.nan)]),
    iou=st.sampled_from([0.0, 0.45, 0.6, 0.65, 0.9, 1.0]),
)
@hypothesis.settings(max_examples=200, deadline=None)
def test_nms_is_that_of_each_class_by_itself(seed, count, classes, wild, iou):
    found = some_candidates(seed, count, classes, wild)
    callback = YoloXPostPredictionCallback(iou=iou, max_predictions=count + 1)
    assert torch.equal(callback.keep(found), class_by_class(found, iou))


def test_a_box_far_away_changes_nothing_for_the_others():
    found = some_candidates(0, 900, 20, ())
    callback = YoloXPostPredictionCallback(iou=0.9, max_predictions=1000)
    far = Candidates(
        torch.cat((found.boxes, torch.tensor([[0, 0, 200_000.0, 200_000.0]]))),
        torch.cat((found.scores, torch.tensor([0.001]))),
        torch.cat((found.labels, torch.tensor([19]))),
        torch.arange(901),
    )
    assert callback.keep(far)[:-1].tolist() == callback.keep(found).tolist()


@pytest.mark.parametrize("callback", MATRIX)
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_matrix_nms_of_other_boxes_does_not_change_for_one_that_is_not_finite(callback, value):
    generator = torch.Generator().manual_seed(0)
    boxes, scores = 30 * torch.rand(1, 15, 4, generator=generator), torch.rand(1, 15, 3, generator=generator)
    detect = callback(conf=0.3, nms_type="matrix")
    (expected,) = detect(for_callback(callback, boxes, scores))
    more = torch.tensor([[[value, 5, 5, 5]]]), torch.tensor([[[0.0, 1.0, 0.0]]])
    both = (torch.cat(parts, 1) for parts in zip((boxes, scores), more, strict=True))
    (found,) = detect(for_callback(callback, *both))
    assert torch.equal(found[found[:, :4].isfinite().all(1)], expected)


def test_the_score_of_ssd_is_the_class_probability():
    """The reference squares that of the best class."""
    rows = decoded([10, 10, 8, 8, 0.8, 0.8, 0.1], [50, 50, 10, 10, 0.6, 0.3, 0.6])
    (found,) = SSDPostPredictCallback(conf=0.05)(rows)
    assert found[:, 4].tolist() == pytest.approx([0.8, 0.6, 0.3, 0.1])
    assert found[:, 5].int().tolist() == [0, 1, 0, 1]


def matrix_oracle(boxes, scores, labels, keep, conf, agnostic):
    """Matrix NMS in plain loops, straight from the paper: the Gaussian kernel with sigma 3."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[:keep]

    def overlap(i, j):
        return float(iou(boxes[i], boxes[j])) if agnostic or labels[i] == labels[j] else 0.0

    found = []
    for rank, j in enumerate(order):
        decay = 1.0
        for above, i in enumerate(order[:rank]):
            most = max((overlap(k, i) for k in order[:above]), default=0.0)
            decay = min(decay, math.exp(-3 * overlap(i, j) ** 2) / math.exp(-3 * most**2))
        if scores[j] * decay > conf:
            found.append((scores[j] * decay, labels[j], boxes[j].tolist()))
    return sorted(found, key=lambda row: -row[0])


@pytest.mark.parametrize("callback", MATRIX)
@given(seed=st.integers(0, 10_000), agnostic=st.booleans(), keep=st.sampled_from([3, 12, 300]))
@hypothesis.settings(max_examples=20, deadline=None)
def test_matrix_nms_is_that_of_its_paper(callback, seed, agnostic, keep):
    generator = torch.Generator().manual_seed(seed)
    boxes, scores = 30 * torch.rand(1, 15, 4, generator=generator), torch.rand(1, 15, 3, generator=generator)
    callback = callback(conf=0.3, nms_type="matrix", max_predictions=keep, class_agnostic_nms=agnostic)
    (found,) = callback(for_callback(type(callback), boxes, scores))
    best = scores[0].max(-1)
    above = (best.values > 0.3).nonzero().squeeze(1)
    expected = matrix_oracle(
        cxcywh_to_xyxy(boxes[0, above]), best.values[above].tolist(), best.indices[above].tolist(), keep, 0.3, agnostic
    )
    assert found[:, 4].tolist() == pytest.approx([score for score, _, _ in expected], rel=1e-5)
    assert found[:, 5].int().tolist() == [label for _, label, _ in expected]
    torch.testing.assert_close(found[:, :4], torch.tensor([box for _, _, box in expected]).reshape(-1, 4))


def test_wrong_nms_type():
    with pytest.raises(ValueError, match="nms_type is 'soft'"):
        YoloXPostPredictionCallback(nms_type="soft")


def test_training_output_is_refused():
    with pytest.raises(ValueError, match=r"evaluation mode: call model.eval\(\)"):
        YoloXPostPredictionCallback()([torch.zeros(1, 1, 8, 8, 7)] * 3)


@pytest.mark.parametrize("kind", CALLBACKS)
@given(seed=st.integers(0, 10_000), multi_label=st.booleans(), agnostic=st.booleans())
def test_sorted_bounded_and_suppressed(kind, seed, multi_label, agnostic):
    generator = torch.Generator().manual_seed(seed)
    boxes, scores = 50 * torch.rand(2, 60, 4, generator=generator), torch.rand(2, 60, 4, generator=generator)
    callback = kind.of(
        conf=0.05, iou=0.4, max_predictions=20, multi_label_per_box=multi_label, class_agnostic_nms=agnostic
    )
    for found in callback(for_callback(kind, boxes, scores)):
        assert len(found) <= 20
        assert (found[:, 4] > 0.05).all()
        assert (found[:, 4].diff() <= 0).all()
        overlap = iou(found[:, None, :4], found[None, :, :4]).fill_diagonal_(0)
        same = torch.ones_like(overlap) if agnostic else found[:, None, 5] == found[None, :, 5]
        assert (overlap[same.bool()] <= 0.4 + 1e-6).all()
