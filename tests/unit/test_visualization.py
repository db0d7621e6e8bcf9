import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from raydet.data.render import letterbox
from raydet.visualization import Shown, class_colour, draw_boxes, grid, resized, sheet


def test_classes_have_colours_of_their_own():
    colours = [class_colour(label) for label in range(80)]
    assert len(set(colours)) == 80


@pytest.mark.parametrize(
    "box",
    [(10, 10, 30, 40), (0, 0, 50, 60), (-20, -10, 20, 20), (40, 50, 90, 90), (45.4, 2.6, 49.9, 59.1)],
    ids=["inside", "whole", "beyond the left", "beyond the right", "fractions"],
)
def test_boxes_are_drawn_on_a_copy(box):
    image = np.full((60, 50, 3), 90, np.uint8)
    drawn = draw_boxes(image, np.array([box]), [1], ("cat", "dog"), [0.5])
    assert (image == 90).all()
    assert drawn.shape == image.shape
    assert (drawn == class_colour(1)).all(-1).any()


@pytest.mark.parametrize("shape", [(60, 400), (400, 60)], ids=["wide", "tall"])
@pytest.mark.parametrize("low", [8, 330])
def test_boxes_are_drawn_where_they_are_in_long_pictures(shape, low):
    """The far edges, which no label covers, of a box near either end of the longer side."""
    image = np.zeros((*shape, 3), np.uint8)
    along = shape[0] < shape[1]
    box = (low, 10, low + 40, 50) if along else (10, low, 50, low + 40)
    drawn = (draw_boxes(image, np.array([box]), [0], ("a",)) == class_colour(0)).all(-1)
    right, bottom = box[2:]
    assert drawn[bottom, box[0] : right].all()
    assert drawn[box[1] : bottom, right].all()
    assert not drawn[bottom + 1 :].any()
    assert not drawn[:, right + 1 :].any()


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 1e30])
def test_boxes_of_a_model_that_diverged_can_be_drawn(value):
    image = np.zeros((60, 50, 3), np.uint8)
    draw_boxes(image, np.array([[value, 10, 30, value]]), [0], ("a",))


def test_no_boxes_leave_the_picture_as_it_is():
    image = np.full((60, 50, 3), 90, np.uint8)
    assert (draw_boxes(image, np.empty((0, 4)), [], ("cat",)) == image).all()


def test_the_best_lies_on_top():
    image = np.zeros((100, 100, 3), np.uint8)
    boxes = np.array([[20, 20, 80, 80], [20, 20, 80, 80]])
    drawn = draw_boxes(image, boxes, [0, 1], ("a", "b"))
    assert tuple(drawn[80, 50]) == class_colour(0)


def test_grid_fits_each_picture_into_its_cell():
    pictures = [np.full(shape, value, np.uint8) for shape, value in (((40, 20, 3), 10), ((10, 80, 3), 20))] * 2
    together = grid(pictures, columns=3, cell=(30, 40))
    assert together.shape == (60, 120, 3)
    assert {10, 20} < set(np.unique(together).tolist())
    assert (together[:30, 80:120] == 10).any()
    assert (together[30:, 40:] == 255).all(), "cells that are left stay white"


@given(
    st.tuples(st.integers(1, 6000), st.integers(1, 12), st.booleans()).map(lambda s: s[1::-1] if s[2] else s[:2]),
    st.sampled_from((None, 0.4)),
)
@example((6000, 5), None)
@example((1, 5000), 0.4)
@example((1, 1), None)
@settings(max_examples=40, deadline=None)
def test_images_of_any_size_are_drawn(size, gt_alpha):
    width, height = size
    image, box = np.full((height, width, 3), 200, np.uint8), np.array([[0, 0, width, height]])
    for factor in (0.01, 1, 2):
        small = resized(image, factor, cv2.INTER_AREA)
        assert small.shape == (*(max(1, round(side * factor)) for side in (height, width)), 3)
    assert letterbox(image, (64, 96), "pad_centre").shape == (64, 96, 3)
    drawn = draw_boxes(image, box, [0], ("thing",), [0.5])
    assert drawn.shape == image.shape
    together = grid([drawn, image], columns=2, cell=(30, 40))
    assert together.shape == (30, 80, 3)
    assert (together[:, 40:] != 255).any()
    shown = Shown(image, box, np.array([0]), box, np.array([0]), np.array([0.5]), "its caption")
    assert sheet([shown, shown], ("thing",), gt_alpha).ndim == 3
