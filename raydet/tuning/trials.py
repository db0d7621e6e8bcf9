"""The trials of a sweep: what each tries, what came of it, and the table that shows them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from ray.tune.progress_reporter import TrialProgressCallback
from rich.live import Live
from rich.table import Table

from raydet.errors import user_error
from raydet.recipe import Space
from raydet.runs.log import read_metrics
from raydet.store import Store, join

VALUES, ERROR, SUMMARY = "values.json", "error.txt", "summary.json"  # files of a trial's folder


@dataclass(frozen=True)
class Trial:
    """A training with settings that a sweep has chosen.

    Attributes:
        name: name of the trial's folder.
        values: value of each setting, by its key.
        state: waiting, running, finished, stopped early or failed.
        epoch: number of epochs that are done.
        value: best value of eval.watch; None: nothing was measured.
        error: why the trial failed.
    """

    name: str
    values: dict[str, Any]
    state: str
    epoch: int = 0
    value: float | None = None
    error: str = ""


def folder_name(trial_id: str) -> str:
    """Return the name of a trial's folder: Ray Tune's ids are random, or such a word and a number."""
    return f"trial_{trial_id.rpartition('_')[2]}"


def drawn(space: Mapping[str, Space], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that Ray Tune's draws stand for: values to choose from are drawn by their places."""
    return {
        key: among.values[config[key]] if among.kind in ("grid", "choice") else config[key]
        for key, among in space.items()
    }


def read_trials(folder: str | Path, watch: str) -> list[Trial]:
    """Return the trials in a sweep's folder whose training has ended, the best first."""
    files = (PurePosixPath(name) for name in Store(folder).files(recursive=True))
    names = [file.parts[0] for file in files if file.match(f"trial_*/{VALUES}") and len(file.parts) == 2]
    return sorted((read_trial(folder, name, watch) for name in names), key=_rank)


def read_trial(folder: str | Path, name: str, watch: str) -> Trial:
    """Return a trial whose training has ended, from its folder: what a process knew of it may have died with it.

    Args:
        folder: path or address of the folder of the sweep.
        name: name of the trial's folder in it.
        watch: metric by which trials are compared.
    """
    run = Store(join(folder, name))
    there = run.files() if run.kind() == "folder" else {}
    values = json.loads(run.text(VALUES)) if VALUES in there else {}
    lines = read_metrics(run.root)
    measured = [line[f"val/{watch}"] for line in lines if f"val/{watch}" in line]
    error = run.text(ERROR) if ERROR in there else ""
    state = "failed" if error else "finished" if SUMMARY in there else "stopped early"
    epoch = int(max((line["epoch"] for line in lines), default=0))
    return Trial(name, values, state, epoch, max(measured, default=None), error)


def table(trials: Sequence[Trial], watch: str, epochs: int, rows: int) -> Table:
    """Return a table of the best trials, at most `rows`, with those that run or wait below."""
    shown = Table("trial", "", "epoch", watch, *(trials[0].values if trials else ()))
    for trial in sorted(trials, key=_rank)[:rows]:
        value = "-" if trial.value is None else f"{trial.value:.4f}"
        cells = [
            trial.name.removeprefix("trial_"),
            trial.state,
            f"{trial.epoch}/{epochs}",
            value,
            *map(short, trial.values.values()),
        ]
        shown.add_row(*cells, style={"running": "bold", "failed": "red", "stopped early": "dim"}.get(trial.state, ""))
    if len(trials) > rows:
        shown.caption = f"and {len(trials) - rows} more"
    return shown


