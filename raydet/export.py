"""Writes a checkpoint as an ONNX file, when it detects what the checkpoint does."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from raydet import __version__
from raydet.data.formats import load_index
from raydet.data.render import decode
from raydet.data.store import Store
from raydet.data.synthetic import make_picture
from raydet.devices import pick_device
from raydet.errors import RaydetError
from raydet.mirror import opened
from raydet.models import Detector
from raydet.models.export import OUTPUTS, Exported, MissingPackages, to_onnx
from raydet.predict import METADATA, OnnxPredictor, Predictor, with_thresholds
from raydet.training import checkpoint
from raydet.training.evaluate import post_prediction
from raydet.training.prepare import load_evaluated

Rows = npt.NDArray[np.float32]
_IMAGES = 8  # that the check detects in
_SCORE, _PIXELS = 1e-3, 0.5  # largest differences
# Of two boxes that overlap just as much as NMS allows, rounding decides which stay: so many detections may differ.
_SHARE = 0.01


@dataclass(frozen=True)
class Written:
    """An ONNX file, and how near it is to the checkpoint.

    Attributes:
        path: of the file.
        detections: that were compared.
        missing: of these, which only one of the two has.
        score: largest difference of a score.
        pixels: largest difference of a box's side.
    """

    path: Path
    detections: int
    missing: int
    score: float
    pixels: float


def export(
    path: str | Path,
    out: str | Path | None = None,
    *,
    model: nn.Module | None = None,
    trust_code: bool = False,
    form: str = "batch",
    conf: float | None = None,
    iou: float | None = None,
    say: Callable[[str], Any] = print,
) -> Written:
    """Write a checkpoint as ONNX: preprocessing, the model, its thresholds and NMS in one file; and compare them.

    Args:
        path: of a checkpoint, or of a run, whose best it is.
        out: the file; None: model.onnx in the checkpoint's folder.
        model: a detector of your own, where the checkpoint is of one.
        trust_code: in its place, run the code that the checkpoint names as its model, and the recipe of its run to read
            the images to compare with.
        form: of the output, see `raydet.models.export.Exported`.
        conf: lowest score, in place of the checkpoint's.
        iou: of two boxes that overlap more the better stays, in place of the checkpoint's.
        say: takes each line of progress.

    Raises:
        RaydetError: there is no checkpoint, a package is not installed, or onnxruntime detects something else than
            PyTorch, and no file is written.
    """
    if form not in OUTPUTS:
        raise RaydetError(f"--output {form}: it is {' or '.join(OUTPUTS)}")
    with opened(path) as local:
        folder = checkpoint.find(local)
        config = checkpoint.read_config(folder)
        thresholds = with_thresholds(config.thresholds, conf, iou)
        model = checkpoint.load_model(folder, config, model, trust_code)
        if not isinstance(model, Detector):
            raise RaydetError(f"{folder}: only a raydet.models.Detector can be exported")
        content = checkpoint.read_json(folder / checkpoint.CONFIG) | {"thresholds": thresholds.model_dump()}
        about = {key: value for key, value in content.items() if key not in ("files", "awaited")}
        pytorch = Predictor(model, checkpoint.config_of(about, str(folder)), pick_device("cpu"))
        target = Path(out) if out is not None else folder / "model.onnx"
        say(f"exporting {config.model or 'a model'} of {config.image_size[0]}x{config.image_size[1]} px")
        try:
            module = Exported(model.fuse(), config.preprocessing, post_prediction(model, thresholds), form)
            data = to_onnx(module, config.image_size, {METADATA: json.dumps(about), "raydet_version": __version__})
        except MissingPackages as error:
            raise RaydetError(f"export: {error}") from None
        images, source = _images(folder, pytorch, trust_code)
        onnx = OnnxPredictor(data, str(target))
        say(f"comparing onnxruntime with PyTorch on {len(images)} {source}")
        lists: list[tuple[Rows, Rows]] = []
        for inputs in images[:1], images:
            sizes = [config.image_size[::-1]] * len(inputs)
            found = (predictor.detect_fitted(inputs, sizes, thresholds) for predictor in (pytorch, onnx))
            lists += zip(*found, strict=True)
        compared = [compare(*pair, thresholds.score, thresholds.max_detections) for pair in lists]
        detections, missing = sum(len(ours) for ours, _ in lists), sum(number for number, *_ in compared)
        if missing > _SHARE * max(detections, 1):
            raise RaydetError(
                f"{target}: not written, as onnxruntime detects something else than PyTorch: of {detections} and "
                f"{sum(len(theirs) for _, theirs in lists)} detections, {missing} have none like them"
            )
        Store(target.parent).write(target.name, data)
        score, pixels = (max(values) for values in list(zip(*compared, strict=True))[1:])
        return Written(target, detections, missing, score, pixels)


def compare(ours: Rows, theirs: Rows, threshold: float, most: int) -> tuple[int, float, float]:
    """Compare two lists of detections [n, 6] in an image.

    Args:
        ours: the one.
        theirs: the other.
        threshold: lowest score of a detection.
        most: detections of an image; what has a score near the last of so many may be in one list alone.

    Returns:
        Detections that only one list has, and the largest differences of a score and of a box's side in pixels among
        the others.
    """
    lowest = max([threshold, *(rows[-1, 4] for rows in (ours, theirs) if len(rows) == most)])
    left = list(range(len(theirs)))
    missing, score, pixels = 0, 0.0, 0.0
    for row in ours:
        near = [
            number
            for number in left
            if theirs[number, 5] == row[5]
            and abs(theirs[number, 4] - row[4]) <= _SCORE
            and np.abs(theirs[number, :4] - row[:4]).max() <= _PIXELS
        ]
        if near:
            left.remove(near[0])
            score = max(score, float(abs(theirs[near[0], 4] - row[4])))
            pixels = max(pixels, float(np.abs(theirs[near[0], :4] - row[:4]).max()))
        else:
            missing += bool(row[4] > lowest + _SCORE)
    return missing + sum(bool(theirs[number, 4] > lowest + _SCORE) for number in left), score, pixels


def _images(folder: Path, predictor: Predictor, trust_code: bool) -> tuple[list[npt.NDArray[np.uint8]], str]:
    """Return images to compare with, fitted into the model's input: of the validation data, or drawn if it is gone."""
    try:
        index = load_index(load_evaluated(folder, None, (), trust_code).data, "val")
        rows = range(min(len(index), _IMAGES))
        return [predictor.fit(decode(index.read(row), index.path(row))) for row in rows], "validation images"
    except RaydetError:
        drawn = (make_picture(np.random.default_rng(number))[0] for number in range(_IMAGES))
        return [predictor.fit(image) for image in drawn], "images of shapes, as its data is not here"
