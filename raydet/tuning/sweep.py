"""`raydet tune`: trainings with settings that Ray Tune chooses, ended early where they fall behind.

A trial is a function of Ray Tune's that starts a training on Ray Train; what its workers measure at the end of each
epoch goes back to the scheduler and the searcher. Population based training is not offered: it copies checkpoints from
trial to trial by Ray Tune, which knows none of these, as they lie in the trials' own run folders.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune as ray_tune
from torch import nn

from raydet.api import train
from raydet.cluster import alive_nodes, check_kept, check_seen, connect, prepare_tune, share_of_cluster
from raydet.data.formats import load_index
from raydet.data.index import Index
from raydet.data.problems import Problems
from raydet.errors import RaydetError
from raydet.models.download import local_weights
from raydet.recipe import Recipe, Space, Tune, describe, differences, override
from raydet.recipe import load as load_recipe
from raydet.runs import checkpoint
from raydet.runs.folder import claimed, run_address, run_folder
from raydet.runs.owner import owned
from raydet.store import Store, above, is_uri, join
from raydet.training.prepare import make_job
from raydet.tuning.pictures import draw
from raydet.tuning.trials import (
    ERROR,
    VALUES,
    Board,
    Trial,
    drawn,
    folder_name,
    from_json,
    read_trial,
    read_trials,
    to_json,
)

BEST, TRIALS = "best_recipe.yaml", "trials.json"
_RECIPE = "recipe.yaml"
_SUFFIX = "-tune"
_ENDING_S = 60.0  # for the processes of a driver that was killed
_NOTES = "ray"  # Ray Tune's folder in that of the sweep, while it is not finished
_OWN = ("name", "storage", "tune.", "scale.", "track.", "eval.watch")


@dataclass(frozen=True)
class Sweep:
    """What a sweep has found.

    Attributes:
        folder: path or address of the folder of the sweep, in which each trial's run has a folder.
        recipe: path or address of the recipe of the best trial, for `raydet train`.
        trials: all trials, best first.
        pictures: paths or addresses of the pictures of the sweep.
        finished_before: the sweep had been finished already, and nothing was done.
    """

    folder: str | Path
    recipe: str | Path
    trials: list[Trial]
    pictures: list[str | Path]
    finished_before: bool = False


def tune(
    recipe: str | Path | Recipe,
    *,
    model: nn.Module | None = None,
    loss: nn.Module | None = None,
    train_data: Index | None = None,
    val_data: Index | None = None,
    overrides: Sequence[str] = (),
    verbose: bool = False,
    live: bool = False,
    say: Callable[[str], Any] = print,
) -> Sweep:
    """Train with many settings and find the best, or go on with a sweep that was interrupted.

    Args:
        recipe: a recipe, the name of a shipped one, or the path of a YAML file; its section `tune` says what to try.
        model, loss, train_data, val_data: as of `raydet.train`, the same for each trial.
        overrides: `section.key=value`.
        verbose: let Ray print what its workers print.
        live: show a table in the terminal in place of lines.
        say: takes each line of progress.

    Raises:
        RaydetError: something in the recipe or the data cannot work, or no trial has.
        KeyboardInterrupt: it was interrupted.
    """
    settings = load_recipe(recipe, overrides)
    _check_space(settings)
    check_kept(settings.storage, "storage")
    if settings.scale.async_validation:  # whose results do not reach Ray Tune
        say("scale.async_validation is off in a sweep")
        settings = settings.model_copy(update={"scale": settings.scale.model_copy(update={"async_validation": False})})
    named = settings.model_copy(update={"name": settings.name and settings.name + _SUFFIX})
    address, copy = run_address(named), run_folder(named)
    with claimed(copy, "raydet tune"), owned(address, "raydet tune"):
        folder = address or copy
        own = {"model": model, "loss": loss, "train_data": train_data, "val_data": val_data}
        return _sweep(settings, folder, own, verbose, live, say)


def _sweep(
    settings: Recipe, folder: str | Path, own: dict[str, Any], verbose: bool, live: bool, say: Callable[[str], Any]
) -> Sweep:
    """Run a sweep in its folder, which is this command's alone; `own`: arguments of `raydet.train`."""
    _open(folder, settings)
    store, best_recipe = Store(folder), join(folder, BEST)
    space, watch, epochs = settings.tune.space, settings.eval.watch, settings.train.epochs
    if store.kind(BEST) == "file":
        return Sweep(folder, best_recipe, from_json(store.text(TRIALS)), [], finished_before=True)
    problems = {split: Problems(settings.data.on_error, settings.data.max_errors) for split in ("train", "val")}
    train_index, val_index = own["train_data"], own["val_data"]
    train_index = train_index if train_index is not None else load_index(settings.data, "train", problems["train"])
    val_index = val_index if val_index is not None else load_index(settings.data, "val", problems["val"])
    loaded = {**own, "train_data": train_index, "val_data": val_index}
    for split, found in problems.items():
        if found.messages:
            say(f"{len(found.messages)} records of the {split} data cannot be used, such as: {found.messages[0]}")
        for notice in found.notices:
            say(f"warning: {split} data: {notice}")
    make_job(settings, train_index, val_index, own["model"], own["loss"])  # raises what each trial would

    prepare_tune()
    with ExitStack() as stack:
        if connect(settings.scale, verbose, groups=settings.tune.concurrent or 1):
            stack.callback(ray.shutdown)
        scale, concurrent = share_of_cluster(settings.scale, settings.tune.concurrent)
        # Ray Train must not replace lost workers: when Ray Tune ends a trial, its workers may be gone before their
        # controller, and the resources of new ones would never come back. Ray Tune starts such a trial again.
        scale = scale.model_copy(update={"max_failures": 0})
        track = settings.track.model_copy(update={"wandb_group": settings.track.wandb_group or above(folder)[1]})
        shared = {"scale": scale, "track": track, "storage": str(folder)}
        base = _anywhere(settings).model_copy(update=shared)
        nodes = alive_nodes()
        check_seen("storage", str(folder), nodes, _RECIPE)
        if base.model.weights is not None and Path(base.model.weights).is_absolute():
            check_seen("model.weights", base.model.weights, nodes)
        trainable = ray_tune.with_parameters(run_trial, base=base, own=own, loaded=loaded)
        # A trial waits for its workers, which have their CPUs; a share of one more would be missed by the data tasks.
        trainable = ray_tune.with_resources(trainable, {"memory": 1})
        board = stack.enter_context(Board(space, watch, epochs, live, say, folder))
        if store.kind(_NOTES) and any(name.startswith("experiment_state-") for name in store.files(_NOTES)):
            say(f"going on with the sweep in {folder}")
            files, notes = store.arrow(_NOTES)
            tuner = ray_tune.Tuner.restore(
                notes, trainable, resume_unfinished=True, resume_errored=True, storage_filesystem=files
            )
        else:
            tuner = _new(trainable, settings, concurrent, store, board)
        say(f"trials in {folder}, {concurrent} at once")
        with _interruptible(say) as interrupted:
            tuner.fit()
        if interrupted:
            raise KeyboardInterrupt
    trials = read_trials(folder, watch)
    measured = [trial for trial in trials if trial.value is not None]
    if not measured:
        why = next((trial.error for trial in trials if trial.error), "none has come so far")
        raise RaydetError(f"no trial has measured {watch}: {why}")
    best = load_recipe(settings, [override(key, value) for key, value in measured[0].values.items()])
    best = best.model_copy(update={"name": f"{settings.name}-best", "tune": Tune()})
    pictures = draw(measured, space, watch, folder)
    store.write(TRIALS, to_json(trials).encode())
    store.write(BEST, describe(best).encode())
    for notes in (_NOTES, *(f"{trial.name}/{_NOTES}" for trial in trials)):
        store.remove(notes)
    return Sweep(folder, best_recipe, trials, pictures)


