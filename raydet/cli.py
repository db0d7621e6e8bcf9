"""The command `raydet`."""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from raydet import __version__
from raydet.errors import RaydetError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from raydet.data.batch import Batch
    from raydet.data.index import Index
    from raydet.data.report import Report
    from raydet.recipe import Recipe

TOP_FINDINGS = 10  # that `inspect` prints
TOP_TRIALS = 20  # that `tune` prints
INTERRUPTED = 130  # exit code

app = typer.Typer(
    help="Train and run object detectors on Ray. Start with: raydet recipes",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="settings, such as train.epochs=50 data.root=/data/coco"),
]
RecipeOption = Annotated[
    str | None, typer.Option("--recipe", help="recipe of the data and, for a weights file, of the model")
]
Debug = Annotated[bool, typer.Option("--debug", help="in this process, without Ray: breakpoints work")]
Device = Annotated[
    str | None, typer.Option("--device", help="such as cuda:1 or cpu [default: the first GPU, or else the CPU]")
]
Score = Annotated[
    float | None,
    typer.Option(
        "--score", help="lowest score of a detection [default: 0.25, or the checkpoint's if higher]", min=0, max=1
    ),
]
IoU = Annotated[
    float | None,
    typer.Option("--iou", help="of two boxes that overlap more the better stays [default: the checkpoint's]", max=1),
]
Verbose = Annotated[bool, typer.Option("--verbose", help="show what Ray and its workers print")]


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
    from raydet.data.formats import load_index
    from raydet.data.problems import Problems
    from raydet.data.store import is_uri
    from raydet.mirror import opened
    from raydet.recipe import load
    from raydet.report import report as report_of_run
    from raydet.training.display import summary
    from raydet.training.launch import train as start
    from raydet.training.pictures import draw_validation

    _check_device(device, debug)
    live = sys.stdout.isatty() and not verbose
    result = start(recipe, overrides=overrides or (), debug=debug, device=device, verbose=verbose, live=live, say=_say)
    if result.finished_before:
        _say(f"{result.folder} is finished; another name=… starts another run")
    _table({name.removeprefix("val/"): value for name, value in result.metrics.items()})
    data = load(result.folder / "recipe.yaml").data
    index = load_index(data, "val", Problems(data.on_error, data.max_errors))
    run = result.address or str(result.folder)
    with opened(run) as folder:
        if not result.finished_before:
            _say(f"detections on validation images, beside the truth: {draw_validation(folder, index)}")
        for line in summary(folder):
            _say(line)
        _say(f"curves: {folder / 'images' / 'metrics.png'}")
        if not result.finished_before:
            _say(f"report: {report_of_run(folder)}")
    _say(f"run folder: {run}")
    _say(f"best checkpoint: {result.checkpoint}")
    images = "photos/" if is_uri(index.root) or (index.shards >= 0).any() else str(Path(index.path(0)).parent)
    _say(f"next: {_program()} predict {quote(run)} {quote(images)}")
    _say(f"      {_program()} evaluate {quote(run)}")


