import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydet.data.transforms import HSV, Fit, HorizontalFlip, Pad, Sample, fit_scale, sanitise

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


@pytest.mark.parametrize("size", [(64, 64), (64, 128), (128, 64), (256, 320)])
@pytest.mark.parametrize("shape", [(100, 50), (50, 100), (37, 91), (300, 200)])
def test_fit_moves_boxes_with_the_pixels(size, shape):
    height, width = shape
    box = (width // 4, height // 4, width * 3 // 4, height * 3 // 4)
    fitted = Fit(size)(picture(height, width, box), rng(0))
    assert fitted.image.shape[0] <= size[0]
    assert fitted.image.shape[1] <= size[1]
    assert size[0] - fitted.image.shape[0] < 2 or size[1] - fitted.image.shape[1] < 2  # one side fits
    # Half a pixel of each image: sides are whole numbers, and bilinear edges are soft.
    scale = fit_scale(width, height, size)
    np.testing.assert_allclose(fitted.boxes[0], bounds(fitted.image), atol=0.5 + 0.5 * max(1, scale))


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [((426, 640), (416, 416), (276, 416)), ((640, 427), (640, 640), (640, 427)), ((333, 500), (640, 640), (426, 640))],
)
def test_fit_rounds_down_as_yolox_does(shape, size, expected):
    assert Fit(size)(picture(*shape, (0, 0, 10, 10)), rng(0)).image.shape[:2] == expected


def test_pad_is_grey_at_the_bottom_and_the_right():
    padded = Pad((32, 64))(picture(20, 40, (1, 2, 3, 4)), rng(0))
    assert padded.image.shape == (32, 64, 3)
    assert (padded.image[20:] == 114).all()
    assert (padded.image[:, 40:] == 114).all()
    assert padded.boxes.tolist() == [[1, 2, 3, 4]]


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
