"""Refuses a training whose norms would see one value a channel, which has no variance: its first step would fail."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from raydet.errors import RaydetError
from raydet.recipe import Recipe
from raydet.training.optimization import train_mode
from raydet.training.run import scaled
from raydet.training.step import part_size


def check_norms(recipe: Recipe, model: nn.Module) -> None:
    """Raise RaydetError where a worker takes a single image at once, and a map of it has a single cell before a norm.

    Args:
        recipe: says how many images a worker takes at once, and how small they are.
        model: as it is trained, on the CPU.
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
