"""Mosaic and mixup: transforms that make one picture of several images.

The others are whole images of the same chunk (`raydet.data.samples`), which are read and decoded for it anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import numpy as np

from raydet.boxes import clip
from raydet.data.transforms import Letterbox, Picture, scaling


class Composition(Protocol):
    """A transform that takes `partners` other images."""

    partners: ClassVar[int]

    def __call__(self, picture: Picture, rng: np.random.Generator, others: Sequence[Picture]) -> Picture:
        """Return the picture with the others; they are `Picture.of` whole images."""
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

    def __call__(self, picture: Picture, rng: np.random.Generator, others: Sequence[Picture]) -> Picture:
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
        return Picture(canvas, (tuple(tiles),), every[shown], labels[shown])


@dataclass(frozen=True)
class Mixup:
    """With probability `prob`, the mean of the picture and another image (YOLOX's form of Zhang et al., 2018).

    The other image is fitted into `size`, scaled by a factor from `scale`, mirrored in half of the cases, and cut out
    at random where it is larger; where it is smaller, it lies at the top left. See `Picture.visible` for its objects
    that are kept.
    """

    prob: float
    size: tuple[int, int]
    scale: tuple[float, float] = (0.5, 1.5)
    min_visible: float = 0.1
    min_side: float = 2.0
    max_aspect: float = 20.0
    partners: ClassVar[int] = 1

    def __call__(self, picture: Picture, rng: np.random.Generator, others: Sequence[Picture]) -> Picture:
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
