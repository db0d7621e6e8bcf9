"""The worker loop: what every rank of a training does, from the first line to the last."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from raydet.data.batch import Batch
from raydet.data.problems import Problems
from raydet.devices import agreed
from raydet.losses.base import DetectionLoss
from raydet.models import Preprocessing
from raydet.predict.predictor import post_prediction
from raydet.runs import checkpoint
from raydet.runs.checkpoint import Progress
from raydet.runs.log import RunLog
from raydet.training.extremes import TrainPictures, ValPictures
from raydet.training.job import Job, World, noting_errors
from raydet.training.keeper import Keeper
from raydet.training.meter import Meter, opening, validation_line
from raydet.training.optimization import EMA, Schedule, freeze, make_optimizer, train_mode
from raydet.training.step import Step
from raydet.training.validation import evaluate, metrics_of


@dataclass(frozen=True)
class Ended:
    """How a worker loop ended.

    Attributes:
        metrics: of the last validation, by name.
        interrupted: it was told to stop, and has kept a checkpoint to go on from.
    """

    metrics: dict[str, float]
    interrupted: bool = False


def train_loop(job: Job, world: World, log: RunLog) -> Ended:  # noqa: PLR0912 - it reads top to bottom
    """Train, from the beginning or from the last checkpoint in the run's folder.

    Raises:
        RaydetError: losses or gradients are not finite, a metric does not exist, or the last checkpoint cannot be kept.
    """
    recipe, settings = job.recipe, job.recipe.train
    device, leader = world.device, world.rank == 0
    batch_size = job.batch_size(world.size)

    model: nn.Module = job.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert job.criterion is not None
    criterion = job.criterion.to(device)
    freeze(model, settings)
    optimizer = make_optimizer(model, settings)
    schedule = Schedule.of(settings, job.total_steps)
    average = EMA(model, settings, job.total_steps)
    if settings.sync_bn and world.size > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]  # of the same tensors: the average goes on following
    step = Step(model, criterion, optimizer, settings, device, world.size)
    pictures = TrainPictures(job, world, log, criterion, post_prediction(job.model, recipe.eval))
    torch.backends.cudnn.benchmark = True

    state = Progress()
    metrics: dict[str, float] = {}
    trained = {"optimizer": optimizer, "scaler": step.scaler}
    folder, damaged = agreed(checkpoint.latest(job.folder) if leader else None)
    if folder is not None:
        folder = job.folder / folder.name  # each machine may have a copy of its own
        state, metrics = checkpoint.restore(folder, average.model, model, trained)
    keeper = Keeper(job, world, log, average.model, {"model": model, **trained})
    keeper.begin(state, damaged)
    if leader:
        for line in opening(job, world, schedule, state):
            log.say(line)

    val_batches = world.val_batches()
    beside = recipe.scale.async_validation and world.validate is not None
    meter = Meter(criterion, job, state, device)
    train_mode(model, settings)
    ended = keeper.patience_is_over(state)
    interrupted = False
    left = 0 if ended else job.steps_left(state.position, batch_size)
    stream = world.train_batches(state.position, state.position + left * batch_size)
    for batch in meter.waiting(noting(stream, job, world)):
        # Whatever a model draws at random is a function of (seed, position, rank), so that a restart repeats it.
        torch.manual_seed(hash((recipe.seed, state.position, world.rank)))
        planned = state.position / settings.batch_size  # steps, of the recipe's batch size
        lr = schedule(planned)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        if isinstance(criterion, DetectionLoss):
            criterion.at_epoch(job.epoch_of(state.position), settings.epochs)
        size = job.multiscale(int(planned))
        prepare = partial(_prepared, preprocessing=job.config.preprocessing, size=size)
        outcome = step(batch, prepare, keeper.asked(state), pictures.need_outputs(state.position))
        interrupted, due, ended = outcome.asked
        state.step += 1
        pictures.step(state.position, state.step, batch, outcome, size)
        state.position += batch_size
        if outcome.finite:
            average.update(state.position / settings.batch_size)
            state.bad = 0
        else:
            keeper.skipped(state, outcome, batch)
        meter.update(outcome, batch_size)
        epoch = job.epoch_of(state.position)
        ends_epoch = epoch > job.epoch_of(state.position - batch_size)
        if ends_epoch or state.step % recipe.track.log_every == 0:
            numbers, text = meter.flush(state, lr)
            if leader:
                log.metrics(step=state.step, epoch=epoch, position=state.position, **numbers)
                log.say(text)
        if ends_epoch:
            pictures.epoch_ends(epoch, state.step)
            metrics = {}
            validates = job.validates_after(state.position, batch_size)
            if validates and not beside:
                shown = ValPictures(job, world.rank, log, criterion, epoch, state.step)
                what = f"epoch {epoch}"
                metrics = agreed(_validate_average(average.model, val_batches, job, world, log, state, what, shown))
                ended = keeper.judge(state, metrics)
            keeper.save(state, metrics, awaited=validates and beside)
            world.report({"step": state.step, "epoch": epoch, **metrics})
        elif interrupted or due or ended:
            keeper.save(state, {})
        if ends_epoch or due:
            meter.pause()
        if interrupted or ended:
            break

    # Let go of the stream: it would go on making batches beside what is still to be done.
    stream.close()
    if interrupted:
        keeper.stopped(state)
        return Ended(metrics, interrupted=True)
    metrics = keeper.wait_for_validations(state) or metrics
    keeper.check_last(state)
    best = agreed(checkpoint.ranked(job.folder)[: recipe.track.keep_checkpoints] if leader else None)
    if recipe.track.average_best and len(best) > 1:
        if leader:
            checkpoint.average_weights(average.model, best)
        _broadcast(average.model.state_dict().values())
        what = f"the average of the best {len(best)}"
        found = _validate_average(average.model, val_batches, job, world, log, state, what)
        keeper.save_average(state, found)
    return Ended(metrics)


def resized(images: Tensor, targets: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Scale images [B, 3, H, W], float, and targets [N, 6] in their pixels to `size` = (height, width)."""
    height, width = images.shape[-2:]
    if size == (height, width):
        return images, targets
    targets = targets.clone()
    targets[:, 2::2] *= size[1] / width
    targets[:, 3::2] *= size[0] / height
    return functional.interpolate(images, size, mode="bilinear", align_corners=False), targets


