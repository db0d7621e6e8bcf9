"""The commands for data and recipes: inspect, ingest, recipes."""

from __future__ import annotations

import sys
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from raydet.cli.options import Overrides, Verbose, say
from raydet.errors import RaydetError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from raydet.data.batch import Batch
    from raydet.data.index import Index
    from raydet.recipe import Recipe
    from raydet.reports.inspect import Inspection

TOP_FINDINGS = 10  # that `inspect` prints


def inspect(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="folder or URI of a data set, or a recipe that names one")
    ],
    overrides: Overrides = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", help="recipe whose augmentation is shown as well; it may also name the files"),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="path of the page")] = Path("inspect.html"),
    decode: Annotated[
        bool, typer.Option("--decode", help="decode every image as well, which finds broken images and copies")
    ] = False,
) -> None:
    """Look at a data set before training on it: numbers, mistakes and images with boxes, on one HTML page.

    Example: raydet inspect /data/coco --recipe coco2017_yolox_s --decode
    """
    from rich.progress import track

    from raydet.data.formats import load_index
    from raydet.data.problems import Problems
    from raydet.reports.inspect import decode_all
    from raydet.reports.inspect import inspect as look
    from raydet.reports.inspect_page import render
    from raydet.store import Store

    every_problem = ["data.on_error=skip", f"data.max_errors={sys.maxsize}"]
    settings = _recipe_of(data, [*every_problem, *(overrides or ())], recipe)
    recipe = recipe or settings.name
    splits, problems, notices, decoded = {}, {}, {}, {}
    for split in ("train", "val"):
        found = Problems(settings.data.on_error, settings.data.max_errors)
        try:
            splits[split] = load_index(settings.data, split, found)
            problems[split], notices[split] = found.messages, found.notices
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
        notices=notices,
        image_size=settings.data.image_size,
        counted=(settings.eval.max_dets, settings.eval.max_detections),
        decoded=decoded,
        augmented=_augmented(settings, train) if recipe and train is not None else None,
        seed=settings.seed,
    )
    Store(out.parent).write(out.name, render(report).encode())
    _summarise(report)
    say(f"page: {out}")


def ingest(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="folder or URI of a data set, or a recipe that names one")
    ],
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="folder for the shards: s3://…, gs://… or a path that all nodes share")
    ],
    overrides: Overrides = None,
    splits: Annotated[
        list[str] | None, typer.Option("--split", help="split to write: train or val", show_default="both")
    ] = None,
    shard_mb: Annotated[
        float,
        typer.Option("--shard-mb", help="size of a shard in megabytes; a task needs three times as much memory", min=1),
    ] = 128,
    seed: Annotated[int, typer.Option("--seed", help="seed of the images' places in the shards", min=0)] = 0,
    verify: Annotated[
        bool, typer.Option("--verify", help="read finished shards once more, and rewrite those that are damaged")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Write a data set as Parquet shards that hold the image files: object stores are slow with many small files.

    Each image is decoded once, so that broken images are found here (data.on_error=skip leaves them out). The same
    command again resumes where it was interrupted. To train from the shards: data.format=shards data.root=OUT.

    Example: raydet ingest coco2017_yolox_s s3://bucket/coco data.root=/data/coco
    """
    from raydet.data.shards import ingest as run

    run(
        _recipe_of(data, overrides or ()).data,
        out,
        splits=splits or ("train", "val"),
        shard_mb=shard_mb,
        seed=seed,
        verify=verify,
        verbose=verbose,
        say=say,
    )
    say(f"next: train with data.format=shards data.root={quote(out)}")


def recipes(
    name: Annotated[str | None, typer.Argument(help="recipe to print in full, with the meaning of each key")] = None,
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


def _recipe_of(data: str, overrides: Sequence[str], recipe: str | None = None) -> Recipe:
    """Return the recipe whose data section says what a folder, its URI or a recipe means; a folder's has no name."""
    from raydet.recipe import Recipe, load, override, shipped
    from raydet.store import is_uri

    if is_uri(data) or Path(data).expanduser().is_dir():
        return load(recipe or Recipe(), [override("data.root", data), *overrides])
    if recipe is None and (data in shipped() or Path(data).is_file()):
        return load(data, overrides)
    raise RaydetError(f"{data} is neither a folder nor the URI of one{'' if recipe else ' nor a recipe'}")


def _augmented(settings: Recipe, index: Index) -> Batch | None:
    """Return the first training samples as the model will get them; None, and the reason said, if none can be made."""
    from raydet.data.batch import local_train_batches
    from raydet.data.pipeline import train_samples
    from raydet.models import family_of
    from raydet.plugins import is_own
    from raydet.reports.inspect import SHOWN
    from raydet.runs.checkpoint import build

    try:
        name = settings.model.name
        model = build(name, len(index.class_names), settings.data.image_size) if is_own(name) else None
        preprocessing = (model and model.preprocessing) or family_of(model or name).preprocessing
        samples = train_samples(settings, index, preprocessing.resize)
        return next(local_train_batches(samples, 0, SHOWN, SHOWN))
    except RaydetError as error:
        say(f"no augmented images: {error}")
        return None


def _summarise(report: Inspection) -> None:
    from rich.console import Console, Group
    from rich.table import Column, Table
    from rich.text import Text

    from raydet.reports.inspect_page import overview

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
        say(f"{len(report.findings) - TOP_FINDINGS} more findings are on the page")
