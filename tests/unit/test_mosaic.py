"""Mosaic, affine and mixup against the textbook, which is spelt out here: whole images pasted on a canvas of twice the
size about a random point, one warp of it, partners from the whole data set. Sizes are (height, width)."""

from functools import cache

import cv2
import numpy as np
import pytest

from raydet.data.coco import load_coco
from raydet.data.index import index_of_images
from raydet.data.render import Renderer, SourceImages
from raydet.data.samples import Samples
from raydet.data.transforms import (
    HorizontalFlip,
    Letterbox,
    Mixup,
    Mosaic,
    RandomAffine,
    SamplePlan,
    VerticalFlip,
    sanitise,
)

GREY = 114
INPUT = (512, 640)
COUNT = 3000  # samples of a distribution
rng = np.random.default_rng


# --- the textbook ---


def fit(shape, size):
    """Scale, and whole width and height, of an image that fits the input."""
    scale = min(size[0] / shape[0], size[1] / shape[1])
    return scale, int(shape[1] * scale), int(shape[0] * scale)


def corner(quadrant, point, width, height):
    """Left and top of an image: the first two lie above the point, the first and third to its left."""
    return point[0] - width * (quadrant in (0, 2)), point[1] - height * (quadrant in (0, 1))


def mosaic_pixels(images, point, size):
    canvas = np.full((2 * size[0], 2 * size[1], 3), GREY, np.uint8)
    for quadrant, image in enumerate(images):
        _, width, height = fit(image.shape, size)
        left, top = corner(quadrant, point, width, height)
        hidden_x, hidden_y = max(0, -left), max(0, -top)
        shown = cv2.resize(image, (width, height))[hidden_y : 2 * size[0] - top, hidden_x : 2 * size[1] - left]
        canvas[top + hidden_y :, left + hidden_x :][: shown.shape[0], : shown.shape[1]] = shown
    return canvas


def mosaic_boxes(shapes, boxes, point, size, clipped=True):
    """Boxes on the canvas, and which of them show there."""
    placed = []
    for quadrant, (shape, own) in enumerate(zip(shapes, boxes, strict=True)):
        scale, width, height = fit(shape, size)
        placed.append(own * scale + np.tile(corner(quadrant, point, width, height), 2))
    canvas = np.concatenate(placed)
    if clipped:
        canvas = clip(canvas, (2 * size[0], 2 * size[1]))
    # Clipping leaves a line of an object beyond the canvas. YOLOX keeps it, and turned it has a hull with an area.
    return canvas, (canvas[:, 2:] > canvas[:, :2]).all(1)


def affine(random, size, scale=(0.1, 2.0), centred=True):
    """M = T · Shear · R · C from the canvas of twice the size, with YOLOX's strengths."""
    height, width = size
    centre, shear, shift = np.eye(3), np.eye(3), np.eye(3)
    centre[:2, 2] = (-width, -height) if centred else (-width / 2, -height / 2)
    rotation = np.vstack((cv2.getRotationMatrix2D((0, 0), random.uniform(-10, 10), random.uniform(*scale)), (0, 0, 1)))
    shear[[0, 1], [1, 0]] = np.tan(np.radians(random.uniform(-2, 2, 2)))
    shift[:2, 2] = random.uniform(0.4, 0.6, 2) * (width, height)
    return (shift @ shear @ rotation @ centre)[:2]


def warp_pixels(image, matrix, size):
    """Boxes count from the edges of pixels, OpenCV from their centres."""
    linear, shift = matrix[:, :2], matrix[:, 2]
    centres = np.column_stack((linear, shift + linear @ (0.5, 0.5) - 0.5))
    return cv2.warpAffine(image, centres, size[::-1], borderValue=(GREY,) * 3)


def warp_boxes(boxes, matrix):
    corners = boxes[:, [[0, 1], [2, 1], [2, 3], [0, 3]]] @ matrix[:, :2].T + matrix[:, 2]
    return np.concatenate((corners.min(1), corners.max(1)), axis=1)


def clip(boxes, size):
    return np.clip(boxes, 0, [size[1], size[0]] * 2)


def visible(boxes, size):
    """Which boxes are kept."""
    (width, height), whole = (clip(boxes, size)[:, 2:] - clip(boxes, size)[:, :2]).T, boxes[:, 2:] - boxes[:, :2]
    large = (width > 2) & (height > 2) & (width * height >= 0.1 * whole.prod(1))
    return large & (np.maximum(width, height) < 20 * np.minimum(width, height))


