"""From a recipe to a job: reads the data, builds the model and the loss, and refuses what cannot work."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from raydet import losses, models
from raydet.boxes import Resize
from raydet.data.index import Index
from raydet.data.mosaic import Composition, Mixup, Mosaic
from raydet.data.samples import Samples
from raydet.data.transforms import (
    HSV,
    ChannelSwap,
    HorizontalFlip,
    Letterbox,
    RandomAffine,
    Rotate90,
    SampleTransform,
    Transform,
    VerticalFlip,
)
from raydet.errors import RaydetError, did_you_mean
from raydet.evaluation import MAIN_METRIC, CocoEvaluation, metric_names
from raydet.models import Detector, Family, Preprocessing, load_weights
from raydet.models.reference_weights import is_uri
from raydet.plugins import accepts, call, is_own, locate
from raydet.recipe import Eval, OwnTransform, Recipe, describe, differences, keys_given
from raydet.recipe import load as load_recipe
from raydet.tracking.pictures import check_pictures
from raydet.training.checkpoint import Config, build, find, read_json
from raydet.training.norms import check_norms
from raydet.training.run import Job


def train_samples(recipe: Recipe, index: Index, resize: Resize) -> Samples:
    """Return the training stream's samples.

    Raises:
        RaydetError: a transform of the user's own cannot be made.
    """
    size, data, augment = recipe.data.image_size, recipe.data, recipe.augment
    if augment.rotate90 and size[0] != size[1]:
        raise RaydetError(f"augment.rotate90 needs a square data.image_size, not {size[0]}x{size[1]}")
    alone = Letterbox(size, resize)
    flips: tuple[Transform, ...] = (
        HorizontalFlip(augment.horizontal_flip),
        VerticalFlip(augment.vertical_flip),
        Rotate90(augment.rotate90),
    )
    colours: tuple[Transform, ...] = (
        HSV(augment.hsv, augment.hue, augment.saturation, augment.value),
        ChannelSwap(augment.channel_swap),
    )
    affine = RandomAffine(size, augment.degrees, augment.translate, augment.scale, augment.shear)
    mixup = Mixup(augment.mixup, size, augment.mixup_scale)
    transforms: list[Transform | Composition]
    if augment.mosaic:
        transforms = [Mosaic(augment.mosaic, alone), affine, mixup, *flips]
    else:  # flips first: the padding stays on the side where validation has it
        transforms = [*flips, alone, *([affine] if affine != RandomAffine(size) else []), mixup]
    return Samples(
        index,
        (*transforms, *colours),
        size,
        data.chunk_size,
        recipe.seed,
        close_at=(recipe.train.epochs - augment.close_epochs) * len(index) if augment.close_epochs else None,
        closed=(*flips, alone, *colours),
        own=tuple(_own_transform(entry) for entry in augment.transforms),
        window=data.shuffle_window,
        on_error=data.on_error,
    )


def val_samples(recipe: Recipe, index: Index, resize: Resize) -> Samples:
    """Return the validation stream's samples."""
    size, data = recipe.data.image_size, recipe.data
    chunk = recipe.eval.batch_size  # a task makes a batch: the ranks end at about the same time
    return Samples(index, (Letterbox(size, resize),), size, chunk, shuffle=False, on_error=data.on_error)


def _own_transform(entry: OwnTransform) -> SampleTransform:
    key = f"augment.transforms: {entry.name}"
    transform: SampleTransform = call(locate(entry.name, key), key, **(entry.model_extra or {}))
    if not callable(transform):
        raise RaydetError(f"{key}: its instances must be callable, with a sample and a generator")
    return transform


def make_job(
    recipe: Recipe,
    train_index: Index | None,
    val_index: Index,
    model: nn.Module | None = None,
    loss: nn.Module | None = None,
) -> Job:
    """Build what the workers get.

    Args:
        recipe: the settings.
        train_index: images to train on; None for an evaluation.
        val_index: images to validate on.
        model: a model of the user's own in place of the recipe's.
        loss: likewise.

    Raises:
        RaydetError: classes, batch and workers, model and loss, or weights do not fit.
    """
    if train_index is not None:
        _check_data(recipe, train_index, val_index)
    names = val_index.class_names
    count = recipe.model.num_classes
    if count is not None and count != len(names):
        raise RaydetError(
            f"model.num_classes is {count}, but the data has {len(names)} classes ({_some(names)}); "
            "set it to null or correct the data"
        )
    name = ""
    if model is None:
        torch.manual_seed(recipe.seed)
        name = recipe.model.name
        model = build(name, len(names), recipe.data.image_size)
        if recipe.model.weights is not None:
            # To measure prediction layers that nobody has trained would be a mistake.
            load_weights(model, _weights(recipe.model.weights), train_index is None, names)
    family = _family(model, recipe)
    config = Config(
        model=name,
        class_names=names,
        category_ids=val_index.category_ids,
        image_size=recipe.data.image_size,
        preprocessing=_preprocessing(model, family),
        thresholds=recipe.eval,
        licence=getattr(model, "licence", ""),
    )
    criterion = None
    if train_index is not None:
        criterion = _check_loss(loss if loss is not None else _make_loss(recipe, family, model))
        check_pictures(recipe, criterion, model, names)
        check_norms(recipe, model)
    train_images = len(train_index) if train_index is not None else 0
    return Job(recipe, recipe.run_folder, config, model, criterion, train_images, val_index)


