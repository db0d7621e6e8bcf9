"""A run's curves as one picture: loss, its components, AP, learning rate and speed over the steps."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from raydet.errors import RaydetError
from raydet.evaluation.coco import MAIN_METRIC
from raydet.runs.log import METRICS_FILE, best_validation, components, read_metrics
from raydet.store import Store

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_Floats = npt.NDArray[np.float64]
_Lines = Sequence[Mapping[str, float]]  # lines of metrics.jsonl

SMOOTHED_ABOVE = 200  # points: more are drawn thin, with the mean over their neighbours on top
_NEIGHBOURS = 0.02  # share of the points that such a mean takes
_MARKED_UP_TO = 40  # points
# Okabe and Ito's, which colour-blind people can tell apart; when they run out, the kind of line changes.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", ":")


def plot(folder: Path, out: Path | None = None) -> Path:
    """Draw the curves of a run into a file, and return its path.

    Args:
        folder: folder of the run, finished or not.
        out: path of the picture, a PNG; None: images/metrics.png in the folder.

    Raises:
        RaydetError: no step is logged, or the picture cannot be written.
    """
    out = out or folder / "images" / "metrics.png"
    if out.suffix.lower() != ".png":
        raise RaydetError(f"{out}: the picture is a PNG, so its name must end with .png")
    lines = read_metrics(folder)
    if not any(map(_is_training, lines)):
        raise RaydetError(f"{folder / METRICS_FILE}: there is no training step in it to plot")
    Store(out.parent).write(out.name, draw(lines, folder.resolve().name))
    return out


def draw(lines: _Lines, title: str) -> bytes:
    """Draw the curves of a run.

    Args:
        lines: lines of its metrics.jsonl, at least one.
        title: text above the picture.

    Returns:
        The picture, a PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    training = list(filter(_is_training, lines))
    figure = Figure(figsize=(21, 9), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, parse_math=False)
    (loss, parts, accuracy), (rate, speed, rest) = figure.subplots(2, 3)
    rest.remove()
    names = {key: name for line in training for key, name in components(line).items()}
    _draw_curves(loss, "loss", training, {"train/loss": "loss"})
    _draw_curves(parts, "loss components", training, names)
    if not names:
        parts.remove()
    _draw_accuracy(accuracy, lines)
    _draw_curves(rate, "learning rate", training, {"train/lr": "learning rate"}, noisy=False)
    _draw_curves(speed, "images a second", training, {"perf/images_per_s": "images a second"})
    for axes in list(figure.axes):
        _draw_steps(axes, lines)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _is_training(line: Mapping[str, float]) -> bool:
    return any(key.startswith("train/") for key in line)


def _draw_curves(axes: Axes, title: str, lines: _Lines, names: Mapping[str, str], noisy: bool = True) -> None:
    """Draw what the lines have under the keys of `names`; with more than one, a legend tells them apart."""
    axes.set_title(title)
    for (key, name), (colour, style) in zip(names.items(), _looks(), strict=False):
        steps, values = _series(lines, key)
        if noisy and len(steps) > SMOOTHED_ABOVE:
            axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.35)
            values = _smoothed(values)
        marker = "." if len(steps) <= _MARKED_UP_TO else ""
        axes.plot(steps, values, color=colour, linestyle=style, marker=marker, label=_plain(name))
    if len(names) > 1:
        axes.legend()


def _draw_accuracy(axes: Axes, lines: _Lines) -> None:
    axes.set_title("AP on the validation images")
    for name, colour in zip((MAIN_METRIC, "mAP@0.50"), _COLOURS, strict=False):
        steps, values = _series(lines, f"val/{name}")
        measured = values >= 0  # -1 is COCO's "no such object"
        axes.plot(steps[measured], values[measured], color=colour, marker=".", label=name)
    for line in lines:
        if (averaged := line.get(f"average/{MAIN_METRIC}", -1)) >= 0:
            label = f"{MAIN_METRIC} of averaged weights: {averaged:.4f}"
            axes.axhline(averaged, color=_COLOURS[0], linestyle="--", label=label)
    best = best_validation(lines)
    if best is None:
        axes.text(0.5, 0.5, "not measured yet", transform=axes.transAxes, ha="center", va="center")
        axes.set_yticks([])
        return
    value = best[f"val/{MAIN_METRIC}"]
    label = f"best: {value:.4f} after epoch {best['epoch']:g}"
    axes.plot([best["step"]], [value], color="black", marker="*", markersize=12, linestyle="", label=label, zorder=3)
    axes.set_ylim(bottom=0)
    axes.legend()


def _draw_steps(axes: Axes, lines: _Lines) -> None:
    """Draw the axis of steps, the same in each panel, and above it that of epochs."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0, max(line["step"] for line in lines) * 1.02)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    ended = [line["step"] / line["epoch"] for line in lines if line["epoch"] > 0]
    if ended:
        each = min(ended)  # a line is logged at the step that completes an epoch
        epochs = axes.secondary_xaxis("top", functions=(partial(_scaled, by=1 / each), partial(_scaled, by=each)))
        epochs.set_xlabel("epoch")
        epochs.xaxis.set_major_locator(MaxNLocator(integer=True))


def _scaled(values: npt.ArrayLike, by: float) -> _Floats:
    return np.asarray(values, dtype=np.float64) * by


def _looks() -> Iterator[tuple[str, str]]:
    return cycle((colour, style) for style in _STYLES for colour in _COLOURS)


def _series(lines: _Lines, key: str) -> tuple[_Floats, _Floats]:
    """Return the steps at which a key is logged, and its values."""
    points = [(line["step"], line[key]) for line in lines if key in line]
    steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def _smoothed(values: _Floats) -> _Floats:
    """Return the mean over each value and its neighbours, of which there are fewer at the ends."""
    window = np.ones(2 * int(len(values) * _NEIGHBOURS / 2) + 1)
    smooth: _Floats = np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")
    return smooth


def _plain(name: str) -> str:
    """Return a name in which matplotlib finds no formula: a user's loss has any."""
    return name.replace("$", r"\$")
