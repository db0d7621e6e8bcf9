"""Trainings and evaluations: on Ray, or in this very process for debugging."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raydet.cluster import check_kept
from raydet.data.formats import load_index
from raydet.data.index import Index
from raydet.data.pipeline import train_samples, val_samples
from raydet.data.problems import Problems
from raydet.data.samples import Samples
from raydet.devices import pick_device
from raydet.errors import RaydetError
from raydet.evaluation.coco import CocoEvaluation, beyond, read_results
from raydet.models.reference_weights import other_classes
from raydet.recipe import DetectionVisualizationCallback, ExtremeBatchDetectionVisualizationCallback, Pictures, Recipe
from raydet.recipe import load as load_recipe
from raydet.reports.curves import plot
from raydet.reports.evaluation import draw_validation, write_evaluation
from raydet.reports.run import report
from raydet.reports.terminal import LiveTable
from raydet.runs import checkpoint
from raydet.runs.folder import LOCK, STOP, claimed, image_size_of, load_evaluated, open_run, run_address, thresholds_of
from raydet.runs.log import RunLog
from raydet.runs.mirror import Mirror, opened
from raydet.runs.published import own_recipe
from raydet.store import is_uri, write_aside
from raydet.tracking import tracked
from raydet.training.job import Job, Run
from raydet.training.loop import evaluation_loop, train_loop
from raydet.training.on_ray import on_ray
from raydet.training.prepare import make_job
from raydet.training.worlds import LocalWorld

DEBUG_IMAGES, DEBUG_EPOCHS, DEBUG_BATCH = 64, 2, 8
_DEBUG = "-debug"
_SUMMARY = "summary.json"


@dataclass(frozen=True)
class Result:
    """What a training leaves.

    Attributes:
        folder: folder of the run; for a run in an object store, this machine's copy.
        checkpoint: folder of the best checkpoint, by `eval.watch`.
        metrics: metrics of the last validation, by name.
        address: address of the run in an object store; None: the run is in a folder.
        finished_before: was the run finished already, so that nothing was done?
    """

    folder: Path
    checkpoint: Path
    metrics: dict[str, float]
    address: str | None = None
    finished_before: bool = False


def train(
    recipe: str | Path | Recipe,
    *,
    model: nn.Module | None = None,
    loss: nn.Module | None = None,
    train_data: Index | None = None,
    val_data: Index | None = None,
    overrides: Sequence[str] = (),
    debug: bool = False,
    device: str | None = None,
    callbacks: Sequence[Any] = (),
    verbose: bool = False,
    live: bool = False,
    say: Callable[[str], Any] = print,
) -> Result:
    """Train a detector, or go on with a training that was interrupted.

    Ctrl-C, or SIGTERM, ends it after the step, with a checkpoint to go on from; a second one ends it at once.

    Args:
        recipe: a recipe, the name of a shipped one, or the path of a YAML file.
        model: a detector of your own in place of the recipe's. A raydet.models.Detector knows its preprocessing; any
            other module has that of `model.name`'s family.
        loss: a loss of your own, called as `loss, components = criterion(outputs, targets)`, with `component_names`.
        train_data: an index to train on in place of the recipe's.
        val_data: an index to validate on in place of the recipe's.
        overrides: `section.key=value`.
        debug: train in this process, without Ray, on the first images, for two epochs.
        device: device to train on with `debug`, such as "cuda:1" or "cpu"; None: the first GPU, or without one the CPU.
        callbacks: pictures to draw beside the recipe's, such as raydet.tracking's
            ExtremeBatchDetectionVisualizationCallback; and callbacks of Ray Train, which are not called with `debug`.
        verbose: let Ray print what its workers print.
        live: show a table in the terminal in place of lines.
        say: takes each line of progress.

    Raises:
        RaydetError: something in the recipe, the data or the weights cannot work.
        KeyboardInterrupt: it was interrupted.
    """
    from raydet.runs.owner import owned

    settings = load_recipe(_for_debugging(load_recipe(recipe)) if debug else recipe, overrides)
    mine = [callback for callback in callbacks if isinstance(callback, Pictures)]
    callbacks = [callback for callback in callbacks if callback not in mine]
    settings = _with_pictures(settings, mine)
    if settings.name.endswith(_DEBUG):
        raise RaydetError(f"name: {settings.name} ends with {_DEBUG}, as runs of the debugger do, which start over")
    if debug:
        settings = settings.model_copy(update={"name": settings.name + _DEBUG})
    check_kept(settings.storage, "storage")
    problems = {split: Problems(settings.data.on_error, settings.data.max_errors) for split in ("train", "val")}
    train_index = train_data if train_data is not None else load_index(settings.data, "train", problems["train"])
    val_index = val_data if val_data is not None else load_index(settings.data, "val", problems["val"])
    if debug:
        train_index, val_index = train_index.head(DEBUG_IMAGES), val_index.head(DEBUG_IMAGES)
    job = make_job(settings, train_index, val_index, model, loss)
    resize = job.config.preprocessing.resize
    streams = train_samples(settings, train_index, resize), val_samples(settings, val_index, resize)
    here = pick_device(device) if debug else None
    address = None if debug else run_address(settings)
    with claimed(job.folder, "raydet train"), owned(address, "raydet train"):
        if debug:
            _clear(job.folder)
        return _train(job, streams, problems, here, callbacks, verbose, live, say)


def _train(
    job: Job,
    streams: tuple[Samples, Samples],
    problems: Mapping[str, Problems],
    device: torch.device | None,
    callbacks: Sequence[Any],
    verbose: bool,
    live: bool,
    say: Callable[[str], Any],
) -> Result:
    """Train in the run's folder, which is this command's alone.

    Args:
        job: the training.
        streams: samples to train and to validate on.
        problems: what cannot be used, for each split.
        device: device to train on in this process; None: train on Ray.
        callbacks, verbose, live, say: see `train`.
    """
    folder, settings = job.folder, job.recipe
    address = run_address(settings) if device is None else None
    mirror = Mirror(folder, address)
    mirror.refresh()
    open_run(folder, settings, job.inputs)
    if (folder / _SUMMARY).is_file():
        metrics = checkpoint.read_json(folder / _SUMMARY)["metrics"]
        mirror.pull_checkpoint(checkpoint.find(folder).name)
        return Result(folder, checkpoint.find(folder), metrics, address, finished_before=True)

    (folder / STOP).unlink(missing_ok=True)
    log = RunLog(folder, echo=say)
    log.left_out(problems)
    for found in beyond(streams[1].index, settings.eval.max_dets, settings.eval.max_detections):
        log.say(f"warning: validation: {found}")
    if device is not None:
        world = LocalWorld(job, *streams, device=device)
        world.show_first_batch(say)
        with tracked(settings, folder, log, rank=0):
            ended = train_loop(Run(job, world, log))
    else:
        table = LiveTable(settings.train.epochs, job.total_steps) if live else None
        mirror.push()
        ended = on_ray(train_loop, job, streams, verbose, say, table, callbacks, mirror.following())
    if ended.interrupted:
        raise KeyboardInterrupt
    mirror.refresh()
    mirror.pull_checkpoint(checkpoint.find(folder).name)
    best = checkpoint.find(folder)
    write_aside(folder / _SUMMARY, json.dumps({"metrics": ended.metrics, "best": best.name}, indent=1))
    try:
        plot(folder)
        draw_validation(folder, job.val_index, copy.deepcopy(job.model))
        report(folder)
    except Exception as error:  # whatever it is, the training is done
        say(f"warning: {error}")
    mirror.push()
    return Result(folder, best, ended.metrics, address)


def evaluate(
    path: str | Path,
    *,
    recipe: str | None = None,
    model: nn.Module | None = None,
    trust_code: bool = False,
    overrides: Sequence[str] = (),
    debug: bool = False,
    device: str | None = None,
    verbose: bool = False,
    out: str | Path | None = None,
    say: Callable[[str], Any] = print,
) -> dict[str, float]:
    """Measure a checkpoint, the best of a run, a weights file or COCO's results JSON on validation data.

    Args:
        path: path of a checkpoint folder, run folder, weights file, or results JSON.
        recipe: recipe of the data and, for a weights file, of the model and thresholds; None: the recipe of the run.
        model: a detector of your own, where the checkpoint is of one.
        trust_code: run the code that the checkpoint names as its model, and the recipe of its run to read the data.
        overrides: `section.key=value`; those of `eval` go before the checkpoint's thresholds, `data.image_size` before
            its image size.
        debug: run in this process, without Ray.
        device: device to run on, with `debug`.
        verbose: let Ray print what its workers print.
        out: path or address of the folder for metrics.json, detections.json and the pictures; None: none are written.
        say: takes each line of progress.

    Returns:
        The metrics by name, without the prefix `val/`.

    Raises:
        RaydetError: something in the checkpoint, the recipe or the data cannot work.
    """
    if out is not None:
        check_kept(out, "out")
    recipe = own_recipe(path, recipe)
    with opened(path) as local:
        if local.suffix == ".json" and local.is_file():
            settings = load_evaluated(local, recipe, overrides)
            val_index = load_index(settings.data, "val")
            evaluation = read_results(local, val_index, settings.eval.max_dets)
        else:
            job, val_index = open_evaluation(local, recipe, model, overrides, say, trust_code)
            state = run_evaluation(evaluation_loop, job, debug, device, verbose, say)
            evaluation = CocoEvaluation.from_bytes(val_index, state)
        metrics = evaluation.compute()
        if out is not None:
            write_evaluation(out, evaluation, metrics)
        return metrics


def open_evaluation(
    path: Path,
    recipe: str | None,
    model: nn.Module | None,
    overrides: Sequence[str],
    say: Callable[[str], Any],
    trust_code: bool = False,
) -> tuple[Job, Index]:
    """Return what measures a checkpoint, the best of a run or a weights file; arguments and errors as of `evaluate`."""
    settings = load_evaluated(path, recipe, overrides, trust_code)
    here = settings.scale.model_copy(update={"async_validation": False})
    settings = settings.model_copy(update={"scale": here})
    val_index = load_index(settings.data, "val")
    source = checkpoint.find(path) if path.is_dir() else path
    say(f"evaluating {source} on {len(val_index)} images")
    if not path.is_dir():
        settings = settings.model_copy(update={"model": settings.model.model_copy(update={"weights": str(path)})})
        return make_job(settings, None, val_index), val_index
    config = checkpoint.read_config(source)
    if config.class_names != val_index.class_names:
        raise RaydetError(other_classes(str(source), config.class_names, val_index.class_names))
    config = replace(config, image_size=image_size_of(config, settings, overrides, say))
    data = settings.data.model_copy(update={"image_size": config.image_size})
    settings = settings.model_copy(update={"data": data, "eval": thresholds_of(config, overrides)})
    base = make_job(settings, None, val_index, model=checkpoint.load_model(source, config, model, trust_code))
    return replace(base, config=config), val_index


def run_evaluation(
    loop: Callable[[Run], Any],
    job: Job,
    debug: bool,
    device: str | None,
    verbose: bool,
    say: Callable[[str], Any],
) -> Any:
    """Run an evaluation here or on Ray, in a scratch folder; return what rank 0 returns.

    The scratch folder is made in the recipe's storage, which all nodes share.

    Args:
        loop: what each rank does with its run.
        job: what is evaluated.
        debug, device, verbose, say: see `evaluate`.

    Raises:
        RaydetError: the scratch folder cannot be made, or see `evaluate`.
    """
    streams = None, val_samples(job.recipe, job.val_index, job.config.preprocessing.resize)
    storage = None if is_uri(job.recipe.storage) else Path(job.recipe.storage).expanduser().resolve()
    with contextlib.ExitStack() as stack:
        try:
            if storage is not None:
                storage.mkdir(parents=True, exist_ok=True)
            scratch = stack.enter_context(tempfile.TemporaryDirectory(dir=storage, prefix=".evaluation-"))
        except OSError as error:
            raise RaydetError(
                f"storage: {storage} cannot be written ({error.strerror}); storage=… names another folder"
            ) from None
        job = replace(job, folder=Path(scratch))
        if debug:
            world = LocalWorld(job, *streams, device=pick_device(device))
            return loop(Run(job, world, RunLog(job.folder, echo=say)))
        return on_ray(loop, job, streams, verbose, say)


def _clear(folder: Path) -> None:
    """Remove what is in a folder, but for the lock, which is held."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name != LOCK:
            entry.unlink()


def _with_pictures(recipe: Recipe, pictures: Sequence[Pictures]) -> Recipe:
    extreme = [entry for entry in pictures if isinstance(entry, ExtremeBatchDetectionVisualizationCallback)]
    numbered = [entry for entry in pictures if isinstance(entry, DetectionVisualizationCallback)]
    track = recipe.track.model_copy(
        update={
            "extreme_batches": [*recipe.track.extreme_batches, *extreme],
            "visualize": [*recipe.track.visualize, *numbered],
        }
    )
    return recipe.model_copy(update={"track": track})


def _for_debugging(recipe: Recipe) -> Recipe:
    """Return a recipe that is small enough to step through; the user's overrides go on top."""
    batch = min(DEBUG_BATCH, recipe.train.batch_size)
    small = [
        f"train.epochs={DEBUG_EPOCHS}",
        f"train.batch_size={batch}",
        f"train.lr={recipe.train.lr * batch / recipe.train.batch_size}",
        "scale.num_workers=1",
        "scale.async_validation=false",
        "track.log_every=1",
    ]
    return load_recipe(recipe, small)
