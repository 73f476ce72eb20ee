"""Which words of an answer differ from those that were expected."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

_WORD = re.compile(r"\w+|\s+|[^\w\s]")
LEAST_ALIKE = 0.4  # below it the marks would cover everything and say nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A stretch of text: in both, only in the answer (more), or only in what was expected (missing)."""

    kind: Literal["same", "more", "missing"]
    text: str


def differences(answer: str, expected: str) -> tuple[Piece, ...]:
    """The answer in pieces, what it lacks put in between. The pieces that are not missing make the answer again.

    One piece where the two are alike, or have little in common.
    """
    said, wanted = _WORD.findall(answer), _WORD.findall(expected)
    matcher = SequenceMatcher(None, wanted, said, autojunk=False)
    if answer == expected or matcher.ratio() < LEAST_ALIKE:
        return (Piece(kind="same", text=answer),)
    return tuple(p for p in _pieces(matcher, wanted, said) if p.text)


def _pieces(matcher: SequenceMatcher[str], wanted: list[str], said: list[str]) -> Iterator[Piece]:
    for tag, a, b, c, d in matcher.get_opcodes():
        if tag == "equal":
            yield Piece(kind="same", text="".join(said[c:d]))
        else:
            yield Piece(kind="missing", text="".join(wanted[a:b]))
            yield Piece(kind="more", text="".join(said[c:d]))
