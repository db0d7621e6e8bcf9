"""Lines of text in any script, drawn in the first font that has their letters.

The first is DejaVu Sans, which matplotlib brings: Latin, Greek, Cyrillic, Arabic, Hebrew and more. What it lacks comes
from the fonts of the system. Pillow shapes the letters and puts them in order.
"""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

logger = logging.getLogger(__name__)

Pixels = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]

_CJK = ("BOPOMOFO", "CJK", "HANGUL", "HIRAGANA", "IDEOGRAPHIC", "KATAKANA")  # how Unicode's names begin
_NO_LETTER = ("Cc", "Cs", "Zl", "Zp")  # categories: control, surrogate, ends of lines and paragraphs


@lru_cache(maxsize=8192)  # 80 classes with 100 scores in their colours; about 3 KB each
def line(text: str, size: int, ink: Colour, ground: Colour) -> Pixels:
    """Draw a line of text; it is kept, so what is returned is read-only.

    Args:
        text: the text.
        size: size of the font in pixels.
        ink: colour of the letters, BGR.
        ground: colour behind them, BGR.

    Returns:
        uint8 [H, W, 3] BGR; all lines of a size are of one height.
    """
    drawn: Pixels = cv2.applyColorMap(_opacity(text, size), _mixtures(ink, ground))  # type: ignore[assignment]
    drawn.flags.writeable = False
    return drawn


@cache
def _mixtures(ink: Colour, ground: Colour) -> Pixels:
    """Return the colours [256, 1, 3] from the ground to the ink."""
    mixed = (np.array(ground) + np.linspace(0, 1, 256)[:, None] * np.subtract(ink, ground)).round()
    return mixed.astype(np.uint8)[:, None]


@lru_cache(maxsize=4096)
def _opacity(text: str, size: int) -> Pixels:
    """Draw the letters [H, W], 0 where there are none, 255 where they are full; each text is drawn once."""
    first = _font(_fonts()[0], size)
    ascent, descent = first.getmetrics()
    runs = [(run, _font(file, size)) for file, run in _runs(text)]
    canvas = Image.new("L", (max(1, round(sum(font.getlength(run) for run, font in runs))), ascent + descent))
    draw, x = ImageDraw.Draw(canvas), 0.0
    for run, font in runs:
        draw.text((x, ascent), run, 255, font, anchor="ls")
        x += font.getlength(run)
    return np.asarray(canvas)


def width(text: str, size: int) -> int:
    """Return how wide a line of text is, in pixels."""
    return max(1, round(sum(_font(file, size).getlength(run) for file, run in _runs(text))))


def _runs(text: str) -> Iterator[tuple[str, str]]:
    """Yield (file of a font, letters) in turn; a font goes on as long as it has the letters."""
    file, run = "", ""
    for given in text:
        letter = " " if unicodedata.category(given) in _NO_LETTER else given
        if not (file and ord(letter) in _letters(file)):
            found = _font_of(letter)
            if found != file and run:
                yield file, run
                run = ""
            file = found
        run += letter
    if run:
        yield file, run


@lru_cache(maxsize=65536)
def _font_of(letter: str) -> str:
    """Return the file of the first font that has a letter; without any, the first of all, which draws a box."""
    for file in _fonts():
        if ord(letter) in _letters(file):
            return file
    name = unicodedata.name(letter, "")
    _tell("fonts-noto-cjk" if name.startswith(_CJK) else "fonts-noto-core", letter)
    return _fonts()[0]


_told: set[str] = set()


def _tell(package: str, letter: str) -> None:
    if package not in _told:
        _told.add(package)
        logger.warning(
            "no font here has the letter %s: it and its like are drawn as boxes; a package such as %s has them",
            letter,
            package,
        )


@cache
def _fonts() -> tuple[str, ...]:
    """Return the files of all fonts: DejaVu Sans, then the system's, upright sans-serif ones first."""
    import matplotlib
    from matplotlib.font_manager import findSystemFonts

    def rank(file: str) -> tuple[bool, bool, str]:
        name = Path(file).stem
        return "Sans" not in name, "Regular" not in name, name

    return f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", *sorted(findSystemFonts(), key=rank)


@cache
def _letters(file: str) -> frozenset[int]:
    """Return the code points that a font has; none if it has one size only, as colour emoji, or cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        font: Any = FT2Font(file)
        return frozenset(font.get_charmap() if font.scalable else ())
    except (OSError, RuntimeError):
        return frozenset()


@cache
def _font(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size)
