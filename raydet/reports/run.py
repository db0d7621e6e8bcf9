"""A run as one HTML page: accuracy, curves, classes, pictures, recipe and environment."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from raydet import __version__
from raydet.errors import RaydetError
from raydet.evaluation.coco import MAIN_METRIC
from raydet.reports.curves import draw
from raydet.reports.html import bar_table, card, embedded, page
from raydet.runs.log import METRICS_FILE, best_validation, read_metrics
from raydet.store import Store

REPORT = "report.html"
_CLASS = "val/AP@0.50:0.95_"
_NOTES = ("warning: ", "left out ")  # how the lines of log.txt begin that are worth reading later
_MOST_NOTES = 200
_TUNED = "tune_nms.png"
_PNG = b"\x89PNG"  # how such a file begins

_Lines = Sequence[Mapping[str, float]]


def report(folder: Path, out: Path | None = None) -> Path:
    """Write a run's report, and return its path.

    Args:
        folder: folder of the run, finished or not.
        out: path of the page; None: report.html in the folder.

    Raises:
        RaydetError: it is no run, nothing is logged, or the page cannot be written.
    """
    out = out or folder / REPORT
    lines = read_metrics(folder)
    if not lines:
        raise RaydetError(f"{folder / METRICS_FILE}: no metrics in it; a run's folder has them after its first steps")
    name = folder.resolve().name
    best = best_validation(lines)
    sections = {
        "Curves": f'<div class="card"><div class="sheet">{_image(draw(lines, ""))}</div></div>',
        "Metrics": _metrics(best),
        "Classes": _classes(best),
        "Pictures": _pictures(folder),
        "Notes": _notes(folder),
        "Recipe": _text(folder / "recipe.yaml"),
        "Environment": _environment(folder),
    }
    sections = {headline: content for headline, content in sections.items() if content}
    links = "".join(f'<a href="#{number}">{headline}</a>' for number, headline in enumerate(sections))
    finished = "finished" if (folder / "summary.json").is_file() else "not finished"
    changed = datetime.fromtimestamp((folder / METRICS_FILE).stat().st_mtime)
    about = f"{escape(str(folder))} · {finished} · {changed:%d %B %Y, %H:%M} · raydet {__version__}"
    parts = [
        f'<h1>{escape(name)}</h1><p class="quiet">{about}</p><nav>{links}</nav>',
        _overview(lines, best),
        *(f'<h2 id="{n}">{headline}</h2>{content}' for n, (headline, content) in enumerate(sections.items())),
    ]
    Store(out.parent).write(out.name, page(f"{name} · run report", "\n".join(parts)).encode())
    return out


def _overview(lines: _Lines, best: Mapping[str, float] | None) -> str:
    speeds = [line["perf/images_per_s"] for line in lines if "perf/images_per_s" in line]
    waits = [line["perf/data_wait"] for line in lines if "perf/data_wait" in line]
    cells = {name: f"{best[f'val/{name}']:.4f}" for name in (MAIN_METRIC, "mAP@0.50", "mAP@0.75") if best}
    if best:
        cells["best epoch"] = f"{best['epoch']:g}"
    cells |= {
        "epochs": f"{max(line['epoch'] for line in lines):g}",
        "steps": f"{max(line['step'] for line in lines):,g}",
    }
    if speeds:
        cells["images/s"] = f"{np.median(speeds):.1f}"
    if waits:
        cells["waiting for data"] = f"{np.mean(waits):.1%}"
    head = "".join(f"<th>{escape(name)}</th>" for name in cells)
    row = "".join(f"<td>{value}</td>" for value in cells.values())
    return f'<div class="card wide"><table><thead><tr>{head}</tr></thead><tbody><tr>{row}</tr></tbody></table></div>'


def _metrics(best: Mapping[str, float] | None) -> str:
    if best is None:
        return ""
    values = {key: value for key, value in best.items() if key.startswith("val/") and not key.startswith(_CLASS)}
    rows = {key.removeprefix("val/"): ([_number(value)], np.array([max(value, 0.0)])) for key, value in values.items()}
    return f'<div class="card">{bar_table(["best validation", "value", ""], rows)}</div>'


def _classes(best: Mapping[str, float] | None) -> str:
    found = {key.removeprefix(_CLASS): value for key, value in (best or {}).items() if key.startswith(_CLASS)}
    rows = {
        name: ([_number(found[name])], np.array([max(found[name], 0.0)]))
        for name in sorted(found, key=lambda name: -found[name])
    }
    return f'<div class="card scroll">{bar_table(["class", MAIN_METRIC, ""], rows)}</div>' if rows else ""


def _number(value: float) -> str:
    return "no objects" if value == -1 else f"{value:.4f}"


def _pictures(folder: Path) -> str:
    """The newest of each kind that the training drew, detections beside the truth, and what thresholds give."""
    newest: dict[str, dict[str, Any]] = {}
    notes = folder / "images" / "pictures.jsonl"
    for line in notes.read_text().splitlines() if notes.is_file() else []:
        try:
            note = json.loads(line)
            newest[note["name"]] = note
        except (ValueError, KeyError, TypeError):  # a line that a crash cut off
            continue
    shown = []
    for note in newest.values():
        value = f", {note['value']:.4f}" if note.get("value") is not None else ""
        about = f"epoch {note['epoch']:g}, step {note['step']:g}{value}"
        shown.append((folder / note["picture"], note["title"], about))
    shown.append(
        (folder / "images" / "validation.jpg", "validation: ground truth beside detections", "best checkpoint")
    )
    shown += [(path, "thresholds", str(path.parent)) for path in sorted(folder.glob(f"**/{_TUNED}"))]
    cards = [
        card(escape(title), escape(about), f'<div class="sheet">{image}</div>')
        for path, title, about in shown
        if (image := _image(path.read_bytes() if path.is_file() else b""))
    ]
    return f'<div class="stack">{"".join(cards)}</div>' if cards else ""


def _image(content: bytes) -> str:
    """Return a picture for the page; none where it is broken."""
    image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR) if content else None
    if image is None:
        return ""
    return embedded(content, image.shape[1], image.shape[0], "png" if content.startswith(_PNG) else "jpeg")


def _notes(folder: Path) -> str:
    log = folder / "log.txt"
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    notes = [line for line in lines if line.startswith(_NOTES)]
    more = [f"… and {len(notes) - _MOST_NOTES:,} more in log.txt"] * (len(notes) > _MOST_NOTES)
    listed = "".join(f"<li>{escape(line)}</li>" for line in (*notes[:_MOST_NOTES], *more))
    return f'<div class="card"><ul>{listed}</ul></div>' if notes else ""


def _text(path: Path) -> str:
    if not path.is_file():
        return ""
    text = escape(path.read_text())
    return f'<div class="card"><details><summary>{path.name}</summary><pre>{text}</pre></details></div>'


def _environment(folder: Path) -> str:
    path = folder / "environment.json"
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return ""
    rows = "".join(f"<tr><td>{escape(str(k))}</td><td>{escape(str(v))}</td></tr>" for k, v in values.items())
    return f'<div class="card wide"><table><tbody>{rows}</tbody></table></div>'
