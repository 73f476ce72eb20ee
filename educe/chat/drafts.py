"""A sequence between text and ids: what is to be encoded, and what the ids must be to be right.

A `Plan` is all of it that does not depend on a row's texts: it is made once for a layout and filled for each row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np
from jaxtyping import Int32

from educe.chat.pieces import control_in
from educe.chat.template import REASONING_KEYS, Piece, remade
from educe.chat.tokens import ChatTokenizer
from educe.types import Apart, Rendering, Segment

# The texts of a row by path: (message, "content") and the like.
Texts = Mapping[tuple[Any, ...], str]
_NO_TEXTS: Texts = {}


@dataclass(frozen=True, slots=True)
class Slot:
    """A stretch of a sequence: a segment that is the same in every row, or (`piece`) where a row's text goes."""

    segment: Segment
    piece: Piece | None = None

    @property
    def varies(self) -> bool:
        """Tool calls and the like are the same in all rows of one shape."""
        return self.piece is not None and self.piece.path[1:2] in _VARYING

    def filled(self, texts: Texts) -> Segment:
        if not self.varies or self.piece is None:
            return self.segment
        s = self.segment
        return Segment(text=_text(self.piece, texts), message=s.message, part=s.part, trained=s.trained)


_VARYING = {(name,) for name in ("content", *REASONING_KEYS)}


def _text(piece: Piece, texts: Texts) -> str:
    return remade(piece, texts) if piece.ops else texts[piece.path]


# Ids that are the same in every row.
Fixed = Int32[np.ndarray, " t"]
# A text with %s where the pieces' texts go.
Form = tuple[str, tuple[Piece, ...]]


def _form(items: Sequence[str | Piece]) -> Form:
    written = "".join([i.replace("%", "%%") if isinstance(i, str) else "%s" for i in items])
    return written, tuple([i for i in items if isinstance(i, Piece)])


def _put(form: Form, row: Texts) -> str:
    return form[0] % tuple([_text(p, row) for p in form[1]])


@dataclass(frozen=True, slots=True)
class Plan:
    """One sequence. `runs` are stretches that are all trained or all context, each as texts and places for texts; `turns` the
    turn of each, None for context; `control` the control tokens that the template writes, in order.

    `cuts` has each run as it is encoded: cut at the control tokens that the template writes, ids where a stretch is the same in
    every row, else a text. `joints` are what is encoded besides, to prove that a server agrees with turns that share a
    sequence: for a completion that is not the last, what stands behind the last control token before it, and the completion.
    """

    slots: tuple[Slot, ...]
    trained: tuple[int, ...]
    apart: Apart
    runs: tuple[Form, ...]
    turns: tuple[int | None, ...]
    control: tuple[int, ...]
    cuts: tuple[tuple[Form | Fixed, ...], ...]
    joints: tuple[tuple[int, Form], ...]
    appended: bool


@dataclass(frozen=True, slots=True)
class Draft:
    """A plan with a row's texts: `texts` of the runs, `joints` as (run, text)."""

    plan: Plan
    row: Texts
    texts: tuple[str, ...]
    joints: tuple[tuple[int, str], ...]

    def stretches(self) -> list[str]:
        """What is encoded for its runs, in order."""
        return [_put(part, self.row) for run in self.plan.cuts for part in run if isinstance(part, tuple)]

    def rendering(self) -> Rendering:
        """With its segments."""
        segments = tuple([s.filled(self.row) for s in self.plan.slots])
        return Rendering(segments=segments, turns=self.plan.trained, apart=self.plan.apart)


