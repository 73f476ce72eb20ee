"""`educe inspect`: the tokens of one row, as they will be trained, and beside it what another mask would train."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from educe.chat.documents import document_made
from educe.chat.examples import build_rendered, made_of
from educe.chat.masks import MASKS, OtherMask
from educe.chat.pairs import ANSWER, pair_made
from educe.chat.probe import settings_to_try
from educe.chat.render import Renderer
from educe.chat.settle import settle
from educe.chat.tokens import ChatTokenizer, load_tokenizer
from educe.chat.view import Span, view
from educe.chat.weights import Weighing
from educe.config import Recipe
from educe.data.formats import detect
from educe.data.reading import Reading, read_row, reading_for, to_conversation
from educe.data.sources import read_rows
from educe.data.trees import joined
from educe.errors import Refusal, UsageError
from educe.model.source import Say
from educe.recipes.build import sample_of, weighing_of
from educe.recipes.items import Item, talks_of
from educe.recipes.model_of import model_of
from educe.recipes.prepare import inputs_of
from educe.recipes.wanted import wanted
from educe.types import Conversation, Document, Message, Pair, Rendered, Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """One training sequence: its tokens, the assistant turns trained in it, and why it does not go on in the one before.

    `stops` are the places of the tokens that end its turns. `prompt` is, as text, what a server sends for its first turn:
    its first `num_prompt_tokens` tokens. `label` says which of a pair's answers it is, or which part of a text.
    """

    label: str
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
    """The row asked for, as it stands in the file and as what is learned from it, and rows around it."""

    raw: Mapping[str, Any]
    form: str
    item: Item | Refusal
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
    if isinstance(found.item, Refusal):
        return _refused(found.item, found)
    if diff is not None and not isinstance(found.item, Conversation):
        raise UsageError(101, "--diff", "compares masks of a conversation, and the row is none.", "Leave it out.")
    settled = settle(loaded, found.others, weighing) if chosen and not isinstance(found.item, Document) else None
    tokenizer = settled.tokenizer if settled is not None else loaded
    built: list[Rendered] = []
    sequences: tuple[Shown, ...] | Refusal
    if isinstance(found.item, Document):
        sequences = _of_text(found.item, tokenizer, recipe.data.max_tokens)
    elif isinstance(found.item, Pair):
        sequences = _of_pair(found.item, tokenizer, recipe.data.max_tokens)
    else:
        c, made = found.item, build_rendered([found.item], Renderer(tokenizer), weighing)[0]
        if isinstance(made, Refusal):
            return _refused(made, found)
        built, sequences = made, tuple(_shown(made, k, c, tokenizer, weighing) for k in range(len(made)))
    if isinstance(sequences, Refusal):
        return _refused(sequences, found)
    stops = {number: word for word, number in tokenizer.control.items() if number in tokenizer.stop}
    talks = talks_of(found.item)
    return Inspection(
        place=str(found.item.source),
        form=found.form,
        messages=talks[0].messages if talks else (),
        sequences=sequences,
        refusal=None,
        stop=tuple(stops.values()),
        notes=tuple(_notes(found, settled.why if settled is not None else "", sequences, recipe, tokenizer)),
        other=MASKS[diff](talks[0], found.raw, built, tokenizer) if diff is not None else None,
    )


def _of_text(document: Document, tokenizer: ChatTokenizer, max_tokens: int) -> tuple[Shown, ...]:
    """Raw text as it is trained: split where it is too long."""
    examples = document_made(document.text, tokenizer, max_tokens).examples
    shown = []
    for k, e in enumerate(examples):
        ids = e.ids_T.tolist()
        spans = [
            Span(
                text=text,
                token=token,
                kind="trained" if weight > 0 else "content",
                control=token in tokenizer.control_ids,
                weight=weight,
                segment=0,
                message=None,
                part="eos" if token == tokenizer.eos and n == len(ids) - 1 else "content",
            )
            for n, (text, token, weight) in enumerate(
                zip(tokenizer.pieces(ids), ids, e.weights_T.tolist(), strict=True)
            )
        ]
        label = f"text, part {k + 1} of {len(examples)}" if len(examples) > 1 else "text"
        shown.append(Shown(label=label, spans=spans, turns=(), stops=(), apart="", prompt="", num_prompt_tokens=0))
    return tuple(shown)


def _of_pair(pair: Pair, tokenizer: ChatTokenizer, max_tokens: int) -> tuple[Shown, ...] | Refusal:
    """The chosen answer and the rejected one, each behind the prompt."""
    renderer, talks = Renderer(tokenizer), talks_of(pair)
    chosen, rejected = (made_of(c, renderer, ANSWER, max_tokens) for c in talks)
    made = pair_made(pair, chosen, rejected)
    if isinstance(made, Refusal):
        return made
    shown = []
    for name, c, built in zip(("chosen", "rejected"), talks, build_rendered(talks, renderer, ANSWER), strict=True):
        if isinstance(built, Refusal):
            return built
        shown.append(_shown(built, 0, c, tokenizer, ANSWER, f"{name} answer"))
    return tuple(shown)


def _shown(
    built: Sequence[Rendered],
    k: int,
    c: Conversation,
    tokenizer: ChatTokenizer,
    weighing: Weighing,
    label: str = "",
) -> Shown:
    first = built[k].runs[0]
    return Shown(
        label=label,
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
    talks = talks_of(found.item) if not isinstance(found.item, Refusal) else ()
    if any(tokenizer.holds_control(m.content) for c in talks for m in c.messages):
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
    talks = talks_of(found.item) if not isinstance(found.item, Refusal) else ()
    return Inspection(
        place=refusal.where,
        form=found.form,
        messages=talks[0].messages if talks else (),
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
            made = value if isinstance(value, Refusal) else _item(value, source, reading, unread, recipe)
            raw = {} if isinstance(value, Refusal) else value
            return _Row(raw, reading.format or "".join(detect(raw)[:1]), made, others, tuple(unread))
    what = f"there is no row at line {line} of {file.name}; the last is at line {last}."
    raise UsageError(101, "--row", what, "Give the line of a row in the training file.")


def _item(
    value: dict[str, Any], source: Source, reading: Reading, unread: Counter[str], recipe: Recipe
) -> Item | Refusal:
    """What is learned from a row; why it is refused."""
    objective = recipe.objective.kind
    whole = [x for x in read_row(value, source, reading, unread) if isinstance(x, Document | Pair)]
    if not whole:
        made = to_conversation(value, source, reading, unread)
        return made if isinstance(made, Refusal) else wanted(made, objective)
    return wanted(whole[0], objective)


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
