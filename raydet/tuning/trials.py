"""The trials of a sweep: what each tries, what came of it, and the table that shows them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from raydet.recipe import Space
from raydet.training.display import read_metrics

VALUES, ERROR, SUMMARY = "values.json", "error.txt", "summary.json"  # files of a trial's folder


@dataclass(frozen=True)
class Trial:
    """A training with settings that a sweep has chosen.

    Attributes:
        name: of its folder.
        values: of the settings, by their keys.
        state: waiting, running, finished, stopped early or failed.
        epoch: epochs that it has done.
        value: its best by eval.watch; None: nothing was measured.
        error: why it failed.
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


def read_trials(folder: Path, watch: str) -> list[Trial]:
    """Return the trials in a sweep's folder whose training has ended, the best first."""
    return sorted((read_trial(values.parent, watch) for values in folder.glob(f"trial_*/{VALUES}")), key=_rank)


def read_trial(run: Path, watch: str) -> Trial:
    """Return a trial whose training has ended, from its folder: what a process knew of it may have died with it."""
    values = json.loads((run / VALUES).read_text()) if (run / VALUES).is_file() else {}
    lines = read_metrics(run)
    measured = [line[f"val/{watch}"] for line in lines if f"val/{watch}" in line]
    error = (run / ERROR).read_text() if (run / ERROR).is_file() else ""
    state = "failed" if error else "finished" if (run / SUMMARY).is_file() else "stopped early"
    epoch = int(max((line["epoch"] for line in lines), default=0))
    return Trial(run.name, values, state, epoch, max(measured, default=None), error)


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