def plan_sequence(slots: Sequence[Slot], turns: tuple[int, ...], apart: Apart, tokenizer: ChatTokenizer) -> Plan:
    """Work out all that does not depend on the texts."""
    key = TokenizerKey(tokenizer)
    groups = [tuple(g) for _, g in groupby(slots, key=lambda s: run_of(s.segment))]
    control = [n for s in slots if s.segment.part == "template" for _, _, n in written(s.segment.text, key)]
    joints = [
        (k, _form((*loose, *map(_item, groups[k]))))
        for k in range(1, len(groups) - 1)  # the last completion is in no prompt of this sequence
        if groups[k][0].segment.trained and (loose := _behind_control(groups[k - 1], key))
    ]
    return Plan(
        slots=tuple(slots),
        trained=turns,
        apart=apart,
        runs=tuple(_form(tuple(map(_item, g))) for g in groups),
        turns=tuple(g[0].segment.message if g[0].segment.trained else None for g in groups),
        control=tuple(control),
        cuts=tuple(_cut(tuple(map(_item, g)), key) for g in groups) if tokenizer.table is not None else (),
        joints=tuple(joints),
        appended=bool(slots) and slots[-1].segment.part == "eos",
    )


def _cut(run: Sequence[str | Piece], key: TokenizerKey) -> tuple[Form | Fixed, ...]:
    """A run cut at the template's control tokens: encoding a text is encoding the stretches between them (see `bytes_of`)."""
    cuts: list[Form | Fixed] = []
    fixed, stretch = "", list[str | Piece]()

    def close(word: str) -> None:
        nonlocal fixed, stretch
        if any(isinstance(i, Piece) for i in stretch):
            if fixed:
                cuts.append(np.array(key.tokenizer.encode(fixed), np.int32))
            cuts.append(_form(stretch))
            fixed, stretch = word, []
        else:
            fixed, stretch = "".join([fixed, *map(str, stretch), word]), []

    for item in run:
        if isinstance(item, Piece):
            stretch.append(item)
            continue
        at = 0
        for start, end, _ in written(item, key):
            stretch.append(item[at:start])
            close(item[start:end])
            at = end
        stretch.append(item[at:])
    close("")
    if fixed:
        cuts.append(np.array(key.tokenizer.encode(fixed), np.int32))
    return tuple(cuts)


def fill(plan: Plan, row: Texts) -> Draft:
    """The plan with a row's texts."""
    texts = tuple([_put(run, row) for run in plan.runs])
    return Draft(plan, row, texts, tuple([(k, _put(run, row)) for k, run in plan.joints]) if plan.joints else ())


def draft_of(rendering: Rendering, tokenizer: ChatTokenizer) -> Draft:
    """A rendering as a draft of its own."""
    slots = [Slot(s) for s in rendering.segments]
    return fill(plan_sequence(slots, rendering.turns, rendering.apart, tokenizer), _NO_TEXTS)


def run_of(segment: Segment) -> int | None:
    """Which run a segment is in: one turn's completion, or context (None). Two turns may touch, each has its own weight."""
    return segment.message if segment.trained else None


def _item(slot: Slot) -> str | Piece:
    return slot.piece if slot.varies and slot.piece is not None else slot.segment.text


def _behind_control(run: Sequence[Slot], key: TokenizerKey) -> list[str | Piece]:
    """The end of a run behind the last control token that the template wrote."""
    loose: list[str | Piece] = []
    for s in reversed(run):
        if s.segment.part == "template" and (found := written(s.segment.text, key)):
            rest = s.segment.text[found[-1][1] :]
            return [rest, *loose] if rest else loose
        loose.insert(0, _item(s))
    return loose


class TokenizerKey:
    """A tokenizer as a key of the cache below."""

    __slots__ = ("tokenizer",)

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self.tokenizer = tokenizer

    def _identity(self) -> tuple[str, int]:
        return self.tokenizer.tokenizer_hash, len(self.tokenizer.control)

    def __hash__(self) -> int:
        return hash(self._identity())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenizerKey) and other._identity() == self._identity()


@lru_cache(maxsize=4096)
def written(text: str, key: TokenizerKey) -> tuple[tuple[int, int, int], ...]:
    """Control tokens in a stretch of the template: (start, end, id)."""
    words = key.tokenizer.control
    return tuple((start, end, words[word]) for start, end, word in control_in(text, words))
