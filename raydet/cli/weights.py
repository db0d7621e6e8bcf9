"""The command for published weights: list them, and fetch one before a machine goes offline."""

from __future__ import annotations

from typing import Annotated

import typer

from raydet.cli.options import say

app = typer.Typer(invoke_without_command=True)


@app.callback()
def weights(context: typer.Context) -> None:
    """List the published weights that a model's name stands for: AP on COCO, size, licence, address, local path.

    Where a command takes a checkpoint, the name of a model is its published COCO weights. They are downloaded at the
    first use; RAYDET_WEIGHTS names a folder or a mirror that is asked first. For a training, model.weights=coco are
    the same, and model.weights=imagenet those of the backbone.

    Example: raydet weights get yolox_s
    """
    if context.invoked_subcommand is not None:
        return
    from raydet.models.download import present
    from raydet.models.published import BACKBONES, PUBLISHED

    for row in (*PUBLISHED.values(), *BACKBONES.values()):
        file = present(row)
        size = f"{row.size / 1e6:.1f} MB" if row.size else "size unknown"
        ap = f"AP {row.ap:g} at {row.image_size} px ({row.measured_by})" if row.ap else "backbone, from ImageNet"
        say(f"{row.model:<21}  {ap}  {size}")
        say(f"    {row.address}")
        say(f"    licence: {row.licence}")
        say(f"    here: {file}" if file else "    not on this machine")


@app.command()
def get(
    model: Annotated[str, typer.Argument(help="name of the model, as `raydet weights` lists it")],
    of_backbone: Annotated[bool, typer.Option("--backbone", help="those of its backbone, from ImageNet")] = False,
) -> None:
    """Download the published weights of a model, and check their sum.

    Example: raydet weights get yolox_s
    """
    from raydet.models.download import fetch
    from raydet.models.published import backbone, published

    row = backbone(model) if of_backbone else published(model)
    say(f"{fetch(row)}; licence: {row.licence}")
