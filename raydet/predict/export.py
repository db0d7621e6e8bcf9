"""Writes a checkpoint as an ONNX file, when it detects what the checkpoint does."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from raydet import __version__
from raydet.data.formats import load_index
from raydet.data.render import decode
from raydet.data.synthetic import make_picture
from raydet.devices import pick_device
from raydet.errors import RaydetError
from raydet.models import Detector
from raydet.models.download import is_published
from raydet.models.export import OUTPUTS, Exported, MissingPackages, to_onnx
from raydet.predict.predictor import METADATA, OnnxPredictor, Predictor, post_prediction, with_thresholds
from raydet.recipe import Eval
from raydet.runs import checkpoint
from raydet.runs.folder import load_evaluated
from raydet.runs.mirror import opened
from raydet.store import Store
from raydet.visualization import Image

Rows = npt.NDArray[np.float32]
_IMAGES = 8  # that the check detects in
_COMPARED, _BEST = 10, 300  # detections in an image, and boxes that they are of, where the export's score leaves none
_SCORE, _PIXELS = 1e-3, 0.5  # largest differences
_SHARE_OF_SCORE = 0.01  # largest difference as a share of the highest score, where that is less
# Where two boxes overlap just as much as NMS allows, rounding decides which stays. This share of the detections may
# differ.
_SHARE = 0.01


@dataclass(frozen=True)
class Written:
    """An ONNX file, and how near it is to the checkpoint.

    Attributes:
        path: path of the ONNX file.
        detections: number of detections that were compared.
        threshold: lowest score of these detections: that of the file where it detects something.
        missing: number of these detections that only one of the two has.
        score: largest difference between two scores.
        pixels: largest difference between two box sides, in pixels.
    """

    path: Path
    detections: int
    threshold: float
    missing: int
    score: float
    pixels: float

    def __str__(self) -> str:
        if not self.detections:
            return "nothing was compared: neither onnxruntime nor PyTorch detects anything, whatever the score"
        return (
            f"{self.detections} detections with scores above {self.threshold:.2g} compared: {self.missing} are not in "
            f"both, the others' scores differ by at most {self.score:.1g}, boxes by {self.pixels:.1g} px"
        )


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
        path: folder of a checkpoint, or of a run, whose best checkpoint is taken.
        out: path of the ONNX file; None: model.onnx in the checkpoint's folder.
        model: a detector of your own, where the checkpoint is of one.
        trust_code: in its place, run the code that the checkpoint names as its model, and the recipe of its run to read
            the images to compare with.
        form: form of the output, see `raydet.models.export.Exported`.
        conf: lowest score of a detection, in place of the checkpoint's.
        iou: IoU threshold of NMS, in place of the checkpoint's.
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
        model = checkpoint.load_model(folder, config, model, trust_code)
        if not isinstance(model, Detector):
            raise RaydetError(f"{folder}: only a raydet.models.Detector can be exported")
        has_nms = post_prediction(model, config.thresholds).has_nms
        thresholds = with_thresholds(config.thresholds, conf, iou, has_nms)
        content = checkpoint.read_json(folder / checkpoint.CONFIG) | {"thresholds": thresholds.model_dump()}
        about = {key: value for key, value in content.items() if key not in ("files", "awaited")}
        pytorch = Predictor(model, checkpoint.config_of(about, str(folder)), pick_device("cpu"))
        usual = Path(f"{path}.onnx") if is_published(path) else folder / "model.onnx"
        target = Path(out) if out is not None else usual
        say(f"exporting {config.model or 'a model'} of {config.image_size[0]}x{config.image_size[1]} px")
        fused = model.fuse()

        def written(thresholds: Eval) -> bytes:
            module = Exported(fused, config.preprocessing, post_prediction(model, thresholds), form)
            try:
                return to_onnx(module, config.image_size, {METADATA: json.dumps(about), "raydet_version": __version__})
            except MissingPackages as error:
                raise RaydetError(f"export: {error}") from None

        data = written(thresholds)
        images, source = _images(folder, pytorch, trust_code)
        say(f"comparing onnxruntime with PyTorch on {len(images)} {source}")
        found = _check(pytorch, OnnxPredictor(data, str(target)), images, thresholds, target)
        if not found.detections and (lower := _lower(pytorch, images, thresholds)) is not None:
            say(
                f"nothing is detected there with a score above {thresholds.score:g}: comparing what is above "
                f"{lower.score:.2g}, without NMS"
            )
            about |= {"thresholds": lower.model_dump()}
            found = _check(pytorch, OnnxPredictor(written(lower), str(target)), images, lower, target)
        Store(target.parent).write(target.name, data)
        return found


def _check(pytorch: Predictor, onnx: Predictor, images: Sequence[Image], thresholds: Eval, target: Path) -> Written:
    """Compare what both detect in the first image alone and in all as a batch; RaydetError: something else."""
    lists: list[tuple[Rows, Rows]] = []
    for inputs in images[:1], images:
        sizes = [pytorch.config.image_size[::-1]] * len(inputs)
        found = (predictor.detect_fitted(inputs, sizes, thresholds) for predictor in (pytorch, onnx))
        lists += zip(*found, strict=True)
    highest = max(float(rows[:, 4].max(initial=0)) for pair in lists for rows in pair)
    apart = min(_SCORE, _SHARE_OF_SCORE * highest)
    compared = [compare(*pair, thresholds.score, thresholds.max_detections, apart) for pair in lists]
    detections, missing = sum(len(ours) for ours, _ in lists), sum(number for number, *_ in compared)
    if missing > _SHARE * max(detections, 1):
        raise RaydetError(
            f"{target}: not written, as onnxruntime detects something else than PyTorch: of {detections} and "
            f"{sum(len(theirs) for _, theirs in lists)} detections, {missing} have none like them"
        )
    score, pixels = (max(values) for values in list(zip(*compared, strict=True))[1:])
    return Written(target, detections, thresholds.score, missing, score, pixels)


def _lower(pytorch: Predictor, images: Sequence[Image], thresholds: Eval) -> Eval | None:
    """Return the thresholds with a score that leaves detections to compare; None: whatever it is, there are none."""
    # Without NMS, and all classes of a box: scores as low as that may be so near each other that rounding decides which
    # is the best.
    everything = {"score": 0.0, "iou": 1.0, "multi_label": True, "class_agnostic": False}
    every = thresholds.model_copy(update={**everything, "nms_top_k": _BEST})
    sizes = [pytorch.config.image_size[::-1]] * len(images)
    scores = np.sort(np.concatenate([rows[:, 4] for rows in pytorch.detect_fitted(images, sizes, every)]))[::-1]
    if not len(scores):
        return None
    # A score as low as that of the last one is not above the threshold.
    last = scores[min(_COMPARED * len(images), len(scores) - 1)]
    lower = last if last < scores[0] else scores[0] / 2
    return thresholds.model_copy(update={**everything, "score": float(lower)})


def compare(ours: Rows, theirs: Rows, threshold: float, most: int, apart: float = _SCORE) -> tuple[int, float, float]:
    """Compare two lists of detections [n, 6] in an image.

    Args:
        ours: the one.
        theirs: the other.
        threshold: lowest score of a detection.
        most: detections of an image; what has a score near the last of so many may be in one list alone.
        apart: largest difference of the scores of the same detection.

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
            and abs(theirs[number, 4] - row[4]) <= apart
            and np.abs(theirs[number, :4] - row[:4]).max() <= _PIXELS
        ]
        if near:
            left.remove(near[0])
            score = max(score, float(abs(theirs[near[0], 4] - row[4])))
            pixels = max(pixels, float(np.abs(theirs[near[0], :4] - row[:4]).max()))
        else:
            missing += bool(row[4] > lowest + apart)
    return missing + sum(bool(theirs[number, 4] > lowest + apart) for number in left), score, pixels


def _images(folder: Path, predictor: Predictor, trust_code: bool) -> tuple[list[npt.NDArray[np.uint8]], str]:
    """Return images to compare with, fitted into the model's input: of the validation data, or drawn if it is gone."""
    try:
        index = load_index(load_evaluated(folder, None, (), trust_code).data, "val")
        rows = range(min(len(index), _IMAGES))
        return [predictor.fit(decode(index.read(row), index.path(row))) for row in rows], "validation images"
    except RaydetError:
        drawn = (make_picture(np.random.default_rng(number))[0] for number in range(_IMAGES))
        return [predictor.fit(image) for image in drawn], "images of shapes, as its data is not here"
