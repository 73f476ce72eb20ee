"""Conversation → examples: the whole way from a row to what is stored, one by one or in a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from educe.chat.assemble import Draft, Unshared, assemble_many, draft_many, finish, texts_of
from educe.chat.engine import Flat
from educe.chat.render import Renderer
from educe.chat.tokens import ChatTokenizer
from educe.chat.turns import Unproved
from educe.chat.weights import EVEN, Weighing, weigh
from educe.errors import Refusal
from educe.types import Conversation, Example, Rendered, Rendering

# Texts → ids of all of them end to end, as `ChatTokenizer.encode_many` gives them; a faster engine may stand in.
Encode = Callable[[Sequence[str]], Flat]
# Of every chunk, so many rows are rendered by the template itself and compared with what its layout gave.
NUM_COMPARED = 2


class Distrust(Exception):
    """A row's remembered layout gave another text than the template itself: (place, remembered, rendered)."""


def build_rendered(
    conversations: Sequence[Conversation], renderer: Renderer, weighing: Weighing = EVEN
) -> list[list[Rendered] | Refusal]:
    """All sequences of each row, proved; a row with one that cannot be proved is refused."""
    waiting = _started(conversations, renderer, weighing)
    return _finished(waiting, renderer.tokenizer.encode_many(waiting.texts), renderer, weighing)


def build_examples(
    conversations: Sequence[Conversation], renderer: Renderer, *, max_tokens: int, weighing: Weighing = EVEN
) -> list[list[Example] | Refusal]:
    """Rows as examples of at most `max_tokens` tokens. A longer one refuses the row: an answer is never cut."""
    built = build_rendered(conversations, renderer, weighing)
    return [
        b if isinstance(b, Refusal) else examples_of(c, b, renderer.tokenizer, weighing, max_tokens)
        for c, b in zip(conversations, built, strict=True)
    ]


def build_stream(
    chunks: Iterable[Sequence[Conversation]], renderer: Renderer, weighing: Weighing, encode: Encode
) -> Iterator[tuple[Sequence[Conversation], list[list[Rendered] | Refusal]]]:
    """As `build_rendered`, chunk by chunk, ids of the next chunk being made in a thread while the last one is proved.

    Raises `Distrust` where the template does not do for a row what it did for the row that was remembered.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="encode") as pool:
        ahead: list[tuple[_Waiting, Future[Flat]]] = []
        for chunk in chunks:
            waiting = _started(chunk, renderer, weighing)
            ahead.append((waiting, pool.submit(encode, waiting.texts)))
            if len(ahead) > 1:
                yield _settled(*ahead.pop(0), renderer, weighing)
        for waiting, ids in ahead:
            yield _settled(waiting, ids, renderer, weighing)


@dataclass(frozen=True, slots=True)
class _Waiting:
    """Rows rendered, their ids being made. `rendered` holds each row's renderings, in the order of `drafts`."""

    conversations: Sequence[Conversation]
    rendered: list[list[Rendering] | Refusal]
    drafts: list[Draft | Rendering]
    texts: list[str]


def _started(conversations: Sequence[Conversation], renderer: Renderer, weighing: Weighing) -> _Waiting:
    rendered = [renderer.render(c, tuple(weighing.turns(c.messages))) for c in conversations]
    drafts = draft_many([r for rs in rendered if not isinstance(rs, Refusal) for r in rs], renderer.tokenizer)
    return _Waiting(conversations, rendered, drafts, texts_of(drafts))


def _settled(
    waiting: _Waiting, ids: Future[Flat], renderer: Renderer, weighing: Weighing
) -> tuple[Sequence[Conversation], list[list[Rendered] | Refusal]]:
    rows = waiting.conversations
    for k in range(0, len(rows), max(1, len(rows) // NUM_COMPARED)):
        if renderer.render(rows[k], tuple(weighing.turns(rows[k].messages)), fresh=True) != waiting.rendered[k]:
            raise Distrust(str(rows[k].source))
    return rows, _finished(waiting, ids.result(), renderer, weighing)


def _finished(waiting: _Waiting, flat: Flat, renderer: Renderer, weighing: Weighing) -> list[list[Rendered] | Refusal]:
    ready = iter(finish(waiting.drafts, flat, renderer.tokenizer))
    made: list[list[Rendered] | Refusal] = []
    for c, rs in zip(waiting.conversations, waiting.rendered, strict=True):
        if isinstance(rs, Refusal):
            made.append(rs)
            continue
        sequences = [next(ready) for _ in rs]
        if any(isinstance(s, Unshared) for s in sequences):
            sequences = _apart(c, renderer, weighing)
        made.append(_whole(c, sequences))
    return made


def _apart(c: Conversation, renderer: Renderer, weighing: Weighing) -> list[Rendered | Unproved]:
    """Each turn as a sequence of its own: its prompt's ids are those a server computes, whatever came before."""
    again = renderer.render(c, tuple(weighing.turns(c.messages)), apart=True)
    if isinstance(again, Refusal):
        return [Unproved(again.code, again.found, again.fix)]
    return assemble_many(again, renderer.tokenizer)


def _whole(c: Conversation, sequences: Sequence[Rendered | Unproved]) -> list[Rendered] | Refusal:
    failed = next((s for s in sequences if isinstance(s, Unproved)), None)
    if failed is None:
        return [s for s in sequences if isinstance(s, Rendered)]
    code, found, fix = failed.args
    return Refusal(code=code, where=str(c.source), found=found, fix=fix)


def examples_of(
    c: Conversation, built: Sequence[Rendered], tokenizer: ChatTokenizer, weighing: Weighing, max_tokens: int
) -> list[Example] | Refusal:
    """A row's sequences with their weights, or why they are not used."""
    longest = max([r.ids_T.size for r in built])
    if longest > max_tokens:
        found = f"{longest} tokens, more than data.max_tokens ({max_tokens})."
        fix = "Raise data.max_tokens or shorten the row."
        return Refusal(code="E-DATA-201", where=str(c.source), found=found, fix=fix)
    made: list[Example] = []
    for k, r in enumerate(built):
        weights_T = weigh(r, c.messages, tokenizer, weighing)
        if not weights_T.any():
            found, fix = "the weights leave no token to train.", "Give a turn a weight above 0."
            return Refusal(code="E-CHAT-310", where=str(c.source), found=found, fix=fix)
        made.append(Example(ids_T=r.ids_T, weights_T=weights_T, prefix_of=shared(built[k - 1], r) if k else 0))
    return made


def shared(one: Rendered, other: Rendered) -> int:
    """Leading ids that two sequences share."""
    length = min(one.ids_T.size, other.ids_T.size)
    differ = np.flatnonzero(one.ids_T[:length] != other.ids_T[:length])
    return int(differ[0]) if differ.size else length