def load_evaluated(
    checkpoint_path: Path, recipe: str | None, overrides: Sequence[str], trust_code: bool = False
) -> Recipe:
    """Return the recipe to evaluate a checkpoint, a run or a weights file with.

    Args:
        checkpoint_path: what is evaluated.
        recipe: the user's own; None: that of the run.
        overrides: `section.key=value`.
        trust_code: the recipe of the run may name code that reads the data.

    Raises:
        RaydetError: there is nothing at the path, it does not say which recipe is its own, or that recipe names code
            that is not trusted.
    """
    if not checkpoint_path.exists():
        raise RaydetError(f"{checkpoint_path}: no such file or folder")
    run = checkpoint_path if (checkpoint_path / "recipe.yaml").is_file() else checkpoint_path.parent
    if recipe is not None:
        return load_recipe(recipe, overrides)
    if checkpoint_path.is_dir() and (run / "recipe.yaml").is_file():
        settings = load_recipe(run / "recipe.yaml", overrides)
        if is_own(settings.data.format) and not trust_code and "data.format" not in keys_given(overrides):
            raise RaydetError(
                f"{run / 'recipe.yaml'} names code of its own to read the data, {settings.data.format}, and nothing of "
                "it was run: pass data.format=… or a --recipe of yours, or, if you trust the code, trust_code=True "
                "(--trust-code)"
            )
        if "storage" not in keys_given(overrides):  # that of the training, perhaps on another machine
            settings = settings.model_copy(update={"storage": str(run)})
        return settings
    raise RaydetError(
        f"{checkpoint_path} says neither its model nor its data: add --recipe, such as --recipe coco2017_yolox_s"
    )


def thresholds_of(config: Config, overrides: Sequence[str]) -> Eval:
    """Return the thresholds of a checkpoint, tuned perhaps after its training, with `eval.key=value` on top."""
    mine = [override for override in overrides if override.startswith("eval.")]
    return load_recipe(Recipe(eval=config.thresholds), mine).eval


def image_size_of(
    config: Config, recipe: Recipe, overrides: Sequence[str], say: Callable[[str], Any]
) -> tuple[int, int]:
    """Return the (height, width) to evaluate a checkpoint at: its own, unless the overrides give another.

    Args:
        config: of the checkpoint.
        recipe: to evaluate with; a line names its size where it is another one and does not count.
        overrides: `section.key=value`.
        say: takes that line.
    """
    theirs = recipe.data.image_size
    if "data.image_size" in keys_given(overrides):
        return theirs
    if theirs != config.image_size:
        other, own = ("x".join(map(str, size)) for size in (theirs, config.image_size))
        say(
            f"data.image_size is {other} in the recipe, but {own} in the checkpoint, which counts; "
            f"data.image_size=… takes another"
        )
    return config.image_size


def open_run(job: Job) -> None:
    """Make the run's folder with recipe.yaml, inputs.json and environment.json, or check that it is the same run.

    Raises:
        RaydetError: the folder has checkpoints of a run with other settings, data, model or loss, or cannot be made.
    """
    folder, recipe = job.folder, job.recipe
    inputs = {
        "model": type(job.model).__qualname__,
        "loss": type(job.criterion).__qualname__,
        "training images": job.train_images,
        "validation images": len(job.val_index),
        "classes": list(job.config.class_names),
    }
    if any(folder.glob("checkpoint_*/config.json")):
        changed = differences(recipe, load_recipe(folder / "recipe.yaml"))
        earlier = read_json(folder / "inputs.json")
        changed += [
            f"{key}: {_short(earlier.get(key))} there, {_short(value)} here"
            for key, value in inputs.items()
            if earlier.get(key) != value
        ]
        if changed:
            raise RaydetError(
                f"{folder} is a run with other settings ({'; '.join(changed)}); "
                "choose another name=…, or remove the folder; to train on from its weights: name=… "
                f"model.weights={recipe.storage}/{recipe.name}"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "recipe.yaml", describe(recipe))
        _write(folder / "inputs.json", json.dumps(inputs, indent=1) + "\n")
        _write(folder / "environment.json", json.dumps(environment(), indent=1) + "\n")
    except OSError as error:
        raise RaydetError(f"storage: {folder} cannot be made or written ({error.strerror})") from None


def environment() -> dict[str, str | int]:
    """Return what a run's numbers may depend on beside its recipe."""
    packages = ("raydet", "torch", "torchvision", "ray", "numpy", "opencv-python", "pyarrow", "hotcoco")
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none on the driver"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count() or 0,
        "gpu": gpu,
        **{name: version(name) for name in packages},
    }


