"""What several commands share: their options, and how a line is printed."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="settings, such as train.epochs=50 data.root=/data/coco"),
]
Verbose = Annotated[bool, typer.Option("--verbose", help="show what Ray and its workers print")]
RecipeOption = Annotated[
    str | None, typer.Option("--recipe", help="recipe that names the data and, for a weights file, the model")
]
Debug = Annotated[bool, typer.Option("--debug", help="run in this process, without Ray, so that breakpoints work")]
TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-code", help="run code that the checkpoint or its run names: a model or data set that is not raydet's"
    ),
]
Device = Annotated[
    str | None,
    typer.Option("--device", help="device, such as cuda:1 or cpu", show_default="the first GPU, or else the CPU"),
]
Score = Annotated[
    float | None,
    typer.Option(
        "--score", help="lowest score of a detection", show_default="0.25, or the checkpoint's if higher", min=0, max=1
    ),
]
MaxPixels = Annotated[
    int, typer.Option("--max-pixels", help="largest image to decode, in pixels; the default is Pillow's limit", min=1)
]
IoU = Annotated[
    float | None,
    typer.Option("--iou", help="IoU threshold of NMS", show_default="the checkpoint's", max=1),
]


def say(text: str) -> None:
    """Print a line at once: `ray job logs -f` shows it."""
    typer.echo(text)
    sys.stdout.flush()
