"""From a recipe and its data to a job: builds the model and the loss, and refuses what cannot work."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from raydet import losses, models
from raydet.data.index import Index
from raydet.errors import RaydetError, did_you_mean, some
from raydet.evaluation.coco import MAIN_METRIC, CocoEvaluation, metric_names
from raydet.models import Detector, Family, Preprocessing, load_weights
from raydet.models.download import local_weights
from raydet.models.reference_weights import is_uri
from raydet.plugins import accepts, call, is_own, locate
from raydet.recipe import Eval, Recipe
from raydet.runs.checkpoint import Config, build, find
from raydet.runs.folder import run_folder
from raydet.training.extremes import check_pictures
from raydet.training.job import Job, scaled
from raydet.training.optimization import train_mode
from raydet.training.step import part_size


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
        loss: a loss of the user's own in place of the recipe's.

    Raises:
        RaydetError: classes, batch and workers, model and loss, or weights do not fit.
    """
    if train_index is not None:
        _check_data(recipe, train_index, val_index)
    names = val_index.class_names
    count = recipe.model.num_classes
    if count is not None and count != len(names):
        raise RaydetError(
            f"model.num_classes is {count}, but the data has {len(names)} classes ({some(names)}); "
            "set it to null or correct the data"
        )
    name = ""
    if model is None:
        torch.manual_seed(recipe.seed)
        name = recipe.model.name
        model = build(name, len(names), recipe.data.image_size)
        if recipe.model.weights is not None:
            # To measure prediction layers that nobody has trained would be a mistake.
            load_weights(model, _weights(recipe.model.weights, name), train_index is None, names)
    family = _family(model, recipe)
    if family is not None and family.has_queries:
        check_recipe_without_nms(recipe.eval, family)
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
    return Job(recipe, run_folder(recipe), config, model, criterion, train_images, val_index)


def _check_data(recipe: Recipe, train_index: Index, val_index: Index) -> None:
    if train_index.class_names != val_index.class_names:
        raise RaydetError(
            "training and validation data have different classes: "
            f"{some(train_index.class_names)} and {some(val_index.class_names)}"
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


def check_recipe_without_nms(settings: Eval, family: Family) -> None:
    """Check that a recipe sets nothing of NMS for a family that has none.

    Raises:
        RaydetError: it does; the message names the settings.
    """
    given = [key for key in ("iou", "nms_top_k", "class_agnostic") if getattr(settings, key) != getattr(Eval(), key)]
    if given:
        raise RaydetError(
            f"{', '.join(f'eval.{key}' for key in given)}: {family.name} has no NMS, so that this changes nothing: "
            "remove it; eval.score and eval.max_detections say what counts as a detection"
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
    # The validation data may have no objects of some classes, or no small, medium or large ones.
    nothing = CocoEvaluation(val_index, max_dets=settings.max_dets)
    nothing.update(range(len(val_index)), [np.empty((0, 6))] * len(val_index))
    if watch not in nothing.compute():
        raise RaydetError(f"eval.watch: the validation data has no objects that {watch} is measured on: watch another")


def _weights(text: str, model: str) -> str | Path:
    """Return what the recipe's weights mean: a URI, a file, published ones, a checkpoint, or the best one of a run."""
    text = str(local_weights(text, model))
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


def check_norms(recipe: Recipe, model: nn.Module) -> None:
    """Raise RaydetError where a worker takes a single image at once, and a map of it has a single cell before a norm.

    Args:
        recipe: says how many images a worker takes at once, and how small they are.
        model: the model as it is trained, on the CPU.
    """
    train = recipe.train
    fewest, most = recipe.scale.workers
    for workers in range(fewest, most + 1):
        share = train.batch_size // workers
        size = part_size(share, train.micro_batch_size)
        if (share % size or size) > 1 or (train.sync_bn and workers > 1):
            continue
        height, width = smallest = _smallest(recipe)
        norm = _norm_of_one_value(recipe, model, smallest)
        if norm is None:
            return
        by_size = ["data.image_size"] if recipe.augment.multiscale is None else ["augment.multiscale"]
        raise RaydetError(
            f"train.batch_size {train.batch_size} of {workers} worker(s)"
            f"{f' and train.micro_batch_size {train.micro_batch_size}' * (train.micro_batch_size is not None)} leave a "
            f"single image at once, and at {height}x{width} pixels the model's norm {norm} sees one value a channel of "
            f"it, from which it cannot learn: set {_cure(train.batch_size, most, share)}, or {by_size[0]} larger"
        )


def _cure(batch_size: int, workers: int, share: int) -> str:
    """Return the keys to set for parts of two images or more."""
    if share == 1:
        return f"train.batch_size to at least {2 * workers}{' or scale.num_workers lower' * (workers > 1)}"
    enough = next(most for most in range(2, share + 1) if (share % (size := part_size(share, most)) or size) > 1)
    return f"train.micro_batch_size to {enough}"


def _smallest(recipe: Recipe) -> tuple[int, int]:
    """Return the (height, width) of the smallest images that a step trains on."""
    size, sides = recipe.data.image_size, recipe.augment.multiscale
    return size if sides is None else scaled(size, sides[0])


def _norm_of_one_value(recipe: Recipe, model: nn.Module, size: tuple[int, int]) -> str | None:
    """Return the name of the first norm that sees one value a channel of a single image; None: none does."""
    probe = copy.deepcopy(model)
    train_mode(probe, recipe.train)
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if module.training and inputs[0].numel() == inputs[0].shape[1]:
                found.append(name)

        return hook

    for name, module in probe.named_modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(look(name))
    # Torch refuses such a norm; of whatever else fails, the first step tells.
    with torch.no_grad(), torch.random.fork_rng(devices=[]), contextlib.suppress(Exception):
        probe(torch.zeros(1, 3, *size))
    return found[0] if found else None
