"""Transforms: small classes that take a sample and a random generator, and return the sample changed.

Images are uint8 [H, W, 3] in BGR, boxes float32 [n, 4] xyxy in pixels of that image. A transform draws all its random
numbers from the generator it is given, so that a sample depends on its seed alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import cv2
import numpy as np
import numpy.typing as npt

from raydet.boxes import Resize, clip, place

PAD_VALUE = 114  # grey, the padding that YOLOX was trained with
MIN_BOX_SIDE = 1.0  # pixels; what is thinner after a transform is no object to learn from


@dataclass(frozen=True)
class Sample:
    """An image with its objects: uint8 [H, W, 3] BGR, boxes float32 [n, 4] xyxy in its pixels, labels int32 [n]."""

    image: npt.NDArray[np.uint8]
    boxes: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int32]


class Transform(Protocol):
    """What the stream calls: a sample and a generator in, a sample out."""

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Return the sample transformed; the one that came in stays as it was."""
        ...


@dataclass(frozen=True)
class Fit:
    """Scale to what `raydet.boxes.place` says for an input of `size` = (height, width)."""

    size: tuple[int, int]
    resize: Resize = "pad_bottom_right"

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        height, width = sample.image.shape[:2]
        to = place(width, height, self.size, self.resize)
        image: Any = cv2.resize(sample.image, (to.width, to.height), interpolation=cv2.INTER_LINEAR)
        return replace(sample, image=image, boxes=sample.boxes * np.asarray(to.scale * 2, np.float32))


@dataclass(frozen=True)
class Pad:
    """Pad a fitted image to `size` = (height, width), at the bottom and the right or all around."""

    size: tuple[int, int]
    resize: Resize = "pad_bottom_right"
    value: int = PAD_VALUE

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        height, width = sample.image.shape[:2]
        top, left = 0, 0
        if self.resize == "pad_centre":
            top, left = (self.size[0] - height) // 2, (self.size[1] - width) // 2
        canvas = np.full((*self.size, 3), self.value, np.uint8)
        canvas[top : top + height, left : left + width] = sample.image
        boxes = sample.boxes + np.asarray((left, top) * 2, np.float32)
        return replace(sample, image=canvas, boxes=boxes)


@dataclass(frozen=True)
class HorizontalFlip:
    """Mirror left and right with probability `prob`."""

    prob: float

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        if rng.random() >= self.prob:
            return sample
        width = sample.image.shape[1]
        boxes = sample.boxes.copy()
        boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
        image: Any = cv2.flip(sample.image, 1)
        return replace(sample, image=image, boxes=boxes)


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

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        drawn = rng.random() < self.prob
        limits = np.array([self.hue, self.saturation, self.value])
        shifts = (rng.uniform(-1, 1, 3) * limits).astype(int) * rng.integers(0, 2, 3)
        if not drawn or not shifts.any():
            return sample
        levels = np.arange(256)
        table = np.stack(
            [(levels + shifts[0]) % 180, (levels + shifts[1]).clip(0, 255), (levels + shifts[2]).clip(0, 255)], axis=-1
        ).astype(np.uint8)
        hsv = cv2.cvtColor(sample.image, cv2.COLOR_BGR2HSV)
        image: Any = cv2.cvtColor(cv2.LUT(hsv, table[None]), cv2.COLOR_HSV2BGR)
        return replace(sample, image=image)


def sanitise(sample: Sample) -> Sample:
    """Clip boxes to the image and drop those with a side below `MIN_BOX_SIDE` or labels without a box to learn."""
    height, width = sample.image.shape[:2]
    boxes = clip(sample.boxes, width, height)
    keep = (boxes[:, 2:] - boxes[:, :2] >= MIN_BOX_SIDE).all(1)
    return replace(sample, boxes=boxes[keep], labels=sample.labels[keep])
