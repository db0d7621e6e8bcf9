"""One update of the weights: parts of a batch forward and backward, one division, and a look before the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raydet.data.batch import Batch
from raydet.devices import memory_suffices
from raydet.losses.base import PartialLoss, has_terms
from raydet.recipe import Train

Prepare = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Outcome:
    """What became of a step; the same on every rank, but for `suspect`, `shares` and `outputs`. Tensors on the CPU.

    Attributes:
        loss: [] mean of the loss over the ranks.
        components: [C] mean of the components of the loss over the ranks.
        grad_norm: norm of all gradients as one vector, before clipping.
        finite: are loss and gradients finite? Otherwise the weights are as they were.
        overflow: is the step not finite only because the loss was scaled too far for half precision? The scale has been
            lowered.
        suspect: is the step not finite, and may this rank's batch be the reason? It may if the model's output for the
            batch is not finite, or if that of every rank is finite.
        asked: flags of rank 0.
        shares: [B, K] share of each of this rank's images in the loss, by term; None: the terms of the loss are not
            known.
        outputs: output of the model for each part of the batch, on its device; empty: they are not to be kept.
    """

    loss: Tensor
    components: Tensor
    grad_norm: float
    finite: bool
    overflow: bool
    suspect: bool
    asked: tuple[bool, ...]
    shares: Tensor | None = None
    outputs: tuple[Any, ...] = ()


class Step:
    """Makes the steps of a training on one rank.

    Args:
        model: the model that is trained, on the device.
        criterion: the loss.
        optimizer: optimizer of the model's weights.
        settings: section `train` of the recipe.
        device: device of the model.
        ranks: number of ranks that train the model together.
        seed: seed of the training.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: Train,
        device: torch.device,
        ranks: int,
        seed: int,
    ):
        self._criterion, self._optimizer = criterion, optimizer
        # Each rank's norms follow its own batches; the loop makes them one before they are used.
        self._parallel = (
            DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True) if ranks > 1 else None
        )
        self._takes_targets = getattr(model, "takes_targets", False)
        self._network: Callable[..., object] = self._parallel or model
        if settings.compile:
            self._network = torch.compile(self._network)
        self._settings, self._device, self._ranks, self._seed = settings, device, ranks, seed
        self._precision = _precision(settings, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self._precision == torch.float16)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._buffers: dict[torch.dtype, list[Tensor]] = {}
        for buffer in model.buffers():
            self._buffers.setdefault(buffer.dtype, []).append(buffer)
        self._kept = {kind: [buffer.clone() for buffer in buffers] for kind, buffers in self._buffers.items()}
        self._adds_up = has_terms(criterion)  # else only the mean over its parts is known

    def __call__(
        self, batch: Batch, prepare: Prepare, asked: tuple[bool, ...] = (), keep_outputs: bool = False
    ) -> Outcome:
        """Train on a batch.

        Args:
            batch: batch of this rank, on the CPU.
            prepare: turns images [B, 3, H, W] uint8 and targets [N, 6], on the device, into the model's input.
            asked: flags of rank 0 that all ranks get to know.
            keep_outputs: return the outputs of the model as well.

        Raises:
            RaydetError: the memory of the GPU is too small for it.
        """
        for kind, buffers in self._buffers.items():
            torch._foreach_copy_(self._kept[kind], buffers)
        self._optimizer.zero_grad(set_to_none=True)
        most_objects = self._most_objects(batch.targets) if self._takes_targets else 0
        parts = list(self._parts(batch, most_objects))
        remedy = "set train.micro_batch_size below that, which changes the result little, or lower train.batch_size"
        with memory_suffices(f"{len(parts[0].images)} images at once", remedy):
            made = self._backward(parts, prepare, keep_outputs)
        self.scaler.unscale_(self._optimizer)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if made.scale is not None:
            torch._foreach_mul_(gradients, made.scale)
        norm = torch.nn.utils.get_total_norm(gradients)

        # Ranks share their sums: one rank's images can make the loss of all not finite, but not their outputs.
        broken = made.broken.float().view(1)
        unusable = (~torch.isfinite(made.loss)).float().view(1)
        flags = torch.cat((broken, unusable, torch.tensor([float(flag) for flag in asked], device=self._device)))
        losses = torch.cat((made.loss.float().view(1), made.components.float()))
        agreed = torch.cat((flags, losses))
        if self._parallel is not None:
            dist.all_reduce(agreed)
        # The only time that a step waits for the device, if neither model nor loss does.
        own = torch.cat((norm.float().view(1), broken, made.shares.float().flatten()))
        read = torch.cat((own, agreed)).cpu()
        own, agreed = read[: len(own)], read[len(own) :]
        (grad_norm, broken_here), shares = own[:2].tolist(), own[2:].view(made.shares.shape)
        (any_broken, bad, *told), losses = agreed[: len(flags)].tolist(), agreed[len(flags) :] / self._ranks
        finite = not bad and math.isfinite(grad_norm)
        overflow = not finite and not bad and self.scaler.is_enabled() and self.scaler.get_scale() > 1
        if finite:
            if self._settings.clip_grad_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(self._parameters, self._settings.clip_grad_norm, norm)
            with memory_suffices(
                "the state of the optimizer beside the model", "set train.optimizer=sgd, or choose a smaller model"
            ):
                self.scaler.step(self._optimizer)
        else:
            for kind, buffers in self._buffers.items():  # norms have seen what was not finite
                torch._foreach_copy_(buffers, self._kept[kind])
        if self.scaler.is_enabled():
            self.scaler.update()
        suspect = not finite and not overflow and bool(broken_here or not any_broken)
        return Outcome(
            losses[0],
            losses[1:],
            grad_norm,
            finite,
            overflow,
            suspect,
            tuple(flag > 0 for flag in told),
            shares if self._adds_up else None,
            made.outputs,
        )

    def _backward(self, parts: list[_Part], prepare: Prepare, keep_outputs: bool) -> _Made:
        images = sum(len(part.images) for part in parts)
        total = PartialLoss(self._criterion) if self._adds_up else None  # type: ignore[arg-type]
        sums: list[tuple[Tensor, Tensor]] = []
        kept: list[Any] = []
        broken = torch.zeros((), dtype=torch.bool, device=self._device)
        if total is not None and len(parts) > 1 and total.criterion.has_divisors:
            self._count(parts, prepare, total)
        for number, part in enumerate(parts, start=1):
            inputs, targets = self._prepared(part, prepare)
            with self._together(number == len(parts)):
                outputs = self._forward(inputs, targets, part)
                if keep_outputs:
                    kept.append(outputs)
                for tensor in _tensors(outputs):
                    broken |= ~torch.isfinite(tensor).all()
                if total is not None:
                    loss = total.add(outputs, targets)
                else:
                    loss, components = self._criterion(outputs, targets)
                    share = len(part.images) / images
                    loss = loss * share if share < 1 else loss
                    sums.append((loss.detach(), components * share if share < 1 else components))
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if total is not None:
            scale, loss, components = total.finish()
            return _Made(loss, components, scale if len(parts) > 1 else None, broken, total.shares(), tuple(kept))
        losses, each = zip(*sums, strict=True)
        nothing = torch.empty(0, device=self._device)
        return _Made(torch.stack(losses).sum(), torch.stack(each).sum(0), None, broken, nothing, tuple(kept))

    def _prepared(self, part: _Part, prepare: Prepare) -> tuple[Tensor, Tensor]:
        return prepare(*(tensor.to(self._device, non_blocking=True) for tensor in (part.images, part.targets)))

    def _forward(self, inputs: Tensor, targets: Tensor, part: _Part) -> object:
        half = self._precision != torch.float32
        further = (targets, part.seeds, part.most_objects) if self._takes_targets else ()
        with torch.autocast(self._device.type, self._precision if half else None, enabled=half):
            return self._network(inputs, *further)

    @torch.no_grad()
    def _count(self, parts: list[_Part], prepare: Prepare, total: PartialLoss) -> None:
        """Show the loss all parts once; random numbers and the statistics of norms stay as they were."""
        drawn = torch.get_rng_state()
        for part in parts:
            inputs, targets = self._prepared(part, prepare)
            total.count(self._forward(inputs, targets, part), targets)
        torch.set_rng_state(drawn)
        for kind, buffers in self._buffers.items():
            torch._foreach_copy_(buffers, self._kept[kind])

    def _most_objects(self, targets: Tensor) -> int:
        """Return the most objects of an image in the batches of all ranks."""
        most = torch.bincount(targets[:, 0].long(), minlength=1).max()
        if self._parallel is not None:
            most = most.to(self._device)
            dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)

    def _parts(self, batch: Batch, most_objects: int) -> Iterator[_Part]:
        count = len(batch.images)
        size = part_size(count, self._settings.micro_batch_size)
        # What a model draws for an image does not depend on the rank or the part that the image is in.
        seeds = torch.tensor([hash((self._seed, position)) for position in batch.positions.tolist()])
        if size == count:
            yield _Part(batch.images, batch.targets, seeds, most_objects)
            return
        for first in range(0, count, size):
            within = (batch.targets[:, 0] >= first) & (batch.targets[:, 0] < first + size)
            targets = batch.targets[within]
            targets[:, 0] -= first
            rows = slice(first, first + size)
            yield _Part(batch.images[rows], targets, seeds[rows], most_objects)

    def _together(self, last: bool) -> AbstractContextManager[None]:
        """Ranks exchange their gradients in the last part only."""
        return nullcontext() if last or self._parallel is None else self._parallel.no_sync()


