"""Shows a sweep while it runs: a table that is redrawn in a terminal, lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ray import tune
from rich.live import Live

from raydet.data.store import Store
from raydet.errors import user_error
from raydet.recipe import Space
from raydet.tuning.trials import ERROR, Trial, drawn, error_of, folder_name, short, table

_STATES = {"PENDING": "waiting", "RUNNING": "running", "PAUSED": "waiting", "ERROR": "failed"}
_shown: list[Board] = []


def _of_this_process() -> Board:
    return _shown[-1]


class Board(tune.Callback):  # type: ignore[misc]
    """A callback of Ray Tune, and a context manager; one at a time.

    Args:
        space: of the sweep.
        watch: the metric.
        epochs: of a trial.
        live: redraw a table in the terminal.
        say: takes lines, without a table.
        folder: of the sweep.
    """

    def __init__(
        self,
        space: Mapping[str, Space],
        watch: str,
        epochs: int,
        live: bool,
        say: Callable[[str], Any],
        folder: Path,
    ):
        self._space, self._watch, self._epochs, self._say, self._folder = space, watch, epochs, say, folder
        self._live = Live(auto_refresh=False, transient=True) if live else None
        self._drawn: list[Trial] = []
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
        value = result.get(f"val/{self._watch}")
        line = f"{folder_name(trial.trial_id)}: epoch {result.get('epoch', 0)}/{self._epochs}"
        self._tell(line if value is None else f"{line}  {self._watch} {value:.4f}  ({self._count(trials)})")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say that it has ended."""
        name, epoch = folder_name(trial.trial_id), self._trial(trial).epoch
        error = error_of(self._folder / name)
        self._tell(f"{name} failed: {error}" if error else f"{name}: {self._ended(epoch)} after epoch {epoch}")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say that it starts again."""
        self._tell(f"{folder_name(trial.trial_id)} starts again: {_error(trial)}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say why it failed."""
        name, error = folder_name(trial.trial_id), _error(trial)
        Store(self._folder / name).write(ERROR, error.encode())
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

    def _count(self, trials: Sequence[Any]) -> str:
        best = min(map(self._trial, trials), key=lambda trial: -(trial.value or 0))
        states = [trial.status for trial in trials]
        done = sum(state in ("TERMINATED", "ERROR") for state in states)
        return f"best so far {best.value or 0:.4f} of {best.name}; {states.count('RUNNING')} running, {done} done"

    def _trial(self, trial: Any) -> Trial:
        epoch = int((trial.last_result or {}).get("epoch", 0))
        value = trial.metric_analysis.get(f"val/{self._watch}", {}).get("max")
        state = _STATES.get(trial.status) or self._ended(epoch)
        return Trial(folder_name(trial.trial_id), drawn(self._space, trial.config), state, epoch, value)

    def _ended(self, epoch: int) -> str:
        return "finished" if epoch >= self._epochs else "stopped early"


def _error(trial: Any) -> str:
    """Return in a line why a trial of Ray Tune's failed."""
    error = trial.get_pickled_error() or trial.get_error()
    return str(user_error(error) or error).strip().splitlines()[-1]
