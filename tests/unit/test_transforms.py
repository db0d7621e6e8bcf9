import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydet.boxes import place
from raydet.data.index import make_index
from raydet.data.render import Renderer, SourceImages, letterbox
from raydet.data.transforms import (
    HSV,
    ChannelSwap,
    HorizontalFlip,
    Letterbox,
    Mixup,
    Mosaic,
    Normalize,
    RandomAffine,
    Rotate90,
    Sample,
    SamplePlan,
    Standardize,
    VerticalFlip,
    sanitise,
)

rng = np.random.default_rng


@pytest.fixture(scope="module")
def show(tmp_path_factory):
    """Render a transformed picture of an image with boxes: (image, boxes, transforms, seed) → sample and plan."""
    folder = tmp_path_factory.mktemp("pictures")

    def render(image, boxes, *transforms, seed=0):
        height, width = image.shape[:2]
        cv2.imwrite(str(folder / "image.png"), image)
        nothing = np.empty(0, int)
        index = make_index(
            [(0, "image.png", width, height)],
            np.empty((0, 4)),
            nothing,
            nothing,
            nothing,
            nothing,
            root=str(folder),
            class_names=("thing",),
            category_ids=(1,),
        )
        boxes = np.array(boxes, float).reshape(-1, 4)
        picture = SamplePlan.of(0, width, height, boxes, np.arange(len(boxes)))
        random = rng(seed)
        for transform in transforms:
            others = [[picture] * getattr(transform, "partners", 0)]
            picture = transform(picture, random, *others) if others[0] else transform(picture, random)
        out = np.empty((*picture.size, 3), np.uint8)
        Renderer(picture.size)(picture, SourceImages(index, [picture], [picture]), out)
        return Sample(out, *sanitise(picture.boxes, picture.labels, picture.size)), picture

    return render


def white(height, width, box):
    """A black image with one white box."""
    image = np.zeros((height, width, 3), np.uint8)
    left, top, right, bottom = box
    image[top:bottom, left:right] = 255
    return image


def bounds(image, threshold=127):
    """The box around what is brighter than grey."""
    bright = image.max(2) > max(threshold, 114)
    rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


shapes = st.tuples(st.integers(4, 60), st.integers(4, 60))


@st.composite
def scenes(draw):
    height, width = draw(shapes)
    left, top = draw(st.integers(0, width - 2)), draw(st.integers(0, height - 2))
    return height, width, (left, top, draw(st.integers(left + 1, width)), draw(st.integers(top + 1, height)))


@given(scenes(), st.sampled_from([HorizontalFlip(1.0), VerticalFlip(1.0), Rotate90(1.0)]), st.integers(0, 9))
@settings(deadline=None)
def test_flips_and_turns_move_boxes_with_the_pixels_exactly(show, scene, transform, seed):
    height, width, box = scene
    sample, _ = show(white(height, width, box), [box], transform, seed=seed)
    assert sample.boxes[0].tolist() == bounds(sample.image)
    assert sample.image.shape[0] * sample.image.shape[1] == height * width