def part_size(count: int, most: int | None) -> int:
    """Return how many images of a worker's share each part of a step has, the last perhaps less.

    Args:
        count: number of images of the share.
        most: largest number of images of a part; None: any. Parts have about the same size, as batch norm cannot learn
            from a single image.
    """
    return count if most is None else -(-count // -(-count // most))


class _Part(NamedTuple):
    """Images of a batch that go through the model at once, their targets and seeds, and the most objects of an image
    in the whole batch of all ranks."""

    images: Tensor
    targets: Tensor
    seeds: Tensor
    most_objects: int


class _Made(NamedTuple):
    """What forward and backward made: see Outcome; `scale` is what the gradients are still to be multiplied by,
    `broken` whether an output is not finite."""

    loss: Tensor
    components: Tensor
    scale: Tensor | None
    broken: Tensor
    shares: Tensor
    outputs: tuple[Any, ...]


def _tensors(outputs: object) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs.detach()
    elif isinstance(outputs, list | tuple):
        for output in outputs:
            yield from _tensors(output)


def _precision(settings: Train, device: torch.device) -> torch.dtype:
    if settings.precision == "auto":
        if device.type != "cuda":
            return torch.float32
        # GPUs before Ampere, such as T4 and V100, only emulate bf16, which is slower than fp32.
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[settings.precision]
