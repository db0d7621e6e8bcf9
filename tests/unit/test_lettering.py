"""Text of any script in pictures."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydet import lettering
from raydet.visualization import draw_boxes, text_size, write_text

INK, PAPER = (255, 255, 255), (200, 30, 10)


def written(text, scale=0.6):
    width, above, below = text_size(text, scale)
    image = np.full((above + below, width, 3), PAPER, np.uint8)
    write_text(image, text, 0, above, scale, INK, PAPER)
    return image


def test_ascii_is_drawn_as_opencv_does():
    image = np.full((40, 200, 3), PAPER, np.uint8)
    expected = cv2.putText(image.copy(), "cat 0.91", (5, 30), cv2.FONT_HERSHEY_SIMPLEX, 0.5, INK, 1, cv2.LINE_AA)
    write_text(image, "cat 0.91", 5, 30, 0.5, INK, PAPER)
    assert np.array_equal(image, expected)
    assert text_size("cat 0.91", 0.5)[0] == cv2.getTextSize("cat 0.91", cv2.FONT_HERSHEY_SIMPLEX, 0.5, 1)[0][0]


@pytest.mark.parametrize(
    "names", [("кошка", "собака"), ("Größe", "Grüße"), ("Σκύλος", "γάτα"), ("قطة", "كلب")], ids=str
)
def test_names_are_told_apart(names):
    ours, theirs = map(written, names)
    for image in (ours, theirs):
        ink = (image != PAPER).any(-1)
        assert 0.05 < ink.mean() < 0.6
    assert ours.shape != theirs.shape or (ours != theirs).any()


def test_a_name_takes_the_place_that_it_says():
    """Nothing is cut off: on a larger image the same pixels are inked."""
    for text in ("Ёжик", "ÅÇĜ", "Größe 0.91"):
        width, above, below = text_size(text, 0.6)
        image = np.full((above + below + 40, width + 40, 3), PAPER, np.uint8)
        write_text(image, text, 20, 20 + above, 0.6, INK, PAPER)
        rows, columns = np.nonzero((image != PAPER).any(-1))
        assert 20 <= rows.min() <= rows.max() < 20 + above + below
        assert 20 <= columns.min() <= columns.max() < 20 + width
        assert np.array_equal(image[20 : 20 + above + below, 20 : 20 + width], written(text))


@settings(deadline=None)
@given(st.integers(-80, 80), st.integers(-40, 80), st.sampled_from(["кошка", "猫", "mix 猫 0.5", "قطة"]))
def test_what_is_beyond_the_image_is_left_out(x, baseline, text):
    small = np.full((40, 50, 3), PAPER, np.uint8)
    large = np.full((240, 250, 3), PAPER, np.uint8)
    write_text(small, text, x, baseline, 0.6, INK, PAPER)
    write_text(large, text, x + 100, baseline + 100, 0.6, INK, PAPER)
    assert np.array_equal(small, large[100:140, 100:150])


def test_a_letter_that_no_font_has_is_a_box_and_said_once(caplog):
    lettering._say_missing.cache_clear()
    for scale in (0.5, 0.7):
        assert (written("\U0010fffd", scale) != PAPER).any()
    assert caplog.text.count("no font on this machine has the letters \U0010fffd") == 1
    assert "install one, such as Noto" in caplog.text


def test_each_letter_gets_a_font_that_has_it(monkeypatch):
    fonts = {"a.ttf": "ab", "c.ttf": "cd"}
    monkeypatch.setattr(lettering, "_paths", lambda: list(fonts))
    monkeypatch.setattr(lettering, "_letters", lambda path: set(map(ord, fonts[path])))
    lettering._font_of.cache_clear()
    try:
        assert list(lettering._runs("ab cd a")) == [("ab ", "a.ttf"), ("cd ", "c.ttf"), ("a", "a.ttf")]
        assert list(lettering._runs("c d")) == [("c d", "c.ttf")]
        assert list(lettering._runs("cx")) == [("c", "c.ttf"), ("x", "a.ttf")]
    finally:
        lettering._font_of.cache_clear()


def test_labels_of_boxes_have_any_script():
    image = np.full((200, 300, 3), 90, np.uint8)
    drawn = [draw_boxes(image, np.array([[20.0, 60, 200, 180]]), [0], [name], [0.9]) for name in ("кошка", "????? ")]
    assert (drawn[0] != drawn[1]).any()
    assert (drawn[0][100:] == drawn[1][100:]).all(), "boxes are as they were"