@pytest.mark.parametrize("resize", ["pad_bottom_right", "pad_centre", "stretch"])
@pytest.mark.parametrize("size", [(64, 64), (64, 128), (128, 64), (256, 320)])
@pytest.mark.parametrize("shape", [(100, 50), (50, 100), (37, 91), (300, 200)])
@pytest.mark.parametrize("flip", [HorizontalFlip(0.0), HorizontalFlip(1.0)])
def test_letterbox_moves_boxes_with_the_pixels_into_the_input_and_back(show, resize, size, shape, flip):
    height, width = shape
    box = (width // 4, height // 4, width * 3 // 4, height * 3 // 4)
    sample, _ = show(white(height, width, box), [box], Letterbox(size, resize), flip)
    assert sample.image.shape == (*size, 3)
    # Half a pixel of each image, as bilinear edges are soft.
    there = place(width, height, size, resize)
    np.testing.assert_allclose(sample.boxes[0], bounds(sample.image), atol=0.5 + 0.5 * max(1, *there.scale))
    if not flip.prob:
        np.testing.assert_allclose(there.undo(sample.boxes), [box], atol=1 / min(there.scale))


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
def test_images_lie_where_the_reference_puts_them(show, resize, shape, size, expected):
    there = place(shape[1], shape[0], size, resize)
    assert (there.height, there.width, there.top, there.left) == expected
    image = np.zeros((*shape, 3), np.uint8)
    padded = show(image, [], Letterbox(size, resize))[0].image
    inside = np.zeros(size, bool)
    inside[there.top : there.top + there.height, there.left : there.left + there.width] = True
    assert (padded[~inside] == 114).all()
    assert (padded[inside] == 0).all()
    assert (letterbox(image, size, resize) == padded).all()


@given(scenes(), st.integers(0, 50))
@settings(deadline=None, max_examples=60)
def test_affine_moves_boxes_with_the_pixels(show, scene, seed):
    """The box drawn as pixels and transformed lies in the transformed box, and touches its sides but for soft edges."""
    height, width, box = scene
    transform = RandomAffine((80, 120), 15, 0.1, (0.5, 2), 10, min_visible=0, min_side=0, max_aspect=1e9)
    sample, picture = show(white(height, width, box), [box], transform, seed=seed)
    seen = sample.image.max(2) == 255
    if len(picture.boxes) and seen.any():
        (left, top, right, bottom), found = picture.boxes[0], bounds(sample.image, 200)
        assert (np.array(found[:2]) >= np.array([left, top]) - 2.5).all()
        assert (np.array(found[2:]) <= np.array([right, bottom]) + 2.5).all()
        if min(box[2] - box[0], box[3] - box[1]) > 12:  # its corners survive the interpolation
            np.testing.assert_allclose(found, [left, top, right, bottom], atol=4)


@given(scenes(), st.integers(0, 50), st.sampled_from([(96, 96), (64, 128), (128, 64)]))
@settings(deadline=None, max_examples=60)
def test_boxes_stay_inside_and_are_never_inverted(show, scene, seed, size):
    height, width, box = scene
    transforms = (
        Mosaic(0.7, Letterbox(size)),
        RandomAffine(size, 20, 0.2, (0.3, 2), 10),
        Mixup(0.7, size),
        HorizontalFlip(0.5),
        VerticalFlip(0.5),
    )
    sample, _ = show(white(height, width, box), [box], *transforms, seed=seed)
    assert sample.image.shape == (*size, 3)
    assert (sample.boxes[:, 2:] - sample.boxes[:, :2] >= 1).all()
    assert (sample.boxes >= 0).all()
    assert (sample.boxes[:, [2, 3]] <= (size[1], size[0])).all()
    assert len(sample.boxes) == len(sample.labels)


@pytest.mark.parametrize(
    "transform",
    [
        HorizontalFlip(0.0),
        VerticalFlip(0.0),
        Rotate90(0.0),
        HSV(0.0, 5, 30, 30),
        HSV(1.0, 0, 0, 0),
        ChannelSwap(0.0),
        RandomAffine((20, 30)),
        Letterbox((20, 30)),
        Letterbox((20, 30), "stretch"),
        Mosaic(0.0, Letterbox((20, 30))),
        Mixup(0.0, (20, 30)),
    ],
)
def test_no_strength_is_the_identity(show, transform):
    image = rng(3).integers(0, 256, (20, 30, 3), np.uint8)
    for seed in range(5):
        sample, _ = show(image, [[1, 2, 9, 10]], transform, seed=seed)
        assert (sample.image == image).all()
        assert sample.boxes.tolist() == [[1, 2, 9, 10]]


@pytest.mark.parametrize("size", [(64, 64), (48, 96)])
def test_a_mosaic_has_no_seams_and_grey_only_beyond_its_images(show, size):
    """Four black images on grey: where they meet nothing of the grey shines through."""
    image = np.zeros((64, 64, 3), np.uint8)
    for seed in range(40):
        transforms = (Mosaic(1.0, Letterbox(size)), RandomAffine(size, 10, 0.0, (0.9, 2.0), 2))
        _, picture = show(image, [], *transforms, seed=seed)
        sample, _ = show(image, [], *transforms, seed=seed)
        assert len(picture.layers[0]) == 4
        dark = sample.image[..., 0] < 114
        outline = cv2.morphologyEx(dark.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((3, 3)), borderValue=0)
        assert (outline.astype(bool) == dark)[2:-2, 2:-2].mean() > 0.999, seed


def test_mixup_is_the_mean_of_both(show):
    image = np.full((64, 64, 3), 200, np.uint8)
    sample, _ = show(image, [[0, 0, 64, 64]], Mixup(1.0, (64, 64), (0.5, 0.5)))
    assert np.unique(sample.image[:31, :31]).tolist() == [200]
    assert np.unique(sample.image[34:, 34:]).tolist() == [157]  # with grey
    assert sample.boxes.tolist() == [[0, 0, 64, 64], [0, 0, 32, 32]]


def test_hsv_shifts_within_its_limits(show):
    image = np.full((4, 4, 3), (60, 120, 180), np.uint8)
    before = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)[0, 0].astype(int)
    seen = set()
    for seed in range(200):
        changed = show(image, [], HSV(1.0, 5, 30, 30), seed=seed)[0].image
        shift = cv2.cvtColor(changed, cv2.COLOR_BGR2HSV)[0, 0].astype(int) - before
        assert (np.abs(shift) <= (6, 32, 31)).all()  # the way to BGR and back rounds
        seen.add(tuple(shift))
    assert len(seen) > 100


