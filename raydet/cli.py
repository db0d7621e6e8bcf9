"""The command `raydet`."""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from raydet import __version__, cli_data
from raydet.cli_data import Overrides, Verbose, say
from raydet.data.header import MAX_PIXELS
from raydet.errors import RaydetError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

TOP_TRIALS = 20  # that `tune` prints
INTERRUPTED = 130  # exit code

app = typer.Typer(
    help="Train and run object detectors on Ray. Start with: raydet recipes",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipeOption = Annotated[
    str | None, typer.Option("--recipe", help="recipe of the data and, for a weights file, of the model")
]
Debug = Annotated[bool, typer.Option("--debug", help="in this process, without Ray: breakpoints work")]
TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-code", help="run the code that the checkpoint or its run names: a model, or data, of someone's own"
    ),
]
Device = Annotated[
    str | None, typer.Option("--device", help="such as cuda:1 or cpu [default: the first GPU, or else the CPU]")
]
Score = Annotated[
    float | None,
    typer.Option(
        "--score", help="lowest score of a detection [default: 0.25, or the checkpoint's if higher]", min=0, max=1
    ),
]
MaxPixels = Annotated[
    int, typer.Option("--max-pixels", help="largest image to decode, in pixels; the default is Pillow's limit", min=1)
]
IoU = Annotated[
    float | None,
    typer.Option("--iou", help="IoU threshold of NMS [default: the checkpoint's]", max=1),
]


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="a name that `raydet recipes` lists, or the path of a YAML file")],
    overrides: Overrides = None,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug", help="one process, no Ray, first 64 images, 2 epochs of small batches: breakpoints work anywhere"
        ),
    ] = False,
    device: Device = None,
    verbose: Verbose = False,
) -> None:
    """Train a detector, or go on with a training that was interrupted.

    A run is a folder, {storage}/{name}: the same command again resumes it from its last checkpoint. Ctrl-C ends it
    after the step, with a checkpoint; once more ends it at once.

    Example: raydet train coco2017_yolox_s data.root=/data/coco scale.num_workers=8
    """
    from raydet.api import train as start
    from raydet.data.formats import load_index
    from raydet.data.problems import Problems
    from raydet.plugins import is_own
    from raydet.recipe import load
    from raydet.reports.run import draw_validation
    from raydet.reports.run import report as report_of_run
    from raydet.reports.terminal import summary
    from raydet.runs.checkpoint import build
    from raydet.runs.mirror import opened
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
    model = build(name, len(index.class_names), data.image_size) if is_own(name) else None
    run = result.address or str(result.folder)
    with opened(run) as folder:
        if not result.finished_before:
            say(f"detections on validation images, beside the truth: {draw_validation(folder, index, model)}")
        for line in summary(folder):
            say(line)
        say(f"curves: {folder / 'images' / 'metrics.png'}")
        if not result.finished_before:
            say(f"report: {report_of_run(folder)}")
    say(f"run folder: {run}")
    say(f"best checkpoint: {result.checkpoint}")
    images = "photos/" if is_uri(index.root) or (index.shards >= 0).any() else str(Path(index.path(0)).parent)
    trusted = [" --trust-code" * any(map(is_own, names)) for names in ([name], [name, data.format])]
    say(f"next: {_program()} predict {quote(run)} {quote(images)}{trusted[0]}")
    say(f"      {_program()} evaluate {quote(run)}{trusted[1]}")


@app.command()
def evaluate(
    checkpoint: Annotated[
        str, typer.Argument(help="checkpoint folder, run folder (its best one), weights file, or results.json")
    ],
    overrides: Overrides = None,
    recipe: RecipeOption = None,
    trust_code: TrustCode = False,
    debug: Debug = False,
    device: Device = None,
    verbose: Verbose = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="folder for files and pictures", show_default="evaluation/ in the checkpoint"),
    ] = None,
) -> None:
    """Measure a checkpoint, a weights file or COCO's results JSON with COCO's metrics on validation data.

    Beside the table it leaves metrics.json, detections.json (COCO's results, with the data's own ids) and pictures:
    precision and recall, AP of the classes, confusion, TIDE's errors, calibration.

    Example: raydet evaluate yolox_s.pth --recipe coco2017_yolox_s data.root=/data/coco --out yolox_s
    """
    from raydet.api import evaluate as run

    _check_device(device, debug)
    out = out or (Path(checkpoint) if Path(checkpoint).is_dir() else Path()) / "evaluation"
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


