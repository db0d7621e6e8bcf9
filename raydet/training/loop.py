"""The worker loop: what every rank of a training does, from the first line to the last."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from raydet.devices import agreed
from raydet.losses.base import DetectionLoss
from raydet.models import Preprocessing
from raydet.predict.predictor import post_prediction
from raydet.runs import checkpoint
from raydet.runs.checkpoint import Progress
from raydet.training.extremes import TrainPictures, ValPictures
from raydet.training.job import Run, noting_errors
from raydet.training.keeper import Keeper
from raydet.training.meter import Meter, opening, validation_line
from raydet.training.optimization import EMA, Schedule, freeze, make_optimizer, train_mode
from raydet.training.step import Step
from raydet.training.validation import Follower, Validation, metrics_of


@dataclass(frozen=True)
class Ended:
    """How a worker loop ended.

    Attributes:
        metrics: the metrics of the last validation, by name.
        interrupted: it was told to stop, and has kept a checkpoint to go on from.
    """

    metrics: dict[str, float]
    interrupted: bool = False


def train_loop(run: Run) -> Ended:  # noqa: PLR0912 - it reads top to bottom
    """Train, from the beginning or from the last checkpoint in the folder of the run.

    Raises:
        RaydetError: losses or gradients are not finite, a metric does not exist, or the last checkpoint cannot be kept.
    """
    job, world, log = run.job, run.world, run.log
    recipe, settings, device = job.recipe, job.recipe.train, world.device
    batch_size = job.batch_size(world.size)

    # What is trained, and by what.
    model: nn.Module = job.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert job.criterion is not None
    criterion = job.criterion.to(device)
    freeze(model, settings)
    optimizer = make_optimizer(model, settings)
    schedule = Schedule.of(settings, job.total_steps)
    average = EMA(model, settings, job.total_steps)
    if settings.sync_bn and world.size > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]  # it keeps the tensors, which the average follows
    step = Step(model, criterion, optimizer, settings, device, world.size, recipe.seed)
    torch.backends.cudnn.benchmark = True

    # Go on from the last checkpoint, if there is one.
    state = Progress()
    metrics: dict[str, float] = {}
    trained = {"optimizer": optimizer, "scaler": step.scaler}
    folder, damaged = agreed(checkpoint.latest(job.folder) if run.leader else None)
    if folder is not None:
        folder = job.folder / folder.name  # each machine may have a copy of its own
        state, metrics = checkpoint.restore(folder, average.model, model, trained)

    # Who follows the training: checkpoints, validations, numbers and pictures.
    keeper = Keeper(run, average.model, {"model": model, **trained})
    keeper.begin(state, damaged)
    validation = Validation.of(run)
    beside = recipe.scale.async_validation and world.validate is not None
    meter = Meter(criterion, job, state, device)
    pictures = TrainPictures(run, criterion, post_prediction(job.model, recipe.eval))
    if run.leader:
        for line in opening(job, world, schedule, state):
            log.say(line)

    # Train, batch by batch.
    train_mode(model, settings)
    ended, interrupted = keeper.patience_is_over(state), False
    left = 0 if ended else job.steps_left(state.position, batch_size)
    stream = world.train_batches(state.position, state.position + left * batch_size)
    for batch in meter.waiting(noting_errors(stream, recipe.data, world.beat)):
        # Whatever a model draws at random is a function of (seed, position, rank), so that a restart repeats it.
        torch.manual_seed(hash((recipe.seed, state.position, world.rank)))
        planned = state.position / settings.batch_size  # steps, of the recipe's batch size
        lr = schedule(planned)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        if isinstance(criterion, DetectionLoss):
            criterion.at_epoch(job.epoch_of(state.position), settings.epochs)

        # One step, on all ranks.
        size = job.multiscale(int(planned))
        prepare = partial(_prepared, preprocessing=job.config.preprocessing, size=size)
        outcome = step(batch, prepare, keeper.asked(state), pictures.need_outputs(state.position))
        interrupted, due, ended, leaves = outcome.asked
        state.step += 1
        pictures.step(state.position, state.step, batch, outcome, size)
        state.position += batch_size
        if outcome.finite:
            average.update(state.position / settings.batch_size)
            state.bad = 0
        else:
            keeper.skipped(state, outcome, batch)

        # Numbers of the last steps.
        meter.update(outcome, batch_size)
        epoch = job.epoch_of(state.position)
        ends_epoch = epoch > job.epoch_of(state.position - batch_size)
        if ends_epoch or state.step % recipe.track.log_every == 0:
            numbers, text = meter.flush(state, lr)
            if run.leader:
                log.metrics(step=state.step, epoch=epoch, position=state.position, **numbers)
                log.say(text)

        # The end of an epoch: pictures, a validation, a checkpoint.
        if ends_epoch:
            pictures.epoch_ends(epoch, state.step)
            metrics = {}
            validates = job.validates_after(state.position, batch_size)
            if validates and not beside:
                drawn = ValPictures(validation, criterion, epoch, state.step)
                metrics = agreed(_validate(run, validation, average.model, state, f"epoch {epoch}", drawn))
                ended = keeper.judge(state, metrics)
            keeper.save(state, metrics, awaited=validates and beside)
            world.report({"step": state.step, "epoch": epoch, **metrics})
        elif interrupted or due or ended:
            keeper.save(state, {})
        if ends_epoch or due:
            meter.pause()
        if interrupted or ended:
            break
        if leaves:
            world.leave()
    stream.close()  # it would go on making batches beside what is still to be done

    # What remains at the end: validations beside the training, and the average of the best checkpoints.
    if interrupted:
        keeper.stopped(state)
        return Ended(metrics, interrupted=True)
    metrics = keeper.wait_for_validations(state) or metrics
    keeper.check_last(state)
    best = agreed(checkpoint.ranked(job.folder)[: recipe.track.keep_checkpoints] if run.leader else None)
    if recipe.track.average_best and len(best) > 1:
        if run.leader:
            checkpoint.average_weights(average.model, best)
        _broadcast(average.model.state_dict().values())
        what = f"the average of the best {len(best)}"
        keeper.save_average(state, _validate(run, validation, average.model, state, what))
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


def evaluation_loop(run: Run) -> bytes | None:
    """Detect with the model of the job in its validation images.

    Returns:
        The state of a CocoEvaluation on rank 0, None on the other ranks.
    """
    evaluation = Validation.of(run).evaluate(on_device(run))
    return None if evaluation is None else evaluation.to_bytes()


def on_device(run: Run) -> nn.Module:
    """Return the model of the job on the device of this rank, in evaluation mode."""
    model: nn.Module = run.job.model.to(run.world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.eval()


def _prepared(
    images: Tensor, targets: Tensor, preprocessing: Preprocessing, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    return resized(preprocessing(images), targets, size)


def _validate(
    run: Run, validation: Validation, model: nn.Module, state: Progress, what: str, follower: Follower | None = None
) -> dict[str, float]:
    """Validate the moving average or an average of checkpoints; log its metrics, and return them on rank 0."""
    began = time.monotonic()
    _broadcast(model.buffers())  # each rank has batch norm statistics of its own; those of rank 0 are kept
    metrics = metrics_of(validation.evaluate(model, follower))
    if run.leader:
        seconds = time.monotonic() - began
        run.log.say(validation_line(what, metrics, seconds))
        if what.startswith("epoch"):
            epoch = run.job.epoch_of(state.position)
            run.log.metrics(step=state.step, epoch=epoch, **metrics, **{"perf/val_s": seconds})
    return metrics


def _broadcast(tensors: Iterable[Tensor]) -> None:
    """Give every rank rank 0's values."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)