@app.command()
def evaluate(
    checkpoint: Annotated[
        str, typer.Argument(help="checkpoint folder, run folder (its best one), weights file, or results.json")
    ],
    overrides: Overrides = None,
    recipe: RecipeOption = None,
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
    from raydet.training.launch import evaluate as run

    _check_device(device, debug)
    out = out or (Path(checkpoint) if Path(checkpoint).is_dir() else Path()) / "evaluation"
    metrics = run(
        checkpoint,
        recipe=recipe,
        overrides=overrides or (),
        debug=debug,
        device=device,
        verbose=verbose,
        out=out,
        say=_say,
    )
    _table(metrics)
    _say(f"metrics.json, detections.json and pictures: {out}")


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
    sweep = run(recipe, overrides=overrides or (), verbose=verbose, live=live, say=_say)
    if sweep.finished_before:
        _say(f"{sweep.folder} is finished; another name=… starts another sweep")
    settings = load(sweep.folder / "recipe.yaml")
    Console().print(table(sweep.trials, settings.eval.watch, settings.train.epochs, rows=TOP_TRIALS))
    for trial in sweep.trials:
        if trial.error:
            _say(f"{trial.name} failed: {trial.error}")
    for picture in sweep.pictures:
        _say(f"picture: {picture}")
    _say(f"all trials: {sweep.folder / TRIALS}")
    _say(f"best recipe: {sweep.recipe}")
    _say(f"next: {_program()} train {quote(str(sweep.recipe))}")


@app.command("tune-nms")
def tune_nms(
    checkpoint: Annotated[str, typer.Argument(help="checkpoint folder, run folder (its best one), or weights file")],
    overrides: Overrides = None,
    recipe: RecipeOption = None,
    objective: Annotated[
        str, typer.Option("--objective", help="what is to be highest: mAP@0.50:0.95, mAP@0.50, mAP@0.75 or F1@0.50")
    ] = "mAP@0.50:0.95",
    precision: Annotated[
        float | None,
        typer.Option("--precision", help="least share of the detections to be right at IoU 0.50", min=0, max=1),
    ] = None,
    trials: Annotated[int, typer.Option("--trials", help="number of settings", min=2)] = 200,
    seed: Annotated[int, typer.Option("--seed", help="of the settings and of the halves of the images")] = 0,
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
        overrides=overrides or (),
        objective=objective,
        precision=precision,
        trials=trials,
        seed=seed,
        out=out,
        debug=debug,
        device=device,
        verbose=verbose,
        say=_say,
    )
    for line in tuned.summary(objective):
        _say(line)
    _say(f"all settings: {tuned.folder / TABLE}; picture: {tuned.folder / PICTURE}")
    if Path(checkpoint).is_file():
        _say(f"a weights file keeps no thresholds: add {' '.join(tuned.overrides)}")


@app.command()
def plot(
    run: Annotated[str, typer.Argument(metavar="RUN", help="run folder; its training may still go on")],
    out: Annotated[
        Path | None, typer.Option("--out", help="the picture, a PNG", show_default="RUN/images/metrics.png")
    ] = None,
) -> None:
    """Draw a run's loss, learning rate and AP over its steps and epochs, as one picture.

    A star marks the best AP; a dashed line is that of the averaged weights, if the run made them.

    Example: raydet plot runs/demo
    """
    from raydet.mirror import opened
    from raydet.plot import plot as draw

    with opened(run, weights=False) as folder:
        _say(f"picture: {draw(folder, out)}")


@app.command()
def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="run folder; its training may still go on")],
    out: Annotated[Path | None, typer.Option("--out", help="the page", show_default="RUN/report.html")] = None,
) -> None:
    """Write a run's report: one HTML page with curves, metrics, classes, worst and best images, and its recipe.

    Example: raydet report runs/demo
    """
    from raydet.mirror import opened
    from raydet.report import report as write

    with opened(run, weights=False) as folder:
        _say(f"report: {write(folder, out)}")


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
    batch_size: Annotated[int, typer.Option("--batch-size", help="images at once", min=1)] = 16,
    device: Device = None,
) -> None:
    """Detect in images or a video: pictures or a video with boxes, and a COCO results JSON.

    Where all names are numbers, no two the same, they are the image_ids, as in COCO; else the images, or frames, are
    numbered in order from 1. file_name says which is which. Images that cannot be read are left out and listed; exit
    code 1 says that none could be.

    Example: raydet predict runs/demo photos/ --score 0.4
    """
    from raydet.predict import load, shown_score
    from raydet.predictions import open_target, save

    target = open_target(source, out)
    predictor = load(checkpoint, device)
    score = shown_score(predictor.config.thresholds) if score is None else score
    found = save(predictor.stream(target.source, score, iou, batch_size), target)
    for name, reason in found.failed.items():
        _say(f"not done: {name}: {reason}")
    _say(found.summary)
    if not found.images:
        raise typer.Exit(1)