@app.command()
def tune(
    recipe: Annotated[str, typer.Argument(help="with a section tune: a name, or the path of a YAML file")],
    overrides: Overrides = None,
    verbose: Verbose = False,
) -> None:
    """Train with many settings at once, end those early that fall behind, and find the best.

    tune.space says which settings of the recipe to try: loss weights, learning rate, augmentation, the model. A sweep
    is a folder, {storage}/{name}-tune, with a run in it for each trial: the same command again goes on with it.

    Example: raydet tune demo tune.trials=8 tune.space.loss.cls_weight='{choice: [0.5, 1, 2]}'
    """
    from rich.console import Console

    from raydet.recipe import load
    from raydet.tuning.sweep import TRIALS
    from raydet.tuning.sweep import tune as run
    from raydet.tuning.trials import table

    live = sys.stdout.isatty() and not verbose
    sweep = run(recipe, overrides=overrides or (), verbose=verbose, live=live, say=say)
    if sweep.finished_before:
        say(f"{sweep.folder} is finished; another name=… starts another sweep")
    settings = load(sweep.folder / "recipe.yaml")
    Console().print(table(sweep.trials, settings.eval.watch, settings.train.epochs, rows=TOP_TRIALS))
    for trial in sweep.trials:
        if trial.error:
            say(f"{trial.name} failed: {trial.error}")
    for picture in sweep.pictures:
        say(f"picture: {picture}")
    say(f"all trials: {sweep.folder / TRIALS}")
    say(f"best recipe: {sweep.recipe}")
    say(f"next: {_program()} train {quote(str(sweep.recipe))}")


@app.command("tune-nms")
def tune_nms(
    checkpoint: Annotated[str, typer.Argument(help="checkpoint folder, run folder (its best one), or weights file")],
    overrides: Overrides = None,
    recipe: RecipeOption = None,
    trust_code: TrustCode = False,
    objective: Annotated[
        str, typer.Option("--objective", help="what is to be highest: mAP@0.50:0.95, mAP@0.50, mAP@0.75 or F1@0.50")
    ] = "mAP@0.50:0.95",
    precision: Annotated[
        float | None,
        typer.Option(
            "--precision", help="lowest precision at IoU 0.50: share of the detections that are right", min=0, max=1
        ),
    ] = None,
    trials: Annotated[int, typer.Option("--trials", help="number of settings", min=2)] = 200,
    seed: Annotated[int, typer.Option("--seed", help="seed of the settings and of the halves of the images")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", help="folder for the table and the picture", show_default="the checkpoint's")
    ] = None,
    debug: Debug = False,
    device: Device = None,
    verbose: Verbose = False,
) -> None:
    """Search for the thresholds by which a checkpoint detects best, without running the model for each.

    The model runs once; what it gives is kept beside the checkpoint. Score and IoU thresholds, top-k before NMS, most
    detections, one or many classes a box and NMS across classes are searched on half of the validation images. What
    wins there is compared with what there was on the other half, and stored in the checkpoint if it is better: predict
    and evaluate use it.

    Example: raydet tune-nms runs/demo --objective F1@0.50
    """
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
    say(f"all settings: {tuned.folder / TABLE}; picture: {tuned.folder / PICTURE}")


@app.command()
def plot(
    run: Annotated[str, typer.Argument(metavar="RUN", help="run folder; its training may still go on")],
    out: Annotated[
        Path | None, typer.Option("--out", help="path of the picture, a PNG", show_default="RUN/images/metrics.png")
    ] = None,
) -> None:
    """Draw a run's loss, learning rate and AP over its steps and epochs, as one picture.

    A star marks the best AP; a dashed line is that of the averaged weights, if the run made them.

    Example: raydet plot runs/demo
    """
    from raydet.reports.curves import plot as draw
    from raydet.runs.mirror import opened

    with opened(run, weights=False) as folder:
        say(f"picture: {draw(folder, out)}")


@app.command()
def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="run folder; its training may still go on")],
    out: Annotated[Path | None, typer.Option("--out", help="path of the page", show_default="RUN/report.html")] = None,
) -> None:
    """Write a run's report: one HTML page with curves, metrics, classes, worst and best images, and its recipe.

    Example: raydet report runs/demo
    """
    from raydet.reports.run import report as write
    from raydet.runs.mirror import opened

    with opened(run, weights=False) as folder:
        say(f"report: {write(folder, out)}")