def mixup_pixels(image, size, factor, mirror, offset):
    """What the picture is mixed with: beyond it is grey, where YOLOX has black."""
    boxed, layer = (np.full((*size, 3), GREY, np.uint8) for _ in range(2))
    _, width, height = fit(image.shape, size)
    boxed[:height, :width] = cv2.resize(image, (width, height))
    boxed = cv2.resize(boxed, (int(size[1] * factor), int(size[0] * factor)))[:, :: -1 if mirror else 1]
    x, y = (round(part) for part in offset)
    cut = boxed[y : y + size[0], x : x + size[1]]
    layer[: cut.shape[0], : cut.shape[1]] = cut
    return layer


def mixup_boxes(boxes, shape, size, factor, mirror, offset):
    left, top, right, bottom = (boxes * fit(shape, size)[0] * factor).T
    if mirror:
        left, right = size[1] * factor - right, size[1] * factor - left
    return np.column_stack((left, top, right, bottom)) - np.tile(offset, 2)


@cache
def textbook(index, seed, mixup=False, clipped=True, **settings):
    """The boxes of `COUNT` samples."""
    random, samples = rng(seed), []
    order = np.concatenate([random.permutation(len(index)) for _ in range(-(-COUNT // len(index)))])
    objects = [index.annotations(row) for row in range(len(index))]
    boxes, shapes = [own.boxes[~own.crowd] for own in objects], [index.size(row)[::-1] for row in range(len(index))]
    for first in order[:COUNT]:
        rows = [first, *random.integers(len(index), size=3)]
        point = [int(random.uniform(0.5, 1.5) * side) for side in reversed(INPUT)]
        canvas, shown = mosaic_boxes([shapes[row] for row in rows], [boxes[row] for row in rows], point, INPUT, clipped)
        warped = warp_boxes(canvas[shown], affine(random, INPUT, **settings))
        sample = clip(warped[visible(warped, INPUT)], INPUT)
        if mixup:
            other, factor, mirror = random.integers(len(index)), random.uniform(0.5, 1.5), random.random() < 0.5
            offset = [random.integers(max(0, int(factor * side) - side) + 1) for side in reversed(INPUT)]
            added = mixup_boxes(boxes[other], shapes[other], INPUT, factor, mirror, offset)
            sample = np.concatenate((sample, clip(added[visible(added, INPUT)], INPUT)))
        samples.append(sample)
    return samples


# --- the same random numbers: the same pixels and boxes ---


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """Smooth images: blue rises to the right, green downwards, and red says which it is."""
    folder = tmp_path_factory.mktemp("gallery")
    shapes = [(64, 64), (48, 96), (96, 48), (32, 128), (128, 64), (96, 192)]  # each fits the inputs on whole pixels
    images, records, objects = [], [], []
    for red, (height, width) in zip((10, 50, 90, 140, 180, 220), shapes, strict=True):
        blue, green = np.meshgrid(np.linspace(20, 235, width), np.linspace(20, 235, height))
        images.append(np.stack((blue, green, np.full_like(blue, red)), axis=2).round().astype(np.uint8))
        cv2.imwrite(str(folder / f"{red}.png"), images[-1])
        records.append((red, f"{red}.png", width, height))
        corners = np.sort(rng(red).uniform(size=(20, 2, 2)), axis=1) * (width, height)
        objects.append((corners.reshape(-1, 4), np.arange(20), np.zeros(20, bool)))
    return index_of_images(records, objects, root=str(folder), class_names=[str(i) for i in range(20)]), images


def whole(index, row):
    objects = index.annotations(row)
    return SamplePlan.of(row, *index.size(row), objects.boxes, objects.labels)


def empty_canvas(size):
    return SamplePlan.of(0, 2 * size[1], 2 * size[0], np.empty((0, 4)), np.empty(0, int))


def render(index, picture):
    out = np.empty((*picture.size, 3), np.uint8)
    Renderer(picture.size)(picture, SourceImages(index, [picture], [picture]), out)
    return out


def assert_same(index, picture, layers, boxes, labels):
    np.testing.assert_array_equal(picture.labels, labels)
    np.testing.assert_allclose(picture.boxes, boxes, atol=1e-6)
    smooth = np.zeros(picture.size, bool)
    smooth[2:-2, 2:-2] = True  # a seam may lie just outside
    for layer in layers:
        red = np.ascontiguousarray(layer[..., 2])
        smooth &= cv2.morphologyEx(red, cv2.MORPH_GRADIENT, np.ones((5, 5))) <= 3  # two pixels from all seams
    difference = np.abs(render(index, picture) - np.mean(layers, axis=0)).max(2)[smooth]
    # Resampling once or twice differs by so many grey levels; a shift by a quarter of a pixel by more.
    assert difference.max(initial=0) <= 8
    assert difference.sum() <= 1.0 * smooth.sum()


def composed(gallery, size, seed):
    """raydet's picture of a mosaic under an affine map, and the textbook's layers, boxes and labels by its numbers."""
    index, images = gallery
    random, move = rng(seed), RandomAffine(size, 10, 0.1, (0.1, 2.0), 2)
    rows = random.permutation(len(images))[:4].tolist()  # no two alike, or their seam is not seen
    first, *others = (whole(index, row) for row in rows)
    picture = Mosaic(1.0, Letterbox(size))(first, random, others)
    point = [int(shift) for *_, shift in picture.layers[0][3].matrix]
    matrix = np.array(move(empty_canvas(size), rng(seed)).layers[0][0].matrix)
    parts = [index.annotations(row) for row in rows]
    boxes, shown = mosaic_boxes([images[row].shape for row in rows], [part.boxes for part in parts], point, size)
    boxes = warp_boxes(boxes, matrix)
    shown &= visible(boxes, size)
    pixels = warp_pixels(mosaic_pixels([images[row] for row in rows], point, size), matrix, size)
    labels = np.concatenate([part.labels for part in parts])
    return move(picture, rng(seed)), [pixels], clip(boxes[shown], size), labels[shown]


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (64, 64)])
def test_mosaic_and_affine_are_the_warp_of_the_canvas(gallery, size):
    for seed in range(100):
        assert_same(gallery[0], *composed(gallery, size, seed))


@pytest.mark.parametrize("factor", [0.5, 0.75, 1.0, 1.25, 1.5])
@pytest.mark.parametrize("size", [(64, 96), (96, 64)])
def test_mixup_and_flips_follow(gallery, size, factor):
    index, images = gallery
    for seed in range(30):
        picture, layers, boxes, labels = composed(gallery, size, seed)
        row = seed % len(images)
        picture = Mixup(1.0, size, (factor, factor))(picture, rng(seed), [whole(index, row)])
        (across, _, left), (_, _, top) = picture.layers[1][0].matrix
        offset = ((factor * size[1] if across < 0 else 0) - left, -top)
        beyond = max(0, factor - 1) * np.array(size[::-1])
        np.testing.assert_array_equal(offset, np.clip(offset, -1e-9, beyond + 1e-9))
        layers.append(mixup_pixels(images[row], size, factor, across < 0, offset))
        added = mixup_boxes(index.annotations(row).boxes, images[row].shape, size, factor, across < 0, offset)
        kept = visible(added, size)
        boxes = np.concatenate((boxes, clip(added[kept], size)))
        labels = np.concatenate((labels, index.annotations(row).labels[kept]))
        assert_same(index, picture, layers, boxes, labels)
        picture = VerticalFlip(1.0)(HorizontalFlip(1.0)(picture, rng()), rng())
        boxes = np.tile(size[::-1], 2) - boxes[:, [2, 3, 0, 1]]
        assert_same(index, picture, [layer[::-1, ::-1] for layer in layers], boxes, labels)


# --- other random numbers: the same distribution ---


@pytest.fixture(scope="module")
def index(shared):
    root = shared / "data/coco_mini"
    return load_coco(root / "annotations/instances_train2017.json", root / "train2017")


def pictures(index, mixup=False, count=COUNT, **settings):
    settings = {"degrees": 10, "translate": 0.1, "scale": (0.1, 2.0), "shear": 2} | settings
    transforms = (Mosaic(1.0, Letterbox(INPUT)), RandomAffine(INPUT, **settings), Mixup(float(mixup), INPUT))
    samples = Samples(index, transforms, INPUT)
    chunks = [samples.rows(first, first + 64).tolist() for first in range(0, count, 64)]
    return [samples.plan(position, chunks[position // 64]) for position in range(count)]


def of_boxes(boxes):
    """Sizes, centres and number."""
    sides = boxes[:, 2:] - boxes[:, :2]
    return np.sqrt(sides.prod(1)), *(boxes[:, :2] + sides / 2).T, [len(boxes)]


def of_matrix(matrix):
    """Scale, direction, skew, and where the middle of the canvas goes."""
    across, down = np.arctan2(matrix[:, 1], matrix[:, 0])
    scale = np.sqrt(np.linalg.det(matrix[:, :2]))
    return [scale], [across], [down - across], *(matrix @ (INPUT[1], INPUT[0], 1)).reshape(2, 1)


def likelihood(measures, first, second, rounds=499):
    """How likely the difference of two sets of `COUNT` samples is by chance, in the measure in which it is least so.

    It is the share of random halves of all samples with histograms as different. Samples change sides whole: the
    objects of one are alike, and would seem more evidence counted one by one.
    """
    sides = np.tile(np.repeat(np.float32([1, -1]), COUNT), (rounds + 1, 1))
    sides[1:] = rng(0).permuted(sides[1:], axis=1)
    shares = []
    for values in zip(*map(measures, (*first, *second)), strict=True):
        edges = np.unique(np.quantile(np.concatenate(values), np.linspace(0, 1, 17)[1:-1]))
        bins = [np.bincount(np.searchsorted(edges, value), minlength=len(edges) + 1) for value in values]
        distance = ((sides @ np.array(bins, np.float32)) ** 2 / np.sum(bins, axis=0)).sum(1)
        shares.append((distance >= distance[0]).mean())
    return min(1.0, min(shares) * len(shares))  # of several measures one is more likely to be far off


@pytest.mark.parametrize("settings", [{}, {"mixup": True}, {"scale": (0.1, 0.5)}], ids=str)
def test_objects_are_distributed_as_in_the_textbook(index, settings):
    mine = [picture.boxes for picture in pictures(index, **settings)]
    assert likelihood(of_boxes, mine, textbook(index, 1, **settings)) > 0.01


@pytest.mark.parametrize("mistake", [{"centred": False}, {"clipped": False}, {"scale": (0.1, 0.45)}], ids=str)
def test_a_mistake_would_be_seen_in_the_objects(index, mistake):
    settings = {"scale": (0.1, 0.5)}  # so small that the canvas is seen to its edges
    assert likelihood(of_boxes, textbook(index, 2, **settings | mistake), textbook(index, 1, **settings)) < 0.01


@pytest.mark.parametrize(
    ("strengths", "alike"),
    [
        ((10, 0.1, (0.1, 2.0), 2), True),
        ((11, 0.1, (0.1, 2.0), 2), False),
        ((10, 0.11, (0.1, 2.0), 2), False),
        ((10, 0.1, (0.2, 2.0), 2), False),
        ((10, 0.1, (0.1, 2.0), 2.5), False),
    ],
)
def test_affine_maps_are_distributed_as_in_the_textbook(strengths, alike):
    move, canvas = RandomAffine(INPUT, *strengths), empty_canvas(INPUT)
    mine = [np.array(move(canvas, random).layers[0][0].matrix) for random in [rng(1)] * COUNT]
    theirs = [affine(random, INPUT) for random in [rng(2)] * COUNT]
    assert (likelihood(of_matrix, mine, theirs) > 0.01) == alike


def test_every_image_is_shown_as_often_as_any_other(index):
    """Once an epoch by its turn, and three times by chance."""
    size, epochs = len(index), 8
    shown = [tile.source for picture in pictures(index, count=epochs * size) for tile in picture.layers[0]]
    by_chance = np.bincount(shown, minlength=size) - epochs
    assert by_chance.mean() == 3 * epochs
    dispersion = ((by_chance - 3 * epochs) ** 2).sum() / (3 * epochs)  # chi square of size - 1 degrees of freedom
    assert abs(dispersion - size) < 4 * np.sqrt(2 * size)


@pytest.mark.parametrize("part", [(0, 64, 64), (5, 6, 1), (5, 21, 4), (17, 64, 64)])
def test_blocks_hold_the_plan_of_each_position_however_they_are_cut(shapes_index, part):
    size = (64, 96)
    transforms = (Mosaic(1.0, Letterbox(size)), RandomAffine(size, 10, 0.1, (0.1, 2.0), 2), Mixup(0.5, size))
    samples = Samples(shapes_index, transforms, size)
    rows = samples.rows(0, 64).tolist()  # more than an epoch
    made = [
        sample
        for block in samples.blocks(range(*part[:2]), part[2])
        for sample in block.drop_columns(["image"]).to_pylist()
    ]
    assert [sample["position"] for sample in made] == list(range(*part[:2]))
    for sample in made:
        planned = samples.plan(sample["position"], rows)
        boxes, labels = sanitise(planned.boxes, planned.labels, size)
        assert (sample["row"], sample["labels"]) == (rows[sample["position"]], labels.tolist())
        assert sample["boxes"] == boxes.tolist()
