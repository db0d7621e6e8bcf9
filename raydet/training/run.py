"""A run: what its workers are given, what they need of their surroundings, and the files they write."""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from raydet.data.batch import Batch
from raydet.data.index import Index
from raydet.data.problems import Problems
from raydet.errors import RaydetError
from raydet.recipe import Recipe
from raydet.training.checkpoint import Config
from raydet.visualization import Shown, sheet, write_picture

logger = logging.getLogger(__name__)

# Random numbers of the sizes never share a seed with those of the samples.
_SIZES = 3


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
        if step == 0:  # the largest first: what does not fit into the memory should not be found out after hours
            low = high
        drawn = np.random.default_rng((self.recipe.seed, _SIZES, step // augment.multiscale_every))
        return scaled(size, 32 * int(drawn.integers(low // 32, high // 32 + 1)))

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
        metrics: by name, as a line of metrics.jsonl has them.
        logged: what is to be logged besides, such as the pictures.
        seconds: duration of the validation.
    """

    metrics: dict[str, float]
    logged: Recorder
    seconds: float


class Validation(Protocol):
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
    """What surrounds the worker loop: a Ray Train worker group, or a single process."""

    rank: int
    size: int
    device: torch.device

    def train_batches(self, start: int, stop: int) -> Generator[Batch, None, None]:
        """Yield this rank's batches of positions start … stop - 1."""
        ...

    def val_batches(self) -> Callable[[], Iterator[Batch]]:
        """Return what yields this rank's share of the validation images, each time it is called."""
        ...

    @property
    def validate(self) -> Callable[[bytes, int, int], Validation] | None:
        """What starts a validation beside the training, called with the content of model.safetensors and the numbers
        of epochs and steps that are done; None: validations cannot run beside the training."""
        ...

    def report(self, metrics: dict[str, float]) -> None:
        """Report metrics to who watches; all ranks call it."""
        ...

    def beat(self) -> None:
        """Give a sign of life."""
        ...

    def paths(self, rows: Iterable[int]) -> list[str]:
        """Return the paths of training images by their rows in the index."""
        ...


def agreed(value: Any) -> Any:
    """Return rank 0's value on every rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gathered(value: Any) -> list[Any] | None:
    """Return every rank's value on rank 0, None elsewhere."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values)
    return values


def everyone(value: Any) -> list[Any]:
    """Return every rank's value, on every rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def noting_errors(batches: Iterator[Batch], problems: Problems, beat: Callable[[], Any]) -> Iterator[Batch]:
    """Pass batches on with a sign of life for each, and warn once of each image that was left out of them.

    Raises:
        RaydetError: there are too many.
    """
    for batch in batches:
        for error in batch.errors:
            if error not in problems.messages:
                logger.warning("left out: %s", error)
                problems.add(error)
        beat()
        yield batch


class Tracker(Protocol):
    """Shows a run elsewhere; nothing that fails in it raises."""

    def metrics(self, values: Mapping[str, float]) -> None:
        """Take a line of metrics.jsonl."""
        ...

    def pictures(self, name: str, images: Sequence[Shown], class_names: Sequence[str], at: Mapping[str, float]) -> None:
        """Take images with their boxes, in place of those of the same name; `at` has step and epoch."""
        ...

    def finish(self, *, failed: bool) -> None:
        """End it."""
        ...


class RunLog:
    """metrics.jsonl, one flat object of numbers a line, and log.txt, what a person reads; rank 0 writes them.

    Where they cannot be written, the disk being full, lines go to the process' own output: a training is worth more.
    """

    def __init__(self, folder: Path, echo: Callable[[str], Any] | None = None):
        self._folder = folder
        self._echo = echo
        self.trackers: Sequence[Tracker] = ()  # get metrics and pictures too
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
        self._append("metrics.jsonl", json.dumps(finite))
        for tracker in self.trackers:
            tracker.metrics(finite)

    def pictures(
        self,
        name: str,
        title: str,
        images: Sequence[Shown],
        class_names: Sequence[str],
        gt_alpha: float | None = None,
        *,
        step: int,
        epoch: int,
        value: float | None = None,
    ) -> None:
        """Draw images with their boxes as images/{name}.jpg, in place of those before, and note it in pictures.jsonl.

        Args:
            name: which pictures of the run they are.
            title: the same in words.
            images: at least one.
            class_names: name of each class.
            gt_alpha: see `raydet.visualization.draw`.
            step: of the training, at which they were seen.
            epoch: that has ended.
            value: of what is extreme in them.
        """
        for tracker in self.trackers:
            tracker.pictures(name, images, class_names, {"step": step, "epoch": epoch})
        path = self._folder / "images" / f"{re.sub('[^A-Za-z0-9.@_-]+', '_', name)}.jpg"
        try:
            write_picture(path, sheet(images, class_names, gt_alpha))
        except RaydetError as error:
            self.say(f"warning: {error}")
            return
        note = {"name": name, "title": title, "epoch": epoch, "step": step, "value": value}
        note |= {"picture": str(path.relative_to(self._folder)), "captions": [shown.caption for shown in images]}
        self._append("images/pictures.jsonl", json.dumps(note))

    def left_out(self, problems: Mapping[str, Problems]) -> None:
        """List the records of each split that cannot be used, and say what may be a mistake."""
        for split, found in problems.items():
            for message in found.messages:
                self._append("log.txt", f"left out of the {split} data: {message}")
            if found.messages:
                self.say(f"{len(found.messages)} records of the {split} data cannot be used; log.txt names them")
            for notice in found.notices:
                self.say(f"warning: {split} data: {notice}")

    def say(self, text: str) -> None:
        """Append a line of text."""
        self._append("log.txt", text)
        if self._echo:
            self._echo(text)

    def _append(self, name: str, line: str) -> None:
        try:
            with (self._folder / name).open("a") as file:
                file.write(line + "\n")
        except OSError as error:
            print(f"{self._folder / name} ({error.strerror}): {line}", file=sys.stderr)


class Recorder:
    """Takes what is to be logged in a process that has no folder of the run, for rank 0 to log it."""

    def __init__(self) -> None:
        self._calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def metrics(self, **values: float) -> None:
        """See `RunLog.metrics`."""
        self._calls.append(("metrics", (), values))

    def pictures(self, *given: Any, **named: Any) -> None:
        """See `RunLog.pictures`."""
        self._calls.append(("pictures", given, named))

    def replay(self, log: RunLog) -> None:
        """Log all of it."""
        for method, given, named in self._calls:
            getattr(log, method)(*given, **named)


class SayWarnings(logging.Handler):
    """Puts raydet's warnings of a worker, such as that no data comes, among the lines of progress."""

    def __init__(self, say: Callable[[str], Any]):
        super().__init__(logging.WARNING)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        """Say it."""
        self._say(f"warning: {record.getMessage()}")


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line that a crash cut off
        return math.inf
