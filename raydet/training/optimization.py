"""The optimizer, its learning-rate schedule, and the moving average of the weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from raydet.errors import RaydetError
from raydet.recipe import Train

PARTS = ("backbone", "neck", "head")


def freeze(model: nn.Module, settings: Train) -> None:
    """Stop the gradients of the parts whose learning rate is 0.

    Raises:
        RaydetError: the model has no such parts, or nothing is left to train.
    """
    for part in _frozen(model, settings):
        part.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise RaydetError("train.backbone_lr, neck_lr and head_lr: all are 0, so that there is nothing to train")


def train_mode(model: nn.Module, settings: Train) -> None:
    """Set the model to training, but for the norms of frozen parts, which keep their statistics."""
    model.train()
    for part in _frozen(model, settings):
        for module in part.modules():
            if isinstance(module, _NormBase):
                module.eval()


def make_optimizer(model: nn.Module, settings: Train) -> torch.optim.Optimizer:
    """SGD with Nesterov's momentum, or AdamW; biases and norms (all that has one dimension) may go without decay.

    Each group has the `factor` of its part on the learning rate.

    Raises:
        RaydetError: the recipe has learning rates of parts, but the model has no such parts.
    """
    factors = _factors(model, settings)
    kinds = _NormBase | nn.LayerNorm
    norms = {id(p) for module in model.modules() if isinstance(module, kinds) for p in module.parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part, _, last = name.partition(".")
            decays = settings.decay_all or parameter.ndim > 1 or (settings.decay_backbone and part == "backbone")
            decays |= settings.decay_biases and last.endswith("bias") and id(parameter) not in norms
            decay = settings.weight_decay if decays else 0.0
            groups.setdefault((factors.get(part, 1.0), decay), []).append(parameter)
    given = [{"params": group, "factor": factor, "weight_decay": decay} for (factor, decay), group in groups.items()]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(given, lr=settings.lr)
    return torch.optim.SGD(given, lr=settings.lr, momentum=settings.momentum, nesterov=settings.momentum > 0)


def _factors(model: nn.Module, settings: Train) -> dict[str, float]:
    factors = {part: getattr(settings, f"{part}_lr") for part in PARTS}
    for part, factor in factors.items():
        if factor != 1 and not isinstance(getattr(model, part, None), nn.Module):
            raise RaydetError(f"train.{part}_lr is {factor}, but {type(model).__name__} has no part named {part}")
    return factors


def _frozen(model: nn.Module, settings: Train) -> Iterator[nn.Module]:
    return (getattr(model, part) for part, factor in _factors(model, settings).items() if not factor)


@dataclass(frozen=True)
class Schedule:
    """Learning rate by step: a linear warm-up, a cosine, steps or a constant, a constant cooldown.

    All numbers are in steps.

    Attributes:
        total: number of steps of the run.
        warmup: number of first steps, in which the rate rises from lr / warmup to lr.
        cooldown: number of last steps, in which the rate is final · lr, or what it was before if that is lower.
        lr: highest rate.
        final: lowest rate, as a fraction of `lr`.
        kind: shape of the schedule between warmup and cooldown: "cosine", "step" or "constant".
        milestones: steps from which on the rate is `gamma` times what it was, with the kind "step".
        gamma: factor on the rate at each milestone.
    """

    total: int
    warmup: int
    cooldown: int
    lr: float
    final: float
    kind: str = "cosine"
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1

    @classmethod
    def of(cls, settings: Train, total: int) -> Schedule:
        """Return the schedule of a run; warm-up and cooldown shrink to half of a run that is too short for them."""
        per_epoch = total / settings.epochs
        warmup = settings.warmup_steps or settings.warmup_epochs * per_epoch
        cooldown = settings.cooldown_epochs * per_epoch
        if warmup + cooldown > total:
            shrink = total / 2 / (warmup + cooldown)
            warmup, cooldown = warmup * shrink, cooldown * shrink
        milestones = tuple(epoch * per_epoch for epoch in settings.lr_milestones)
        kind, lr, final = settings.schedule, settings.lr, settings.final_lr
        return cls(total, round(warmup), round(cooldown), lr, final, kind, milestones, settings.lr_gamma)

    def __call__(self, step: float) -> float:
        """Return the learning rate of a step, the first being 0; a fraction, where steps are smaller than planned."""
        if step < self.warmup:
            return self.lr * min((step + 1) / self.warmup, 1.0)
        end = self.total - self.cooldown
        if self.kind == "cosine":
            done = min((step - self.warmup) / max(end - self.warmup, 1e-9), 1.0)
            return self.lr * (self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2)
        rate = self.lr
        if self.kind == "step":
            rate *= self.gamma ** sum(step >= milestone for milestone in self.milestones)
        return min(rate, self.lr * self.final) if step >= end else rate


class EMA:
    """Exponential moving average of a model's weights and norm statistics, which is what is validated and kept.

    Its decay rises, so that it follows the young model closely: see `ema_rise` of the recipe.
    """

    def __init__(self, model: nn.Module, settings: Train, total_steps: int):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._settings, self._total = settings, total_steps
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values(), strict=True))
        self._ours = [ours for ours, _ in pairs if ours.is_floating_point()]
        self._theirs = [theirs for _, theirs in pairs if theirs.is_floating_point()]
        self._counters = [(ours, theirs) for ours, theirs in pairs if not ours.is_floating_point()]

    @torch.no_grad()
    def update(self, step: float) -> None:
        """Take in the weights as they are after `step` steps; a fraction, where steps are smaller than planned."""
        torch._foreach_lerp_(self._ours, self._theirs, 1 - self._decay(step))
        for ours, theirs in self._counters:
            ours.copy_(theirs)

    def _decay(self, step: float) -> float:
        decay = self._settings.ema_decay
        if self._settings.ema_rise == "exp":
            return decay * (1 - math.exp(-self._settings.ema_ramp * step / self._total))
        return min(decay, (1 + step) / (10 + step)) if self._settings.ema_rise == "threshold" else decay
