"""JSON files of any size: the records of their lists, one after the other, in little memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

_SPACE = re.compile(r"[ \t\n\r]*")
_COMMA = re.compile(r"[ \t\n\r]*,[ \t\n\r]*")
_BEHIND = frozenset(" \t\n\r,:]}")  # a value; a number may go on in the next piece
# (text, place) → value, place behind it; errors as of `json.loads`.
_scan: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder().scan_once  # type: ignore[attr-defined]


def read_lists(
    pieces: Iterable[bytes], names: Collection[str], without: re.Pattern[str], instead: str
) -> Iterator[tuple[str, Iterator[Any]]]:
    """Read lists that an object has at its top, such as `{"images": […], "annotations": […]}`.

    Args:
        pieces: content of the file, in order.
        names: names of the lists; what else the object has is read and passed over.
        without: pattern of text that is replaced before it is parsed, within a record; it must not match anything else.
        instead: text that takes its place.

    Yields:
        Each list's name and an iterator of its records, which must be used up before the next list is asked for. A
        value that is no list is not yielded.

    Raises:
        ValueError: it is not JSON.
    """
    text = _Text(pieces, without, instead)
    if text.next() != "{":
        text.value()
    else:
        for _ in text.items("{", "}"):
            name = text.value()
            if not isinstance(name, str) or text.next() != ":":
                raise text.error("Expecting property name and ':'")
            text.skip()
            if name in names and text.next() == "[":
                yield name, text.records()
            else:
                text.value()
    if text.next():
        raise text.error("Extra data")


class _Text:
    """Text of which a part is there, and a place in it."""

    def __init__(self, pieces: Iterable[bytes], without: re.Pattern[str], instead: str):
        self._pieces = iter(pieces)
        first = b""
        while len(first) < 4 and (piece := next(self._pieces, None)):  # which tell the encoding
            first += piece
        self._decoder = codecs.getincrementaldecoder(json.detect_encoding(first))("surrogatepass")
        self._without, self._instead = without, instead
        self._text, self._place, self._is_whole = "", 0, False
        self._take(first)

    def next(self) -> str:
        """Return the next character that is no space; "": there is none."""
        while True:
            self._place = _SPACE.match(self._text, self._place).end()  # type: ignore[union-attr]
            if self._place < len(self._text) or self._is_whole:
                return self._text[self._place : self._place + 1]
            self._more()

    def skip(self) -> None:
        """Go past the next character that is no space."""
        self.next()
        self._place += 1

    def value(self) -> Any:
        """Read the next value."""
        self.next()
        while True:
            try:
                value, end = _scan(self._text, self._place)
                if self._text[end : end + 1] in _BEHIND or self._is_whole:
                    self._place = end
                    return value
            except StopIteration as error:
                if self._is_whole:
                    self._place = error.value
                    raise self.error("Expecting value") from None
            except json.JSONDecodeError as error:
                if self._is_whole:
                    self._place = error.pos
                    raise self.error(error.msg) from None
            self._more()

    def items(self, first: str, last: str) -> Iterator[None]:
        """Stop at each item of a list or object, which is to be read before the next is asked for."""
        self.skip()
        if self.next() == last:
            self.skip()
            return
        while True:
            yield
            following = self.next()
            self._place += 1
            if following == last:
                return
            if following != ",":
                self._place -= 1
                raise self.error(f"Expecting ',' or {last!r}")

    def records(self) -> Iterator[Any]:
        """Read the items of a list."""
        for _ in self.items("[", "]"):
            yield self.value()
            # All but the last in this piece are read with less ado, which is twice as fast.
            text, place = self._text, self._place
            while (comma := _COMMA.match(text, place)) is not None:
                try:
                    value, end = _scan(text, comma.end())
                except (StopIteration, json.JSONDecodeError):
                    break
                if text[end : end + 1] not in _BEHIND:
                    break
                yield value
                self._place = place = end

    def error(self, message: str) -> ValueError:
        """Return an error that says where."""
        rest = self._text[self._place : self._place + 40]
        return ValueError(f"{message} at {rest!r}" if rest else f"{message}, but it ends here")

    def _more(self) -> None:
        """Get more text; each time more, so that a long value is not begun too often."""
        wanted = max(1, len(self._text) - self._place)
        taken = 0
        while not self._is_whole and taken < wanted:
            piece = next(self._pieces, None)
            taken += self._take(piece)

    def _take(self, piece: bytes | None) -> int:
        """Add a piece, None after the last, and return how long it is."""
        self._is_whole = piece is None
        text = self._decoder.decode(piece or b"", final=piece is None)
        self._text, self._place = self._without.sub(self._instead, self._text[self._place :] + text), 0
        return len(piece or b"")
