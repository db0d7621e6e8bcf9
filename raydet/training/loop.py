"""The worker loop: what every rank of a training does, from the first line to the last."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from raydet.data.batch import Batch
from raydet.data.problems import Problems
from raydet.losses.base import DetectionLoss, sum_over_ranks
from raydet.metrics import MAIN_METRIC
from raydet.training import checkpoint
from raydet.training.evaluate import evaluate
from raydet.training.optimization import EMA, Schedule, make_optimizer
from raydet.training.run import Job, RunLog, World, noting_errors


def train_loop(job: Job, world: World, log: RunLog) -> dict[str, float]:
    """Train, from the beginning or from the checkpoint that the world gives; return the last validation's metrics."""
    settings, recipe = job.recipe.train, job.recipe
    device, leader = world.device, world.rank == 0
    total = job.total_steps

    model: nn.Module = job.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert job.criterion is not None
    criterion = job.criterion.to(device)
    optimizer = make_optimizer(model, settings)
    schedule = Schedule.of(settings, total)
    average = EMA(model, settings, total)
    step = 0
    metrics: dict[str, float] = {}
    with world.checkpoint() as folder:
        if folder is not None:
            step, metrics = checkpoint.restore(folder, average.model, model, optimizer, device)
    if leader:
        log.resume(step)
        for line in _opening(job, world, schedule, step):
            log.say(line)
    # Each rank's norms follow its own batches; `_broadcast_buffers` makes them one before they are used.
    parallel = partial(DistributedDataParallel, broadcast_buffers=False, gradient_as_bucket_view=True)
    network = parallel(model) if world.size > 1 else model
    bf16 = settings.precision == "bf16" or (settings.precision == "auto" and device.type == "cuda")
    torch.backends.cudnn.benchmark = True

    val_batches = world.val_batches()
    meter = Meter(criterion, job, step)
    model.train()
    stream = world.train_batches(step * settings.batch_size, total * settings.batch_size)
    for batch in meter.waiting(noting_errors(stream, Problems(recipe.data.on_error, recipe.data.max_errors))):
        # Whatever a model draws at random is a function of (seed, step, rank), so that a restart repeats it.
        torch.manual_seed(hash((recipe.seed, step, world.rank)))
        lr = schedule(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        images = job.config.preprocessing(batch.images.to(device, non_blocking=True))
        images, targets = resized(images, batch.targets.to(device, non_blocking=True), job.multiscale(step))
        if isinstance(criterion, DetectionLoss):
            criterion.at_epoch(job.epoch_of(step))
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            outputs = network(images)
        loss, components = criterion(outputs, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
        average.update(step)

        meter.update(loss.detach(), components, len(batch.images) * world.size)
        epoch = job.epoch_of(step)
        ends_epoch = epoch > job.epoch_of(step - 1) or step == total
        if ends_epoch or step % recipe.track.log_every == 0:
            numbers, text = meter.flush(step, lr)  # on all ranks: it asks them all
            if leader:
                log.metrics(step=step, epoch=epoch, **numbers)
                log.say(text)
        if not ends_epoch:
            continue

        metrics = {}
        if job.validates_after(step):
            began = time.monotonic()
            _broadcast_buffers(average.model)
            found = _validate(average.model, val_batches(), job, world, log)
            metrics = {f"val/{name}": value for name, value in found.items()}
            if leader:
                seconds = time.monotonic() - began
                log.metrics(step=step, epoch=epoch, **metrics, **{"perf/val_s": seconds})
                log.say(_validation_line(epoch, metrics, seconds))

        write = partial(
            checkpoint.save,
            config=job.config,
            average=average.model,
            online=model,
            optimizer=optimizer,
            step=step,
            epoch=epoch,
            metrics=metrics,
        )
        world.report({"step": step, "epoch": epoch, **metrics}, epoch, write)
        meter.pause()
    return metrics


def resized(images: Tensor, targets: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Scale images [B, 3, H, W], float, and targets [N, 6] in their pixels to `size` = (height, width)."""
    height, width = images.shape[-2:]
    if size == (height, width):
        return images, targets
    targets = targets.clone()
    targets[:, 2::2] *= size[1] / width
    targets[:, 3::2] *= size[0] / height
    return functional.interpolate(images, size, mode="bilinear", align_corners=False), targets


def evaluation_loop(job: Job, world: World, log: RunLog) -> dict[str, float]:
    """Evaluate the job's model on its validation images; return the metrics on rank 0."""
    model: nn.Module = job.model.to(world.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    return _validate(model, world.val_batches()(), job, world, log)


def _validate(model: nn.Module, batches: Iterator[Batch], job: Job, world: World, log: RunLog) -> dict[str, float]:
    say = log.say if world.rank == 0 else lambda text: None
    batches = noting_errors(batches, Problems(job.recipe.data.on_error, job.recipe.data.max_errors))
    return evaluate(model, batches, job.val_index, job.config.preprocessing, job.recipe.eval, world.device, say)


class Meter:
    """Loss components, speed and waiting since the last progress line."""

    def __init__(self, criterion: nn.Module, job: Job, step: int):
        self._names: tuple[str, ...] = criterion.component_names  # type: ignore[assignment]
        self._prefix = f"train/{type(criterion).__name__}"
        self._job = job
        self._begin_step = step
        self._began = time.monotonic()
        self._reset()

    def _reset(self) -> None:
        self._sum: Tensor | None = None  # of the loss and its components
        self._steps = self._images = 0
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

    def update(self, loss: Tensor, components: Tensor, images: int) -> None:
        """Count a step; nothing is read back from the device."""
        values = torch.cat((loss.view(1), components))
        self._sum = values if self._sum is None else self._sum + values
        self._steps += 1
        self._images += images

    def pause(self) -> None:
        """Leave out the time since the last line: it was not training."""
        self._since = time.monotonic()

    def flush(self, step: int, lr: float) -> tuple[dict[str, float], str]:
        """Return the means over all steps since the last call and all ranks, as metrics and as a line of text."""
        assert self._sum is not None
        # A rank's loss is its own share, and so may be the components of a user's loss.
        total, ranks = sum_over_ranks(self._sum)
        loss, *means = (total / (ranks * self._steps)).tolist()
        values = dict(zip(self._names, means, strict=True))
        for name in ("Loss", "loss"):  # what the families call the sum
            values.pop(name, None)
        seconds = time.monotonic() - self._since
        speed, wait = self._images / seconds, self._waited / seconds
        self._reset()
        elapsed = time.monotonic() - self._began  # validations included, as more of them will come
        left = elapsed / (step - self._begin_step) * (self._job.total_steps - step)
        epoch = step * self._job.recipe.train.batch_size / self._job.train_images
        numbers: dict[str, float] = {
            "train/loss": loss,
            **{f"{self._prefix}/{name}": value for name, value in values.items()},
            "train/lr": lr,
            "perf/images_per_s": speed,
            "perf/data_wait": wait,
        }
        shown = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
        text = (
            f"epoch {min(epoch, self._job.recipe.train.epochs):.2f}/{self._job.recipe.train.epochs}  "
            f"step {step}/{self._job.total_steps}  loss {loss:.3f} ({shown})  lr {lr:.5f}  "
            f"{speed:.1f} images/s  {wait:.0%} waiting for data  ETA {_clock(left)}"
        )
        return numbers, text


def _opening(job: Job, world: World, schedule: Schedule, step: int) -> Iterator[str]:
    settings = job.recipe.train
    parameters = sum(p.numel() for p in job.model.parameters())
    yield (
        f"{job.config.model or type(job.model).__name__}: {parameters / 1e6:.2f} M parameters, "
        f"{len(job.config.class_names)} classes, {job.config.image_size[0]}x{job.config.image_size[1]} px; "
        f"{job.train_images} training and {len(job.val_index)} validation images"
    )
    yield (
        f"{settings.epochs} epochs, {job.total_steps} steps of {settings.batch_size} images: "
        f"{world.size} worker(s) on {world.device.type}"
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
    if settings.epochs <= job.recipe.augment.close_epochs:
        yield "augment.close_epochs covers the whole run: it is without mosaic, affine and mixup"
    if job.config.licence:
        yield f"weights: {job.recipe.model.weights}; licence: {job.config.licence}"
    if step:
        yield f"resumed after step {step}"


def _validation_line(epoch: int, metrics: dict[str, float], seconds: float) -> str:
    names = (MAIN_METRIC, "mAP@0.50", "mAP@0.75")
    shown = "  ".join(f"{name} {metrics.get(f'val/{name}', 0.0):.4f}" for name in names)
    return f"epoch {epoch} validated in {seconds:.1f} s: {shown}"


def _broadcast_buffers(model: nn.Module) -> None:
    """Give every rank rank 0's norm statistics: each updates its own, and rank 0's are kept."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
