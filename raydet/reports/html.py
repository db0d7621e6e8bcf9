"""What HTML pages are made of that need nothing else: no scripts, no fonts, pictures inside."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]

SERIES = ("first", "second", "third")  # CSS classes, a colour each


def page(title: str, content: str) -> str:
    """Return a page of HTML content; the title is text."""
    template = Template((files("raydet.reports") / "page.html").read_text(encoding="utf-8"))
    return template.substitute(title=escape(title), content=content)


def embedded(content: bytes, width: int, height: int, kind: str = "jpeg") -> str:
    """Return an image of an encoded picture of so many pixels."""
    data = base64.b64encode(content).decode()
    return f'<img alt="" width="{width}" height="{height}" src="data:image/{kind};base64,{data}">'


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
