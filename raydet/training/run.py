"""A run: what its workers are given, what they need of their surroundings, and the files they write."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from raydet.data.batch import Batch
from raydet.data.index import Index
from raydet.recipe import Recipe
from raydet.training.checkpoint import Config


@dataclass(frozen=True)
class Job:
    """All that a training or an evaluation is, but for the streams.

    Attributes:
        recipe: the settings.
        folder: of the run, absolute: workers have another working directory.
        config: what every checkpoint says of the model.
        model: as it begins, on the CPU.
        criterion: the loss; None in an evaluation.
        train_images: number of training images.
        val_index: the images to validate on.
    """

    recipe: Recipe
    folder: Path
    config: Config
    model: nn.Module
    criterion: nn.Module | None
    train_images: int
    val_index: Index

    @property
    def total_steps(self) -> int:
        """Steps of the run."""
        return -(-self.recipe.train.epochs * self.train_images // self.recipe.train.batch_size)

    def epoch_of(self, step: int) -> int:
        """Epochs that are complete when `step` steps are done."""
        done = step * self.recipe.train.batch_size // self.train_images
        return min(done, self.recipe.train.epochs)

    def validates_after(self, step: int) -> bool:
        """Is a validation due when `step` steps are done? A step may span several epochs of a small data set."""
        every = self.recipe.eval.every
        return step == self.total_steps or self.epoch_of(step) // every > self.epoch_of(step - 1) // every


class World(Protocol):
    """What surrounds the worker loop: a Ray Train worker group, or a single process."""

    rank: int
    size: int
    device: torch.device

    def train_batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Yield this rank's batches of positions start … stop - 1."""
        ...

    def val_batches(self) -> Callable[[], Iterator[Batch]]:
        """Return what yields this rank's share of the validation images, each time it is called."""
        ...

    def checkpoint(self) -> AbstractContextManager[Path | None]:
        """Give the folder of the checkpoint to resume from."""
        ...

    def report(self, metrics: dict[str, float], epoch: int, write: Callable[[Path], None]) -> None:
        """Keep a checkpoint that `write` writes, and report the metrics; all ranks call it."""
        ...


class RunLog:
    """metrics.jsonl, one flat object of numbers a line, and log.txt, what a person reads; rank 0 writes them."""

    def __init__(self, folder: Path, echo: Callable[[str], Any] | None = None):
        self._folder = folder
        self._echo = echo
        folder.mkdir(parents=True, exist_ok=True)

    def resume(self, step: int) -> None:
        """Drop the metrics of steps after `step`: they will be written again."""
        path = self._folder / "metrics.jsonl"
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if _step(line) <= step]
            partial = path.with_suffix(".partial")
            partial.write_text("".join(line + "\n" for line in lines))
            partial.replace(path)

    def metrics(self, **values: float) -> None:
        """Append a line of metrics; what is not finite is left out, as JSON has no such numbers."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        with (self._folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(finite) + "\n")

    def say(self, text: str) -> None:
        """Append a line of text."""
        with (self._folder / "log.txt").open("a") as file:
            file.write(text + "\n")
        if self._echo:
            self._echo(text)


class SayWarnings(logging.Handler):
    """Puts raydet's warnings of a worker, such as that no data comes, among the lines of progress."""

    def __init__(self, log: RunLog):
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Say it."""
        self._log.say(f"warning: {record.getMessage()}")


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line that a crash cut off
        return math.inf