def _check_data(recipe: Recipe, train_index: Index, val_index: Index) -> None:
    if train_index.class_names != val_index.class_names:
        raise RaydetError(
            "training and validation data have different classes: "
            f"{_some(train_index.class_names)} and {_some(val_index.class_names)}"
        )
    for split, index in (("training", train_index), ("validation", val_index)):
        if index.objects()[1].crowd.all():
            raise RaydetError(f"the {split} data has no objects in its {len(index)} images")
    batch, (fewest, most) = recipe.train.batch_size, recipe.scale.workers
    if batch < most:
        raise RaydetError(f"train.batch_size {batch} is less than an image for each of scale.num_workers {most}")
    if batch % most and fewest == most:
        raise RaydetError(f"train.batch_size {batch} cannot be shared by scale.num_workers {most} equally")
    _check_watch(recipe.eval, val_index)
    if recipe.train.micro_batch_size is not None and getattr(recipe.loss, "obj_loss_fix", False):
        raise RaydetError(
            "train.micro_batch_size: with loss.obj_loss_fix the terms of the loss have different divisors, so that "
            "parts of a batch cannot be added up; set one of the two to null or false"
        )


def _check_watch(settings: Eval, val_index: Index) -> None:
    watch, names = settings.watch, metric_names(val_index, settings.max_dets)
    if watch not in names:
        known = [*(name for name in names if not name.startswith("AP@")), "AP@0.50:0.95_{class}"]
        raise RaydetError(
            f"eval.watch: there is no metric {watch}{did_you_mean(watch, names)} (known: {', '.join(known)})"
        )
    if watch == MAIN_METRIC:
        return
    # Of some classes, or of small, medium or large objects, the validation data may have none.
    nothing = CocoEvaluation(val_index, max_dets=settings.max_dets)
    nothing.update(range(len(val_index)), [np.empty((0, 6))] * len(val_index))
    if watch not in nothing.compute():
        raise RaydetError(f"eval.watch: the validation data has no objects that {watch} is measured on: watch another")


def _weights(text: str) -> str | Path:
    """Return what the recipe's weights mean: a URI, a file, a checkpoint, or the best one of a run."""
    path = Path(text).expanduser()
    return text if is_uri(text) else find(path) if path.is_dir() else path


def _family(model: nn.Module, recipe: Recipe) -> Family | None:
    """Return the model's family; None for a head of the user's own."""
    if not isinstance(model, Detector):
        return models.family_of(recipe.model.name)
    sizes = [("data.image_size", recipe.data.image_size)]
    sizes += [("augment.multiscale", (side, side)) for side in recipe.augment.multiscale or ()]
    for key, size in sizes:
        try:
            model.check_size(*size)
        except ValueError as error:
            raise RaydetError(f"{key}: {error}") from None
    return next((family for family in models.FAMILIES if isinstance(model.head, family.head)), None)


def _preprocessing(model: nn.Module, family: Family | None) -> Preprocessing:
    own = getattr(model, "preprocessing", None)
    if own is None and family is None:
        raise RaydetError(
            f"{type(model).__name__} has a head of your own, so raydet does not know what it expects: "
            "build it as Detector(backbone, neck, head, preprocessing)"
        )
    return own or family.preprocessing  # type: ignore[union-attr]


def _make_loss(recipe: Recipe, family: Family | None, model: nn.Module) -> nn.Module:
    settings = recipe.loss.model_dump()
    name: str = settings.pop("name")
    kind = locate(name, "loss.name") if is_own(name) else getattr(losses, name)
    if not isinstance(kind, type):
        raise RaydetError(f"loss.name: {name} is no class")
    strangers = [other for other in models.FAMILIES if issubclass(kind, other.losses)]
    if family is None and strangers:
        models.family_of(model)  # raises: it says whose heads there are losses for
    if family is not None and strangers and not issubclass(kind, family.losses):
        raise RaydetError(
            f"loss.name: {name} is a loss of {' and '.join(other.name for other in strangers)}, the model is of "
            f"{family.name}; its losses are {', '.join(loss.__name__ for loss in family.losses)}. The recipe "
            f"{family.recipe} has both"
        )
    known = family.loss_arguments(model) if family is not None else {"num_classes": model.num_classes}
    known = {key: value for key, value in known.items() if accepts(kind, key)}
    criterion: nn.Module = call(kind, f"loss.name: {name}", **known, **settings)
    return criterion


def _check_loss(loss: nn.Module) -> nn.Module:
    if not isinstance(loss, nn.Module) or not isinstance(getattr(loss, "component_names", None), tuple | list):
        raise RaydetError(
            f"the loss {type(loss).__name__} must be a torch.nn.Module with component_names, the names of what it "
            "returns beside the loss; raydet.losses.DetectionLoss is a base to begin with"
        )
    return loss


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _short(value: object) -> str:
    return _some(value) if isinstance(value, list) else str(value)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)
