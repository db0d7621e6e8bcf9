"""How a run is shown to a person: a table that is redrawn in a terminal, lines of text, and a summary at the end."""

from __future__ import annotations

import io
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich import box
from rich.ansi import AnsiDecoder
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from raydet.evaluation.coco import MAIN_METRIC
from raydet.runs.log import METRICS_FILE, best_validation, components, parse_metrics, read_metrics
from raydet.runs.mirror import repeated

_Line = Mapping[str, float]  # a line of metrics.jsonl
_CLASS = f"val/AP@{MAIN_METRIC.partition('@')[2]}_"
_PROGRESS = "epoch "  # how the lines of log.txt begin that the table shows better
_LOOK_EVERY_S = 0.5

TRAINING_LINES, VALIDATIONS = 10, 5  # rows that the table shows
_MIN_TRAINING_LINES = 3  # training lines before a low terminal shows validations
_NOTHING = "-"  # in a cell
_UNLIMITED = 10_000  # columns: as wide as a table would like to be
_EXTREMES = 5  # best and worst classes that the summary names


def summary(folder: Path) -> list[str]:
    """Return the lines that are said of a run's accuracy at its end; none where nothing was measured."""
    lines = read_metrics(folder)
    best = best_validation(lines)
    if best is None:
        return []
    said = [f"best: {_of_epoch(best)}"]
    last = [line for line in lines if f"val/{MAIN_METRIC}" in line][-1]
    if last is not best:
        said.append(f"last: {_of_epoch(last)}")
    averages = [line for line in lines if f"average/{MAIN_METRIC}" in line]
    said += [f"average of the best checkpoints' weights: {_accuracy(line, 'average/')}" for line in averages[-1:]]

    classes = {key.removeprefix(_CLASS): value for key, value in best.items() if key.startswith(_CLASS)}
    ranked = sorted(classes, key=lambda name: -classes[name])
    groups = {"AP of the classes": ranked} if ranked else {}
    if len(ranked) >= 2 * _EXTREMES:
        groups = {"highest AP": ranked[:_EXTREMES], "lowest AP": ranked[: -_EXTREMES - 1 : -1]}
    for what, names in groups.items():
        said.append(f"{what}: " + "  ".join(f"{_printable(name)} {classes[name]:.3f}" for name in names))
    return said


def _of_epoch(validation: Mapping[str, float]) -> str:
    return f"epoch {validation['epoch']:g} with {_accuracy(validation, 'val/')}"


def _accuracy(values: Mapping[str, float], prefix: str) -> str:
    names = [name for name in (MAIN_METRIC, "mAP@0.50") if prefix + name in values]
    return " and ".join(f"{name} {values[prefix + name]:.4f}" for name in names)


@contextmanager
def follow(folder: Path, say: Callable[[str], Any], table: LiveTable | None) -> Iterator[None]:
    """Show what is appended to a run's log.txt and metrics.jsonl from now on.

    Args:
        folder: folder of the run.
        say: takes each line of log.txt, if there is no table.
        table: takes the metrics, and the lines that say something else.
    """
    log, metrics = _Tail(folder / "log.txt"), _Tail(folder / METRICS_FILE)

    def look() -> None:
        for line in log.lines():
            text = line.decode(errors="replace")
            if table is None:
                say(text)
            elif not text.startswith(_PROGRESS):
                table.line(text)
        if table is not None:
            for line in metrics.lines():
                if (values := parse_metrics(line)) is not None:
                    table.metrics(values)

    try:
        with repeated(look, _LOOK_EVERY_S, "raydet-follow"):
            yield
    finally:
        look()


class _Tail:
    """The complete lines that are appended to a file from now on."""

    def __init__(self, path: Path):
        self._path = path
        self._rest = b""
        try:
            self._position = path.stat().st_size
        except OSError:  # most often it is not there yet
            self._position = 0

    def lines(self) -> list[bytes]:
        try:
            with self._path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < self._position:  # a resumed run has dropped lines, all of which were shown
                    self._position, self._rest = size, b""
                file.seek(self._position)
                added = file.read()
        except OSError:  # a shared file system fails now and then: the next time may find it
            return []
        self._position += len(added)
        *lines, self._rest = (self._rest + added).split(b"\n")
        return lines


