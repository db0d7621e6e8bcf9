"""A job, which is a training or an evaluation; the world that it runs in; and both together on one rank: a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from torch import nn

from raydet.data.batch import Batch
from raydet.data.index import Index
from raydet.data.problems import Problems
from raydet.recipe import Data, Recipe
from raydet.runs.checkpoint import Config
from raydet.runs.log import Call, RunLog

logger = logging.getLogger(__name__)

# Random numbers of the sizes never share a seed with those of the samples.
_SIZES = 3


@dataclass(frozen=True)
class Job:
    """All that a training or an evaluation is, except for the streams of samples.

    Attributes:
        recipe: the settings.
        folder: absolute path of the folder of the run: workers have another working directory.
        config: what every checkpoint says about the model.
        model: the model before the first step, on the CPU.
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
    def inputs(self) -> dict[str, Any]:
        """What the run was given beside its recipe; a run that goes on is given the same."""
        return {
            "model": type(self.model).__qualname__,
            "loss": type(self.criterion).__qualname__,
            "training images": self.train_images,
            "validation images": len(self.val_index),
            "classes": list(self.config.class_names),
        }

    @property
    def total_steps(self) -> int:
        """Steps of the run, all of the recipe's batch size."""
        return self.steps_left(0, self.recipe.train.batch_size)

    def batch_size(self, ranks: int) -> int:
        """Images of a step: the recipe's, or the next lower number that the ranks can share equally."""
        return self.recipe.train.batch_size // ranks * ranks

    def steps_left(self, position: int, batch_size: int) -> int:
        """Steps from a position to the end of the run; the last may go beyond it."""
        return max(0, -(-(self.recipe.train.epochs * self.train_images - position) // batch_size))

    def epoch_of(self, position: int) -> int:
        """Epochs that are complete when so many samples are done."""
        return min(position // self.train_images, self.recipe.train.epochs)

    def multiscale(self, step: int) -> tuple[int, int]:
        """Return (height, width) of the images that a step trains on: the same on every rank, and after a restart."""
        size, augment = self.recipe.data.image_size, self.recipe.augment
        if augment.multiscale is None:
            return size
        low, high = augment.multiscale
        sides = list(range(low, high + 1, 32))
        if step == 0:  # the largest first: what does not fit into the memory should not be found out after hours
            return scaled(size, sides[-1])
        if max(size) in sides:
            sides += [max(size)] * (augment.multiscale_repeats - 1)
        drawn = np.random.default_rng((self.recipe.seed, _SIZES, step // augment.multiscale_every))
        return scaled(size, sides[drawn.integers(len(sides))])

    def validates_after(self, position: int, batch_size: int) -> bool:
        """Is a validation due after the step that ends here? A step may span several epochs of a small data set."""
        every, epoch = self.recipe.eval.every, self.epoch_of(position)
        return epoch == self.recipe.train.epochs or epoch // every > self.epoch_of(position - batch_size) // every


def scaled(size: tuple[int, int], longer: int) -> tuple[int, int]:
    """Return the (height, width) near a size with another longer side, both multiples of 32."""
    return tuple(max(32, round(longer * side / max(size) / 32) * 32) for side in size)  # type: ignore[return-value]


@dataclass(frozen=True)
class Validated:
    """What a validation beside the training has found.

    Attributes:
        metrics: metrics by name, as in a line of metrics.jsonl.
        logged: what else is to be logged, such as pictures; see `raydet.runs.log.Recorder`.
        seconds: duration of the validation.
    """

    metrics: dict[str, float]
    logged: list[Call]
    seconds: float


class ValidationBeside(Protocol):
    """A validation that runs beside the training."""

    def poll(self) -> Sequence[str | Validated]:
        """Return what has come since the last call: lines of progress, and at the end the result.

        Raises:
            Exception: the validation has failed, or its process has died.
        """
        ...

    def cancel(self) -> None:
        """End it."""
        ...


class World(Protocol):
    """Where a job runs: a worker of Ray Train, or a single process."""

    rank: int
    size: int
    device: torch.device

    def train_batches(self, start: int, stop: int) -> Generator[Batch, None, None]:
        """Yield this rank's batches of positions start … stop - 1."""
        ...

    def val_batches(self) -> Callable[[], Iterator[Batch]]:
        """Return a function that yields this rank's share of the validation images each time it is called."""
        ...

    @property
    def validate(self) -> Callable[[bytes, int, int], ValidationBeside] | None:
        """A function that starts a validation beside the training; None: validations cannot run beside the training.

        Its arguments are the content of model.safetensors and the numbers of epochs and steps that are done.
        """
        ...

    def report(self, metrics: dict[str, float]) -> None:
        """Report metrics to whoever watches; all ranks call it."""
        ...

    def beat(self) -> None:
        """Give a sign of life."""
        ...

    def ranks_to_lose(self) -> int:
        """Return how many ranks are on nodes that are about to be taken away."""
        ...

    def leave(self) -> NoReturn:
        """End this worker, as the run goes on without those nodes; all ranks call it."""
        ...

    def paths(self, rows: Iterable[int]) -> list[str]:
        """Return the paths of training images by their rows in the index."""
        ...


@dataclass(frozen=True)
class Run:
    """A job on one rank.

    Attributes:
        job: what is done.
        world: where it runs.
        log: takes metrics, pictures and lines of progress.
    """

    job: Job
    world: World
    log: RunLog

    @property
    def leader(self) -> bool:
        """Is this rank 0, which writes what all ranks have in common?"""
        return self.world.rank == 0


def noting_errors(batches: Iterator[Batch], settings: Data, beat: Callable[[], Any]) -> Iterator[Batch]:
    """Pass batches on with a sign of life for each, and warn once of each image that was left out of them.

    Raises:
        RaydetError: there are more such images than the settings of the data allow.
    """
    problems = Problems(settings.on_error, settings.max_errors)
    for batch in batches:
        for error in batch.errors:
            if error not in problems.messages:
                logger.warning("left out: %s", error)
                problems.add(error)
        beat()
        yield batch
