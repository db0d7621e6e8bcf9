"""The optimizer, its learning-rate schedule, and the moving average of the weights."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import nn

from raydet.recipe import Train


def make_optimizer(model: nn.Module, settings: Train) -> torch.optim.Optimizer:
    """SGD with Nesterov's momentum, or AdamW; biases and norms (all that has one dimension) may go without decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {
            "params": [p for p in parameters if p.ndim <= 1],
            "weight_decay": settings.weight_decay if settings.decay_all else 0.0,
        },
    ]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr)
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.momentum > 0)


@dataclass(frozen=True)
class Schedule:
    """Learning rate by step: a linear warm-up, half a cosine, a constant cooldown; all numbers in steps.

    Attributes:
        total: steps of the run.
        warmup: the rate rises from lr / warmup to lr.
        cooldown: at the end the rate is final · lr.
        lr: highest rate.
        final: lowest rate, as a share of it.
    """

    total: int
    warmup: int
    cooldown: int
    lr: float
    final: float

    @classmethod
    def of(cls, settings: Train, total: int) -> Schedule:
        """Return the schedule of a run; warm-up and cooldown shrink to half of a run that is too short for them."""
        per_epoch = total / settings.epochs
        warmup = settings.warmup_steps or settings.warmup_epochs * per_epoch
        cooldown = settings.cooldown_epochs * per_epoch
        if warmup + cooldown > total:
            shrink = total / 2 / (warmup + cooldown)
            warmup, cooldown = warmup * shrink, cooldown * shrink
        return cls(total, round(warmup), round(cooldown), settings.lr, settings.final_lr)

    def __call__(self, step: int) -> float:
        """Return the learning rate of a step, the first being 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if step >= self.total - self.cooldown:
            return self.lr * self.final
        done = (step - self.warmup) / (self.total - self.warmup - self.cooldown)
        return self.lr * (self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2)


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
    def update(self, step: int) -> None:
        """Take in the weights as they are after `step` steps."""
        torch._foreach_lerp_(self._ours, self._theirs, 1 - self._decay(step))
        for ours, theirs in self._counters:
            ours.copy_(theirs)

    def _decay(self, step: int) -> float:
        decay = self._settings.ema_decay
        if self._settings.ema_rise == "exp":
            return decay * (1 - math.exp(-self._settings.ema_ramp * step / self._total))
        return min(decay, (1 + step) / (10 + step)) if self._settings.ema_rise == "threshold" else decay
