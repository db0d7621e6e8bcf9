"""The transforms of SSD (Liu et al., 2016), with which detection transformers are trained: zoom-out, crop, colours.

The numbers are those of torchvision's RandomZoomOut, RandomIoUCrop and RandomPhotometricDistort.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np

from raydet.boxes import clip
from raydet.data.transforms import Letterbox, SamplePlan, Tile, scaling

_LARGEST = 4.0  # side of the canvas of a zoom-out, in sides of the picture
_SMALLEST = 0.3  # side of a crop, in sides of the picture
_ASPECTS = (0.5, 2.0)  # width of a crop in shares of the picture's width, divided by its height likewise
_OVERLAPS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)  # of a crop with the object that it overlaps best; 1: no crop
_TRIALS = 40
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = (0.875, 1.125), (0.5, 1.5), (0.5, 1.5), 9  # the hue in units of 2 degrees


@dataclass(frozen=True)
class ZoomOut:
    """With probability `prob` put the picture at a random place of a grey canvas of up to four times its sides."""

    prob: float

    def __call__(self, picture: SamplePlan, rng: np.random.Generator) -> SamplePlan:
        drawn, factor, (across, down) = rng.random() < self.prob, rng.uniform(1.0, _LARGEST), rng.random(2).tolist()
        if not drawn:
            return picture
        height, width = picture.size
        size = int(height * factor), int(width * factor)
        return picture.moved(scaling(1.0, 1.0, int((size[1] - width) * across), int((size[0] - height) * down)), size)


@dataclass(frozen=True)
class IoUCrop:
    """With probability `prob` cut out a part of the picture that overlaps an object by at least a random share.

    Objects whose centre lies in the part are kept, clipped to it. Where no such part is found, another share is drawn,
    one of which leaves the picture as it is.
    """

    prob: float

    def __call__(self, picture: SamplePlan, rng: np.random.Generator) -> SamplePlan:
        if rng.random() >= self.prob or not len(picture.boxes):
            return picture
        height, width = picture.size
        centres = (picture.boxes[:, :2] + picture.boxes[:, 2:]) / 2
        while (least := rng.choice(_OVERLAPS)) < 1:
            for _ in range(_TRIALS):
                share_x, share_y = rng.uniform(_SMALLEST, 1.0, 2).tolist()
                across, down = rng.random(2).tolist()
                wide, high = int(width * share_x), int(height * share_y)
                if not wide or not high or not _ASPECTS[0] <= share_x / share_y <= _ASPECTS[1]:
                    continue
                left, top = int((width - wide) * across), int((height - high) * down)
                within = ((centres > (left, top)) & (centres < (left + wide, top + high))).all(1)
                moved = picture.boxes[within] - (left, top, left, top)
                if within.any() and _overlap(moved, wide, high).max() >= least:
                    return _cut(picture, left, top, (high, wide), within)
        return picture


def _overlap(boxes: Any, width: float, height: float) -> Any:
    """Return the IoU of boxes [n, 4] with a picture of a size."""
    shown, whole = ((part[:, 2:] - part[:, :2]).prod(1) for part in (clip(boxes, width, height), boxes))
    return shown / (whole + width * height - shown)


def _cut(picture: SamplePlan, left: int, top: int, size: tuple[int, int], kept: Any) -> SamplePlan:
    """Return a part of a picture whose tiles are only scaled, mirrored or turned by right angles."""
    moved = picture.moved(scaling(1.0, 1.0, -left, -top), size)
    layers = tuple(tuple(_within(tile, size) for tile in layer) for layer in moved.layers)
    boxes = clip(moved.boxes[kept], size[1], size[0])
    return replace(moved, layers=layers, boxes=boxes, labels=moved.labels[kept])


def _within(tile: Tile, size: tuple[int, int]) -> Tile:
    """Return a tile that shows no more than lies on a canvas: the rest must not come back beside it."""
    (a, b, x), (c, d, y) = tile.matrix
    corners = np.array(((0.0, 0.0), (size[1], size[0]))) - (x, y)
    source = corners @ np.linalg.inv(np.array(((a, b), (c, d)))).T
    low, high = source.min(0), source.max(0)
    first_x, first_y, last_x, last_y = tile.window
    window = (max(first_x, low[0]), max(first_y, low[1]), min(last_x, high[0]), min(last_y, high[1]))
    return tile._replace(window=tuple(map(float, window)))  # type: ignore[arg-type]


@dataclass(frozen=True)
class ZoomedLetterbox(Letterbox):
    """A zoom-out and a crop, each with its probability, then the letterbox."""

    zoom_out: float = 0.0
    iou_crop: float = 0.0

    def __call__(self, picture: SamplePlan, rng: np.random.Generator) -> SamplePlan:
        return super().__call__(IoUCrop(self.iou_crop)(ZoomOut(self.zoom_out)(picture, rng), rng), rng)


@dataclass(frozen=True)
class PhotometricDistort:
    """Change brightness, contrast, saturation, hue and the order of the channels, each with probability `prob`."""

    prob: float

    def __call__(self, picture: SamplePlan, rng: np.random.Generator) -> SamplePlan:
        changes = (rng.random(5) < self.prob).tolist()
        brightness, contrast, saturation = (rng.uniform(*limits) for limits in (_BRIGHTNESS, _CONTRAST, _SATURATION))
        hue, early, order = int(rng.integers(-_HUE, _HUE + 1)), bool(rng.random() < 0.5), rng.permutation(3).tolist()
        if not any(changes):
            return picture
        change = Colours(
            brightness if changes[0] else 1.0,
            contrast if changes[1] else 1.0,
            saturation if changes[2] else 1.0,
            hue if changes[3] else 0,
            tuple(order) if changes[4] else (0, 1, 2),
            early,
        )
        return replace(picture, colours=(*picture.colours, change))


@dataclass(frozen=True)
class Colours:
    """Change the colours of an image.

    Attributes:
        brightness: factor on the pixels.
        contrast: factor on their distance from the mean grey of the image.
        saturation: factor on their distance from their own grey.
        hue: shift, in units of 2 degrees.
        order: channel that comes first, second and third.
        early: the contrast changes before saturation and hue, not after them.
    """

    brightness: float
    contrast: float
    saturation: float
    hue: int
    order: tuple[int, ...]
    early: bool

    def __call__(self, image: Any, out: Any) -> None:
        changed = np.ascontiguousarray(image[..., :3])
        if self.brightness != 1:
            changed = cv2.convertScaleAbs(changed, alpha=self.brightness)
        if self.early:
            changed = self._contrasted(changed)
        if self.saturation != 1:
            grey = cv2.cvtColor(cv2.cvtColor(changed, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
            changed = cv2.addWeighted(changed, self.saturation, grey, 1 - self.saturation, 0)
        if self.hue:
            hsv = cv2.cvtColor(changed, cv2.COLOR_BGR2HSV)
            hsv[..., 0] = (hsv[..., 0].astype(np.int16) + self.hue) % 180
            changed = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
        if not self.early:
            changed = self._contrasted(changed)
        np.copyto(out, changed[..., list(self.order)])

    def _contrasted(self, image: Any) -> Any:
        if self.contrast == 1:
            return image
        mean = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY).mean()
        table = (np.arange(256) * self.contrast + mean * (1 - self.contrast)).round().clip(0, 255).astype(np.uint8)
        return cv2.LUT(image, table)
