"""Text in pictures: every script in a font that has its letters."""

import numpy as np
import pytest

from raydet import lettering
from raydet.lettering import line, width

BLACK, WHITE = (0, 0, 0), (255, 255, 255)


@pytest.fixture
def fonts(monkeypatch):
    """Of all fonts only DejaVu Sans, and nothing said yet."""
    lettering._font_of.cache_clear()
    lettering._opacity.cache_clear()
    lettering.line.cache_clear()
    first = lettering._fonts()[0]
    monkeypatch.setattr(lettering, "_fonts", lambda: (first,))
    monkeypatch.setattr(lettering, "_told", set())
    yield
    lettering.line.cache_clear()
    lettering._font_of.cache_clear()
    lettering._opacity.cache_clear()


@pytest.mark.parametrize("text", ["Straßenbahnführer", "Собака", "Γάτα", "سيارة", "cat 0.87"])
def test_scripts_of_dejavu_are_drawn_without_boxes(fonts, caplog, text):
    drawn = line(text, 13, BLACK, WHITE)
    assert drawn.min() < 60
    assert drawn.shape[1] == width(text, 13)
    assert not caplog.records


def test_other_letters_are_other_pictures():
    one, other = line("кот", 20, BLACK, WHITE), line("рот", 20, BLACK, WHITE)
    assert one.shape != other.shape or (one != other).any()


def test_a_letter_that_no_font_has_is_said_once_with_the_package(fonts, caplog):
    for text in ("猫", "犬", "ねこ"):
        assert line(text, 13, BLACK, WHITE).min() < 200, "a box is drawn"
    assert [record.getMessage() for record in caplog.records] == [
        "no font here has the letter 猫: it and its like are drawn as boxes; a package such as fonts-noto-cjk has them"
    ]


@pytest.mark.parametrize("text", ["", "a\nb", "\x00", "\ud800", "\u200d", "\U0001f600", " "])
def test_any_text_is_drawn(text):
    assert line(text, 11, BLACK, WHITE).shape[0] == line("cat", 11, BLACK, WHITE).shape[0]


def test_the_colours_are_those_that_are_asked_for():
    drawn = line("■", 40, (10, 20, 30), (200, 100, 50)).reshape(-1, 3)
    found = {tuple(colour) for colour in np.unique(drawn, axis=0).tolist()}
    assert {(10, 20, 30), (200, 100, 50)} <= found
