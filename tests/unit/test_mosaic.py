"""Mosaic, affine and mixup against the textbook, which is spelt out here: whole images pasted on a canvas of twice the
size about a random point, one warp of it, partners from the whole data set. Sizes are (height, width)."""

from dataclasses import replace
from itertools import pairwise

import cv2
import numpy as np
import pytest

from raydet.data.coco import load_coco
from raydet.data.index import make_index
from raydet.data.mosaic import Mixup, Mosaic
from raydet.data.render import Renderer, Sources
from raydet.data.samples import Samples
from raydet.data.transforms import HorizontalFlip, Letterbox, Picture, RandomAffine, VerticalFlip

GREY = 114
INPUT = (512, 640)
COUNT = 2000
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
    # Of an object beyond the canvas the clip leaves a line, which has a hull again when it is turned: YOLOX keeps these.
    return canvas, (canvas[:, 2:] > canvas[:, :2]).all(1)


def affine(random, size, scale=(0.1, 2.0), translate=0.1, centred=True):
    """M = T · Shear · R · C from the canvas of twice the size, at 10 degrees of rotation and 2 of shear."""
    height, width = size
    centre, shear, shift = np.eye(3), np.eye(3), np.eye(3)
    centre[:2, 2] = (-width, -height) if centred else (-width / 2, -height / 2)
    rotation = np.vstack((cv2.getRotationMatrix2D((0, 0), random.uniform(-10, 10), random.uniform(*scale)), (0, 0, 1)))
    shear[[0, 1], [1, 0]] = np.tan(np.radians(random.uniform(-2, 2, 2)))
    shift[:2, 2] = random.uniform(0.5 - translate, 0.5 + translate, 2) * (width, height)
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


def mixup_pixels(image, other, factor, mirror, offset):
    size = image.shape[:2]
    boxed, padded = np.full_like(image, GREY), np.full_like(image, GREY)
    _, width, height = fit(other.shape, size)
    boxed[:height, :width] = cv2.resize(other, (width, height))
    boxed = cv2.resize(boxed, (int(size[1] * factor), int(size[0] * factor)))[:, :: -1 if mirror else 1]
    x, y = offset
    cut = boxed[y : y + size[0], x : x + size[1]]
    padded[: cut.shape[0], : cut.shape[1]] = cut
    return image / 2 + padded / 2


def mixup_boxes(boxes, shape, size, factor, mirror, offset):
    boxes = boxes * fit(shape, size)[0] * factor
    if mirror:
        boxes = np.array([0, 0, size[1] * factor, 0])[[2, 1, 2, 1]] + boxes[:, [2, 1, 0, 3]] * (-1, 1, -1, 1)
    return boxes - np.tile(offset, 2)


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
    images = []
    for red, (height, width) in zip((10, 50, 90, 140, 180, 220), shapes, strict=True):
        blue, green = np.meshgrid(np.linspace(20, 235, width), np.linspace(20, 235, height))
        images.append(np.stack((blue, green, np.full_like(blue, red)), axis=2).round().astype(np.uint8))
        cv2.imwrite(str(folder / f"{red}.png"), images[-1])
    shares = rng(0).uniform(size=(len(shapes), 20, 2, 2))
    corners = np.sort(shares, axis=2) * np.array([shape[::-1] for shape in shapes])[:, None, None]
    count = len(shapes) * 20
    index = make_index(
        [(i, f"{image[0, 0, 2]}.png", *image.shape[1::-1]) for i, image in enumerate(images)],
        corners.reshape(-1, 4),
        np.arange(count),
        np.zeros(count, int),
        np.zeros(count),
        np.arange(count) // 20,
        root=str(folder),
        class_names=[str(i) for i in range(count)],
        category_ids=range(count),
    )
    return index, images


def whole(index, row):
    objects = index.annotations(row)
    return Picture.of(row, *index.size(row), objects.boxes, objects.labels)


def render(index, picture):
    out = np.empty((*picture.size, 3), np.uint8)
    Renderer(picture.size)(picture, Sources(index, [picture], [picture]), out)
    return out


def assert_same(index, picture, pixels, boxes, labels):
    np.testing.assert_array_equal(picture.labels, labels)
    np.testing.assert_allclose(picture.boxes, boxes, atol=1e-6)
    red = np.ascontiguousarray(pixels[..., 2]).astype(np.uint8)
    smooth = cv2.morphologyEx(red, cv2.MORPH_GRADIENT, np.ones((5, 5))) <= 3  # two pixels from all seams
    smooth[:2] = smooth[-2:] = smooth[:, :2] = smooth[:, -2:] = False  # a seam may lie just outside
    difference = np.abs(render(index, picture) - pixels.astype(float)).max(2)[smooth]
    # Resampling once or twice differs by so many grey levels; a shift by a quarter of a pixel by more.
    assert difference.max(initial=0) <= 8
    assert difference.mean() <= 0.75


