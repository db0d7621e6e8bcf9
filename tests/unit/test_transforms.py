import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydet.boxes import place
from raydet.data.transforms import HSV, Fit, HorizontalFlip, Pad, Sample, sanitise

rng = np.random.default_rng


def picture(height, width, box):
    """A black picture with one white box."""
    image = np.zeros((height, width, 3), np.uint8)
    left, top, right, bottom = box
    image[top:bottom, left:right] = 255
    return Sample(image, np.array([box], np.float32), np.array([4], np.int32))


def bounds(image):
    rows, columns = np.flatnonzero(image.max(2).max(1) > 127), np.flatnonzero(image.max(2).max(0) > 127)
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


@given(st.integers(4, 60), st.integers(4, 60), st.data())
def test_flip_moves_boxes_with_the_pixels(height, width, data):
    left, top = data.draw(st.integers(0, width - 2)), data.draw(st.integers(0, height - 2))
    box = (left, top, data.draw(st.integers(left + 1, width)), data.draw(st.integers(top + 1, height)))
    flipped = HorizontalFlip(1.0)(picture(height, width, box), rng(0))
    assert flipped.boxes[0].tolist() == bounds(flipped.image)
    assert HorizontalFlip(1.0)(flipped, rng(0)).boxes.tolist() == [list(box)]


@pytest.mark.parametrize("resize", ["pad_bottom_right", "pad_centre", "stretch"])
@pytest.mark.parametrize("size", [(64, 64), (64, 128), (128, 64), (256, 320)])
@pytest.mark.parametrize("shape", [(100, 50), (50, 100), (37, 91), (300, 200)])
def test_boxes_move_with_the_pixels_into_the_input_and_back(resize, size, shape):
    height, width = shape
    box = (width // 4, height // 4, width * 3 // 4, height * 3 // 4)
    fitted = Fit(size, resize)(picture(height, width, box), rng(0))
    padded = Pad(size, resize)(fitted, rng(0))
    assert padded.image.shape == (*size, 3)
    # Half a pixel of each image: sides are whole numbers, and bilinear edges are soft.
    there = place(width, height, size, resize)
    white = np.where(padded.image > 127, padded.image, 0)  # the padding is grey
    np.testing.assert_allclose(padded.boxes[0], bounds(white), atol=0.5 + 0.5 * max(1, *there.scale))
    np.testing.assert_allclose(there.undo(padded.boxes), [box], rtol=1e-4)


@pytest.mark.parametrize(
    ("resize", "shape", "size", "expected"),
    [
        # as YOLOX: rounded down
        ("pad_bottom_right", (426, 640), (416, 416), (276, 416, 0, 0)),
        ("pad_bottom_right", (640, 427), (640, 640), (640, 427, 0, 0)),
        ("pad_bottom_right", (333, 500), (640, 640), (426, 640, 0, 0)),
        # as YOLO-NAS: fitted into 4 pixels less, rounded to the nearest, in the middle
        ("pad_centre", (480, 640), (640, 640), (477, 636, 81, 2)),
        ("pad_centre", (640, 427), (640, 640), (636, 424, 2, 108)),
        ("pad_centre", (333, 500), (640, 640), (424, 636, 108, 2)),
        # as PP-YOLOE
        ("stretch", (333, 500), (640, 640), (640, 640, 0, 0)),
        # extremely long
        ("pad_bottom_right", (1, 5000), (64, 64), (1, 64, 0, 0)),
        ("pad_centre", (5000, 1), (64, 64), (60, 1, 2, 31)),
    ],
)
def test_images_lie_where_the_reference_puts_them(resize, shape, size, expected):
    there = place(shape[1], shape[0], size, resize)
    assert (there.height, there.width, there.top, there.left) == expected
    padded = Pad(size, resize)(Fit(size, resize)(picture(*shape, (0, 0, 1, 1)), rng(0)), rng(0)).image
    inside = np.zeros(size, bool)
    inside[there.top : there.top + there.height, there.left : there.left + there.width] = True
    assert (padded[~inside] == 114).all()
    assert not (padded[inside] == 114).all()


@pytest.mark.parametrize("transform", [HorizontalFlip(0.0), HSV(0.0, 5, 30, 30), HSV(1.0, 0, 0, 0)])
def test_no_strength_is_the_identity(transform):
    image = rng(3).integers(0, 256, (20, 30, 3), np.uint8)
    for seed in range(5):
        assert (transform(Sample(image, np.empty((0, 4)), np.empty(0)), rng(seed)).image == image).all()


def test_hsv_shifts_within_its_limits():
    image = np.full((4, 4, 3), (60, 120, 180), np.uint8)
    before = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)[0, 0].astype(int)
    seen = set()
    for seed in range(200):
        changed = HSV(1.0, 5, 30, 30)(Sample(image, np.empty((0, 4)), np.empty(0)), rng(seed)).image
        shift = cv2.cvtColor(changed, cv2.COLOR_BGR2HSV)[0, 0].astype(int) - before
        assert (np.abs(shift) <= (6, 32, 31)).all()  # the way to BGR and back rounds
        seen.add(tuple(shift))
    assert len(seen) > 100


@pytest.mark.parametrize("transform", [HorizontalFlip(0.5), HSV(0.7, 5, 30, 30)])
def test_the_same_generator_gives_the_same_sample_and_the_input_stays(transform):
    image = rng(3).integers(0, 256, (20, 30, 3), np.uint8)
    sample = Sample(image.copy(), np.array([[1.0, 2, 9, 10]], np.float32), np.array([0], np.int32))
    results = {}
    for seed in [*range(6), *range(6)]:
        result = transform(sample, rng(seed))
        key = (result.image.tobytes(), result.boxes.tobytes())
        assert results.setdefault(seed, key) == key
    assert len(set(results.values())) > 1
    assert (sample.image == image).all()
    assert sample.boxes.tolist() == [[1, 2, 9, 10]]


def test_sanitise_clips_and_drops_slivers():
    boxes = np.array([[-5, -5, 10, 10], [15, 5, 40, 8], [3, 3, 3.5, 9], [30, 30, 40, 40]], np.float32)
    clean = sanitise(Sample(np.zeros((20, 20, 3), np.uint8), boxes, np.arange(4, dtype=np.int32)))
    assert clean.boxes.tolist() == [[0, 0, 10, 10], [15, 5, 20, 8]]
    assert clean.labels.tolist() == [0, 1]
