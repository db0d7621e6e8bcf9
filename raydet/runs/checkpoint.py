"""Checkpoints: folders that are enough to resume, evaluate and predict.

model.safetensors   the weights to use: the moving average
training.pt         online weights, optimizer, scaler, where the training stands (read with weights_only); gone from
                    older checkpoints that are kept for their metrics
config.json         model, classes, preprocessing, thresholds, metrics, licence; checksums of the other files

A folder is written under another name, brought to the disk and then renamed: what has its name is whole, and what a
disk has damaged since is found out by the checksums.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from raydet import models
from raydet.errors import RaydetError
from raydet.models import Detector, Preprocessing
from raydet.plugins import call, is_own, locate
from raydet.recipe import Eval
from raydet.store import write_aside

FORMAT = 3
WEIGHTS, TRAINING, CONFIG, CARD = "model.safetensors", "training.pt", "config.json", "README.md"
AVERAGE = "checkpoint_average"
_NAMES = "checkpoint_[0-9]*"  # in the order of the training
_PARTIAL = ".partial-"


@dataclass
class Progress:
    """Where a training stands.

    Attributes:
        position: number of samples that were trained on.
        step: number of steps that are done, skipped ones included.
        best: highest value of the metric that is watched; -1: none yet.
        stale: number of validations since the best one.
        bad: number of steps in a row that were skipped.
    """

    position: int = 0
    step: int = 0
    best: float = -1.0
    stale: int = 0
    bad: int = 0


@dataclass(frozen=True)
class Config:
    """What must be known to use a model's weights; kept as config.json.

    Attributes:
        model: name in `raydet.models`, or `package.module:function`; empty for an object of the user's own.
        class_names: name of each label.
        category_ids: the data set's own id of each label.
        image_size: (height, width) that the model was trained at, in pixels.
        preprocessing: how an image becomes the model's input.
        thresholds: what counts as a detection.
        licence: licence of the weights that the training began with; empty: there were none.
    """

    model: str
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    image_size: tuple[int, int]
    preprocessing: Preprocessing
    thresholds: Eval
    licence: str = ""


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


def pack(
    config: Config,
    average: nn.Module,
    training: Mapping[str, Any] | None,
    progress: Progress,
    epoch: int,
    metrics: Mapping[str, float],
    is_awaited: bool = False,
) -> dict[str, bytes]:
    """Return the files of a checkpoint: name → content.

    Args:
        config: what is known of the model.
        average: the model with the averaged weights (EMA), which are the weights to use.
        training: state dicts by name, to resume the training from; None: the training cannot be resumed.
        progress: where the training stands.
        epoch: number of epochs that are done.
        metrics: metrics of the averaged weights.
        is_awaited: the metrics will come later: the checkpoint is being validated elsewhere.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in average.state_dict().items()}
    packed = {WEIGHTS: safetensors.torch.save(tensors)}
    if training is not None:
        buffer = io.BytesIO()
        torch.save({**training, "progress": asdict(progress)}, buffer)
        packed[TRAINING] = buffer.getvalue()
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
        "position": progress.position,
        "step": progress.step,
        "epoch": epoch,
        "metrics": dict(metrics),
        "awaited": is_awaited,
        "files": {name: {"bytes": len(data), "crc32": zlib.crc32(data)} for name, data in packed.items()},
    }
    return {**packed, CARD: _card(content).encode(), CONFIG: json.dumps(content, indent=1).encode()}


def _card(content: Mapping[str, Any]) -> str:
    """Return the model card of a checkpoint: what people read where its folder is shown, for instance on a hub."""
    (height, width), preprocessing, metrics = content["image_size"], content["preprocessing"], content["metrics"]
    about = {
        "model": f"{content['model'] or 'an own one'}, trained with raydet",
        "input": f"{height} x {width} pixels (height x width), {preprocessing['channels']}, {preprocessing['resize']}",
        "trained": f"{content['epoch']:g} epochs, {content['step']:,} steps, by recipe.yaml in the folder of the run",
        "licence of the weights it began with": content["licence"] or "it began with random weights, or none is known",
    }
    tables = [about, {key.removeprefix("val/"): f"{value:.4f}" for key, value in metrics.items()}]
    about_text, accuracy = (
        "\n".join(("| | |", "|---|---|", *(f"| {_cell(key)} | {_cell(value)} |" for key, value in table.items())))
        for table in tables
    )
    names = ", ".join(entry["name"] for entry in content["classes"])
    return (
        "---\nlibrary_name: raydet\npipeline_tag: object-detection\n---\n\n"
        f"# {content['model'] or 'Detector'} of {len(content['classes'])} classes\n\n{about_text}\n\n"
        f"## Accuracy on the validation images\n\n{accuracy if metrics else 'Not measured yet.'}\n\n"
        f"## Classes\n\n{names}\n\n"
        "## Use\n\n```python\nimport raydet\n\n"
        'found = raydet.load("path/of/this/folder").predict("photo.jpg")\nfound.show()\n```\n'
    )


