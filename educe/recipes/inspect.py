"""`educe inspect`: the tokens of one row, as they will be trained, and beside it what another mask would train."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from educe.chat.examples import build_rendered
from educe.chat.masks import MASKS, OtherMask
from educe.chat.probe import settings_to_try
from educe.chat.render import Renderer
from educe.chat.settle import settle
from educe.chat.tokens import ChatTokenizer, load_tokenizer
from educe.chat.view import Span, view
from educe.chat.weights import Weighing
from educe.config import Recipe
from educe.data.formats import detect
from educe.data.reading import reading_for, to_conversation
from educe.data.sources import read_rows
from educe.data.trees import joined
from educe.errors import Refusal, UsageError
from educe.model.source import Say
from educe.recipes.build import sample_of, weighing_of
from educe.recipes.model_of import model_of
from educe.recipes.prepare import inputs_of
from educe.types import Conversation, Message, Rendered


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """One training sequence: its tokens, the assistant turns trained in it, and why it does not go on in the one before.

    `stops` are the places of the tokens that end its turns. `prompt` is, as text, what a server sends for its first turn:
    its first `num_prompt_tokens` tokens.
    """

    spans: list[Span]
    turns: tuple[int, ...]
    stops: tuple[int, ...]
    apart: str
    prompt: str
    num_prompt_tokens: int

    @property
    def num_trained(self) -> int:
        return sum(s.weight > 0 for s in self.spans)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """One training row: each of its sequences token by token, or why it is refused.

    `notes` say what else is to be known: template settings, or that training leaves the row out. `other` is what the mask
    named by --diff would train.
    """

    place: str
    form: str
    messages: tuple[Message, ...]
    sequences: tuple[Shown, ...]
    refusal: Refusal | None
    stop: tuple[str, ...]
    notes: tuple[str, ...]
    other: OtherMask | None


@dataclass(frozen=True, slots=True)
class _Row:
    """The row asked for, as it stands in the file and as a conversation, and rows around it."""

    raw: Mapping[str, Any]
    form: str
    conversation: Conversation | Refusal
    others: list[Conversation]
    unread: tuple[str, ...]


def inspect(recipe: Recipe, row: str, say: Say, diff: str | None = None) -> Inspection:
    """Render a training row (LINE, from 1, or FILE:LINE) and prove it. `diff` names a mask to compare with."""
    if diff is not None and diff not in MASKS:
        raise UsageError(101, "--diff", f"{diff!r} is no mask.", f"One of {', '.join(MASKS)}.")
    loaded = load_tokenizer(model_of(recipe.model, say), recipe.template)
    weighing = weighing_of(recipe.data)
    chosen = recipe.template.settings is None and len(settings_to_try(loaded.template)) > 1
    found = _find(recipe, row, look=chosen)
    if isinstance(found.conversation, Refusal):
        return _refused(found.conversation, found)
    settled = settle(loaded, found.others, weighing) if chosen else None
    tokenizer = settled.tokenizer if settled is not None else loaded
    built = build_rendered([found.conversation], Renderer(tokenizer), weighing)[0]
    if isinstance(built, Refusal):
        return _refused(built, found)
    sequences = tuple(_shown(built, k, found.conversation, tokenizer, weighing) for k in range(len(built)))
    stops = {number: word for word, number in tokenizer.control.items() if number in tokenizer.stop}
    return Inspection(
        place=str(found.conversation.source),
        form=found.form,
        messages=found.conversation.messages,
        sequences=sequences,
        refusal=None,
        stop=tuple(stops.values()),
        notes=tuple(_notes(found, settled.why if settled is not None else "", sequences, recipe, tokenizer)),
        other=MASKS[diff](found.conversation, found.raw, built, tokenizer) if diff is not None else None,
    )


def _shown(built: Sequence[Rendered], k: int, c: Conversation, tokenizer: ChatTokenizer, weighing: Weighing) -> Shown:
    first = built[k].runs[0]
    return Shown(
        spans=view(built[k], c.messages, tokenizer, weighing),
        turns=built[k].rendering.turns,
        stops=tuple(run.end - 1 for run in built[k].runs if run.trained),
        apart=why_apart(built, k),
        prompt="" if first.trained else "".join(s.text for s in first.segments),
        num_prompt_tokens=0 if first.trained else first.end,
    )


def _notes(
    found: _Row, why_settings: str, sequences: Sequence[Shown], recipe: Recipe, tokenizer: ChatTokenizer
) -> Iterator[str]:
    """What to know about the row beside its tokens."""
    if why_settings:
        yield why_settings
    if left_out := _left_out(sequences, recipe):
        yield left_out
    if found.unread:
        yield f"keys that are not read: {', '.join(found.unread)}"
    if isinstance(found.conversation, Conversation) and any(
        tokenizer.holds_control(m.content) for m in found.conversation.messages
    ):
        yield "a message holds the text of a control token: trained as text, where a server would make a control token of it"


def _left_out(sequences: Sequence[Shown], recipe: Recipe) -> str:
    """Why training leaves a row out that can be proved; "" where it does not."""
    longest = max(len(s.spans) for s in sequences)
    if longest > recipe.data.max_tokens:
        return f"training drops this row: {longest:,} tokens, more than data.max_tokens ({recipe.data.max_tokens:,})"
    if any(not s.num_trained for s in sequences):
        return "training refuses this row: the weights leave no token to train"
    return ""


def _refused(refusal: Refusal, found: _Row) -> Inspection:
    c = found.conversation
    return Inspection(
        place=refusal.where,
        form=found.form,
        messages=() if isinstance(c, Refusal) else c.messages,
        sequences=(),
        refusal=refusal,
        stop=(),
        notes=(),
        other=None,
    )


def _find(recipe: Recipe, row: str, *, look: bool) -> _Row:
    """The row, given as LINE or FILE:LINE, and with `look` rows spread over the files."""
    inputs, _ = inputs_of(recipe)
    train = [(f, i) for i in inputs if i.role == "train" for f in i.files]
    name, _, line = row.rpartition(":")
    places = [(f, i) for f, i in train if not name or str(f).endswith(name)]
    if not line.isdigit() or not places:
        there = ", ".join(f.name for f, _ in train[:5])
        raise UsageError(101, "--row", f"{row!r} names no row.", f"Give LINE or FILE:LINE; the files are {there}.")
    file, read = places[0]
    others = sample_of(inputs) if look else []
    last = 0
    reading, unread = reading_for(read.reading, file, read.header), Counter[str]()
    for source, value in joined(read_rows(file, read.header), messages=reading.of_messages):
        last = source.line
        if source.line == int(line):
            made = value if isinstance(value, Refusal) else to_conversation(value, source, reading, unread)
            raw = {} if isinstance(value, Refusal) else value
            return _Row(raw, reading.format or "".join(detect(raw)[:1]), made, others, tuple(unread))
    what = f"there is no row at line {line} of {file.name}; the last is at line {last}."
    raise UsageError(101, "--row", what, "Give the line of a row in the training file.")


def why_apart(built: Sequence[Rendered], k: int) -> str:
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
    if begun := re.search(r"[<\[][^\s<>\[\]]{0,24}$", before[:at]):  # what differs is a tag: shown whole
        at = begun.start()
    had, has = before[at : at + 40], now[at : at + 40]
    return f"the template rewrites history: where {had!r} was trained, the prompt of turn {turn} has {has!r}"