@app.command()
def predict(
    checkpoint: Annotated[str, typer.Argument(help="checkpoint folder, or run folder (its best one)")],
    source: Annotated[
        str, typer.Argument(help="image, folder of images, pattern, video, http(s) address, or number of a camera")
    ],
    out: Annotated[
        Path, typer.Option("--out", "--save", help="folder for the pictures or the video, and detections.json")
    ] = Path("predictions"),
    score: Score = None,
    iou: IoU = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="number of images in a batch", min=1)] = 16,
    max_pixels: MaxPixels = MAX_PIXELS,
    trust_code: TrustCode = False,
    device: Device = None,
) -> None:
    """Detect in images or a video: pictures or a video with boxes, and a COCO results JSON.

    Where all names are numbers, no two the same, they are the image_ids, as in COCO; else the images, or frames, are
    numbered in order from 1. file_name says which is which. Images that cannot be read are left out and listed; exit
    code 1 says that none could be.

    Example: raydet predict runs/demo photos/ --score 0.4
    """
    from raydet.predict.predictor import load, shown_score
    from raydet.predict.save import open_target, save

    target = open_target(source, out, max_pixels)
    predictor = load(checkpoint, device, trust_code=trust_code)
    score = shown_score(predictor.config.thresholds) if score is None else score
    found = save(predictor.stream(target.source, score, iou, batch_size), target)
    for name, reason in found.failed.items():
        say(f"not done: {name}: {reason}")
    say(found.summary)
    if not found.images:
        raise typer.Exit(1)


@app.command("batch-predict")
def batch_predict(
    checkpoint: Annotated[str, typer.Argument(help="checkpoint folder, or run folder (its best one)")],
    source: Annotated[str, typer.Argument(help="folder of images: s3://…, gs://… or a path that all nodes share")],
    out: Annotated[
        str,
        typer.Argument(metavar="OUT", help="folder for the detections: s3://…, gs://… or a path that all nodes share"),
    ],
    form: Annotated[
        str, typer.Option("--format", help="parquet, or coco: a COCO results JSON besides", metavar="FORMAT")
    ] = "parquet",
    score: Score = None,
    iou: IoU = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="number of images in a batch", min=1)] = 16,
    shard_images: Annotated[
        int,
        typer.Option(
            "--shard-images", help="number of images in a file of detections: what is lost when killed", min=1
        ),
    ] = 128,
    actors: Annotated[
        int | None,
        typer.Option("--actors", help="number of models at once [default: one for each GPU, or else each CPU]", min=1),
    ] = None,
    max_pixels: MaxPixels = MAX_PIXELS,
    trust_code: TrustCode = False,
    verbose: Verbose = False,
) -> None:
    """Detect in any number of images on Ray, from and to a disk or an object store.

    OUT gets Parquet files with a row for each image: boxes, scores, classes, or why it could not be read. The same
    command again goes on where it was interrupted.

    Example: raydet batch-predict runs/demo s3://bucket/photos s3://bucket/found --format coco
    """
    from raydet.predict.on_ray import batch_predict as run

    summary = run(
        checkpoint,
        source,
        out,
        trust_code=trust_code,
        form=form,
        conf=score,
        iou=iou,
        batch_size=batch_size,
        shard_images=shard_images,
        actors=actors,
        max_pixels=max_pixels,
        verbose=verbose,
        say=say,
    )
    say(str(summary))


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="checkpoint folder, or run folder (its best one)")],
    form: Annotated[str, typer.Option("--format", help="onnx, the only one so far", metavar="FORMAT")] = "onnx",
    output: Annotated[
        str, typer.Option("--output", help="batch: count, boxes, scores and labels of each image; flat: [N, 7]")
    ] = "batch",
    out: Annotated[
        Path | None,
        typer.Option("--out", help="path of the file", show_default="model.onnx in the checkpoint's folder"),
    ] = None,
    score: Annotated[
        float | None, typer.Option("--score", help="lowest score [default: the checkpoint's]", min=0, max=1)
    ] = None,
    iou: IoU = None,
    trust_code: TrustCode = False,
) -> None:
    """Write a checkpoint as an ONNX file that needs no raydet: uint8 images in, detections out, NMS inside.

    It detects in validation images, and is written if onnxruntime finds there what PyTorch does.

    Example: raydet export runs/demo --score 0.25 && raydet predict runs/demo/checkpoint_000012/model.onnx photos/
    """
    from raydet.predict.export import export as run

    if form != "onnx":
        raise RaydetError(f"--format {form}: it is onnx")
    written = run(checkpoint, out, trust_code=trust_code, form=output, conf=score, iou=iou, say=say)
    say(str(written))
    say(f"model: {written.path} ({written.path.stat().st_size / 1e6:.1f} MB)")


for command in (cli_data.inspect, cli_data.ingest, cli_data.recipes):
    app.command()(command)


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        app()
    except RaydetError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except SystemExit as end:
        if end.code == INTERRUPTED:  # what typer makes of KeyboardInterrupt
            typer.echo("interrupted; what was interrupted goes on when the same command is run again", err=True)
        raise


def _check_device(device: str | None, debug: bool) -> None:
    if device is not None and not debug:
        raise RaydetError("--device goes with --debug; on Ray, scale.gpu and scale.num_workers say what to use")


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


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="print the version", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"raydet {__version__}")
        raise typer.Exit


if __name__ == "__main__":
    main()
