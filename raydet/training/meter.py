"""What a training says of itself: its first lines, and numbers of the steps since the last line."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from raydet.data.batch import Batch
from raydet.evaluation.coco import MAIN_METRIC
from raydet.runs.checkpoint import Progress
from raydet.training.job import Job, World
from raydet.training.optimization import Schedule
from raydet.training.step import Outcome


class Meter:
    """Loss components, speed and waiting since the last progress line."""

    def __init__(self, criterion: nn.Module, job: Job, state: Progress, device: torch.device):
        self._names: tuple[str, ...] = criterion.component_names  # type: ignore[assignment]
        self._prefix = f"train/{type(criterion).__name__}"
        self._job, self._device = job, device
        self._begin = state.position
        self._began = time.monotonic()
        self._reset()

    def _reset(self) -> None:
        self._sum: Tensor | None = None  # sum of the loss and its components
        self._steps = self._skipped = self._images = 0
        self._grad_norm = 0.0
        self._waited = 0.0
        self._since = time.monotonic()

    def waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Pass the batches on and measure how long they are waited for; the first is not counted."""
        first = True
        while True:
            began = time.monotonic()
            batch = next(batches, None)
            if batch is None:
                return
            if first:
                self._began = self._since = time.monotonic()
                first = False
            else:
                self._waited += time.monotonic() - began
            yield batch

    def update(self, outcome: Outcome, images: int) -> None:
        """Count a step."""
        self._images += images
        if not outcome.finite:
            self._skipped += 1
            return
        values = torch.cat((outcome.loss.view(1), outcome.components)).double()
        self._sum = values if self._sum is None else self._sum + values
        self._grad_norm += outcome.grad_norm
        self._steps += 1

    def pause(self) -> None:
        """Leave out the time since the last line: it was not training."""
        self._since = time.monotonic()

    def flush(self, state: Progress, lr: float) -> tuple[dict[str, float], str]:
        """Return the means over all steps since the last call, as metrics and as a line of text."""
        epochs, position = self._job.recipe.train.epochs, state.position
        seconds = time.monotonic() - self._since
        speed, wait = self._images / seconds, self._waited / seconds
        elapsed = time.monotonic() - self._began  # validations included, as more of them will come
        left = elapsed / (position - self._begin) * max(0, epochs * self._job.train_images - position)
        step, total = state.step, state.step + self._job.steps_left(position, self._images // self.steps)
        numbers: dict[str, float] = {}
        losses = "all skipped: not finite"
        if self._sum is not None:
            loss, *means = (self._sum / self._steps).tolist()
            values = dict(zip(self._names, means, strict=True))
            for name in ("Loss", "loss"):  # what the families call the sum
                values.pop(name, None)
            numbers = {"train/loss": loss, **{f"{self._prefix}/{name}": value for name, value in values.items()}}
            numbers["train/grad_norm"] = self._grad_norm / self._steps
            losses = f"{loss:.3f} ({'  '.join(f'{name} {value:.3f}' for name, value in values.items())})"
        memory = _memory_gb(self._device)
        numbers |= {
            "train/lr": lr,
            "train/skipped": self._skipped,
            "perf/images_per_s": speed,
            "perf/data_wait": wait,
            "perf/memory_gb": memory,
            "perf/eta_s": left,
        }
        text = (
            f"epoch {min(position / self._job.train_images, epochs):.2f}/{epochs}  step {step}/{total}  loss {losses}  "
            f"lr {lr:.5f}  {speed:.1f} images/s  {wait:.0%} waiting for data  {memory:.1f} GB  ETA {_clock(left)}"
        )
        self._reset()
        return numbers, text

    @property
    def steps(self) -> int:
        """Steps since the last line."""
        return self._steps + self._skipped


def opening(job: Job, world: World, schedule: Schedule, state: Progress) -> Iterator[str]:
    """Yield the lines that a training begins with."""
    recipe, settings = job.recipe, job.recipe.train
    parameters, trained = (
        sum(p.numel() for p in job.model.parameters() if p.requires_grad or everything) for everything in (True, False)
    )
    yield (
        f"{job.config.model or type(job.model).__name__}: {parameters / 1e6:.2f} M parameters"
        f"{f' ({trained / 1e6:.2f} M trained)' if trained < parameters else ''}, "
        f"{len(job.config.class_names)} classes, {job.config.image_size[0]}x{job.config.image_size[1]} px; "
        f"{job.train_images} training and {len(job.val_index)} validation images"
    )
    batch = job.batch_size(world.size)
    each, most = batch // world.size, settings.micro_batch_size
    yield (
        f"{settings.epochs} epochs, {job.steps_left(0, batch)} steps of {batch} images: "
        f"{world.size} worker(s) on {world.device.type}"
        f"{f', {-(-each // most)} parts of up to {most} images a step' if most and most < each else ''}"
    )
    if batch < settings.batch_size:
        yield (
            f"train.batch_size {settings.batch_size} cannot be shared by {world.size} workers equally: "
            f"steps take {batch} images while there are so many"
        )
    per_epoch = job.total_steps / settings.epochs
    for what, steps, wanted in (
        ("warm-up", schedule.warmup, settings.warmup_steps / per_epoch or settings.warmup_epochs),
        ("cooldown", schedule.cooldown, settings.cooldown_epochs),
    ):
        if steps < round(wanted * per_epoch):
            yield f"the {what} of {wanted:g} epochs is too long for this run: shortened to {steps / per_epoch:.2f}"
    if settings.batch_size > job.train_images:
        yield f"a step takes {settings.batch_size} images, but there are {job.train_images}: lower train.batch_size"
    if settings.epochs <= recipe.augment.close_epochs:
        yield "augment.close_epochs covers the whole run: it is without mosaic, affine, mixup and the like"
    if job.config.licence:
        yield f"weights: {recipe.model.weights}; licence: {job.config.licence}"
    if state.step:
        yield f"resumed after step {state.step}"


def validation_line(what: str, metrics: dict[str, float], seconds: float) -> str:
    """Return the line on a validation."""
    names = (MAIN_METRIC, "mAP@0.50", "mAP@0.75")
    shown = "  ".join(f"{name} {metrics.get(f'val/{name}', 0.0):.4f}" for name in names)
    return f"{what} validated in {seconds:.1f} s: {shown}"


def _memory_gb(device: torch.device) -> float:
    """GB that the process has: of the GPU its peak; of a CPU's memory what is its own now, without the pages that it
    shares with others, such as those of Ray's object store."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    pages = Path("/proc/self/statm")
    if pages.exists():
        _, resident, shared, *_ = map(int, pages.read_text().split())
        return (resident - shared) * os.sysconf("SC_PAGE_SIZE") / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # macOS: bytes


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
