"""Transforms: small classes that take the plan of a sample and a random generator, and return the plan changed.

A `SamplePlan` has no pixels. It says which parts of which source images lie where, and which boxes are on them. A
geometric transform only multiplies matrices, so that mosaic, affine, mixup, flips and letterbox together cost one
resampling of each source image (`raydet.data.render`), and boxes follow the same matrices as the pixels. A transform of
the user's own gets a `Sample`, which has pixels.

Coordinates are those of pixel edges: pixel i spans i … i + 1. All random numbers are drawn from the generator that a
transform is given, so that a sample depends on its seed alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Protocol

import cv2
import numpy as np
import numpy.typing as npt

from raydet.boxes import Resize, clip, place

Array = npt.NDArray[Any]
Row = tuple[float, float, float]
Matrix = tuple[Row, Row]  # an affine map: x' = m[0] · (x, y, 1), y' = m[1] · (x, y, 1)

PAD_VALUE = 114  # grey, the padding that YOLOX was trained with
_STRIP = 64  # rows of pixels whose colours change at a time
MIN_BOX_SIDE = 1.0  # pixels; what is thinner after all transforms is no object to learn from


@dataclass(frozen=True)
class Sample:
    """An image with its objects: uint8 [H, W, 3] BGR, boxes float32 [n, 4] xyxy in its pixels, labels int32 [n]."""

    image: Array
    boxes: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int32]


class SampleTransform(Protocol):
    """What a user's own transform is, as `module:Class` in `augment.transforms`."""

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Return the sample transformed; the image keeps its size."""
        ...


class PixelTransform(Protocol):
    """A change of colours."""

    def __call__(self, image: Array, out: Array) -> None:
        """Write an image [H, W, 3 or 4] BGR or BGRA, changed, to `out` [H, W, 3] BGR, which may be the same memory."""
        ...


class Tile(NamedTuple):
    """A part of a source image in a picture.

    Attributes:
        source: row of the image in the index.
        matrix: transform from source pixels to picture pixels.
        window: the part that shows, xyxy in source pixels.
    """

    source: int
    matrix: Matrix
    window: tuple[float, float, float, float]


@dataclass(frozen=True)
class SamplePlan:
    """What a sample will show.

    Attributes:
        size: (height, width) in pixels.
        layers: each a canvas of grey with tiles painted on in turn; the picture is their mean.
        boxes: float64 [n, 4] xyxy in its pixels.
        labels: int32 [n] classes.
        colours: changes of the finished pixels, applied in turn.
    """

    size: tuple[int, int]
    layers: tuple[tuple[Tile, ...], ...]
    boxes: npt.NDArray[np.float64]
    labels: npt.NDArray[np.int32]
    colours: tuple[PixelTransform, ...] = ()

    @staticmethod
    def of(source: int, width: int, height: int, boxes: Array, labels: Array) -> SamplePlan:
        """Return a whole source image as it is."""
        whole = Tile(source, scaling(1.0, 1.0), (0.0, 0.0, float(width), float(height)))
        return SamplePlan((height, width), ((whole,),), boxes, labels)

    def moved(self, matrix: Matrix, size: tuple[int, int]) -> SamplePlan:
        """Return the picture under an affine map, on a canvas of `size`; boxes become hulls, not clipped."""
        layers = tuple(
            tuple(Tile(source, _after(matrix, first), window) for source, first, window in layer)
            for layer in self.layers
        )
        return SamplePlan(size, layers, _hulls(self.boxes, matrix), self.labels, self.colours)

    def visible(self, min_visible: float, min_side: float, max_aspect: float) -> SamplePlan:
        """Return the picture with its boxes clipped, and only those of which enough is left.

        Args:
            min_visible: fraction of a box's area of which more must be left.
            min_side: pixels that both sides must be longer than.
            max_aspect: aspect ratio that a box must be below.
        """
        boxes = clip(self.boxes, self.size[1], self.size[0])
        whole, sides = self.boxes[:, 2:] - self.boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
        keep = (sides > min_side).all(1)
        keep &= sides.prod(1) > min_visible * whole.prod(1)
        keep &= sides.max(1, initial=0) < max_aspect * sides.min(1, initial=np.inf)
        return replace(self, boxes=boxes[keep], labels=self.labels[keep])


def _after(second: Matrix, first: Matrix) -> Matrix:
    (a, b, x), (c, d, y) = second
    (e, f, u), (g, h, v) = first
    return (
        (a * e + b * g, a * f + b * h, a * u + b * v + x),
        (c * e + d * g, c * f + d * h, c * u + d * v + y),
    )


def _hulls(boxes: Array, matrix: Matrix) -> Array:
    """Boxes [n, 4] under an affine map: their centres move with it, their half sides with its absolute values."""
    if not len(boxes):
        return boxes
    (a, b, x), (c, d, y) = matrix
    if not b and not c and a > 0 and d > 0:
        return boxes * (a, d, a, d) + (x, y, x, y)
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 @ ((a, c), (b, d)) + (x, y)
    half = (boxes[:, 2:] - boxes[:, :2]) / 2 @ ((abs(a), abs(c)), (abs(b), abs(d)))
    return np.concatenate((centre - half, centre + half), axis=1)


class Transform(Protocol):
    """What plans a picture: one in, one out."""

    def __call__(self, picture: SamplePlan, rng: np.random.Generator) -> SamplePlan:
        """Return the picture transformed; the one that came in stays as it was."""
        ...


def scaling(across: float, down: float, left: float = 0.0, top: float = 0.0) -> Matrix:
    """Return the map that scales, then shifts."""
    return (across, 0.0, left), (0.0, down, top)


@dataclass(frozen=True)
class Letterbox:
    """Fit a picture into `size` = (height, width), rounded and placed as `raydet.boxes.place` says."""

    size: tuple[int, int]
    resize: Resize = "pad_bottom_right"

    def __call__(self, picture: SamplePlan, rng: np.random.Generator) -> SamplePlan:
        height, width = picture.size
        to = place(width, height, self.size, self.resize)
        return picture.moved(scaling(to.width / width, to.height / height, to.left, to.top), self.size)


@dataclass(frozen=True)
class RandomAffine:
    """Rotate, scale, shear and shift about the centre, onto a canvas of `size` = (height, width).

    The order is SuperGradients': centre, then rotation and scale, shear, translation. See `SamplePlan.visible` for the
    objects that are kept.

    Args:
        size: (height, width) of the result in pixels; the middle of what came in goes to its middle.
        degrees: largest rotation either way.
        translate: largest shift either way, as a fraction of the result's sides.
        scale: lowest and highest scale factor.
        shear: largest shear either way, in degrees.
        min_visible: fraction of an object's area of which more must be left.
        min_side: pixels that both sides of an object must be longer than.
        max_aspect: aspect ratio that an object must be below.
    """

    size: tuple[int, int]
    degrees: float = 0.0
    translate: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    shear: float = 0.0
    min_visible: float = 0.1
    min_side: float = 2.0
    max_aspect: float = 20.0

    def __call__(self, picture: SamplePlan, rng: np.random.Generator) -> SamplePlan:
        angle, shear_x, shear_y, shift_x, shift_y = rng.uniform(-1, 1, 5).tolist()
        factor = rng.uniform(*self.scale)
        turn = math.radians(angle * self.degrees)
        a, b = factor * math.cos(turn), factor * math.sin(turn)
        tan_x, tan_y = (math.tan(math.radians(part * self.shear)) for part in (shear_x, shear_y))
        (height, width), (from_height, from_width) = self.size, picture.size
        centre = scaling(1.0, 1.0, -from_width / 2, -from_height / 2)
        rotation = (a, b, 0.0), (-b, a, 0.0)
        x, y = (0.5 + shift_x * self.translate) * width, (0.5 + shift_y * self.translate) * height
        shear = (1.0, tan_x, x), (tan_y, 1.0, y)
        moved = picture.moved(_after(shear, _after(rotation, centre)), self.size)
        return moved.visible(self.min_visible, self.min_side, self.max_aspect)


@dataclass(frozen=True)
class HorizontalFlip:
    """Mirror left and right with probability `prob`."""

    prob: float

    def __call__(self, picture: SamplePlan, rng: np.random.Generator) -> SamplePlan:
        if rng.random() >= self.prob:
            return picture
        return picture.moved(scaling(-1, 1, left=picture.size[1]), picture.size)


@dataclass(frozen=True)
class VerticalFlip:
    """Mirror top and bottom with probability `prob`."""

    prob: float

    def __call__(self, picture: SamplePlan, rng: np.random.Generator) -> SamplePlan:
        if rng.random() >= self.prob:
            return picture
        return picture.moved(scaling(1, -1, top=picture.size[0]), picture.size)


@dataclass(frozen=True)
class Rotate90:
    """With probability `prob` turn by 90, 180 or 270 degrees, each as likely."""

    prob: float

    def __call__(self, picture: SamplePlan, rng: np.random.Generator) -> SamplePlan:
        drawn, quarters = rng.random() < self.prob, rng.integers(1, 4)
        if not drawn:
            return picture
        for _ in range(quarters):  # anticlockwise
            height, width = picture.size
            picture = picture.moved(((0.0, 1.0, 0.0), (-1.0, 0.0, width)), (width, height))
        return picture


@dataclass(frozen=True)
class HSV:
    """Shift hue, saturation and value with probability `prob`; each of the three shifts in half of these cases.

    Shifts are uniform whole numbers up to the given limits, on OpenCV's 8-bit scales: hue of 0 … 179 (2 degrees each,
    it wraps), saturation and value of 0 … 255 (they saturate).
    """

    prob: float
    hue: int
    saturation: int
    value: int

    def __call__(self, picture: SamplePlan, rng: np.random.Generator) -> SamplePlan:
        drawn = rng.random() < self.prob
        limits = np.array([self.hue, self.saturation, self.value])
        shifts = (rng.uniform(-1, 1, 3) * limits).astype(int) * rng.integers(0, 2, 3)
        if not drawn or not shifts.any():
            return picture
        return replace(picture, colours=(*picture.colours, ShiftHSV(*shifts.tolist())))


@dataclass(frozen=True)
class ShiftHSV:
    """Add to hue, saturation and value, on the scales of `HSV`."""

    hue: int
    saturation: int
    value: int

    def __call__(self, image: Any, out: Any) -> None:
        # OpenCV's addition saturates, which hue must not: it wraps in the way back from 8 bits, so that it only must
        # stay within 0 … 255. With blue and red swapped hue runs backwards, and a fall becomes a rise.
        swap = self.hue < 0
        to, back = (cv2.COLOR_RGB2HSV, cv2.COLOR_HSV2RGB) if swap else (cv2.COLOR_BGR2HSV, cv2.COLOR_HSV2BGR)
        height, width = image.shape[:2]
        # By the strip, which stays in the processor's cache: twice as fast. An image of changes is added three times
        # faster than a number a channel.
        strip = np.empty((min(height, _STRIP), width, 3), np.uint8)
        row = np.tile(np.array((abs(self.hue), self.saturation, self.value)), width)
        changes = [
            (np.repeat(change.astype(np.uint8)[None], len(strip), axis=0), apply)
            for change, apply in ((row.clip(min=0), cv2.add), ((-row).clip(min=0), cv2.subtract))
            if change.any()
        ]
        for top in range(0, height, _STRIP):
            part = slice(top, top + _STRIP)
            hsv = strip[: height - top]
            cv2.cvtColor(image[part], to, dst=hsv)
            rows = hsv.reshape(len(hsv), -1)
            for change, apply in changes:
                apply(rows, change[: len(rows)], dst=rows)
            cv2.cvtColor(hsv, back, dst=out[part])


@dataclass(frozen=True)
class ChannelSwap:
    """Exchange blue and red with probability `prob`."""

    prob: float

    def __call__(self, picture: SamplePlan, rng: np.random.Generator) -> SamplePlan:
        if rng.random() >= self.prob:
            return picture
        return replace(picture, colours=(*picture.colours, _swap_channels))


def _swap_channels(image: Any, out: Any) -> None:
    cv2.cvtColor(image, cv2.COLOR_BGRA2RGB if image.shape[2] == 4 else cv2.COLOR_BGR2RGB, dst=out)


@dataclass(frozen=True)
class Standardize:
    """Divide pixels by `max_value`: float32 images."""

    max_value: float = 255.0

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return replace(sample, image=sample.image.astype(np.float32) / np.float32(self.max_value))


@dataclass(frozen=True)
class Normalize:
    """(pixel - mean) / std, each of three in the order of the channels: float32 images."""

    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        image = (sample.image - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return replace(sample, image=image)


def sanitise(boxes: Array, labels: Array, size: tuple[int, int]) -> tuple[Array, Array]:
    """Clip boxes to an image of `size` = (height, width); drop those with a side below `MIN_BOX_SIDE`."""
    boxes = clip(boxes, size[1], size[0]).astype(np.float32)
    keep = (boxes[:, 2:] - boxes[:, :2] >= MIN_BOX_SIDE).all(1)
    return boxes[keep], labels[keep].astype(np.int32)


class Composition(Protocol):
    """A transform that takes `partners` other images."""

    partners: ClassVar[int]

    def __call__(self, picture: SamplePlan, rng: np.random.Generator, others: Sequence[SamplePlan]) -> SamplePlan:
        """Return the picture with the others; they are `SamplePlan.of` whole images."""
        ...


@dataclass(frozen=True)
class Mosaic:
    """With probability `prob`, four images that meet at a random point of a canvas of twice the size (Bochkovskiy et
    al., 2020); otherwise the one image, letterboxed.

    Each image is scaled to fit `alone.size`; `RandomAffine` after it cuts the result out of the canvas.
    """

    prob: float
    alone: Letterbox
    partners: ClassVar[int] = 3

    def __call__(self, picture: SamplePlan, rng: np.random.Generator, others: Sequence[SamplePlan]) -> SamplePlan:
        if rng.random() >= self.prob:
            return self.alone(picture, rng)
        height, width = self.alone.size
        canvas = (2 * height, 2 * width)
        x, y = int(rng.uniform(0.5, 1.5) * width), int(rng.uniform(0.5, 1.5) * height)
        tiles, boxes = [], []
        for number, part in enumerate((picture, *others)):
            scale = min(height / part.size[0], width / part.size[1])
            left = x if number % 2 else x - part.size[1] * scale
            top = y if number >= 2 else y - part.size[0] * scale
            placed = part.moved(scaling(scale, scale, left, top), canvas)
            tile = placed.layers[0][0]
            # What the canvas cuts off must not come back when it is turned or shrunk.
            first_x, first_y = max(0.0, -left / scale), max(0.0, -top / scale)
            last_x, last_y = (canvas[1] - left) / scale, (canvas[0] - top) / scale
            window = (first_x, first_y, min(last_x, tile.window[2]), min(last_y, tile.window[3]))
            tiles.append(tile._replace(window=window))
            boxes.append(clip(placed.boxes, canvas[1], canvas[0]))
        every, labels = np.concatenate(boxes), np.concatenate([part.labels for part in (picture, *others)])
        shown = (every[:, 2:] > every[:, :2]).all(1)
        return SamplePlan(canvas, (tuple(tiles),), every[shown], labels[shown])


@dataclass(frozen=True)
class Mixup:
    """With probability `prob`, the mean of the picture and another image (YOLOX's form of Zhang et al., 2018).

    The other image is fitted into `size`, scaled by a factor from `scale`, mirrored in half of the cases, and cut out
    at random where it is larger; where it is smaller, it lies at the top left. See `SamplePlan.visible` for its objects
    that are kept.
    """

    prob: float
    size: tuple[int, int]
    scale: tuple[float, float] = (0.5, 1.5)
    min_visible: float = 0.1
    min_side: float = 2.0
    max_aspect: float = 20.0
    partners: ClassVar[int] = 1

    def __call__(self, picture: SamplePlan, rng: np.random.Generator, others: Sequence[SamplePlan]) -> SamplePlan:
        drawn, factor, mirror = rng.random() < self.prob, rng.uniform(*self.scale), rng.random() < 0.5
        across, down = rng.random(2).tolist()
        if not drawn:
            return picture
        (height, width), (other,) = self.size, others
        scale = factor * min(height / other.size[0], width / other.size[1])
        beyond = max(0.0, factor - 1)
        left, top = -across * beyond * width, -down * beyond * height
        if mirror:
            placed = other.moved(scaling(-scale, scale, left + factor * width, top), self.size)
        else:
            placed = other.moved(scaling(scale, scale, left, top), self.size)
        placed = placed.visible(self.min_visible, self.min_side, self.max_aspect)
        return replace(
            picture,
            layers=picture.layers + placed.layers,
            boxes=np.concatenate((picture.boxes, placed.boxes)),
            labels=np.concatenate((picture.labels, placed.labels)),
        )