def short(value: Any) -> str:
    """Return a setting's value as a person reads it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def to_json(trials: Sequence[Trial]) -> str:
    """Return the trials as JSON."""
    return json.dumps([asdict(trial) for trial in trials], indent=1) + "\n"


def from_json(text: str) -> list[Trial]:
    """Return the trials that `to_json` has written."""
    return [Trial(**trial) for trial in json.loads(text)]


def _rank(trial: Trial) -> tuple[float, str]:
    return -(trial.value if trial.value is not None else -1), trial.name


_STATES = {"PENDING": "waiting", "RUNNING": "running", "PAUSED": "waiting", "ERROR": "failed"}
_shown: list[Board] = []


def _of_this_process() -> Board:
    return _shown[-1]


class Board(TrialProgressCallback):  # type: ignore[misc]
    """A callback of Ray Tune, in place of its own that prints lines, and a context manager; one at a time.

    Args:
        space: settings that the sweep tries.
        watch: metric by which trials are compared.
        epochs: number of epochs of a trial.
        live: redraw a table in the terminal.
        say: takes lines, without a table.
        folder: path or address of the folder of the sweep.
    """

    def __init__(
        self,
        space: Mapping[str, Space],
        watch: str,
        epochs: int,
        live: bool,
        say: Callable[[str], Any],
        folder: str | Path,
    ):
        super().__init__()
        self._space, self._watch, self._epochs, self._say, self._folder = space, watch, epochs, say, folder
        self._live = Live(auto_refresh=False, transient=True) if live else None
        self._drawn: list[Trial] = []
        self._ended: dict[str, Trial] = {}  # by name
        self._stack = ExitStack()

    def __enter__(self) -> Board:
        _shown.append(self)
        self._stack.callback(_shown.clear)
        if self._live is not None:
            self._stack.enter_context(self._live)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def __reduce__(self) -> tuple[Any, ...]:
        # Ray Tune keeps its callbacks with the sweep's state: another start has a terminal of its own.
        return _of_this_process, ()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say what it tries."""
        mine = self._trial(trial)
        values = "  ".join(f"{key} {short(value)}" for key, value in mine.values.items())
        self._tell(f"{mine.name} starts: {values}")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Say what it has measured."""
        name, value = folder_name(trial.trial_id), result.get(f"val/{self._watch}")
        line = f"{name}: epoch {result.get('epoch', 0)}/{self._epochs}"
        self._tell(
            line if value is None else f"{line}  {self._watch} {value:.4f}  ({self._count(trials, name, value)})"
        )

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say that it has ended."""
        ended = self._of_folder(trial)
        failed = f"{ended.name} failed: {ended.error}"
        self._tell(failed if ended.error else f"{ended.name}: {ended.state} after epoch {ended.epoch}")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say that it starts again."""
        self._tell(f"{folder_name(trial.trial_id)} starts again: {_error_of(trial)}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say why it failed."""
        name, error = folder_name(trial.trial_id), _error_of(trial)
        Store(self._folder).write(f"{name}/{ERROR}", error.encode())
        self._tell(f"{name} failed: {error}")

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Draw the table anew if anything has changed."""
        now = [self._trial(trial) for trial in trials]
        if self._live is not None and now != self._drawn:
            self._drawn = now
            rows = max(3, self._live.console.size.height - 6)
            self._live.update(table(now, self._watch, self._epochs, rows), refresh=True)

    def _tell(self, line: str) -> None:
        if self._live is None:
            self._say(line)

    def _count(self, trials: Sequence[Any], name: str, value: float) -> str:
        """Return what is known of all, after a value that Ray Tune has not taken note of yet."""
        values = [(one.value or 0, one.name) for one in map(self._trial, trials)]
        best, whose = max([*values, (value, name)], key=lambda entry: entry[0])
        states = [trial.status for trial in trials]
        done = sum(state in ("TERMINATED", "ERROR") for state in states)
        return f"best so far {best:.4f} of {whose}; {states.count('RUNNING')} running, {done} done"

    def _trial(self, trial: Any) -> Trial:
        if trial.status not in _STATES:
            return self._of_folder(trial)
        name, values = folder_name(trial.trial_id), drawn(self._space, trial.config)
        epoch = int((trial.last_result or {}).get("epoch", 0))
        value = trial.metric_analysis.get(f"val/{self._watch}", {}).get("max")
        return Trial(name, values, _STATES[trial.status], epoch, value)

    def _of_folder(self, trial: Any) -> Trial:
        """Return a trial that has ended as its folder shows it; Ray Tune may have missed its last results."""
        name = folder_name(trial.trial_id)
        if name not in self._ended:
            found = read_trial(self._folder, name, self._watch)
            self._ended[name] = replace(found, values=drawn(self._space, trial.config))
        return self._ended[name]


def _error_of(trial: Any) -> str:
    """Return in a line why a trial of Ray Tune's failed."""
    error = trial.get_pickled_error() or trial.get_error()
    return str(user_error(error) or error).strip().splitlines()[-1]
