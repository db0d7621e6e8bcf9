import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydet.data.json_lists import read_lists

POLYGON = re.compile(r'"segmentation"\s*:\s*\[[^"{}]*\](?=\s*(?:,\s*"|\}))')
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text('ab"\\{}[],: ü\n€\U0001f600'),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(("id", "a", "segmentation")), inner),
    max_leaves=12,
)
FILES = st.dictionaries(st.sampled_from(("images", "annotations", "info", "x")), VALUES, max_size=4)


def read(content, size, names=("images", "annotations")):
    pieces = [content[start : start + size] for start in range(0, len(content), size)]
    return {name: list(records) for name, records in read_lists(pieces, names, POLYGON, '"segmentation":0')}


def without_polygons(value):
    """What `POLYGON` takes out: lists of numbers, whose brackets hold nothing else."""
    if isinstance(value, list):
        return [without_polygons(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {
        key: 0
        if key == "segmentation" and isinstance(each, list) and not set(json.dumps(each)) & set('"{}')
        else without_polygons(each)
        for key, each in value.items()
    }


@given(
    FILES,
    st.integers(1, 40),
    st.sampled_from((None, 1)),
    st.booleans(),
    st.sampled_from(("utf-8", "utf-8-sig", "utf-16")),
)
@settings(deadline=None)
def test_the_records_of_lists_are_those_that_json_reads_whatever_the_pieces(value, size, indent, ascii_only, encoding):
    content = json.dumps(value, indent=indent, ensure_ascii=ascii_only).encode(encoding)
    lists = {key: without_polygons(each) for key, each in value.items() if key in ("images", "annotations")}
    assert read(content, size) == {key: each for key, each in lists.items() if isinstance(each, list)}


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        '{"images"',
        '{"images": [1',
        '{"images": [1,',
        '{"images": [1,]}',
        '{"images": [1 2]}',
        '{"images": [{"id": 1}, {"id": }]}',
        '{"images": [] "x": 1}',
        '{"images": [],}',
        "{1: 2}",
        '{"images": []} x',
        "[1, 2",
        '{"images": [tru]}',
        '{"images": ["\n"]}',
    ],
)
def test_what_is_not_json_is_an_error_whatever_the_pieces(content, size):
    with pytest.raises(ValueError):  # noqa: PT011  # json's words
        json.loads(content)
    with pytest.raises(ValueError, match=r" at '|ends here"):
        read(content.encode(), size)


def test_broken_text_is_an_error():
    with pytest.raises(UnicodeDecodeError):
        read(b'{"images": ["\xff\xff"]}', 5)


@pytest.mark.parametrize("content", ["[]", "1", '"text"', "null", '[{"images": [1]}]', ' {"other": [1]} '])
def test_other_json_has_no_lists(content):
    assert read(content.encode(), 2) == {}