def composed(gallery, size, seed):
    """raydet's picture of a mosaic under an affine map, and the textbook's pixels, boxes and labels by its numbers."""
    index, images = gallery
    random, move = rng(seed), RandomAffine(size, 10, 0.1, (0.1, 2.0), 2)
    rows = random.permutation(len(images))[:4].tolist()  # no two alike, or their seam is not seen
    first, *others = (whole(index, row) for row in rows)
    picture = Mosaic(1.0, Letterbox(size))(first, random, others)
    point = [int(shift) for *_, shift in picture.layers[0][3].matrix]
    canvas = Picture.of(0, 2 * size[1], 2 * size[0], np.empty((0, 4)), np.empty(0, int))
    matrix = np.array(move(canvas, rng(seed)).layers[0][0].matrix)
    parts = [index.annotations(row) for row in rows]
    boxes, shown = mosaic_boxes([images[row].shape for row in rows], [part.boxes for part in parts], point, size)
    boxes = warp_boxes(boxes, matrix)
    shown &= visible(boxes, size)
    pixels = warp_pixels(mosaic_pixels([images[row] for row in rows], point, size), matrix, size)
    labels = np.concatenate([part.labels for part in parts])
    return move(picture, rng(seed)), pixels, clip(boxes[shown], size), labels[shown]


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (64, 64)])
def test_mosaic_and_affine_are_the_warp_of_the_canvas(gallery, size):
    for seed in range(100):
        assert_same(gallery[0], *composed(gallery, size, seed))


@pytest.mark.parametrize("factor", [0.5, 0.75, 1.0, 1.25, 1.5])
@pytest.mark.parametrize("size", [(64, 96), (96, 64)])
def test_mixup_and_flips_follow(gallery, size, factor):
    index, images = gallery
    for seed in range(30):
        picture, pixels, boxes, labels = composed(gallery, size, seed)
        row = seed % len(images)
        picture = Mixup(1.0, size, (factor, factor))(picture, rng(seed), [whole(index, row)])
        (across, _, left), (_, _, top) = picture.layers[1][0].matrix
        offset = ((factor * size[1] if across < 0 else 0) - left, -top)
        added = mixup_boxes(index.annotations(row).boxes, images[row].shape, size, factor, across < 0, offset)
        kept = visible(added, size)
        pixels = mixup_pixels(pixels, images[row], factor, across < 0, [round(part) for part in offset])
        boxes = np.concatenate((boxes, clip(added[kept], size)))
        labels = np.concatenate((labels, index.annotations(row).labels[kept]))
        assert_same(index, picture, pixels, boxes, labels)
        picture = VerticalFlip(1.0)(HorizontalFlip(1.0)(picture, rng()), rng())
        boxes = np.tile(size[::-1], 2) - boxes[:, [2, 3, 0, 1]]
        assert_same(index, picture, pixels[::-1, ::-1], boxes, labels)


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


MEASURES = {
    "size": lambda boxes: np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(1)),
    "x": lambda boxes: boxes[:, [0, 2]].mean(1),
    "y": lambda boxes: boxes[:, [1, 3]].mean(1),
    "objects": lambda boxes: np.array([len(boxes)]),
}


def likelihoods(first, second, rounds=999):
    """By measure: how often two random halves of all samples have histograms as different as those of the two sets.

    Samples change sides whole, since the objects of one are alike: counted one by one they would seem more evidence.
    """
    halves = rng(0).permuted(np.tile(np.repeat([1, -1], COUNT), (rounds + 1, 1)), axis=1)
    halves[0] = np.repeat([1, -1], COUNT)
    result = {}
    for name, measure in MEASURES.items():
        values = [measure(boxes) for boxes in (*first, *second)]
        edges = np.unique(np.quantile(np.concatenate(values), np.linspace(0, 1, 17)[1:-1]))
        bins = [np.bincount(np.searchsorted(edges, value), minlength=len(edges) + 1) for value in values]
        distance = ((halves @ np.array(bins)) ** 2 / np.sum(bins, axis=0)).sum(1)
        result[name] = (distance >= distance[0]).mean()
    return result


@pytest.mark.parametrize("mixup", [False, True])
def test_objects_are_distributed_as_in_the_textbook(index, mixup):
    mine = [picture.boxes for picture in pictures(index, mixup)]
    assert min(likelihoods(mine, textbook(index, 1, mixup)).values()) > 0.05 / len(MEASURES)


@pytest.mark.parametrize(
    "mistake", [{"scale": (0.1, 1.8)}, {"translate": 0.2}, {"centred": False}, {"clipped": False}], ids=str
)
def test_a_mistake_in_the_geometry_would_be_seen(index, mistake):
    assert min(likelihoods(textbook(index, 1, **mistake), textbook(index, 2)).values()) < 0.005


def test_every_image_is_shown_as_often_as_any_other(index):
    """Once an epoch by its turn, and three times by chance."""
    size, epochs = len(index), 8
    shown = [tile.source for picture in pictures(index, count=epochs * size) for tile in picture.layers[0]]
    by_chance = np.bincount(shown, minlength=size) - epochs
    assert by_chance.mean() == 3 * epochs
    dispersion = ((by_chance - 3 * epochs) ** 2).sum() / (3 * epochs)  # chi square of size - 1 degrees of freedom
    assert abs(dispersion - size) < 4 * np.sqrt(2 * size)