class LiveTable:
    """A run's last training lines and validations, redrawn in place in a terminal; a context manager.

    Args:
        epochs: number of epochs of the run.
        total_steps: number of steps of the run.
        console: console to show it on; None: standard output.
    """

    def __init__(self, epochs: int, total_steps: int, console: Console | None = None):
        self._console = console or Console()
        # Redrawn when something has changed and not by a clock, so that nothing flickers.
        self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
        # rich takes none: a line that another thread prints in the middle of a redrawing would tear the table.
        self._lock = threading.RLock()
        self._redirected = ExitStack()
        self._epochs, self._total_steps = epochs, total_steps
        self._training: list[_Line] = []
        self._validations: list[_Line] = []

    def __enter__(self) -> LiveTable:
        with self._lock:
            self._live.start()
            if self._console.is_terminal:
                for redirect, file in ((redirect_stdout, sys.stdout), (redirect_stderr, sys.stderr)):
                    above = _Above(self._console, self._lock, file)
                    self._redirected.enter_context(redirect(above))
                    self._redirected.callback(above.finish)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._redirected.close()
            self._live.stop()

    def line(self, text: str) -> None:
        """Print a line above the table."""
        with self._lock:
            self._console.print(Text(_printable(text)))

    def metrics(self, values: Mapping[str, float]) -> None:
        """Take a line of metrics.jsonl."""
        line = {key: value for key, value in values.items() if math.isfinite(value)}
        with self._lock:
            # After a restart steps come again: what was shown of them is no longer true.
            self._training = [other for other in self._training if _order(other) < _order(line)]
            self._validations = [other for other in self._validations if _order(other) < _order(line)]
            if any(key.startswith("train/") for key in line):
                self._training = [*self._training, line][-TRAINING_LINES:]
            elif any(key.endswith(f"/{MAIN_METRIC}") for key in line):
                self._validations.append(line)
            tables = _Tables(self._training, self._validations, self._epochs, self._total_steps)
            self._live.update(tables, refresh=True)


class _Above(io.TextIOBase):
    """Stands for standard output or error while a table is shown: whole lines appear above it, in their colours."""

    def __init__(self, console: Console, lock: threading.RLock, file: TextIO):
        self._console, self._lock = console, lock
        self.rich_proxied_file = file  # rich's name for it: a console on standard output writes there
        self._decode = AnsiDecoder().decode_line
        self._rest = ""

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._rest = (self._rest + text).split("\n")
            for line in lines:
                self._console.print(self._decode(line))
        return len(text)

    def finish(self) -> None:
        """Print a line that has no end."""
        if self._rest:
            self.write("\n")

    # click writes past a stream that has no encoding, to its buffer.
    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.rich_proxied_file.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return self.rich_proxied_file.errors

    def fileno(self) -> int:
        return self.rich_proxied_file.fileno()

    def isatty(self) -> bool:
        return self.rich_proxied_file.isatty()


def _order(line: _Line) -> tuple[float, bool, bool]:
    """Return what sorts a run's lines: those of one step are of training, validation, averaged weights."""
    return line["step"], _is_average(line), f"val/{MAIN_METRIC}" in line


def _is_average(line: _Line) -> bool:
    return f"average/{MAIN_METRIC}" in line


@dataclass(frozen=True)
class _Tables:
    """The last training lines and below them the last validations, as many as the terminal is high."""

    training: Sequence[_Line]
    validations: Sequence[_Line]
    epochs: int
    total_steps: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = options.size.height - 1  # Live ends with an empty line
        head = 2  # the names of the columns and a rule
        validations = max(0, min(VALIDATIONS, len(self.validations), room - 2 * head - 1 - _MIN_TRAINING_LINES))
        lines = max(1, room - head - (validations + head + 1 if validations else 0))
        if self.training:
            shown = self.training[-lines:]
            yield _fitted(_training_columns(shown, self.epochs, self.total_steps), shown, None, console, options)
        if validations:
            best = best_validation(self.validations)
            shown = list(self.validations[-validations:])
            if best is not None and all(line is not best for line in shown):
                shown[0] = best
            if self.training:
                yield Text()
            yield _fitted(_validation_columns(best), shown, best, console, options)


