"""Conversation → sequences of text with the answers marked, each turn proved to follow the prompt that inference sends.

Turns share a sequence while each next prompt starts with what came before, as text and (in `assemble`) as ids; where a template
rewrites history they do not, and the later turn becomes a sequence of its own. What was found for one row holds for every row
of the same shape that gives the same answers to what the template asked: a `Renderer` remembers it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any

from educe.chat.drafts import Draft, Plan, Slot, fill, plan_sequence
from educe.chat.pieces import cut, joined, starts_with
from educe.chat.template import Asked, Piece, TemplateRefusal, remade
from educe.chat.tokens import ChatTokenizer
from educe.chat.trace import ask
from educe.chat.turns import Row, Turn, Unproved, check_answer, find_turn
from educe.errors import Refusal
from educe.types import Apart, Conversation, Message, Rendering, Segment, Source

_NOWHERE = Source(file="prompt", line=0)
MAX_LAYOUTS = 64  # remembered for one shape; a template that asks ever other things is rendered every time


@dataclass(frozen=True, slots=True)
class _Layout:
    """The sequences of a row, as they are for all rows of its shape that meet the conditions. `sure`: nothing else is to be
    looked at; otherwise each turn is checked to say what it must.
    """

    conditions: tuple[Asked, ...]
    plans: tuple[Plan, ...]
    sure: bool


class Renderer:
    """Renders conversations with one tokenizer's template. `num_rendered` of them went through the template itself."""

    def __init__(self, tokenizer: ChatTokenizer, *, remembers: bool = True) -> None:
        self.tokenizer = tokenizer
        self.num_rendered = 0
        self._remembers = remembers
        self._layouts: dict[Any, list[_Layout]] = {}

    def render(
        self,
        conversation: Conversation,
        turns: Sequence[int] | None = None,
        *,
        apart: bool = False,
        fresh: bool = False,
    ) -> list[Rendering] | Refusal:
        """The training sequences of a conversation, or why it has none.

        `turns` are the assistant turns to train (all). `apart`: no two share a sequence. `fresh`: ask the template itself.
        """
        made = self.draft(conversation, turns, apart=apart, fresh=fresh)
        return made if isinstance(made, Refusal) else [d.rendering() for d in made]

    def draft(
        self,
        conversation: Conversation,
        turns: Sequence[int] | None = None,
        *,
        apart: bool = False,
        fresh: bool = False,
    ) -> list[Draft] | Refusal:
        """As `render`, ready for encoding."""
        wanted = tuple(trainable_turns(conversation.messages) if turns is None else turns)
        texts: dict[tuple[Any, ...], str] = {}
        shape = (_shape(conversation, texts), wanted, apart)
        known = self._layouts.setdefault(shape, [])
        if not fresh:
            for layout in known:
                if not _meets(layout.conditions, texts) or (filled := _filled(layout, texts)) is None:
                    continue
                if layout.sure or all(_says(d, conversation) for d in filled):
                    return filled
                break  # the template itself tells what is wrong
        self.num_rendered += 1
        try:
            new, exact = _render(Row(conversation, self.tokenizer), wanted, apart)
        except TemplateRefusal as e:
            code, said = e.args
            fix = "Change the conversation to what the template accepts."
            found = f"the chat template refused: {said}."
            return Refusal(code=code, where=str(conversation.source), found=found, fix=fix)
        except Unproved as e:
            code, found, fix = e.args
            return Refusal(code=code, where=str(conversation.source), found=found, fix=fix)
        if exact and self._remembers and not fresh and len(known) < MAX_LAYOUTS:
            known.append(new)
        return [fill(plan, texts) for plan in new.plans]


def trainable_turns(messages: Sequence[Message]) -> list[int]:
    """Assistant turns that inference can be asked for. One that opens the conversation has no prompt: it is context only."""
    return [i for i, m in enumerate(messages) if m.role == "assistant" and i > 0]


