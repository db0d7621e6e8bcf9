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

    A run is a folder, {storage}/{name}: the same command again resumes it from its last checkpoint.

    Example: raydet train coco2017_yolox_s data.root=/data/coco scale.num_workers=8
    """
    from raydet.recipe import load
    from raydet.training.launch import train as run

    _check_device(device, debug)
    result = run(recipe, overrides=overrides or (), debug=debug, device=device, verbose=verbose, say=_say)
    if result.finished_before:
        _say(f"{result.folder} is finished; another name=… starts another run")
    _table({name.removeprefix("val/"): value for name, value in result.metrics.items()})
    if not result.finished_before:
        _pictures(result.folder)
    _say(f"run folder: {result.folder}")
    _say(f"best checkpoint: {result.checkpoint}")
    data = load(result.folder / "recipe.yaml").data
    program = "raydet" if shutil.which("raydet") else sys.argv[0]
    _say(f"next: {program} predict {quote(str(result.folder))} {quote(str(Path(data.root) / data.val_images))}")


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="checkpoint folder, run folder (its best one), or weights file")],
    overrides: Overrides = None,
    recipe: RecipeOption = None,
    debug: Debug = False,
    device: Device = None,
    verbose: Verbose = False,
) -> None:
    """Measure a checkpoint or a weights file with COCO's metrics on validation data.

    Example: raydet evaluate yolox_s.pth --recipe coco2017_yolox_s data.root=/data/coco
    """
    from raydet.training.launch import evaluate as run

    _check_device(device, debug)
    metrics = run(
        checkpoint, recipe=recipe, overrides=overrides or (), debug=debug, device=device, verbose=verbose, say=_say
    )
    _table(metrics)


@app.command()
def predict(
    checkpoint: Annotated[Path, typer.Argument(help="checkpoint folder, or run folder (its best one)")],
    source: Annotated[Path, typer.Argument(help="image, or folder of images")],
    out: Annotated[Path, typer.Option("--out", help="folder for the pictures and detections.json")] = Path(
        "predictions"
    ),
    score: Annotated[float, typer.Option("--score", help="lowest score of a detection", min=0, max=1)] = 0.25,
    device: Device = None,
) -> None:
    """Detect in images: pictures with boxes, and a COCO results JSON.

    Where all names are numbers, no two the same, they are the image_ids, as in COCO; else the images are numbered in
    order. file_name says which is which.

    Example: raydet predict runs/demo photos/ --score 0.4
    """
    import json

    import cv2
    from rich.progress import track

    from raydet.predict import IMAGE_SUFFIXES, image_files, load, predict_files

    root = source if source.is_dir() else source.parent
    files = image_files(source)
    if root.resolve() in out.resolve().parents:  # what an earlier call drew is no image to detect in
        files = [path for path in files if out.resolve() not in path.resolve().parents]
        if not files:
            raise RaydetError(f"{source}: no images in it but those in {out}, which are raydet's own")
    if out.resolve() == root.resolve():
        raise RaydetError(f"--out {out} is the folder of the images, which the pictures would replace")
    predictor = load(checkpoint, device)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RaydetError(f"--out {out}: cannot be made ({error.strerror})") from None
    numbered = len({int(path.stem) for path in files if path.stem.isdecimal()}) == len(files)
    results = []
    found = predict_files(predictor, files, score)
    for number, (path, image, detections) in enumerate(track(found, "detecting", total=len(files)), start=1):
        image_id = int(path.stem) if numbered else number
        name = path.relative_to(root)
        picture = out / name
        if picture.suffix.lower() not in IMAGE_SUFFIXES:
            picture = picture.with_suffix(".jpg")
        picture.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(picture), predictor.draw(image, detections))
        results += [{**entry, "file_name": str(name)} for entry in predictor.to_coco(detections, image_id)]
    partial = out / "detections.json.partial"
    partial.write_text(json.dumps(results))
    partial.replace(out / "detections.json")
    _say(f"{len(results)} detections in {len(files)} images; pictures and detections.json in {out}")


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
    except KeyboardInterrupt:
        typer.echo(
            "interrupted; a training goes on from its last checkpoint when the same command is run again", err=True
        )
        sys.exit(130)


def _check_device(device: str | None, debug: bool) -> None:
    if device is not None and not debug:
        raise RaydetError("--device goes with --debug; on Ray, scale.gpu and scale.num_workers say what to use")


def _say(text: str) -> None:
    typer.echo(text)
    sys.stdout.flush()


def _pictures(folder: Path) -> None:
    from raydet.training.pictures import draw_validation

    _say(f"detections on validation images, beside the truth: {draw_validation(folder)}")


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
