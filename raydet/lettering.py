"""Text in pictures that is not ASCII: drawn by Pillow, with a font that has the letters.

The fonts are DejaVu, which comes with matplotlib and has Latin, Greek and Cyrillic letters, and those of the system.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from functools import cache, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

logger = logging.getLogger(__name__)

Image = npt.NDArray[np.uint8]

_EM = 29  # pixels: size of a font whose capitals are as high as OpenCV's at scale 1
_ABOVE, _BELOW = 0.94, 0.26  # shares of the size that letters take above and below the baseline
_REGULAR = 400  # weight of a font that is neither light nor bold
_LAST_RESORT = "LastResort"  # matplotlib's font that has a box for each letter
# What is cached is drawn often: the name of a class, and each score. All that is between two letters that are not ASCII
# is drawn at once, as the letters of some scripts depend on their neighbours, and some scripts run from right to left.
_PIECES = re.compile(r"[^\x00-\x7f](?:.*[^\x00-\x7f])?|[\x00-\x7f]+", re.DOTALL)


def text_size(text: str, scale: float) -> tuple[int, int, int]:
    """See `raydet.visualization.text_size`."""
    size = _size(scale)
    width = sum(_piece(piece, size).shape[1] for piece in _PIECES.findall(text))
    return width, round(_ABOVE * size), round(_BELOW * size)


def write_text(
    image: Image, text: str, x: int, baseline: int, scale: float, ink: tuple[int, int, int], paper: tuple[int, int, int]
) -> None:
    """See `raydet.visualization.write_text`."""
    size = _size(scale)
    top = baseline - round(_ABOVE * size)
    for piece in _PIECES.findall(text):
        letters = _inked(piece, size, ink, paper)
        high, wide = letters.shape[:2]
        rows = slice(*(min(max(0, edge), image.shape[0]) for edge in (top, top + high)))
        columns = slice(*(min(max(0, edge), image.shape[1]) for edge in (x, x + wide)))
        image[rows, columns] = letters[rows.start - top : rows.stop - top, columns.start - x : columns.stop - x]
        x += wide


def _size(scale: float) -> int:
    return max(6, round(_EM * scale))


@lru_cache(maxsize=4096)
def _inked(text: str, size: int, ink: tuple[int, int, int], paper: tuple[int, int, int]) -> Image:
    share = _piece(text, size)[..., None]
    inked: Image = np.rint(share * np.array(ink) + (1 - share) * np.array(paper)).astype(np.uint8)
    return inked


@lru_cache(maxsize=4096)
def _piece(text: str, size: int) -> npt.NDArray[np.float64]:
    """Return the share of ink [h, w] in each pixel of a text."""
    import PIL.Image
    import PIL.ImageDraw

    above, below = round(_ABOVE * size), round(_BELOW * size)
    drawn = []
    for run, path in _runs(text):
        font = _font(path, size)
        mask = PIL.Image.new("L", (max(1, round(font.getlength(run))), above + below))
        PIL.ImageDraw.Draw(mask).text((0, above), run, fill=255, font=font, anchor="ls")
        drawn.append(np.asarray(mask) / 255)
    return np.concatenate(drawn, axis=1)


def _runs(text: str) -> Iterator[tuple[str, str]]:
    """Yield stretches of a text, each with a font that has its letters; a single one where any font has them all."""
    fonts = [_font_of(letter) for letter in text if not letter.isspace()]
    whole = next((path for path in dict.fromkeys(fonts) if path and all(_has(path, one) for one in text)), None)
    if whole is not None:
        yield text, whole
        return
    if None in fonts:
        _say_missing("".join(sorted({letter for letter in text if _font_of(letter) is None and not letter.isspace()})))
    run, used = "", ""
    for letter in text:
        path = used if used and _has(used, letter) else _font_of(letter) or _dejavu()
        if run and path != used:
            yield run, used
            run = ""
        run, used = run + letter, path
    yield run, used


@cache
def _say_missing(letters: str) -> None:
    logger.warning(
        "no font on this machine has the letters %s, which are drawn as boxes; install one, such as Noto "
        "(Debian and Ubuntu: apt install fonts-noto-core fonts-noto-cjk)",
        letters,
    )


@cache
def _font(path: str, size: int) -> Any:
    import PIL.ImageFont

    return PIL.ImageFont.truetype(path, size)


def _dejavu() -> str:
    return _paths()[0]


@cache
def _paths() -> list[str]:
    """Return the paths of all fonts, upright ones of regular weight first, and DejaVu before all others."""
    from matplotlib.font_manager import findSystemFonts, fontManager, weight_dict

    def order(font: Any) -> tuple[bool, bool, int, str]:
        weight = font.weight if isinstance(font.weight, int) else weight_dict.get(font.weight, _REGULAR)
        return font.name != "DejaVu Sans", font.style != "normal", abs(weight - _REGULAR), font.fname

    known = [font.fname for font in sorted(fontManager.ttflist, key=order)]
    new = sorted(findSystemFonts(), key=lambda path: ("Regular" not in path, path))  # matplotlib keeps an older list
    return [path for path in dict.fromkeys((*known, *new)) if _LAST_RESORT not in path]


@cache
def _letters(path: str) -> Any:
    from matplotlib.ft2font import FT2Font

    try:
        return FT2Font(path).get_charmap().keys()
    except (OSError, RuntimeError):  # no font, or of a kind that FreeType does not read
        return ()


def _has(path: str, letter: str) -> bool:
    return letter.isspace() or ord(letter) in _letters(path)


@cache
def _font_of(letter: str) -> str | None:
    """Return the first font that has a letter; None: no font has it."""
    return next((path for path in _paths() if _has(path, letter)), None)
