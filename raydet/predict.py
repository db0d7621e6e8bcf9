"""Detection in pictures, with a checkpoint and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from raydet.boxes import place, xyxy_to_xywh
from raydet.data.render import imread, letterbox
from raydet.errors import RaydetError
from raydet.models import Detector
from raydet.training import checkpoint
from raydet.training.checkpoint import Config
from raydet.training.evaluate import post_prediction
from raydet.visualization import draw_boxes

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


@dataclass(frozen=True)
class Detections:
    """What was found in an image, best first.

    Attributes:
        boxes: float32 [n, 4] xyxy in pixels of the image.
        scores: float32 [n].
        labels: int64 [n].
        names: class name of each.
    """

    boxes: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    names: tuple[str, ...]


class Predictor:
    """A trained model with what it needs to detect.

    Args:
        model: its weights loaded.
        config: of its checkpoint.
        device: to run on.
    """

    def __init__(self, model: nn.Module, config: Config, device: torch.device):
        self.model = (model.fuse() if isinstance(model, Detector) else model.eval()).to(device)
        self.config = config
        self.device = device

    @torch.no_grad()
    def predict(self, images: Sequence[npt.NDArray[np.uint8]], conf: float | None = None) -> list[Detections]:
        """Detect in images, uint8 [H, W, 3] BGR of any size; `conf` replaces the checkpoint's lowest score."""
        size, resize = self.config.image_size, self.config.preprocessing.resize
        batch = np.stack([letterbox(image, size, resize) for image in images])
        thresholds = self.config.thresholds
        if conf is not None:
            thresholds = thresholds.model_copy(update={"score": conf})
        pixels = self.config.preprocessing(torch.from_numpy(batch).permute(0, 3, 1, 2).to(self.device))
        results = []
        for image, found in zip(images, post_prediction(self.model, thresholds)(self.model(pixels)), strict=True):
            height, width = image.shape[:2]
            rows = found.cpu().numpy()
            labels = rows[:, 5].astype(np.int64)
            results.append(
                Detections(
                    place(width, height, size, resize).undo(rows[:, :4]),
                    rows[:, 4],
                    labels,
                    tuple(self.config.class_names[label] for label in labels),
                )
            )
        return results

    def draw(self, image: npt.NDArray[np.uint8], found: Detections) -> npt.NDArray[np.uint8]:
        """Return a copy of an image with its detections on it."""
        return draw_boxes(image, found.boxes, found.labels.tolist(), self.config.class_names, found.scores.tolist())

    def to_coco(self, found: Detections, image_id: int) -> list[dict[str, Any]]:
        """Return detections as COCO's results, in the category ids of the data set the model was trained on."""
        return [
            {
                "image_id": image_id,
                "category_id": self.config.category_ids[label],
                "bbox": [round(value, 3) for value in box],
                "score": round(score, 5),
            }
            for label, box, score in zip(
                found.labels.tolist(), xyxy_to_xywh(found.boxes).tolist(), found.scores.tolist(), strict=True
            )
        ]


def load(path: str | Path, device: str | None = None, model: nn.Module | None = None) -> Predictor:
    """Load a checkpoint, or the best one of a run.

    Args:
        path: of a checkpoint or run folder.
        device: such as "cuda:1" or "cpu"; None: the first GPU, or without one the CPU.
        model: a detector of your own, where the checkpoint is of one.

    Raises:
        RaydetError: there is no checkpoint, or it is damaged.
    """
    folder = checkpoint.find(Path(path))
    config = checkpoint.read_config(folder)
    return Predictor(checkpoint.load_model(folder, config, model), config, pick_device(device))


def pick_device(name: str | None) -> torch.device:
    """Return the named device; None: the first GPU, or without one the CPU.

    Raises:
        RaydetError: there is no such device here.
    """
    if name is None:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RaydetError(f"device {name!r}: {str(error).splitlines()[0]}") from None
    return device


def image_files(source: str | Path) -> list[Path]:
    """Return the image files meant by a path: itself, or all below a folder, sorted.

    Raises:
        RaydetError: there are none.
    """
    source = Path(source)
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise RaydetError(f"{source}: no such file or folder")
    found = sorted(path for path in source.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise RaydetError(f"{source}: no images in it ({', '.join(IMAGE_SUFFIXES)})")
    return found


def predict_files(
    predictor: Predictor, files: Sequence[Path], conf: float | None, batch_size: int = 16
) -> Iterator[tuple[Path, npt.NDArray[np.uint8], Detections]]:
    """Detect in image files, and give each with its picture and detections.

    Raises:
        RaydetError: a file is no image.
    """
    for start in range(0, len(files), batch_size):
        part = files[start : start + batch_size]
        images = [imread(str(path)) for path in part]
        yield from zip(part, images, predictor.predict(images, conf), strict=True)