def _render(row: Row, wanted: Sequence[int], apart: bool) -> tuple[_Layout, bool]:
    """The row's layout, and whether it holds for other rows too (else its plans have this row's texts in them)."""
    if not wanted:
        found = "no assistant turn of the row is to be trained."
        raise Unproved("E-CHAT-310", found, "Give the row an answer after a user's message, or a weight above 0.")
    turns = [find_turn(row, i) for i in wanted]
    exact = all(t.exact for t in turns)
    groups: list[list[Turn]] = []
    reasons: list[Apart] = []
    for turn in turns:
        last = groups[-1][-1] if groups else None
        done = (*last.prompt, *last.completion) if last is not None else ()
        follows = last is not None and turn.prompt and joined(turn.prompt).startswith(joined(done))
        if last is not None and not apart and not last.adds_stop and follows:
            groups[-1].append(turn)
            exact = exact and starts_with(turn.prompt, done)
        else:
            reason: Apart = (
                "" if last is None else "eos" if last.adds_stop and follows else "ids" if follows else "text"
            )
            exact = exact and (reason != "eos" or starts_with(turn.prompt, done))
            reasons.append(reason)
            groups.append([turn])
    plans = tuple(
        plan_sequence(tuple(_slots(group, exact)), tuple(t.index for t in group), reason, row.tokenizer)
        for group, reason in zip(groups, reasons, strict=True)
    )
    asked = (*(c for t in (*row.texts.values(), *row.more) for c in t.conditions), *row.asked)
    sure = all(t.sure for t in turns)
    return _Layout(tuple(dict.fromkeys(asked)) if exact else (), plans, sure), exact


def _says(draft: Draft, c: Conversation) -> bool:
    """Whether the trained turns of a filled layout hold what they must."""
    before: list[Piece] = []
    for turn, group in groupby(draft.plan.slots, key=lambda s: s.segment.message if s.segment.trained else None):
        pieces = [_piece(slot, draft) for slot in group]
        if turn is not None:
            try:
                check_answer(c, turn, before, pieces)
            except Unproved:
                return False
        before += pieces
    return True


def _piece(slot: Slot, draft: Draft) -> Piece:
    text = slot.filled(draft.row).text
    if slot.piece is not None:
        return replace(slot.piece, text=text)
    return Piece(text, slot.segment.message, slot.segment.part)


def _slots(group: Sequence[Turn], exact: bool) -> Iterable[Slot]:
    """The turns of one sequence end to end: what stands between two completions is context."""
    done = 0
    for turn in group:
        start = sum(len(p.text) for p in turn.prompt)
        for piece in cut(turn.prompt, done, start):
            yield _slot(piece, piece.message, exact, trained=False)
        for piece in turn.completion:
            yield _slot(piece, turn.index, exact, trained=True)
        done = start + sum(len(p.text) for p in turn.completion)


def _slot(piece: Piece, message: int | None, exact: bool, *, trained: bool) -> Slot:
    segment = Segment(text=piece.text, message=message, part=piece.part, trained=trained)
    return Slot(segment, piece if exact and piece.from_data else None)


def _shape(c: Conversation, texts: dict[tuple[Any, ...], str]) -> Any:
    """What a row is but for its texts, which go into `texts` by path."""
    shape: list[Any] = []
    plain = not c.tools
    for i, m in enumerate(c.messages):
        texts[i, "content"] = m.content
        if m.reasoning is None and not m.tool_calls and m.name is None and m.call_id is None:
            shape.append(m.role)
            continue
        plain = False
        shape.append(
            (
                m.role,
                bool(m.content),
                m.reasoning is not None and m.reasoning != "",
                m.name,
                m.call_id,
                len(m.tool_calls),
            )
        )
        if m.reasoning:
            for key in ("reasoning_content", "reasoning", "thinking"):
                texts[i, key] = m.reasoning
    if plain:
        return tuple(shape)
    calls = [[(c.name, c.arguments, c.id) for c in m.tool_calls] for m in c.messages]
    return (tuple(shape), json.dumps([calls, list(c.tools)], ensure_ascii=False, sort_keys=False))


def _text(piece: Piece, texts: Mapping[tuple[Any, ...], str]) -> str:
    """A piece's text in another row; what is not in `texts` is the same in all rows of the shape."""
    return remade(piece, texts) if piece.path in texts else piece.text


def _meets(conditions: Sequence[Asked], texts: Mapping[tuple[Any, ...], str]) -> bool:
    for c in conditions:
        try:
            if ask("".join(_text(p, texts) for p in c.pieces), c.question, c.args) != c.answer:
                return False
        except (ValueError, IndexError):
            return False
    return True


def _filled(layout: _Layout, texts: Mapping[tuple[Any, ...], str]) -> list[Draft] | None:
    """The layout with a row's texts; None where a sequence that was split off would go on in this row."""
    made = [fill(plan, texts) for plan in layout.plans]
    for before, now in pairwise(made):
        if now.plan.apart == "text" and "".join(now.texts).startswith("".join(before.texts)):
            return None
    return made