def run_trial(config: dict[str, Any], base: Recipe, own: dict[str, Any], loaded: dict[str, Any]) -> None:
    """Train with the settings that Ray Tune has drawn; it calls this in a process of its own.

    Args:
        config: the settings that were drawn.
        base: the recipe of all trials.
        own: further arguments of `raydet.train`.
        loaded: further arguments of `raydet.train`: the data that `base` names.
    """
    from ray.tune.integration.ray_train import TuneReportCallback

    values = drawn(base.tune.space, config)
    name = folder_name(ray_tune.get_context().get_trial_id())
    recipe = load_recipe(base, [override(key, value) for key, value in values.items()])
    recipe = recipe.model_copy(update={"name": name, "tune": Tune()})
    same_data = recipe.data.model_copy(update={"image_size": base.data.image_size}) == base.data
    address, copy = run_address(recipe), run_folder(recipe)
    run = Store(address or copy)
    # A driver that was killed leaves trials that end soon.
    with claimed(copy, "raydet tune", _ENDING_S), owned(address, "raydet tune", _ENDING_S):
        pass
    if run.kind(VALUES) and json.loads(run.text(VALUES)) != values:
        run.remove()  # left by a sweep that was killed before it had noted this trial
    run.write(VALUES, (json.dumps(values) + "\n").encode())
    run.delete(ERROR)
    trained = _position(run)
    try:
        train(recipe, **(loaded if same_data else own), callbacks=[TuneReportCallback()], say=_nothing)
    except RaydetError as error:  # no new start would cure it
        run.write(ERROR, str(error).encode())
        return
    finally:
        if not run.is_local:  # the copy of this trial on this node, which nobody else needs
            shutil.rmtree(copy.parent, ignore_errors=True)
    if _position(run) == trained:  # it was at its end, and the sweep was killed before it had noted that
        found = read_trial(base.storage, name, recipe.eval.watch)
        value = found.value if found.value is not None else math.nan
        ray_tune.report({f"val/{recipe.eval.watch}": value, "epoch": found.epoch})