def evaluation_loop(job: Job, world: World, log: RunLog) -> bytes | None:
    """Detect with the job's model in its validation images; see `raydet.training.validation.evaluate`."""
    return _detect(on_device(job, world), world.val_batches()(), job, world, log)


def on_device(job: Job, world: World) -> nn.Module:
    """Return the model on the device of this rank, in evaluation mode."""
    model: nn.Module = job.model.to(world.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    return model


def _prepared(
    images: Tensor, targets: Tensor, preprocessing: Preprocessing, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    return resized(preprocessing(images), targets, size)


def noting(batches: Iterator[Batch], job: Job, world: World) -> Iterator[Batch]:
    """Pass batches on; see `raydet.training.job.noting_errors`."""
    return noting_errors(batches, Problems(job.recipe.data.on_error, job.recipe.data.max_errors), world.beat)


def _detect(
    model: nn.Module,
    batches: Iterator[Batch],
    job: Job,
    world: World,
    log: RunLog,
    pictures: ValPictures | None = None,
) -> bytes | None:
    say = log.say if world.rank == 0 else nothing
    batches = noting(batches, job, world)
    return evaluate(
        model,
        batches,
        job.val_index,
        job.config.preprocessing,
        job.recipe.eval,
        world.device,
        say,
        pictures,
        world.beat,
    )


def _validate_average(
    model: nn.Module,
    val_batches: Callable[[], Iterator[Batch]],
    job: Job,
    world: World,
    log: RunLog,
    state: Progress,
    what: str,
    pictures: ValPictures | None = None,
) -> dict[str, float]:
    """Validate the moving average, or an average of checkpoints; log and return its metrics, on rank 0."""
    began = time.monotonic()
    _broadcast(model.buffers())  # each rank updates its own statistics of the norms; rank 0's are kept
    state_of_it = _detect(model, val_batches(), job, world, log, pictures)
    metrics = {f"val/{name}": value for name, value in metrics_of(job.val_index, state_of_it).items()}
    if world.rank == 0:
        seconds = time.monotonic() - began
        log.say(validation_line(what, metrics, seconds))
        if what.startswith("epoch"):
            log.metrics(step=state.step, epoch=job.epoch_of(state.position), **metrics, **{"perf/val_s": seconds})
    return metrics


def nothing(text: str) -> Any:
    """Say nothing: only rank 0 does."""


def _broadcast(tensors: Iterable[Tensor]) -> None:
    """Give every rank rank 0's values."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)
