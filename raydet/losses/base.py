"""What the losses share: sums over objects, normalisers over all ranks, and one division."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

_ALONE = ContextVar("alone", default=False)


class Terms(NamedTuple):
    """What the loss of this rank's batch is made of, before weights and division.

    Attributes:
        per_image: [B, K] the K terms, summed over each image.
        normaliser: [] number that the sums over all images and ranks are divided by; below 1 it counts as 1.
        counts: [E] further numbers that the components need, to be summed over batches and ranks.
    """

    per_image: Tensor
    normaliser: Tensor
    counts: Tensor


class DetectionLoss(nn.Module):
    """A loss: `loss, components = criterion(outputs, targets)`. The first K components are of its K terms.

    A subclass gives `terms`, `weights` and `components`, or overrides `forward`. Sums and normalisers are those of all
    ranks: given the same outputs, N ranks with a batch of B learn what one with N · B does.
    """

    component_names: tuple[str, ...]
    has_divisors = False  # whether the terms are divided by different numbers

    def terms(self, outputs: Any, targets: Tensor) -> Terms:
        """Return this rank's sums; targets [N, 6] = image, class, cx, cy, w, h in pixels, on any device."""
        raise NotImplementedError

    @property
    def weights(self) -> tuple[float, ...]:
        """Weight of each of the K terms."""
        raise NotImplementedError

    def divisors(self, terms: Terms) -> Tensor:
        """Return what each of the K sums is divided by: [K] or []. `terms` holds the totals of all ranks."""
        return terms.normaliser.clamp(min=1)

    def components(self, divided: Tensor, weighted: Tensor, terms: Terms) -> Tensor:
        """Return what is logged, in the order of `component_names`.

        Args:
            divided: [K] terms of all ranks after division.
            weighted: [K] the divided terms times their weights; the sum is the loss.
            terms: the totals of all ranks; `per_image` is one row.
        """
        raise NotImplementedError

    def at_epoch(self, epoch: int, epochs: int) -> None:
        """Change what changes in the course of a training; called before each step.

        Args:
            epoch: number of epochs that are done.
            epochs: number of epochs of the training.
        """

    def forward(self, outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss, a scalar to call backward on, and its components, detached and the same on every rank.

        Args:
            outputs: the model's output in training or in evaluation mode.
            targets: [N, 6] image index, class, cx, cy, w, h in pixels, on any device.

        Raises:
            ValueError: the output is of a model that this loss is not for.
        """
        whole = PartialLoss(self)
        loss = whole.add(outputs, targets)
        return loss, whole.finish()[2]

    def weigh(self, terms: Tensor) -> list[Tensor]:
        """Return each of the K terms times its weight."""
        # By plain numbers: a tensor of weights would have to be copied to the device, which waits for it.
        return [weight * term for weight, term in zip(self.weights, terms.unbind(), strict=True)]


def has_terms(criterion: nn.Module) -> TypeGuard[DetectionLoss]:
    """Is a loss made of terms that are known? Of one that overrides `forward` only its result is."""
    return isinstance(criterion, DetectionLoss) and type(criterion).forward is DetectionLoss.forward


class PartialLoss:
    """The loss of a batch that comes in parts, whose gradients add up to those of the whole.

    What the sums are to be divided by is known after the last part only. Until then the first part's divisor stands in,
    which keeps gradients in the range of half precision; `finish` says what they are to be multiplied by.
    """

    def __init__(self, criterion: DetectionLoss):
        self.criterion = criterion
        self._totals: Terms | None = None
        self._counted: Terms | None = None
        self._images: list[Tensor] = []

    def count(self, outputs: Any, targets: Tensor) -> None:
        """Look at a part before any is added, so that all are divided by what the whole is divided by.

        It takes a second pass over the batch, and is for losses whose terms have different divisors: no one number
        corrects the gradients of their parts. Arguments and errors as in `DetectionLoss.forward`.
        """
        self._counted = _joined(self._counted, self._everyones(self.criterion.terms(outputs, targets))[0])

    def add(self, outputs: Any, targets: Tensor) -> Tensor:
        """Return a part's loss, a scalar to call backward on; arguments and errors as in `DetectionLoss.forward`.

        Raises:
            ValueError: the terms have different divisors, and the parts were not counted before.
        """
        mine = self.criterion.terms(outputs, targets)
        self._images.append(mine.per_image.detach())
        everyone, ranks = self._everyones(mine)
        if self._totals is None:
            self._divisors = self.criterion.divisors(everyone if self._counted is None else self._counted)
        elif self._divisors.ndim and self._counted is None:
            raise ValueError(f"{type(self.criterion).__name__} divides its terms by different numbers")
        self._totals = _joined(self._totals, everyone)
        sums = mine.per_image.sum(0)
        # Ranks average their gradients, so each multiplies its share by their number.
        return torch.stack(self.criterion.weigh(sums / self._divisors)).sum() * ranks

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the gradients are to be multiplied by, and the loss and the components of all parts and ranks."""
        assert self._totals is not None
        divisors = self.criterion.divisors(self._totals)
        divided = self._totals.per_image[0] / divisors
        weighted = torch.stack(self.criterion.weigh(divided))
        components = self.criterion.components(divided, weighted, self._totals)
        scale = torch.ones_like(divisors[0]) if divisors.ndim else self._divisors / divisors
        return scale, weighted.sum(), components

    @staticmethod
    def _everyones(mine: Terms) -> tuple[Terms, int]:
        """Return the totals of all ranks, and how many there are."""
        sums = mine.per_image.sum(0)
        size = len(sums)
        totals, ranks = sum_over_ranks(torch.cat((sums, mine.normaliser.view(1), mine.counts)))
        return Terms(totals[None, :size], totals[size], totals[size + 1 :]), ranks

    def shares(self) -> Tensor:
        """Return each image's share of the loss [B, K], by term: over all images and ranks they add up to it."""
        assert self._totals is not None
        divided = torch.cat(self._images) / self.criterion.divisors(self._totals)
        return torch.stack([weight * term for weight, term in zip(self.criterion.weights, divided.T, strict=True)], 1)


def _joined(before: Terms | None, now: Terms) -> Terms:
    """Return the totals of two parts."""
    return now if before is None else Terms(*(a + b for a, b in zip(before, now, strict=True)))


@contextmanager
def alone() -> Iterator[None]:
    """Let losses within count this rank's images only: ranks that do not go in step cannot wait for each other."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def sum_over_ranks(values: Tensor) -> tuple[Tensor, int]:
    """Return the sum of a tensor over all ranks, detached, and how many there are; one where nothing is distributed."""
    values = values.detach().clone()
    if _ALONE.get() or not (dist.is_available() and dist.is_initialized()):
        return values, 1
    dist.all_reduce(values)
    return values, dist.get_world_size()
