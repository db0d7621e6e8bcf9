"""The report as one HTML page that needs nothing else: no scripts, no fonts, pictures inside. Charts are SVG."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import date
from html import escape
from itertools import pairwise
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from raydet import __version__
from raydet.reports.html import SERIES, bar_table, card, embedded, key, keys, page
from raydet.reports.inspect import (
    ASPECT_RATIOS,
    CELLS,
    COCO_AREAS,
    COCO_SIZES,
    RELATIVE_SIZES,
    Figure,
    Finding,
    Inspection,
    Statistics,
)

Array = npt.NDArray[Any]

WIDE, HIGH = 340, 130  # size of a chart, in units of its own
MOST_BINS = 30  # bins of the histogram of objects per image
SIZES = 5  # image sizes that are listed
JPEG_QUALITY = 82


def render(report: Inspection) -> str:
    """Return the report as an HTML page. Names come from the data, and are escaped."""
    name = report.root.rstrip("/").rpartition("/")[2] or report.root
    sections = {
        "Findings": _findings(report.findings),
        "Classes": _classes(report.splits),
        "Objects": _charts(report.splits),
        **{headline: _gallery(figures) for headline, figures in report.galleries.items() if figures},
    }
    links = "".join(f'<a href="#{number}">{escape(headline)}</a>' for number, headline in enumerate(sections))
    about = f"{escape(report.root)} · {date.today():%d %B %Y} · raydet {__version__}"
    parts = [
        f'<h1>{escape(name)}</h1><p class="quiet">{about}</p><nav>{links}</nav>',
        _overview(report.splits),
        *(f'<h2 id="{n}">{escape(headline)}</h2>{html}' for n, (headline, html) in enumerate(sections.items())),
    ]
    return page(f"{name} · data report", "\n".join(parts))


def overview(numbers: Statistics) -> dict[str, str]:
    """Return the most important numbers of a split in words."""
    images, objects = max(1, numbers.images), max(1, numbers.objects)
    return {
        "images": f"{numbers.images:,}",
        "without objects": f"{numbers.empty:,}",
        "objects": f"{numbers.objects:,}",
        "crowds": f"{numbers.crowds:,}",
        "objects an image": f"{numbers.objects / images:.1f}",
        "classes with objects": f"{np.count_nonzero(numbers.objects_of_class)} of {len(numbers.class_names)}",
        **{size: f"{count / objects:.0%}" for size, count in zip(COCO_SIZES, numbers.coco_sizes, strict=True)},
    }


def _overview(splits: Mapping[str, Statistics]) -> str:
    head = "".join(f"<th>{name}</th>" for name in overview(next(iter(splits.values()))))
    rows = ""
    for number, (split, numbers) in enumerate(splits.items()):
        cells = "".join(f"<td>{value}</td>" for value in overview(numbers).values())
        rows += f"<tr><td>{key(number, split)}</td>{cells}</tr>"
    return f'<div class="card wide"><table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _findings(findings: Sequence[Finding]) -> str:
    if not findings:
        return '<div class="card">Nothing to complain of.</div>'
    items = []
    for finding in findings:
        more = [f"… and {finding.count - len(finding.examples):,} more"] * (finding.count > len(finding.examples))
        listed = "".join(f"<li>{escape(example)}</li>" for example in (*finding.examples, *more))
        items.append(
            f'<div class="finding"><span class="level {finding.level}">{finding.level}</span>'
            f'<span>{escape(finding.what)}</span><span class="quiet">{escape(finding.split)}</span>'
            f'<b class="count">{finding.count:,}</b>'
            f'<span class="quiet">{escape(finding.remedy)}</span>'
            f"<details><summary>which</summary><ul>{listed}</ul></details></div>"
        )
    return f'<div class="card">{"".join(items)}</div>'


def _classes(splits: Mapping[str, Statistics]) -> str:
    """A row a class, the most frequent first."""
    names = list(dict.fromkeys(name for numbers in splits.values() for name in numbers.class_names))
    objects, images = np.zeros((2, len(splits), len(names)))
    for number, numbers in enumerate(splits.values()):
        place = [names.index(name) for name in numbers.class_names]
        objects[number, place], images[number, place] = numbers.objects_of_class, numbers.images_of_class
    rows = {}
    for label in np.lexsort((-objects.sum(0), -objects[0])).tolist():
        cells = [f"{value:,.0f}" for pair in zip(objects[:, label], images[:, label], strict=True) for value in pair]
        rows[names[label]] = cells, objects[:, label] / objects.sum(1).clip(min=1)
    head = [cell for number, split in enumerate(splits) for cell in (f"{key(number, split)} objects", "images")]
    return f'<div class="card scroll">{bar_table(["class", *head, "share of objects"], rows)}</div>'


def _charts(splits: Mapping[str, Statistics]) -> str:
    sizes = [f"{100 * edge:.2g}%" if edge < 1 else "100%" for edge in RELATIVE_SIZES]
    ratios = [f"{edge:.2g}:1" if edge >= 1 else f"1:{1 / edge:.2g}" for edge in ASPECT_RATIOS]
    marked = (0, 3, 7, 10, 13, 17, 20)  # edges that are 1, 2, 5 or 10 times a power of 10
    fewest, counts = _objects_an_image(splits)
    numbers = [str(low) if high == low + 1 else f"{low}-{high - 1}" for low, high in pairwise(fewest)]
    every = -(-len(numbers) // 8)
    small, large = (round(area**0.5) for area in COCO_AREAS)
    cards = (
        card(
            "Size",
            "square root of a box's share of its image",
            _histogram(
                {split: numbers.relative_sizes for split, numbers in splits.items()},
                [f"{low} to {high}" for low, high in pairwise(sizes)],
                {place: sizes[place] for place in marked},
            ),
        ),
        card(
            "Aspect ratio",
            "width to height",
            _histogram(
                {split: numbers.aspect_ratios for split, numbers in splits.items()},
                [f"{low} to {high}" for low, high in pairwise(ratios)],
                {place: ratios[place] for place in marked},
            ),
        ),
        card(
            "Objects an image",
            f"the last column is {numbers[-1].partition('-')[0]} and more",
            _histogram(counts, numbers, {place + 0.5: numbers[place] for place in range(0, len(numbers), every)}),
        ),
        card("Centres", "where in their image objects are", _maps(splits)),
        card("COCO's sizes", f"small is below {small}² pixels, large from {large}²", _coco_sizes(splits)),
        card("Image sizes", _range(splits), _image_sizes(splits)),
    )
    return f'<div class="cards">{"".join(cards)}</div>'


def _objects_an_image(splits: Mapping[str, Statistics]) -> tuple[list[int], dict[str, Array]]:
    """Return edges of at most `MOST_BINS` columns, the last of which takes the top percent, and images in each."""
    counts = {split: numbers.objects_an_image for split, numbers in splits.items()}
    top = max(int(np.searchsorted(np.cumsum(count), 0.99 * count.sum())) for count in counts.values()) + 1
    width = -(-top // MOST_BINS)
    edges = list(range(0, top + width, width))
    binned = {
        split: np.bincount(np.minimum(np.arange(len(count)) // width, len(edges) - 2), count, len(edges) - 1)
        for split, count in counts.items()
    }
    return edges, binned


def _histogram(series: Mapping[str, Array], columns: Sequence[str], ticks: Mapping[float, str]) -> str:
    """Draw the shares of each series: the first as columns, the others as outlines over them.

    Args:
        series: split → [n] counts.
        columns: [n] what each column is, to be read when pointed at.
        ticks: place on the axis, in columns from the left → label.
    """
    shares = {split: counts / max(1, counts.sum()) for split, counts in series.items()}
    top = max(float(share.max()) for share in shares.values()) or 1.0
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if top / step <= 4)
    left, width = 30.0, (WIDE - 30.0) / len(columns)
    parts = []
    for line in np.arange(0, top + 1e-9, step).tolist():
        y = HIGH * (1 - line / top)
        parts.append(f'<line class="axis" x1="{left}" x2="{WIDE}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{line:.0%}</text>')
    first, *others = shares
    for number, column in enumerate(columns):
        told = "\n".join(f"{split}: {share[number]:.1%}" for split, share in shares.items())
        high = HIGH * shares[first][number] / top
        parts.append(
            f"<g><title>{escape(column)}\n{escape(told)}</title>"
            f'<rect class="column first" x="{left + number * width + 0.75:.2f}" y="{HIGH - high:.2f}" '
            f'width="{width - 1.5:.2f}" height="{high:.2f}" rx="1"/></g>'
        )
    for number, split in enumerate(others, start=1):
        steps = "".join(f"V{HIGH * (1 - share / top):.2f}h{width:.2f}" for share in shares[split].tolist())
        parts.append(f'<path class="outline {SERIES[number % 3]}" d="M{left} {HIGH}{steps}V{HIGH}"/>')
    for place, label in ticks.items():
        parts.append(
            f'<text x="{left + place * width:.1f}" y="{HIGH + 15}" text-anchor="middle">{escape(label)}</text>'
        )
    legend = " ".join(keys(shares))
    return f'<svg viewBox="0 -8 {WIDE + 12} {HIGH + 30}" role="img">{"".join(parts)}</svg><p class="quiet">{legend}</p>'


def _maps(splits: Mapping[str, Statistics]) -> str:
    maps = []
    for number, (split, numbers) in enumerate(splits.items()):
        top = max(1, int(numbers.centres.max()))
        cells = "".join(
            f'<rect class="cell" x="{column}" y="{row}" width="1" height="1" opacity="{count / top:.2f}"/>'
            for (row, column), count in np.ndenumerate(numbers.centres)
            if count
        )
        maps.append(
            f'<div class="{SERIES[number % 3]}"><svg viewBox="0 0 {CELLS} {CELLS}" role="img" '
            f'shape-rendering="crispEdges"><rect class="frame" width="{CELLS}" height="{CELLS}"/>{cells}</svg>'
            f'<p class="quiet">{key(number, split)}</p></div>'
        )
    return f'<div class="maps">{"".join(maps)}</div>'


def _range(splits: Mapping[str, Statistics]) -> str:
    found = [size for numbers in splits.values() for size in numbers.image_sizes]
    if not found:
        return ""
    widths, heights = zip(*found, strict=True)
    if len(set(found)) == 1:
        return "all have the same"
    return f"{len(set(found)):,} different; {min(widths)} to {max(widths)} wide, {min(heights)} to {max(heights)} high"


def _coco_sizes(splits: Mapping[str, Statistics]) -> str:
    counts = np.array([numbers.coco_sizes for numbers in splits.values()])
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    rows = {size: ([f"{count:,}" for count in counts[:, n]], shares[:, n]) for n, size in enumerate(COCO_SIZES)}
    return bar_table(["", *keys(splits), ""], rows)


def _image_sizes(splits: Mapping[str, Statistics]) -> str:
    total: Counter[tuple[int, int]] = Counter()
    for numbers in splits.values():
        total.update(numbers.image_sizes)
    rows = {}
    for size, _ in total.most_common(SIZES):
        counts = [numbers.image_sizes.get(size, 0) for numbers in splits.values()]
        shares = [count / max(1, numbers.images) for count, numbers in zip(counts, splits.values(), strict=True)]
        rows[f"{size[0]}x{size[1]}"] = [f"{count:,}" for count in counts], np.array(shares)
    return bar_table(["", *keys(splits), ""], rows)


def _gallery(figures: Sequence[Figure]) -> str:
    items = []
    for figure in figures:
        height, width = figure.image.shape[:2]
        encoded = cv2.imencode(".jpg", figure.image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
        items.append(
            f'<figure style="--wide:{width / height:.3f}">{embedded(encoded.tobytes(), width, height)}'
            f"<figcaption>{escape(figure.caption)}</figcaption></figure>"
        )
    return f'<div class="gallery">{"".join(items)}</div>'