def _position(run: Store) -> int:
    """Return the samples that a trial has been trained on, as its checkpoints say."""
    trained = 0
    for name in run.files(recursive=True):
        if name.endswith(f"/{checkpoint.CONFIG}"):
            with suppress(ValueError, KeyError):  # it is damaged
                trained = max(trained, json.loads(run.text(name))["position"])
    return trained


def _anywhere(settings: Recipe) -> Recipe:
    """Return a recipe whose paths do not depend on the current folder, which is another one on another node."""

    def absolute(path: str | None) -> str | None:
        return path if path is None or is_uri(path) else str(Path(path).expanduser().resolve())

    weights = settings.model.weights
    if weights is not None and str(local_weights(weights, settings.model.name)) == weights:
        weights = absolute(weights)  # of published weights the name: each node has its own copy of the file
    model = settings.model.model_copy(update={"weights": weights})
    data = settings.data.model_copy(update={"root": absolute(settings.data.root)})
    return settings.model_copy(update={"model": model, "data": data})


def _check_space(settings: Recipe) -> None:
    """Raise RaydetError if the space is empty, or a setting or a value in it cannot be."""
    sweep = settings.tune
    if not sweep.space:
        raise RaydetError(
            "tune.space is empty: say what to try, such as tune.space.loss.iou_weight='{loguniform: [1, 10]}'"
        )
    if settings.name.endswith(_SUFFIX):
        raise RaydetError(f"name: {settings.name} ends with {_SUFFIX}, as the folders of sweeps do")
    if settings.scale.workers[0] != settings.scale.workers[1]:
        raise RaydetError("scale.num_workers: in a sweep it is one number, so that it is known how many trials fit")
    for key, among in sweep.space.items():
        if key.startswith(_OWN):
            raise RaydetError(f"tune.space: {key} is the same for all trials")
        if sweep.search == "grid" and among.kind not in ("grid", "choice"):
            raise RaydetError(f"tune.space: {key}: {among.kind} has no end; with tune.search=grid give grid: [a, b]")
        if sweep.search == "optuna" and among.kind == "grid":
            raise RaydetError(f"tune.space: {key}: Optuna tries no grid; give choice: {among.values}")
        for value in among.values:
            try:
                load_recipe(settings, [override(key, value)])
            except RaydetError as error:
                raise RaydetError(f"tune.space: {error}") from None


