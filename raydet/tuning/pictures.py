"""Pictures of a sweep: its trials over all settings, and which settings matter."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from raydet.recipe import Space
from raydet.store import Store, join
from raydet.tuning.trials import Trial, short

COORDINATES, IMPORTANCE = "parallel_coordinates.png", "importance.png"
_TICKS = 5  # ticks of an axis of numbers
_MIN_TRIALS = 3  # fewest trials whose correlation says something

_Floats = npt.NDArray[np.float64]


def draw(trials: Sequence[Trial], space: Mapping[str, Space], watch: str, folder: str | Path) -> list[str | Path]:
    """Draw a sweep's trials and the importance of its settings; return the pictures' paths.

    Args:
        trials: trials that something was measured of, best first.
        space: settings that the sweep tries.
        watch: metric by which trials are compared.
        folder: path or address of the folder for the pictures.
    """
    figures = {COORDINATES: _coordinates(trials, space, watch), IMPORTANCE: _importance(trials, space, watch)}
    for name, figure in figures.items():
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
        Store(folder).write(name, picture.getvalue())
    return [join(folder, name) for name in figures]


def _coordinates(trials: Sequence[Trial], space: Mapping[str, Space], watch: str) -> Figure:
    """Draw each trial as a line through an axis for each setting and one for the metric."""
    results = np.array([trial.value or 0.0 for trial in trials])
    low, high = float(results.min()), float(results.max())
    heights = [_heights([trial.values[key] for trial in trials], among) for key, among in space.items()]
    heights.append((results - low) / (high - low) if high > low else np.full(len(results), 0.5))
    figure = _figure(2 + 2.2 * len(heights), 6)
    axes = figure.subplots()
    axes.set_xlim(-0.3, len(space) + 0.5)
    axes.set_ylim(-0.08, 1.08)
    axes.set_yticks([])
    axes.set_xticks(range(len(heights)), [*map(_plain, space), watch])
    axes.spines[:].set_visible(False)
    colours = colormaps["viridis"]
    for place in reversed(range(len(trials))):  # the best on top
        is_best = place == 0
        colour = "red" if is_best else colours(heights[-1][place])
        style = "--" if trials[place].state == "stopped early" else "-"
        line = [height[place] for height in heights]
        axes.plot(line, style, color=colour, linewidth=2.5 if is_best else 1.2, alpha=0.9)
    for x, among in enumerate(space.values()):
        axes.axvline(x, color="black", linewidth=0.8)
        for height, text in _ticks(among):
            axes.text(x - 0.03, height, _plain(text), ha="right", va="center", fontsize=8)
    axes.axvline(len(space), color="black", linewidth=0.8)
    for share in np.linspace(0, 1, _TICKS):
        axes.text(len(space) + 0.03, share, f"{low + share * (high - low):.4f}", va="center", fontsize=8)
    axes.set_title(f"{len(trials)} trials; dashed: stopped early; red: the best", fontsize=10)
    return figure


def _heights(values: Sequence[Any], among: Space) -> _Floats:
    """Return where on its axis, from 0 to 1, each value is."""
    if among.kind in ("grid", "choice"):
        return np.array([among.values.index(value) / max(1, len(among.values) - 1) for value in values])
    low, high, found = (_scaled(np.asarray(value, float), among) for value in (*among.values, values))
    return np.asarray((found - low) / (high - low) if high > low else np.full(len(values), 0.5))


def _ticks(among: Space) -> list[tuple[float, str]]:
    """Return heights on an axis and what is there."""
    if among.kind in ("grid", "choice"):
        values = among.values
    else:
        low, high = among.values
        values = np.geomspace(low, high, _TICKS) if among.kind == "loguniform" else np.linspace(low, high, _TICKS)
        values = sorted({round(value) for value in values}) if among.kind == "integer" else values.tolist()
    return list(zip(_heights(values, among).tolist(), map(short, values), strict=True))


def _scaled(values: _Floats, among: Space) -> _Floats:
    return np.log(values) if among.kind == "loguniform" else values


def _importance(trials: Sequence[Trial], space: Mapping[str, Space], watch: str) -> Figure:
    """Draw how each setting goes with the metric: Spearman's rank correlation, or of choices the correlation ratio."""
    results = _ranks(np.array([trial.value or 0.0 for trial in trials]))
    found = {}
    for key, among in space.items():
        values = [trial.values[key] for trial in trials]
        if len(trials) < _MIN_TRIALS or len(set(map(str, values))) == 1 or np.ptp(results) == 0:
            found[key] = 0.0
        elif among.kind in ("grid", "choice") and not _are_numbers(among.values):
            found[key] = _correlation_ratio([str(value) for value in values], results)
        else:
            found[key] = float(np.corrcoef(_ranks(np.asarray(values, float)), results)[0, 1])
    keys = sorted(found, key=lambda key: abs(found[key]))
    figure = _figure(9, 2.5 + 0.5 * len(keys))
    axes = figure.subplots()
    axes.barh([_plain(key) for key in keys], [found[key] for key in keys], color="#0072B2")
    for place, key in enumerate(keys):
        axes.text(0.02 if found[key] < 0 else -0.02, place, f"{found[key]:+.2f}", va="center",
                  ha="left" if found[key] < 0 else "right", fontsize=8)  # fmt: skip
    axes.set_xlim(-1.1, 1.1)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel(f"correlation of its rank with that of {watch}, over {len(trials)} trials")
    axes.set_title("right: more is better; left: less is better; near 0: no matter (choices: right only)", fontsize=9)
    return figure


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _ranks(values: _Floats) -> _Floats:
    """Return the ranks, equals sharing the mean of theirs."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def _correlation_ratio(groups: Sequence[str], values: _Floats) -> float:
    """Return the square root of the share of the variance that is between the groups."""
    names, place = np.unique(groups, return_inverse=True)
    means = np.array([values[place == number].mean() for number in range(len(names))])
    return float(np.sqrt(means[place].var() / values.var()))


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _plain(text: str) -> str:
    """Return text in which matplotlib finds no formula."""
    return text.replace("$", r"\$")
