"""A run on Weights & Biases: its recipe and its metrics, in the group of its sweep.

Key and mode come from the environment, as W&B documents them: WANDB_API_KEY, WANDB_MODE=offline and so on. What fails
there is said once, and stops no training.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raydet.recipe import Recipe
from raydet.training.run import Job, RunLog

_ID = "wandb_id"  # file in the run's folder


@contextmanager
def tracked(job: Job, log: RunLog, rank: int) -> Iterator[None]:
    """Send what a training logs within to Weights & Biases too, if the recipe has it so."""
    if rank != 0 or not job.recipe.track.wandb:
        yield
        return
    run = WandbRun(job.recipe, job.folder, log.say)
    log.tracker = run.log
    try:
        yield
    except BaseException:
        run.finish(failed=True)
        raise
    run.finish(failed=False)


class WandbRun:
    """A run, which a training that is resumed goes on with.

    Args:
        recipe: the settings.
        folder: of the run.
        say: takes a line when W&B fails.
    """

    def __init__(self, recipe: Recipe, folder: Path, say: Callable[[str], Any]):
        self._say = say
        self._run: Any = None
        self._try(lambda: self._start(recipe, folder))

    def log(self, values: Mapping[str, float]) -> None:
        """Send a line of metrics.jsonl."""
        if self._run is not None:
            self._try(lambda: self._run.log(dict(values)))

    def finish(self, *, failed: bool) -> None:
        """End the run."""
        if self._run is not None:
            self._try(lambda: self._run.finish(exit_code=int(failed)))

    def _start(self, recipe: Recipe, folder: Path) -> None:
        import wandb

        note = folder / _ID
        if not note.is_file():
            note.write_text(secrets.token_hex(8))
        self._run = wandb.init(
            project=recipe.track.wandb_project,
            group=recipe.track.wandb_group,
            name=recipe.name,
            id=note.read_text(),
            resume="allow",
            dir=folder,
            config=recipe.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric("*", step_metric="step")

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # whatever it is, the training is worth more
            self._run = None
            self._say(
                f"warning: Weights & Biases failed, the training goes on without: {type(error).__name__}: {error}"
            )
