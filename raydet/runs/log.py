"""What a run logs: metrics.jsonl, log.txt and pictures; and reading them again."""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from raydet.data.problems import Problems
from raydet.errors import RaydetError
from raydet.evaluation.coco import MAIN_METRIC
from raydet.store import Store, write_aside
from raydet.visualization import Shown, sheet, write_picture

METRICS_FILE = "metrics.jsonl"

Call = tuple[str, tuple[Any, ...], dict[str, Any]]  # name of a method, its arguments by position and by name


def parse_metrics(line: str | bytes) -> dict[str, float] | None:
    """Read a line of metrics.jsonl; None: it is damaged."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    if not isinstance(values, dict):
        return None
    numbers = {key: value for key, value in values.items() if isinstance(value, int | float) and math.isfinite(value)}
    return numbers if {"step", "epoch"} <= numbers.keys() else None


def read_metrics(folder: str | Path) -> list[dict[str, float]]:
    """Return the lines of a run's metrics.jsonl without the damaged ones; none where there is no such file.

    Args:
        folder: path or address of the run's folder.
    """
    run = Store(folder)
    lines = run.read(METRICS_FILE).split(b"\n") if run.kind(METRICS_FILE) == "file" else []
    return [values for line in lines if (values := parse_metrics(line)) is not None]


def drop_metrics_after(folder: Path, step: int) -> None:
    """Remove the lines of metrics.jsonl about later steps: the training will write them again."""
    path = folder / METRICS_FILE
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if _step(line) <= step]
        write_aside(path, "".join(line + "\n" for line in lines))


def components(values: Mapping[str, float]) -> dict[str, str]:
    """Return the short names of the loss components in a line of metrics.jsonl, by key."""
    found = {key: key.rpartition("/")[2] for key in values if key.startswith("train/") and key.count("/") > 1}
    return {key: name for key, name in found.items() if name not in {"Loss", "loss"}}  # the sum


def best_validation(lines: Sequence[Mapping[str, float]]) -> Mapping[str, float] | None:
    """Return the validation with the highest mAP@0.50:0.95, the later of equals; None: nothing was measured."""
    measured = [line for line in lines if line.get(f"val/{MAIN_METRIC}", -1) >= 0]  # -1 is COCO's "no such object"
    return max(reversed(measured), key=lambda line: line[f"val/{MAIN_METRIC}"], default=None)


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
            name: name of these pictures in the run.
            title: title of these pictures, for people.
            images: at least one.
            class_names: name of each class.
            gt_alpha: see `raydet.visualization.draw`.
            step: step of the training at which they were made.
            epoch: epoch that has ended.
            value: value of the metric or loss that is extreme in them; None: none is.
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
    """Takes what is to be logged in a process that has no access to the folder of the run, for rank 0 to log it.

    Args:
        say: takes lines of text at once.

    Attributes:
        calls: the methods of a `RunLog` to call with their arguments; see `replay`.
    """

    def __init__(self, say: Callable[[str], Any]):
        self.calls: list[Call] = []
        self.say = say

    def metrics(self, **values: float) -> None:
        """See `RunLog.metrics`."""
        self.calls.append(("metrics", (), values))

    def pictures(self, *given: Any, **named: Any) -> None:
        """See `RunLog.pictures`."""
        self.calls.append(("pictures", given, named))


def replay(calls: Sequence[Call], log: RunLog) -> None:
    """Log what a `Recorder` has taken."""
    for method, given, named in calls:
        getattr(log, method)(*given, **named)


@contextmanager
def warnings_said(say: Callable[[str], Any]) -> Iterator[None]:
    """Put raydet's warnings, such as that no data comes, among the lines of progress."""
    logger, handler = logging.getLogger("raydet"), _SayWarnings(say)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _SayWarnings(logging.Handler):
    def __init__(self, say: Callable[[str], Any]):
        super().__init__(logging.WARNING)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say(f"warning: {record.getMessage()}")


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line that a crash cut off
        return math.inf