def _cell(text: str) -> str:
    """Return text for a cell of a Markdown table: a class may have any name."""
    return text.replace("|", "\\|").replace("\n", " ")


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Make a checkpoint's folder, or replace it.

    Raises:
        OSError: it cannot be written; what was there still is.
    """
    partial = folder.with_name(_PARTIAL + folder.name)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for name, data in files.items():
            with (partial / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        if folder.exists():
            earlier = folder.with_name(f"{_PARTIAL}earlier-{folder.name}")
            shutil.rmtree(earlier, ignore_errors=True)
            folder.rename(earlier)
            partial.rename(folder)
            shutil.rmtree(earlier, ignore_errors=True)
        else:
            partial.rename(folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)  # not to fill the disk with what is of no use
        raise


def set_metrics(folder: Path, metrics: Mapping[str, float]) -> None:
    """Give a checkpoint the metrics that were awaited.

    Raises:
        OSError: it cannot be written.
    """
    _update(folder, {"metrics": dict(metrics), "awaited": False})


def set_thresholds(folder: Path, thresholds: Eval) -> None:
    """Give a checkpoint the thresholds that were found best for it.

    Raises:
        OSError: it cannot be written.
    """
    _update(folder, {"thresholds": thresholds.model_dump()})


def _update(folder: Path, values: Mapping[str, Any]) -> None:
    content = read_json(folder / CONFIG) | dict(values)
    write_aside(folder / CARD, _card(content))
    write_aside(folder / CONFIG, json.dumps(content, indent=1))


def damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint's files, None if nothing is."""
    try:
        files = read_json(folder / CONFIG)["files"]
        for name, expected in files.items():
            if name == TRAINING and not (folder / name).exists():
                continue
            data = (folder / name).read_bytes()
            if len(data) != expected["bytes"]:
                return f"{name} has {len(data)} bytes of {expected['bytes']}"
            if zlib.crc32(data) != expected["crc32"]:
                return f"{name} is not what was written: its checksum differs"
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    except (RaydetError, KeyError, TypeError, AttributeError) as error:
        return f"{CONFIG} is damaged: {error}"
    return None


def latest(run: Path) -> tuple[Path | None, list[str]]:
    """Return a run's last whole checkpoint to go on from, if there is one, and what is wrong with later ones."""
    problems: list[str] = []
    for folder in sorted(run.glob(_NAMES), reverse=True):
        if not (folder / TRAINING).exists() and _content(folder):
            continue  # an older one, whose training.pt was deleted
        if (problem := damage(folder)) is None:
            return folder, problems
        problems.append(f"{folder.name} is damaged: {problem}")
    return None, problems


def prune(run: Path, keep: int) -> None:
    """Delete a run's checkpoints but for the best, the last two, and those whose metrics are awaited.

    Only the last two can be gone on from: the last, and the one before should that be damaged.

    Args:
        run: folder of the run.
        keep: number of best checkpoints to keep.
    """
    folders = sorted(run.glob(_NAMES))
    last = folders[-2:]
    kept = {*ranked(run)[:keep], *last, *awaited(run)}
    for folder in folders:
        if folder not in kept:
            shutil.rmtree(folder, ignore_errors=True)
        elif folder not in last:
            (folder / TRAINING).unlink(missing_ok=True)
    for partial in run.glob(f"{_PARTIAL}*"):
        shutil.rmtree(partial, ignore_errors=True)


def awaited(run: Path) -> list[Path]:
    """Return a run's checkpoints whose metrics are awaited, in order."""
    return [folder for folder in sorted(run.glob(_NAMES)) if _content(folder).get("awaited")]


def ranked(run: Path) -> list[Path]:
    """Return a run's checkpoints that have been validated, the best by `eval.watch` first; of equals the later."""
    scored = [(score, folder) for folder in run.glob(_NAMES) if (score := _score(folder)) is not None]
    return [folder for _, folder in sorted(scored, reverse=True)]


def average_weights(model: nn.Module, folders: Sequence[Path]) -> None:
    """Load the mean of some checkpoints' weights and norm statistics into a model."""
    total: dict[str, torch.Tensor] = {}
    for folder in folders:
        for name, tensor in safetensors.torch.load_file(folder / WEIGHTS).items():
            total[name] = total[name] + tensor.double() if name in total else tensor.double()
    state = model.state_dict()
    model.load_state_dict({name: (total[name] / len(folders)).to(tensor.dtype) for name, tensor in state.items()})