@pytest.mark.parametrize("hue", [-75, -18, -1, 1, 18, 75])
@pytest.mark.parametrize(("saturation", "value"), [(0, 0), (40, -30), (-255, 255)])
def test_hsv_is_addition_that_wraps_in_hue_and_saturates_elsewhere(hue, saturation, value):
    from raydet.data.transforms import ShiftHSV

    image = rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV).astype(int)
    hsv = np.stack(
        [(hsv[..., 0] + hue) % 180, *np.clip(hsv[..., 1:] + (saturation, value), 0, 255).transpose(2, 0, 1)], -1
    )
    expected = cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2BGR).astype(int)
    found = np.empty_like(image)
    ShiftHSV(hue, saturation, value)(image, found)
    # Hue is in steps of two degrees, rounded on either side of the mirror: a sixtieth of a channel's range at most.
    assert np.abs(found - expected).max() <= 9
    assert np.abs(found - expected).mean() < 1.5


def test_channel_swap(show):
    image = np.full((4, 4, 3), (1, 2, 3), np.uint8)
    assert show(image, [], ChannelSwap(1.0))[0].image[0, 0].tolist() == [3, 2, 1]
    assert show(image, [], ChannelSwap(1.0), RandomAffine((4, 4), 1e-9))[0].image[0, 0].tolist() == [3, 2, 1]


@pytest.mark.parametrize(
    "transform",
    [
        HorizontalFlip(0.5),
        HSV(0.7, 5, 30, 30),
        RandomAffine((20, 30), 10, 0.1, (0.5, 2), 2),
        Mosaic(0.5, Letterbox((20, 30))),
    ],
)
def test_the_same_generator_gives_the_same_sample(show, transform):
    image = rng(3).integers(0, 256, (20, 30, 3), np.uint8)
    results = {}
    for seed in [*range(6), *range(6)]:
        out = show(image, [[1.0, 2, 9, 10]], transform, seed=seed)[0]
        key = (out.image.tobytes(), out.boxes.tobytes())
        assert results.setdefault(seed, key) == key
    assert len(set(results.values())) > 1


def test_sanitise_clips_and_drops_slivers():
    boxes = np.array([[-5, -5, 10, 10], [15, 5, 40, 8], [3, 3, 3.5, 9], [30, 30, 40, 40]], np.float32)
    kept, labels = sanitise(boxes, np.arange(4), (20, 20))
    assert kept.tolist() == [[0, 0, 10, 10], [15, 5, 20, 8]]
    assert labels.tolist() == [0, 1]


def test_standardize_and_normalize_make_floats():
    sample = Sample(np.full((2, 2, 3), 51, np.uint8), np.empty((0, 4), np.float32), np.empty(0, np.int32))
    standard = Standardize()(sample, rng(0))
    assert standard.image.dtype == np.float32
    np.testing.assert_allclose(standard.image, 0.2)
    np.testing.assert_allclose(Normalize((1, 2, 3), (2, 2, 2))(sample, rng(0)).image[0, 0], [25, 24.5, 24])
