"""Checkpoints: a folder that is enough to resume, evaluate and predict.

model.safetensors   the weights to use: the moving average
training.pt         online weights, optimizer, step (read with weights_only)
config.json         model, classes, preprocessing, thresholds, metrics, licence
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from raydet import models
from raydet.errors import RaydetError
from raydet.models import Detector, Preprocessing
from raydet.plugins import call, is_own, locate
from raydet.recipe import Eval

FORMAT = 2


@dataclass(frozen=True)
class Config:
    """What must be known to use a model's weights; kept as config.json.

    Attributes:
        model: name in `raydet.models`, or `package.module:function`; empty for an object of the user's own.
        class_names: name of each label.
        category_ids: the data set's own id of each label.
        image_size: (height, width) the model was trained at, in pixels.
        preprocessing: from pixels to the model's input.
        thresholds: what counts as a detection.
        licence: of the weights the training began with; empty: none.
    """

    model: str
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    image_size: tuple[int, int]
    preprocessing: Preprocessing
    thresholds: Eval
    licence: str = ""

    def build(self) -> Detector:
        """Return the model, with weights of its own.

        Raises:
            RaydetError: the model is the user's own, and has no name or cannot be imported.
        """
        if not self.model:
            raise RaydetError(
                "this checkpoint is of a model that raydet does not know: build it, and pass it as model="
            )
        return build(self.model, len(self.class_names), self.image_size)


def build(name: str, num_classes: int, image_size: tuple[int, int]) -> Detector:
    """Build a model by a name of raydet's, or by a user's `package.module:function` of the number of classes.

    Raises:
        RaydetError: there is none of this name, or what the function returns is no Detector.
    """
    if not is_own(name):
        return models.get(name, num_classes, image_size=image_size)
    model = call(locate(name, "model.name"), f"model.name: {name}", num_classes=num_classes)
    if not isinstance(model, Detector):
        raise RaydetError(f"model.name: {name} returns a {type(model).__name__}, not a raydet.models.Detector")
    return model


def save(
    folder: Path,
    config: Config,
    average: nn.Module,
    online: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    epoch: int,
    metrics: dict[str, float],
) -> None:
    """Write a checkpoint into an empty folder; `step` and `epoch` count what is done, `metrics` are its weights'."""
    save_file(
        {name: tensor.contiguous() for name, tensor in average.state_dict().items()}, folder / "model.safetensors"
    )
    torch.save(
        {"model": online.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, folder / "training.pt"
    )
    content = {
        "format": FORMAT,
        "model": config.model,
        "classes": [
            {"id": number, "name": name} for number, name in zip(config.category_ids, config.class_names, strict=True)
        ],
        "image_size": config.image_size,
        "preprocessing": {
            "channels": config.preprocessing.channels,
            "resize": config.preprocessing.resize,
            "mean": config.preprocessing.mean,
            "std": config.preprocessing.std,
        },
        "thresholds": config.thresholds.model_dump(),
        "licence": config.licence,
        "step": step,
        "epoch": epoch,
        "metrics": metrics,
    }
    (folder / "config.json").write_text(json.dumps(content, indent=1))


def restore(
    folder: Path, average: nn.Module, online: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> tuple[int, dict[str, float]]:
    """Load a checkpoint for going on with its training; return its step and its metrics, none if not validated."""
    average.load_state_dict(load_file(folder / "model.safetensors", device=str(device)))
    state = torch.load(folder / "training.pt", map_location=device, weights_only=True)
    online.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    metrics: dict[str, float] = read_json(folder / "config.json")["metrics"]
    return int(state["step"]), metrics


def read_config(folder: Path) -> Config:
    """Read a checkpoint's config.json.

    Raises:
        RaydetError: it is missing or damaged.
    """
    content = read_json(folder / "config.json")
    if content.get("format", FORMAT) != FORMAT:
        raise RaydetError(f"{folder}: a checkpoint of format {content['format']}; this raydet reads format {FORMAT}")
    try:
        return Config(
            model=content["model"],
            class_names=tuple(entry["name"] for entry in content["classes"]),
            category_ids=tuple(entry["id"] for entry in content["classes"]),
            image_size=tuple(content["image_size"]),
            preprocessing=Preprocessing(
                tuple(content["preprocessing"]["mean"]),
                tuple(content["preprocessing"]["std"]),
                content["preprocessing"]["channels"],
                content["preprocessing"]["resize"],
            ),
            thresholds=Eval(**content["thresholds"]),
            licence=content["licence"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RaydetError(f"{folder / 'config.json'} is damaged: {error}") from None


def load_model(folder: Path, config: Config, model: nn.Module | None = None) -> nn.Module:
    """Return the model of a checkpoint, or load its weights into the given one; in evaluation mode, on the CPU.

    Raises:
        RaydetError: the weights are damaged, or of another model.
    """
    model = model if model is not None else config.build()
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except Exception as error:  # safetensors and torch have many
        reason = str(error).partition("\n")[0]
        raise RaydetError(f"{folder}: its weights are damaged or of another model than given: {reason}") from None
    return model.eval()


def find(path: Path) -> Path:
    """Return the checkpoint folder meant by a path: itself, or the best of a run's by mAP, the later of equals.

    Raises:
        RaydetError: there is none.
    """
    if (path / "config.json").is_file():
        return path
    candidates = [folder for folder in sorted(path.glob("checkpoint_*")) if (folder / "config.json").is_file()]
    if not candidates:
        raise RaydetError(f"{path}: neither a checkpoint (no config.json in it) nor a run with checkpoints")
    return max(candidates, key=lambda folder: (_score(folder), folder.name))


def _score(folder: Path) -> float:
    metrics: dict[str, float] = read_json(folder / "config.json").get("metrics", {})
    return metrics.get("val/mAP@0.50:0.95", -1.0)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        RaydetError: the file is missing, or not one.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise RaydetError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise RaydetError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise RaydetError(f"{path} holds no JSON object")
    return content
