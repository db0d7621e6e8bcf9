"""Pictures with boxes."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.uint8]

_FAR = 1_000_000  # pixels; OpenCV takes neither infinities nor more than 32 bits


def class_colour(label: int) -> tuple[int, int, int]:
    """Return a class's colour in BGR: neighbours in number are far apart in hue."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1.0, 0.85, 0.95)
    return int(255 * blue), int(255 * green), int(255 * red)


def draw_boxes(
    image: Image,
    boxes: npt.NDArray[Any],
    labels: Sequence[int],
    class_names: Sequence[str],
    scores: Sequence[float] | None = None,
) -> Image:
    """Return a copy of an image with boxes, class names and scores on it.

    Args:
        image: uint8 [H, W, 3] BGR.
        boxes: [n, 4] xyxy in its pixels; drawn from the last to the first, so that the first lie on top.
        labels: [n] classes.
        class_names: name of each class.
        scores: [n]; None for ground truth.
    """
    image = image.copy()
    height, width = image.shape[:2]
    size = max(0.35, min(height, width) / 1000)
    line = max(1, round(min(height, width) / 350))
    edges = np.nan_to_num(boxes).clip(-_FAR, _FAR).round().astype(int).tolist()
    for number in reversed(range(len(labels))):
        left, top, right, bottom = edges[number]
        colour = class_colour(labels[number])
        cv2.rectangle(image, (left, top), (right, bottom), colour, line)
        text = class_names[labels[number]] + (f" {scores[number]:.2f}" if scores is not None else "")
        (text_width, text_height), below = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, size, 1)
        # Above the box, or inside where there is no room; never beyond the picture.
        x = max(0, min(left, width - text_width - 2))
        y = top if top >= text_height + below else min(max(top, 0) + text_height + below, height)
        cv2.rectangle(image, (x, y - text_height - below), (x + text_width + 2, y), colour, -1)
        bright = 0.114 * colour[0] + 0.587 * colour[1] + 0.299 * colour[2] > 140
        ink = (0, 0, 0) if bright else (255, 255, 255)
        cv2.putText(image, text, (x + 1, y - below + 1), cv2.FONT_HERSHEY_SIMPLEX, size, ink, 1, cv2.LINE_AA)
    return image


def grid(images: Sequence[Image], columns: int, cell: tuple[int, int]) -> Image:
    """Lay images out in rows, each scaled to fit a cell of (height, width) pixels."""
    rows = -(-len(images) // columns)
    sheet = np.full((rows * cell[0], columns * cell[1], 3), 255, np.uint8)
    for number, image in enumerate(images):
        scale = min((cell[0] - 4) / image.shape[0], (cell[1] - 4) / image.shape[1])
        small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        top, left = number // columns * cell[0], number % columns * cell[1]
        sheet[top : top + small.shape[0], left : left + small.shape[1]] = small
    return sheet
