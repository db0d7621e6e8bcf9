"""The picture at the end of a training: detections on validation images beside the truth."""

from __future__ import annotations

from pathlib import Path

import cv2
from torch import nn

from raydet.data.index import Index
from raydet.data.render import decode
from raydet.errors import RaydetError
from raydet.predict.predictor import Detections, load
from raydet.visualization import draw_boxes, grid, resized

SHOWN, SHOWN_SCORE, CELL = 6, 0.3, 360


def draw_validation(folder: Path, index: Index, model: nn.Module | None = None) -> Path:
    """Draw the best checkpoint's detections on validation images beside the ground truth, and return the picture.

    The images are spread over the index; detections below a score of 0.3 are left out.

    Args:
        folder: folder of the run.
        index: index of the images.
        model: a detector of the user's own, where the run is of one.
    """
    predictor = load(folder, model=model)
    pictures = []
    count = min(SHOWN, len(index))
    for row in (number * len(index) // count for number in range(count)):
        try:
            image = decode(index.read(row), index.path(row), index.size(row))
        except RaydetError:  # left out, as the log says
            continue
        scale = min(CELL / side for side in image.shape[:2])
        shown = resized(image, scale, cv2.INTER_AREA)
        truth = index.annotations(row)
        found = predictor.predict(image[:, :, ::-1], SHOWN_SCORE)
        assert isinstance(found, Detections)
        pictures += [
            draw_boxes(shown, truth.boxes * scale, truth.labels.tolist(), index.class_names),
            draw_boxes(
                shown, found.boxes * scale, found.labels.tolist(), predictor.config.class_names, found.scores.tolist()
            ),
        ]
    path = folder / "images" / "validation.jpg"
    path.parent.mkdir(exist_ok=True)
    cv2.imwrite(str(path), grid(pictures, columns=4, cell=(CELL, CELL)))
    return path
