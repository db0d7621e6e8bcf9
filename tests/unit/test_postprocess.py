import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raydet.boxes import iou
from raydet.postprocess import YoloXPostPredictionCallback


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


@pytest.mark.parametrize("rows", [torch.zeros(2, 0, 7), torch.zeros(2, 5, 7)])
def test_nothing_found_is_an_empty_tensor(rows):
    assert [tuple(found.shape) for found in YoloXPostPredictionCallback()((rows, None))] == [(0, 6), (0, 6)]


def test_training_output_is_refused():
    with pytest.raises(ValueError, match=r"evaluation mode: call model.eval\(\)"):
        YoloXPostPredictionCallback()([torch.zeros(1, 1, 8, 8, 7)] * 3)


@given(st.integers(0, 10_000), st.booleans(), st.booleans())
def test_sorted_bounded_and_suppressed(seed, multi_label, agnostic):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(2, 60, 9, generator=generator)
    rows[..., :4] *= 50
    callback = YoloXPostPredictionCallback(
        conf=0.05, iou=0.4, max_predictions=20, multi_label_per_box=multi_label, class_agnostic_nms=agnostic
    )
    for found in callback((rows, None)):
        assert len(found) <= 20
        assert (found[:, 4] > 0.05).all()
        assert (found[:, 4].diff() <= 0).all()
        overlap = iou(found[:, None, :4], found[None, :, :4]).fill_diagonal_(0)
        same = torch.ones_like(overlap) if agnostic else found[:, None, 5] == found[None, :, 5]
        assert (overlap[same.bool()] <= 0.4 + 1e-6).all()
