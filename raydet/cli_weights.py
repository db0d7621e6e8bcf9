"""The command for published weights: list them, and fetch one before a machine goes offline."""

from __future__ import annotations

from typing import Annotated

import typer

from raydet.cli_data import say

app = typer.Typer(invoke_without_command=True)


@app.callback()
def weights(context: typer.Context) -> None:
    """List the published weights that a model's name stands for: AP on COCO, size, licence, address, local path.

    Where a command takes a checkpoint, the name of a model is its published COCO weights. They are downloaded at the
    first use; RAYDET_WEIGHTS names a folder or a mirror that is asked first.

    Example: raydet weights get yolox_s
    """
    if context.invoked_subcommand is not None:
        return
    from raydet.models.download import present
    from raydet.models.published import PUBLISHED

    for row in PUBLISHED.values():
        file = present(row)
        size = f"{row.size / 1e6:.1f} MB" if row.size else "size unknown"
        say(f"{row.model:<21}  AP {row.ap:g} at {row.image_size} px ({row.measured_by})  {size}")
        say(f"    {row.address}")
        say(f"    licence: {row.licence}")
        say(f"    here: {file}" if file else "    not on this machine")


@app.command()
def get(model: Annotated[str, typer.Argument(help="name of the model, as `raydet weights` lists it")]) -> None:
    """Download the published weights of a model, and check their sum.

    Example: raydet weights get yolox_s
    """
    from raydet.models.download import fetch
    from raydet.models.published import published

    row = published(model)
    say(f"{fetch(row)}; licence: {row.licence}")
