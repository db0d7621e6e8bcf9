"""What the losses share: sums over objects, normalisers over all ranks, and one division."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Terms(NamedTuple):
    """What the loss of this rank's batch is made of, before weights and division.

    Attributes:
        per_image: [B, K] the K terms, summed over each image.
        normaliser: [] what their sum over all images and ranks is divided by, and at least by 1.
        counts: [E] further numbers that the components need, to be summed over batches and ranks.
    """

    per_image: Tensor
    normaliser: Tensor
    counts: Tensor


class DetectionLoss(nn.Module):
    """A loss: `loss, components = criterion(outputs, targets)`.

    A subclass gives `terms`, `weights` and `components`, or overrides `forward`. Sums and normalisers are those of all
    ranks: given the same outputs, N ranks with a batch of B learn what one with N · B does.
    """

    component_names: tuple[str, ...]

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
            weighted: [K] the same times the weights; their sum is the loss.
            terms: the totals of all ranks; `per_image` is one row.
        """
        raise NotImplementedError

    def at_epoch(self, epoch: int) -> None:
        """Change what changes in the course of a training; called before each step with the epochs that are done."""

    def forward(self, outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss, a scalar to call backward on, and its components, detached and the same on every rank.

        Args:
            outputs: the model's output in training or in evaluation mode.
            targets: [N, 6] image index, class, cx, cy, w, h in pixels, on any device.

        Raises:
            ValueError: the output is of a model that this loss is not for.
        """
        mine = self.terms(outputs, targets)
        sums = mine.per_image.sum(0)
        totals, world_size = sum_over_ranks(torch.cat((sums, mine.normaliser.view(1), mine.counts)))
        size = len(sums)
        everyone = Terms(totals[None, :size], totals[size], totals[size + 1 :])
        divisors = self.divisors(everyone)
        # Ranks average their gradients, so each multiplies its share by their number.
        loss = torch.stack(self._weigh(sums / divisors)).sum() * world_size
        divided = totals[:size] / divisors
        return loss, self.components(divided, torch.stack(self._weigh(divided)), everyone)

    def _weigh(self, terms: Tensor) -> list[Tensor]:
        # By plain numbers: a tensor of weights would have to be copied to the device, which waits for it.
        return [weight * term for weight, term in zip(self.weights, terms.unbind(), strict=True)]


def sum_over_ranks(values: Tensor) -> tuple[Tensor, int]:
    """Return the sum of a tensor over all ranks, detached, and how many there are; one where nothing is distributed."""
    values = values.detach().clone()
    if not (dist.is_available() and dist.is_initialized()):
        return values, 1
    dist.all_reduce(values)
    return values, dist.get_world_size()