@dataclass(frozen=True)
class _Column:
    """A column of a table.

    Attributes:
        title: head of the column.
        cell: function that gives the text of a line in this column.
        dispensable: order in which columns are left out where the terminal is narrow, highest first; 0: it stays.
    """

    title: str
    cell: Callable[[_Line], str]
    dispensable: int = 0


def _training_columns(lines: Sequence[_Line], epochs: int, total_steps: int) -> list[_Column]:
    """Return the columns that any of the lines fills."""
    named = {key: name for line in lines for key, name in components(line).items()}
    columns = {
        "epoch": _Column("epoch", lambda line: f"{line['step'] * epochs / total_steps:.2f}/{epochs}"),
        "step": _number("step", "step", "{:.0f}", 3),
        "train/loss": _number("loss", "train/loss", "{:.3f}"),
        **{key: _number(name, key, "{:.3f}", 6 + place) for place, (key, name) in enumerate(named.items())},
        "train/lr": _number("lr", "train/lr", "{:.3g}", 4),
        "perf/images_per_s": _number("images/s", "perf/images_per_s", "{:.1f}", 1),
        "perf/data_wait": _number("waiting", "perf/data_wait", "{:.0%}", 2),
        "perf/memory_gb": _number("memory", "perf/memory_gb", "{:.1f} GB", 5),
        "perf/eta_s": _Column("ETA", lambda line: _clock(line["perf/eta_s"]) if "perf/eta_s" in line else _NOTHING),
    }
    filled = {"train/loss", *(key for line in lines for key in line)}  # a loss that is not finite leaves a gap
    return [column for key, column in columns.items() if key in filled]


def _validation_columns(best: _Line | None) -> list[_Column]:
    def accuracy(name: str, dispensable: int) -> _Column:
        def cell(line: _Line) -> str:
            return _shown(line.get(("average/" if _is_average(line) else "val/") + name), "{:.4f}")

        return _Column(name, cell, dispensable)

    return [
        _Column("epoch", lambda line: "average" if _is_average(line) else f"{line['epoch']:g}"),
        *(accuracy(name, place) for place, name in enumerate((MAIN_METRIC, "mAP@0.50", "mAP@0.75"))),
        _number("seconds", "perf/val_s", "{:.1f}", 3),
        _Column("", lambda line: "best" if line is best else ""),
    ]


def _number(title: str, key: str, form: str, dispensable: int = 0) -> _Column:
    return _Column(title, lambda line: _shown(line.get(key), form), dispensable)


def _fitted(
    columns: list[_Column], lines: Sequence[_Line], best: _Line | None, console: Console, options: ConsoleOptions
) -> Table:
    """Return a table of the columns that the terminal has room for."""
    while True:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0, 0, 1))
        for column in columns:
            table.add_column(Text(_printable(column.title)), justify="right", no_wrap=True)
        for line in lines:
            table.add_row(*(column.cell(line) for column in columns), style="bold green" if line is best else "")
        width = Measurement.get(console, options.update(max_width=_UNLIMITED), table).maximum
        first = max(columns, key=lambda column: column.dispensable)
        if not first.dispensable or width <= options.max_width:
            return table
        columns = [column for column in columns if column is not first]


def _shown(value: float | None, form: str) -> str:
    return _NOTHING if value is None else form.format(value)


def _clock(seconds: float) -> str:
    minutes, left = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{left:02d}"


def _printable(text: str) -> str:
    """Return text without what moves the cursor: names come from strangers."""
    return "".join(letter if letter.isprintable() else "?" for letter in text.expandtabs())