def _open(folder: str | Path, settings: Recipe) -> None:
    """Make the sweep's folder, or check that it is of the same sweep."""
    store = Store(folder)
    if store.kind(_RECIPE):
        earlier = load_recipe(join(folder, _RECIPE))
        changed = differences(settings, earlier)
        mine, other = settings.tune.model_dump(mode="json"), earlier.tune.model_dump(mode="json")
        changed += [
            f"tune.{key}: {other[key]} there, {value} here"
            for key, value in mine.items()
            if other[key] != value and key not in ("concurrent", "hours")
        ]
        if changed:
            raise RaydetError(
                f"{folder} is a sweep with other settings ({'; '.join(changed)}); "
                "choose another name=…, or remove the folder"
            )
    store.write(_RECIPE, describe(settings).encode())


def _new(trainable: Any, settings: Recipe, concurrent: int, store: Store, board: Board) -> Any:
    """Return a Tuner of a sweep that begins in a folder or bucket, `store`."""
    sweep = settings.tune
    files, place = store.arrow()
    return ray_tune.Tuner(
        trainable,
        param_space={key: _domain(among, sweep.search) for key, among in sweep.space.items()},
        tune_config=ray_tune.TuneConfig(
            metric=f"val/{settings.eval.watch}",
            mode="max",
            num_samples=1 if sweep.search == "grid" else sweep.trials,
            max_concurrent_trials=concurrent if sweep.search == "optuna" else None,
            search_alg=_searcher(sweep, concurrent, settings.seed),
            scheduler=_scheduler(sweep, settings.train.epochs),
            time_budget_s=sweep.hours * 3600 if sweep.hours is not None else None,
        ),
        run_config=ray_tune.RunConfig(
            name=_NOTES,
            storage_path=place,
            storage_filesystem=files,
            failure_config=ray_tune.FailureConfig(max_failures=settings.scale.max_failures),
            callbacks=[board],
            verbose=0,
        ),
    )


def _domain(among: Space, search: str) -> Any:
    if among.kind in ("grid", "choice"):
        places = list(range(len(among.values)))
        return ray_tune.grid_search(places) if "grid" in (among.kind, search) else ray_tune.choice(places)
    low, high = among.values
    if among.kind == "integer":
        return ray_tune.randint(low, high + 1)
    return ray_tune.loguniform(low, high) if among.kind == "loguniform" else ray_tune.uniform(low, high)


def _searcher(sweep: Tune, concurrent: int, seed: int) -> Any:
    if sweep.search == "optuna":
        try:
            from ray.tune.search.optuna import OptunaSearch

            return OptunaSearch(seed=seed)
        except (ImportError, AssertionError):
            raise RaydetError("tune.search is optuna, which is not installed: pip install 'raydet[tune]'") from None
    from ray.tune.search.basic_variant import BasicVariantGenerator

    return BasicVariantGenerator(max_concurrent=concurrent, random_state=seed)


def _scheduler(sweep: Tune, epochs: int) -> Any:
    from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule

    grace = min(sweep.grace_epochs, epochs)
    if sweep.stop == "none" or grace == epochs:
        return FIFOScheduler()
    if sweep.stop == "median":
        return MedianStoppingRule(time_attr="epoch", grace_period=grace, min_samples_required=3)
    brackets = 1 + int(math.log(epochs / grace, sweep.reduction_factor)) if sweep.stop == "hyperband" else 1
    return AsyncHyperBandScheduler(
        time_attr="epoch",
        max_t=epochs,
        grace_period=grace,
        reduction_factor=sweep.reduction_factor,
        brackets=brackets,
        stop_last_trials=False,  # a trial has something to do after its last epoch
    )


@contextmanager
def _interruptible(say: Callable[[str], Any]) -> Iterator[list[int]]:
    """End the sweep in order on Ctrl-C and SIGTERM, by Ray Tune's own signal for that; a second ends it at once."""
    interrupted: list[int] = []

    def interrupt(number: int, frame: Any) -> None:
        if interrupted or not callable(signal.getsignal(signal.SIGUSR1)):
            raise KeyboardInterrupt
        interrupted.append(number)
        say("ending the sweep; the same command goes on with it")
        signal.raise_signal(signal.SIGUSR1)

    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    earlier = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupted
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _nothing(text: str) -> None:
    """Say nothing: the table shows what matters."""
