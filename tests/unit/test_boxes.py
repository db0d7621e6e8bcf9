import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import box_iou, generalized_box_iou

from raydet import boxes

coordinate = st.floats(-1000, 1000, allow_nan=False, width=32)
side = st.floats(0.0625, 1000, width=32)
box_lists = st.lists(st.tuples(coordinate, coordinate, side, side), min_size=1, max_size=8)


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
@pytest.mark.parametrize(
    ("convert", "given_box", "expected"),
    [
        (boxes.cxcywh_to_xyxy, [10, 20, 4, 6], [8, 17, 12, 23]),
        (boxes.xyxy_to_cxcywh, [8, 17, 12, 23], [10, 20, 4, 6]),
        (boxes.xywh_to_xyxy, [8, 17, 4, 6], [8, 17, 12, 23]),
        (boxes.xyxy_to_xywh, [8, 17, 12, 23], [8, 17, 4, 6]),
    ],
)
def test_conversions(kind, convert, given_box, expected):
    assert convert(kind([given_box])).tolist() == [expected]


@given(box_lists)
def test_conversions_are_inverse(values):
    xywh = np.array(values, np.float64)
    xyxy = boxes.xywh_to_xyxy(xywh)
    np.testing.assert_allclose(boxes.xyxy_to_xywh(xyxy), xywh, atol=1e-9)
    np.testing.assert_allclose(boxes.cxcywh_to_xyxy(boxes.xyxy_to_cxcywh(xyxy)), xyxy, atol=1e-9)


@given(box_lists, box_lists)
def test_overlap_equals_torchvision(first, second):
    a, b = (boxes.xywh_to_xyxy(torch.tensor(values, dtype=torch.float64)) for values in (first, second))
    ious = boxes.iou(a[:, None], b)
    gious = boxes.giou(a[:, None], b)
    torch.testing.assert_close(ious, box_iou(a, b), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(gious, generalized_box_iou(a, b), atol=1e-9, rtol=1e-9)
    assert ((ious >= 0) & (ious <= 1 + 1e-9)).all()
    assert ((gious > -1) & (gious <= ious + 1e-9)).all()


def test_empty_boxes_overlap_nothing():
    point = torch.tensor([[5.0, 5, 5, 5]])
    assert boxes.iou(point, torch.tensor([[0.0, 0, 10, 10]])).tolist() == [0]
    assert boxes.iou(point, point).tolist() == [0]


def test_clip():
    clipped = boxes.clip(np.array([[-5.0, 2, 30, 40]]), width=20, height=30)
    assert clipped.tolist() == [[0, 2, 20, 30]]