@app.command("batch-predict")
def batch_predict(
    checkpoint: Annotated[str, typer.Argument(help="checkpoint folder, or run folder (its best one)")],
    source: Annotated[str, typer.Argument(help="folder of images: s3://…, gs://… or a path that all nodes share")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="folder for the detections, likewise")],
    form: Annotated[
        str, typer.Option("--format", help="parquet, or coco: a COCO results JSON besides", metavar="FORMAT")
    ] = "parquet",
    score: Score = None,
    iou: IoU = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="images at once", min=1)] = 16,
    shard_images: Annotated[
        int, typer.Option("--shard-images", help="images of a file of detections: what is lost when killed", min=1)
    ] = 128,
    actors: Annotated[
        int | None, typer.Option("--actors", help="models at once [default: one for each GPU, or else each CPU]", min=1)
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Detect in any number of images on Ray, from and to a disk or an object store.

    OUT gets Parquet files with a row for each image: boxes, scores, classes, or why it could not be read. The same
    command again goes on where it was interrupted.

    Example: raydet batch-predict runs/demo s3://bucket/photos s3://bucket/found --format coco
    """
    from raydet.batch_predict import batch_predict as run

    summary = run(
        checkpoint,
        source,
        out,
        form=form,
        conf=score,
        iou=iou,
        batch_size=batch_size,
        shard_images=shard_images,
        actors=actors,
        verbose=verbose,
        say=_say,
    )
    _say(str(summary))


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="checkpoint folder, or run folder (its best one)")],
    form: Annotated[str, typer.Option("--format", help="onnx, the only one so far", metavar="FORMAT")] = "onnx",
    output: Annotated[
        str, typer.Option("--output", help="batch: count, boxes, scores and labels of each image; flat: [N, 7]")
    ] = "batch",
    out: Annotated[
        Path | None, typer.Option("--out", help="the file", show_default="model.onnx in the checkpoint's folder")
    ] = None,
    score: Annotated[
        float | None, typer.Option("--score", help="lowest score [default: the checkpoint's]", min=0, max=1)
    ] = None,
    iou: IoU = None,
) -> None:
    """Write a checkpoint as an ONNX file that needs no raydet: uint8 images in, detections out, NMS inside.

    It detects in validation images, and is written if onnxruntime finds there what PyTorch does.

    Example: raydet export runs/demo --score 0.25 && raydet predict runs/demo/checkpoint_000012/model.onnx photos/
    """
    from raydet.export import export as run

    if form != "onnx":
        raise RaydetError(f"--format {form}: it is onnx")
    written = run(checkpoint, out, form=output, conf=score, iou=iou, say=_say)
    _say(
        f"{written.detections} detections compared: {written.missing} are not in both, the others' scores differ by "
        f"at most {written.score:.1g}, boxes by {written.pixels:.1g} px"
    )
    _say(f"model: {written.path} ({written.path.stat().st_size / 1e6:.1f} MB)")


@app.command()
def inspect(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="a data set's folder or URI, or a recipe, whose data it is")
    ],
    overrides: Overrides = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", help="show images also as this recipe augments them; it may name the files"),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="the page")] = Path("inspect.html"),
    decode: Annotated[
        bool, typer.Option("--decode", help="open every image too: finds broken ones and copies")
    ] = False,
) -> None:
    """Look at a data set before training on it: numbers, what is wrong, images with boxes, on one HTML page.

    Example: raydet inspect /data/coco --recipe coco2017_yolox_s --decode
    """
    from rich.progress import track

    from raydet.data.formats import load_index
    from raydet.data.problems import Problems
    from raydet.data.report import decode_all
    from raydet.data.report import inspect as look
    from raydet.data.report_page import render
    from raydet.data.store import Store

    every_problem = ["data.on_error=skip", f"data.max_errors={sys.maxsize}"]
    settings = _recipe_of(data, [*every_problem, *(overrides or ())], recipe)
    recipe = recipe or settings.name
    splits, problems, decoded = {}, {}, {}
    for split in ("train", "val"):
        found = Problems(settings.data.on_error, settings.data.max_errors)
        try:
            splits[split] = load_index(settings.data, split, found)
            problems[split] = found.messages
        except RaydetError as error:
            problems[split] = [str(error)]
    if not splits:
        raise RaydetError(problems["train"][0])
    if decode:
        for split, index in splits.items():
            decoded[split] = list(track(decode_all(index), f"decoding {split}", total=len(index)))
    train = splits.get("train")
    report = look(
        settings.data.root,
        splits,
        problems,
        image_size=settings.data.image_size,
        decoded=decoded,
        augmented=_augmented(settings, train) if recipe and train is not None else None,
        seed=settings.seed,
    )
    Store(out.parent).write(out.name, render(report).encode())
    _summarise(report)
    _say(f"page: {out}")


@app.command()
def ingest(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="a data set's folder or URI, or a recipe, whose data it is")
    ],
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="folder for the shards: s3://…, gs://… or a path that all nodes share")
    ],
    overrides: Overrides = None,
    splits: Annotated[list[str] | None, typer.Option("--split", help="train or val [default: both]")] = None,
    shard_mb: Annotated[
        float, typer.Option("--shard-mb", help="size of a shard; a task needs three times as much memory", min=1)
    ] = 128,
    seed: Annotated[int, typer.Option("--seed", help="of the images' places in the shards", min=0)] = 0,
    verify: Annotated[
        bool, typer.Option("--verify", help="read finished shards once more; write those that are damaged again")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Write a data set as Parquet shards with the encoded images: object stores are slow with many small files.

    Each image is decoded once, so that broken ones are found here (data.on_error=skip leaves them out). The same
    command again goes on where it was interrupted. To train from the shards: data.format=shards data.root=OUT.

    Example: raydet ingest coco2017_yolox_s s3://bucket/coco data.root=/data/coco
    """
    from raydet.data.ingest import ingest as run

    run(
        _recipe_of(data, overrides or ()).data,
        out,
        splits=splits or ("train", "val"),
        shard_mb=shard_mb,
        seed=seed,
        verify=verify,
        verbose=verbose,
        say=_say,
    )
    _say(f"next: train with data.format=shards data.root={quote(out)}")


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="print this one, resolved, with the meaning of each key")] = None,
    overrides: Overrides = None,
) -> None:
    """List the recipes, or print one.

    Example: raydet recipes coco2017_yolox_s > mine.yaml
    """
    from raydet.recipe import describe, load, shipped

    if name is not None:
        found = load(name, overrides or ())
        if found.name == Path(name).stem:  # left empty, so that a copy in mine.yaml makes a run named mine
            found = found.model_copy(update={"name": ""})
        typer.echo(describe(found), nl=False)
        return
    width = max(map(len, shipped()))
    for recipe, path in shipped().items():
        headline = path.read_text().splitlines()[0].removeprefix("#").strip()
        typer.echo(f"{recipe:<{width}}  {headline}")


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


