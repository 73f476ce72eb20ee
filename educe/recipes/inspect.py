"""`educe inspect`: the tokens of one row, as they will be trained, and beside it what another mask would train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from educe.chat.examples import build_rendered
from educe.chat.masks import MASKS, OtherMask
from educe.chat.render import Renderer
from educe.chat.settle import settle
from educe.chat.tokens import load_tokenizer
from educe.chat.view import Span, view
from educe.config import Recipe
from educe.data.formats import detect, to_conversation
from educe.data.sources import read_rows
from educe.errors import Refusal, UsageError
from educe.model.source import Say, find_model
from educe.recipes.build import weighing_of
from educe.types import Conversation, Rendered

NUM_LOOKED_AT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """One training sequence: its tokens, the assistant turns trained in it, and why it does not go on in the one before."""

    spans: list[Span]
    turns: tuple[int, ...]
    apart: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """One training row: each of its sequences token by token, or why it is refused.

    `prompt` is, as text, what a server would send for the first trained turn, `num_prompt_tokens` its length in tokens.
    `other` is what the mask named by --diff would train.
    """

    place: str
    sequences: list[Shown]
    refusal: Refusal | None
    prompt: str
    num_prompt_tokens: int
    stop: tuple[str, ...]
    note: str
    other: OtherMask | None


def inspect(recipe: Recipe, row: int, say: Say, diff: str | None = None) -> Inspection:
    """Render the training file's row number `row` (its line, from 1) and prove it. `diff` names a mask to compare with."""
    if diff is not None and diff not in MASKS:
        raise UsageError(101, "--diff", f"{diff!r} is no mask.", f"One of {', '.join(MASKS)}.")
    loaded = load_tokenizer(find_model(recipe.model, say), recipe.template)
    weighing = weighing_of(recipe.data)
    found, form, others = _find(recipe, row)
    if isinstance(found, Refusal):
        return _refused(found)
    settled = settle(loaded, [*others, found], weighing) if recipe.template.settings is None else None
    tokenizer = settled.tokenizer if settled is not None else loaded
    built = build_rendered([found], Renderer(tokenizer), weighing)[0]
    if isinstance(built, Refusal):
        return _refused(built)
    sequences = [
        Shown(
            spans=view(r, found.messages, tokenizer, weighing),
            turns=r.rendering.turns,
            apart=_why_apart(built, k),
        )
        for k, r in enumerate(built)
    ]
    first = built[0].runs[0]
    stops = {number: word for word, number in tokenizer.control.items() if number in tokenizer.stop}
    return Inspection(
        place=str(found.source),
        sequences=sequences,
        refusal=None,
        prompt="".join(s.text for s in first.segments),
        num_prompt_tokens=first.end,
        stop=tuple(stops.values()),
        note=settled.why if settled is not None else "",
        other=MASKS[diff](found, form, built, tokenizer) if diff is not None else None,
    )


def _refused(refusal: Refusal) -> Inspection:
    nothing: list[Shown] = []
    return Inspection(
        place=refusal.where,
        sequences=nothing,
        refusal=refusal,
        prompt="",
        num_prompt_tokens=0,
        stop=(),
        note="",
        other=None,
    )


def _find(recipe: Recipe, row: int) -> tuple[Conversation | Refusal, str, list[Conversation]]:
    """The row, its format, and some rows before it: template settings are chosen for a task, not for a row."""
    last = 0
    others: list[Conversation] = []
    for source, value in read_rows(Path(recipe.data.train)):
        last = source.line
        wanted = source.line == row
        if not wanted and len(others) >= NUM_LOOKED_AT:
            continue
        made = value if isinstance(value, Refusal) else to_conversation(value, source, recipe.data.system)
        if wanted:
            return made, "" if isinstance(value, Refusal) else "".join(detect(value)[:1]), others
        if not isinstance(made, Refusal):
            others.append(made)
    found = f"there is no row at line {row}; the last is at line {last}."
    raise UsageError(101, "--row", found, "Give the line of a row in the training file.")


def _why_apart(built: Sequence[Rendered], k: int) -> str:
    """Where and why a sequence parts from the one before it."""
    if k == 0:
        return ""
    before, now = built[k - 1].rendering.text, built[k].rendering.text
    turn = built[k].rendering.turns[0]
    if built[k].rendering.apart == "eos":
        return f"the template writes no stop token: the one that is trained does not stand in the prompt of turn {turn}"
    if built[k].rendering.apart == "ids":
        return f"the prompt of turn {turn} has the same text, but a server computes other ids for it"
    at = next((i for i, (a, b) in enumerate(zip(before, now, strict=False)) if a != b), min(len(before), len(now)))
    had, has = before[at : at + 40], now[at : at + 40]
    return f"the template rewrites history: where {had!r} was trained, the prompt of turn {turn} has {has!r}"
