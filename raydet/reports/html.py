"""What HTML pages are made of that need nothing else: no scripts, no fonts, pictures inside. Charts are SVG."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

SERIES = ("first", "second", "third")  # CSS classes, a colour each
_WIDE, _HIGH = 340, 150  # size of a chart, in units of its own
_MOST_POINTS = 300  # points of a curve: more are drawn as means


def page(title: str, content: str) -> str:
    """Return a page of HTML content; the title is text."""
    template = Template((files("raydet.reports") / "page.html").read_text(encoding="utf-8"))
    return template.substitute(title=escape(title), content=content)


def embedded(content: bytes, width: int, height: int, kind: str = "jpeg") -> str:
    """Return an image of an encoded picture of so many pixels."""
    data = base64.b64encode(content).decode()
    return f'<img alt="" width="{width}" height="{height}" src="data:image/{kind};base64,{data}">'


def curves(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], unit: str) -> str:
    """Draw curves, each as (x, y), x rising.

    Args:
        series: name → at least one point; up to three.
        unit: unit of x.
    """
    drawn = {name: _thinned(*points) for name, points in series.items()}
    values = np.concatenate([y for _, y in drawn.values()])
    ends = [x for x, _ in drawn.values()]
    first, last = min(float(x[0]) for x in ends), max(float(x[-1]) for x in ends)
    ticks = _ticks(float(values.min()), float(values.max()))
    low, high, left = ticks[0], ticks[-1], 46.0

    def across(x: Array) -> Array:
        return np.asarray(left + (_WIDE - left) * (x - first) / ((last - first) or 1.0))

    def up(y: Array) -> Array:
        return np.asarray(_HIGH * (1 - (y - low) / (high - low)))

    parts = []
    for tick in ticks:
        level = float(up(np.array(tick)))
        parts.append(f'<line class="axis" x1="{left}" x2="{_WIDE}" y1="{level:.1f}" y2="{level:.1f}"/>')
        parts.append(f'<text x="{left - 5}" y="{level + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for place, anchor in ((first, "start"), (last, "end")):
        at = float(across(np.array(place)))
        parts.append(f'<text x="{at:.1f}" y="{_HIGH + 15}" text-anchor="{anchor}">{escape(unit)} {place:g}</text>')
    for number, (name, (x, y)) in enumerate(drawn.items()):
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across(x).tolist(), up(y).tolist(), strict=True))
        colour = SERIES[number % 3]
        parts.append(f'<polyline class="outline {colour}" points="{points}"/>')
        for a, b, place, value in zip(across(x).tolist(), up(y).tolist(), x.tolist(), y.tolist(), strict=True):
            told = f"{escape(name)} {value:.4g} at {place:g}"
            parts.append(
                f'<circle class="point {colour}" cx="{a:.1f}" cy="{b:.1f}" r="3"><title>{told}</title></circle>'
            )
    legend = f'<p class="quiet">{" ".join(keys(series))}</p>' if len(series) > 1 else ""
    return f'<svg viewBox="0 -8 {_WIDE + 6} {_HIGH + 30}" role="img">{"".join(parts)}</svg>{legend}'


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[Array, Array]:
    parts = min(len(x), _MOST_POINTS)
    return (
        np.array([part[-1] for part in np.array_split(np.array(x, float), parts)]),
        np.array([part.mean() for part in np.array_split(np.array(y, float), parts)]),
    )


def _ticks(low: float, high: float) -> list[float]:
    """Return three to six round numbers, from at most the lowest value to at least the highest."""
    if high <= low:
        low, high = low - 0.5, low + 0.5
    span = high - low
    power = 10.0 ** np.floor(np.log10(span / 3))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if span / step <= 4)
    return [float(step * n) for n in range(int(np.floor(low / step)), int(np.ceil(high / step)) + 1)]


def bar_table(head: Sequence[str], rows: Mapping[str, tuple[Sequence[str], Array]]) -> str:
    """A table that ends in bars.

    Args:
        head: heads of the columns, as HTML.
        rows: name → text of the cells, and a share for each split, which is drawn as a bar.
    """
    top = max((float(shares.max()) for _, shares in rows.values()), default=0.0) or 1.0
    body = ""
    for name, (cells, shares) in rows.items():
        bars = "".join(
            f'<span class="bar {SERIES[n % 3]}" style="width:{share / top:.2%}" title="{share:.2%}"></span>'
            for n, share in enumerate(shares.tolist())
        )
        body += f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in (name, *cells))}<td>{bars}</td></tr>"
    heads = "".join(f"<th>{cell}</th>" for cell in head)
    return f'<table class="bars"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'


def card(headline: str, about: str, content: str) -> str:
    """A box with a headline; all three are HTML."""
    return f'<div class="card"><h3>{headline}</h3><p class="quiet">{about}</p>{content}</div>'


def key(number: int, name: str) -> str:
    """A name with the colour of a series."""
    return f'<span class="key {SERIES[number % 3]}"></span>{escape(name)}'


def keys(names: Iterable[str]) -> list[str]:
    """Names with the colours of their series."""
    return [key(number, name) for number, name in enumerate(names)]
