"""A JSON array of rows, element by element: what is held in memory is one element, not the file."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from typing import BinaryIO

from educe.errors import DataError
from educe.files.jsonl import how_to_mend

BLOCK_BYTES = 1 << 18
MOST_CHARS = 2**28  # as long as a line may be
# A string (open-ended if the text ends inside it), or what opens, closes or parts values.
_MARK = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*("|\\?\Z)|[\[\]{},]', re.S)
_SPACE = re.compile(r"[ \t\r\n]*")


def elements(stream: BinaryIO, shown: str) -> Iterator[tuple[int, int, str]]:
    """(line, column, text) of each element; its text is not parsed. `stream` begins with the array (a byte order mark and white
    space may stand before). Raises `DataError` where the array itself is broken, after the elements before that place.
    """
    text = _Text(stream, shown)
    text.skip_space()
    text.skip(1)  # the bracket
    text.skip_space()
    if text.first() == "]":
        text.skip(1)
        return _end(text)
    while True:
        line, column = text.place()
        element = text.element()
        if not element.strip():
            raise text.broken("an element is missing")
        yield line, column, element
        mark = text.first()
        text.skip(1)
        text.skip_space()
        if mark == "]":
            return _end(text)


def _end(text: _Text) -> None:
    text.skip_space()
    if text.first():
        raise text.broken("there is text after the array")


class _Text:
    """Decoded text that is read as it is needed, and the place that was reached in it."""

    def __init__(self, stream: BinaryIO, shown: str) -> None:
        self._stream, self._shown = stream, shown
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at, self._done = "", 0, False
        self._line, self._column = 1, 1

    def place(self) -> tuple[int, int]:
        return self._line, self._column

    def broken(self, why: str) -> DataError:
        place = f"{self._shown}:{self._line}:{self._column}"
        return DataError(4, place, f"starts like a JSON array and is none: {why}.", "Write one JSON object per line.")

    def first(self) -> str:
        """The next character; "" at the end."""
        while self._at >= len(self._text) and self._more():
            pass
        return self._text[self._at : self._at + 1]

    def skip_space(self) -> None:
        while True:
            match = _SPACE.match(self._text, self._at)
            assert match is not None
            self.skip(match.end() - self._at)
            if self._at < len(self._text) or not self._more():
                return

    def skip(self, num_chars: int) -> None:
        passed = self._text[self._at : self._at + num_chars]
        lines = passed.count("\n")
        self._line += lines
        self._column = len(passed) - passed.rfind("\n") if lines else self._column + len(passed)
        self._at += num_chars

    def element(self) -> str:
        """The text up to the comma or bracket that ends the element."""
        depth, searched = 0, self._at
        while True:
            for match in _MARK.finditer(self._text, searched):
                mark = match[0]
                if mark[0] == '"':
                    if match[1] != '"':  # the text so far ends inside a string
                        searched = match.start()
                        break
                elif mark in "[{":
                    depth += 1
                elif depth and mark in "]}":
                    depth -= 1
                elif not depth and mark != "}":
                    found = self._text[self._at : match.start()]
                    self.skip(len(found))
                    return found
                searched = match.end()
            kept = searched - self._at
            if len(self._text) - self._at > MOST_CHARS or not self._more():
                self.skip(len(self._text) - self._at)
                raise self.broken(
                    "it ends inside an element"
                    if self._done
                    else f"an element is longer than {MOST_CHARS:,} characters"
                )
            searched = self._at + kept

    def _more(self) -> bool:
        """Read on; what was passed is forgotten. False at the end."""
        kept = len(self._text) - self._at
        block = self._stream.read(max(BLOCK_BYTES, kept))  # as much again: what is kept is copied each time
        if self._done:
            return False
        self._done = not block
        try:
            new = self._decoder.decode(block, final=self._done)
        except UnicodeDecodeError as e:
            place = f"{self._shown}:{self._line}"
            found = f"byte 0x{e.object[e.start]:02x} behind this place is not UTF-8."
            raise DataError(4, place, found, how_to_mend(e.object)) from e
        self._text = self._text[self._at :] + new
        self._at = 0
        return bool(new) or not self._done
