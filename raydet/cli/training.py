"""The commands for training, and for what a run leaves: train, evaluate, tune, tune-nms, plot, report."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from raydet.cli.options import Debug, Device, Overrides, RecipeOption, TrustCode, Verbose, say
from raydet.errors import RaydetError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

TOP_TRIALS = 20  # that `tune` prints


def train(
    recipe: Annotated[str, typer.Argument(help="name that `raydet recipes` lists, or path of a YAML file")],
    overrides: Overrides = None,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug",
            help="train in one process, without Ray, so that breakpoints work: 64 images, 2 epochs, run NAME-debug",
        ),
    ] = False,
    device: Device = None,
    verbose: Verbose = False,
) -> None:
    """Train a detector, or resume a training that was interrupted.

    A run is a folder, {storage}/{name}. The same command again resumes the run from its last checkpoint. Ctrl-C stops
    the training after the current step, with a checkpoint; a second Ctrl-C stops it at once.

    Example: raydet train coco2017_yolox_s data.root=/data/coco scale.num_workers=8
    """
    from raydet.api import train as start
    from raydet.data.formats import load_index
    from raydet.data.problems import Problems
    from raydet.plugins import is_own
    from raydet.recipe import load
    from raydet.reports.terminal import summary
    from raydet.runs.mirror import address_of, opened
    from raydet.store import is_uri

    _check_device(device, debug)
    live = sys.stdout.isatty() and not verbose
    result = start(recipe, overrides=overrides or (), debug=debug, device=device, verbose=verbose, live=live, say=say)
    if result.finished_before:
        say(f"{result.folder} is finished; another name=… starts another run")
    _table({name.removeprefix("val/"): value for name, value in result.metrics.items()})
    settings = load(result.folder / "recipe.yaml")
    data, name = settings.data, settings.model.name
    index = load_index(data, "val", Problems(data.on_error, data.max_errors))
    run = result.address or str(result.folder)
    with opened(run) as folder:
        for line in summary(folder):
            say(line)
        for what, file in (
            ("detections on validation images, beside the truth", "images/validation.jpg"),
            ("curves", "images/metrics.png"),
            ("report", "report.html"),
        ):
            if (result.folder / file).is_file():  # else a warning has said why it could not be drawn
                say(f"{what}: {address_of(run, folder / file)}")
        say(f"run folder: {run}")
        say(f"best checkpoint: {address_of(run, result.checkpoint)}")
    images = "photos/" if is_uri(index.root) or (index.shards >= 0).any() else str(Path(index.path(0)).parent)
    trusted = [" --trust-code" * any(map(is_own, names)) for names in ([name], [name, data.format])]
    say(f"next: {_program()} predict {quote(run)} {quote(images)}{trusted[0]}")
    say(f"      {_program()} evaluate {quote(run)}{trusted[1]}")


def evaluate(
    checkpoint: Annotated[
        str, typer.Argument(help="checkpoint folder, run folder (its best checkpoint), weights file, or results.json")
    ],
    overrides: Overrides = None,
    recipe: RecipeOption = None,
    trust_code: TrustCode = False,
    debug: Debug = False,
    device: Device = None,
    verbose: Verbose = False,
    out: Annotated[
        str | None,
        typer.Option("--out", help="folder for files and pictures", show_default="evaluation/ in the checkpoint"),
    ] = None,
) -> None:
    """Measure a checkpoint, a weights file or a COCO results JSON on validation data, with COCO's metrics.

    It prints a table, and writes metrics.json, detections.json (COCO results, with the data set's own ids) and
    pictures: precision and recall, AP of each class, confusion matrix, TIDE's errors, calibration.

    Example: raydet evaluate yolox_s.pth --recipe coco2017_yolox_s data.root=/data/coco --out yolox_s
    """
    from raydet.api import evaluate as run
    from raydet.store import Store

    _check_device(device, debug)
    out = out or (Store(checkpoint).path("evaluation") if Store(checkpoint).kind() == "folder" else "evaluation")
    metrics = run(
        checkpoint,
        recipe=recipe,
        trust_code=trust_code,
        overrides=overrides or (),
        debug=debug,
        device=device,
        verbose=verbose,
        out=out,
        say=say,
    )
    _table(metrics)
    say(f"metrics.json, detections.json and pictures: {out}")


def tune(
    recipe: Annotated[str, typer.Argument(help="recipe with a section tune: name, or path of a YAML file")],
    overrides: Overrides = None,
    verbose: Verbose = False,
) -> None:
    """Search for the best hyperparameters: train with many settings, and stop poor trials early.

    tune.space says which settings of the recipe to try: loss weights, learning rate, augmentation, the model. A sweep
    is a folder, {storage}/{name}-tune, that holds a run for each trial. The same command again resumes the sweep.

    Example: raydet tune demo tune.trials=8 tune.space.loss.cls_weight='{choice: [0.5, 1, 2]}'
    """
    from rich.console import Console

    from raydet.recipe import load
    from raydet.store import join
    from raydet.tuning.sweep import TRIALS
    from raydet.tuning.sweep import tune as run
    from raydet.tuning.trials import table

    live = sys.stdout.isatty() and not verbose
    sweep = run(recipe, overrides=overrides or (), verbose=verbose, live=live, say=say)
    if sweep.finished_before:
        say(f"{sweep.folder} is finished; another name=… starts another sweep")
    settings = load(join(sweep.folder, "recipe.yaml"))
    Console().print(table(sweep.trials, settings.eval.watch, settings.train.epochs, rows=TOP_TRIALS))
    for trial in sweep.trials:
        if trial.error:
            say(f"{trial.name} failed: {trial.error}")
    for picture in sweep.pictures:
        say(f"picture: {picture}")
    say(f"all trials: {join(sweep.folder, TRIALS)}")
    say(f"best recipe: {sweep.recipe}")
    say(f"next: {_program()} train {quote(str(sweep.recipe))}")


def tune_nms(
    checkpoint: Annotated[
        str, typer.Argument(help="checkpoint folder, run folder (its best checkpoint), or weights file")
    ],
    overrides: Overrides = None,
    recipe: RecipeOption = None,
    trust_code: TrustCode = False,
    objective: Annotated[
        str, typer.Option("--objective", help="metric to maximise: mAP@0.50:0.95, mAP@0.50, mAP@0.75 or F1@0.50")
    ] = "mAP@0.50:0.95",
    precision: Annotated[
        float | None,
        typer.Option(
            "--precision", help="lowest precision at IoU 0.50: share of the detections that are right", min=0, max=1
        ),
    ] = None,
    trials: Annotated[int, typer.Option("--trials", help="number of settings to try", min=2)] = 200,
    seed: Annotated[int, typer.Option("--seed", help="seed of the settings and of the halves of the images")] = 0,
    out: Annotated[
        str | None, typer.Option("--out", help="folder for the table and the picture", show_default="the checkpoint's")
    ] = None,
    debug: Debug = False,
    device: Device = None,
    verbose: Verbose = False,
) -> None:
    """Search for the thresholds with which a checkpoint detects best. The model runs only once.

    Its output is kept beside the checkpoint. Half of the validation images are for the search: over score and IoU
    threshold, top-k before NMS, largest number of detections, one or many classes for a box, and NMS across classes.
    On the other half the best setting is compared with the checkpoint's own. If it is better, it is stored in the
    checkpoint, where predict and evaluate find it.

    Example: raydet tune-nms runs/demo --objective F1@0.50
    """
    from raydet.store import Store
    from raydet.tuning.nms import PICTURE, TABLE
    from raydet.tuning.nms import tune_nms as run

    _check_device(device, debug)
    tuned = run(
        checkpoint,
        recipe=recipe,
        trust_code=trust_code,
        overrides=overrides or (),
        objective=objective,
        precision=precision,
        trials=trials,
        seed=seed,
        out=out,
        debug=debug,
        device=device,
        verbose=verbose,
        say=say,
    )
    for line in tuned.summary(objective):
        say(line)
    folder = Store(tuned.folder)
    say(f"all settings: {folder.path(TABLE)}; picture: {folder.path(PICTURE)}")


def plot(
    run: Annotated[str, typer.Argument(metavar="RUN", help="run folder; the training may still be running")],
    out: Annotated[
        str | None, typer.Option("--out", help="path of the picture, a PNG", show_default="RUN/images/metrics.png")
    ] = None,
) -> None:
    """Draw the loss, learning rate and AP of a run over its steps and epochs, as one picture.

    A star marks the best AP. A dashed line shows the AP of the averaged weights, if the run made them.

    Example: raydet plot runs/demo
    """
    from raydet.reports.curves import plot as draw
    from raydet.runs.mirror import opened

    with opened(run, weights=False) as folder:
        say(f"picture: {_put(run, draw(folder, _here(out)), out)}")


def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="run folder; the training may still be running")],
    out: Annotated[str | None, typer.Option("--out", help="path of the page", show_default="RUN/report.html")] = None,
) -> None:
    """Write the report of a run: one HTML page with curves, metrics, classes, worst and best images, and the recipe.

    Example: raydet report runs/demo
    """
    from raydet.reports.run import report as write
    from raydet.runs.mirror import opened

    with opened(run, weights=False) as folder:
        say(f"report: {_put(run, write(folder, _here(out)), out)}")


def _check_device(device: str | None, debug: bool) -> None:
    if device is not None and not debug:
        raise RaydetError("--device goes with --debug; on Ray, scale.gpu and scale.num_workers say what to use")


def _here(out: str | None) -> Path | None:
    """Return the path of --out; None: nothing is given, or the address of a file in an object store."""
    from raydet.store import is_uri

    return None if out is None or is_uri(out) else Path(out)


def _put(run: str, written: Path, out: str | None) -> str | Path:
    """Bring a file of a run to --out, where that is an address, and return where it is."""
    from raydet.runs.mirror import address_of
    from raydet.store import write_file

    if out is None:
        return address_of(run, written)
    if _here(out) is None:
        write_file(out, written.read_bytes())
    return out


def _program() -> str:
    """Return how to start raydet."""
    started = "python -m raydet.cli" if sys.argv[0].endswith(".py") else sys.argv[0]
    return "raydet" if shutil.which("raydet") else started


def _table(metrics: Mapping[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", "value")
    classes: Sequence[str] = [name for name in metrics if name.startswith("AP@")]
    for name in metrics:
        if name not in classes:
            table.add_row(name, f"{metrics[name]:.4f}")
    if 0 < len(classes) <= 20:
        table.add_section()
        for name in classes:
            table.add_row(name, f"{metrics[name]:.4f}")
    Console().print(table)