def _recipe_of(data: str, overrides: Sequence[str], recipe: str | None = None) -> Recipe:
    """Return the recipe whose data section says what a folder, its URI or a recipe means; a folder's has no name."""
    from raydet.data.store import is_uri
    from raydet.recipe import Recipe, load, shipped

    if is_uri(data) or Path(data).expanduser().is_dir():
        return load(recipe or Recipe(), [f"data.root={data}", *overrides])
    if recipe is None and (data in shipped() or Path(data).is_file()):
        return load(data, overrides)
    raise RaydetError(f"{data} is neither a folder nor the URI of one{'' if recipe else ' nor a recipe'}")


def _augmented(settings: Recipe, index: Index) -> Batch | None:
    """Return the first training samples as the model will get them; None, and the reason said, if none can be made."""
    from raydet.data.batch import local_train_batches
    from raydet.data.report import SHOWN
    from raydet.models import family_of
    from raydet.plugins import is_own
    from raydet.training.checkpoint import build
    from raydet.training.prepare import train_samples

    try:
        name = settings.model.name
        model = build(name, len(index.class_names), settings.data.image_size) if is_own(name) else None
        preprocessing = (model and model.preprocessing) or family_of(model or name).preprocessing
        samples = train_samples(settings, index, preprocessing.resize)
        return next(local_train_batches(samples, 0, SHOWN, SHOWN))
    except RaydetError as error:
        _say(f"no augmented images: {error}")
        return None


def _check_device(device: str | None, debug: bool) -> None:
    if device is not None and not debug:
        raise RaydetError("--device goes with --debug; on Ray, scale.gpu and scale.num_workers say what to use")


def _program() -> str:
    """Return how to start raydet."""
    started = "python -m raydet.cli" if sys.argv[0].endswith(".py") else sys.argv[0]
    return "raydet" if shutil.which("raydet") else started


def _say(text: str) -> None:
    typer.echo(text)
    sys.stdout.flush()


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


def _summarise(report: Report) -> None:
    from rich.console import Console, Group
    from rich.table import Column, Table
    from rich.text import Text

    from raydet.data.report_page import overview

    def plain(
        text: str, style: str = ""
    ) -> Text:  # names come from strangers: no markup, nothing that moves the cursor
        return Text("".join(letter if letter.isprintable() else "?" for letter in text), style)

    numbers = {split: overview(statistics) for split, statistics in report.splits.items()}
    table = Table("", *map(Column, map(plain, numbers)))
    for name in next(iter(numbers.values())):
        table.add_row(name, *(values[name] for values in numbers.values()))
    Console().print(table)
    if not report.findings:
        return
    colour = {"error": "red", "warning": "yellow", "note": "dim"}
    table = Table("", "split", "", "findings", show_lines=True)
    table.columns[2].justify = "right"
    for found in report.findings[:TOP_FINDINGS]:
        example = f"{'such as ' * (found.count > 1)}{found.examples[0]}"
        told = Group(plain(found.what), plain(found.remedy, "dim"), plain(example, "dim"))
        table.add_row(plain(found.level, colour[found.level]), plain(found.split), f"{found.count:,}", told)
    Console().print(table)
    if len(report.findings) > TOP_FINDINGS:
        _say(f"{len(report.findings) - TOP_FINDINGS} more findings are on the page")


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="print the version", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"raydet {__version__}")
        raise typer.Exit


if __name__ == "__main__":
    main()
