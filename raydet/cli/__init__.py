"""The command `raydet`."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from raydet import __version__
from raydet.cli import data, detection, training, weights
from raydet.errors import RaydetError

INTERRUPTED = 130  # exit code

app = typer.Typer(
    help="Train and run object detectors on Ray. Start with: raydet recipes",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    training.train,
    training.evaluate,
    training.tune,
    training.tune_nms,
    training.plot,
    training.report,
    detection.predict,
    detection.batch_predict,
    detection.export,
    data.inspect,
    data.ingest,
    data.recipes,
):
    app.command(command.__name__.replace("_", "-"))(command)
app.add_typer(weights.app, name="weights")


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="print the version", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"raydet {__version__}")
        raise typer.Exit


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
