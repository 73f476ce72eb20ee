"""Rendered text as pieces: cut it, compare it, find the control tokens that the template wrote."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from educe.chat.template import Piece


def joined(pieces: Iterable[Piece]) -> str:
    return "".join(p.text for p in pieces)


def cut(pieces: Iterable[Piece], start: int, end: int) -> tuple[Piece, ...]:
    """The stretch between two character positions. A text of the row that is cut inside cannot be made again for another row."""
    kept, at = [], 0
    for p in pieces:
        low, high = max(0, start - at), max(0, end - at)
        text = p.text[low:high]
        if text == p.text and (text or start <= at < end):
            kept.append(p)
        elif text:
            kept.append(replace(p, text=text, path=(), ops=()))
        at += len(p.text)
    return tuple(kept)


def merged(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    """Neighbouring stretches of the template as one; empty ones are left out."""
    kept: list[Piece] = []
    for p in pieces:
        if p.part == "template" and kept and kept[-1].part == "template" and kept[-1].message == p.message:
            kept[-1] = replace(kept[-1], text=kept[-1].text + p.text)
        elif p.text or p.part != "template":
            kept.append(p)
    return tuple(kept)


def starts_with(pieces: Sequence[Piece], start: Sequence[Piece]) -> bool:
    """Whether `pieces` start with `start` whatever the row's texts are: the same texts in the same places."""
    left, right = list(merged(pieces)), list(merged(start))
    for k, want in enumerate(right):
        if k >= len(left):
            return False
        have = left[k]
        if want.part == "template" and have.part == "template":
            last = k == len(right) - 1
            if have.text != want.text and not (last and have.text.startswith(want.text)):
                return False
        elif (have.path, have.ops) != (want.path, want.ops) or not have.path:
            return False
    return True


def control_in(text: str, control: Mapping[str, int]) -> list[tuple[int, int, str]]:
    """Control tokens written in a text, left to right, the longest where several start together: (start, end, word)."""
    found, at = [], 0
    by_first: dict[str, list[str]] = {}
    for word in control:
        by_first.setdefault(word[0], []).append(word)
    while at < len(text):
        fits = [w for w in by_first.get(text[at], ()) if text.startswith(w, at)]
        if fits:
            word = max(fits, key=len)
            found.append((at, at + len(word), word))
            at += len(word)
        else:
            at += 1
    return found


def last_of(pieces: Sequence[Piece], message: int) -> int | None:
    """Where the last of a message's own texts ends in the joined pieces."""
    at, end = 0, None
    for p in pieces:
        at += len(p.text)
        if p.from_data and p.message == message:
            end = at
    return end