def position(folder: Path) -> int:
    """Return the samples that a checkpoint's weights have seen; -1: it does not say, being damaged."""
    seen = _content(folder).get("position", -1)
    return seen if isinstance(seen, int) else -1


def _score(folder: Path) -> float | None:
    """Value of the metric that is watched; None: it was not validated."""
    content = _content(folder)
    try:
        return float(content["metrics"][f"val/{content['thresholds']['watch']}"])
    except (KeyError, TypeError, ValueError):
        return None


def _content(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / CONFIG)
    except RaydetError:
        return {}


def restore(
    folder: Path, average: nn.Module, online: nn.Module, others: Mapping[str, Any]
) -> tuple[Progress, dict[str, float]]:
    """Load a checkpoint for going on with its training.

    Args:
        folder: folder of the checkpoint.
        average: gets the averaged weights (EMA).
        online: gets the weights that are trained.
        others: what else has a state, such as the optimizer, by name.

    Returns:
        Where it stands, and its metrics, none if it was not validated.
    """
    average.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS))
    # Onto the CPU: each part copies what it needs to its own device. AdamW keeps its count of steps on the CPU: from a
    # GPU each step would have to fetch it hundreds of times.
    state = torch.load(folder / TRAINING, map_location="cpu", weights_only=True)
    online.load_state_dict(state["model"])
    for name, other in others.items():
        other.load_state_dict(state[name])
    metrics: dict[str, float] = read_json(folder / CONFIG)["metrics"]
    return Progress(**state["progress"]), metrics


def read_config(folder: Path) -> Config:
    """Read a checkpoint's config.json.

    Raises:
        RaydetError: it is missing or damaged.
    """
    return config_of(read_json(folder / CONFIG), str(folder / CONFIG))


def config_of(content: Mapping[str, Any], name: str) -> Config:
    """Return what a config.json says.

    Args:
        content: content of the file.
        name: name of the file, for messages.

    Raises:
        RaydetError: it is damaged, or of another format.
    """
    if content.get("format", FORMAT) != FORMAT:
        raise RaydetError(f"{name}: a checkpoint of format {content['format']}; this raydet reads format {FORMAT}")
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
        raise RaydetError(f"{name} is damaged: {error}") from None


def load_model(folder: Path, config: Config, model: nn.Module | None = None, trust_code: bool = False) -> nn.Module:
    """Return the model of a checkpoint, in evaluation mode, on the CPU.

    Args:
        folder: folder of the checkpoint.
        config: config of the checkpoint.
        model: gets the weights; None: the model that the checkpoint names is built.
        trust_code: run the code that the checkpoint names, where it is not raydet's own.

    Raises:
        RaydetError: the weights are damaged or of another model, or the checkpoint names none, or code that is not
            trusted or cannot be imported.
    """
    if model is None:
        if not config.model:
            raise RaydetError(f"{folder} is of a model that raydet does not know: build it, and pass it as model=")
        if is_own(config.model) and not trust_code:
            raise RaydetError(
                f"{folder / CONFIG} names code of its own as the model, {config.model}, and nothing of it was run: "
                "pass the model as model=…, or, if you trust the code, trust_code=True (--trust-code)"
            )
        model = build(config.model, len(config.class_names), config.image_size)
    try:
        model.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS))
    except Exception as error:  # safetensors and torch have many
        reason = str(error).partition("\n")[0]
        raise RaydetError(f"{folder}: its weights are damaged or of another model than given: {reason}") from None
    return model.eval()


def find(path: Path) -> Path:
    """Return the checkpoint folder meant by a path: itself, or a run's best, the last if none was validated.

    Raises:
        RaydetError: there is none.
    """
    if path.is_file():
        raise RaydetError(_no_checkpoint(path))
    if not path.exists():
        raise RaydetError(f"{path}: no such file or folder")
    if (path / CONFIG).is_file():
        return path
    candidates = [folder for folder in path.glob("checkpoint_*") if (folder / CONFIG).is_file()]
    if not candidates:
        raise RaydetError(f"{path}: neither a checkpoint (no config.json in it) nor a run with checkpoints")
    return max(candidates, key=lambda folder: (_score(folder) or -1.0, position(folder), folder.name))


def _no_checkpoint(file: Path) -> str:
    """Return a line on a file in place of a checkpoint's folder: what to do."""
    if (file.parent / CONFIG).is_file():
        return f"{file} holds weights alone: give its folder, {file.parent}"
    if file.suffix not in (".pth", ".pt", ".safetensors"):
        return f"{file} is neither a checkpoint or run folder nor an ONNX file"
    return (
        f"{file} holds weights alone, without the names of the classes and the preprocessing: a training from them, "
        f"raydet train RECIPE model.weights={file}, makes checkpoints that have both; "
        f"raydet evaluate {file} --recipe RECIPE measures them"
    )


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
