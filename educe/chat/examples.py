"""Conversation → examples: the whole way from a row to what is stored, one by one or in a stream of chunks."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32, Int64

from educe.chat.assemble import Proved, Unshared, assemble_many, needing_care, prove, texts_of
from educe.chat.drafts import Draft
from educe.chat.engine import Flat
from educe.chat.render import Renderer
from educe.chat.turns import Unproved
from educe.chat.weights import EVEN, Weighing, weigh
from educe.errors import Refusal
from educe.types import Conversation, Example, Rendered

# Texts → ids of all of them end to end, as `ChatTokenizer.encode_many` gives them; a faster engine may stand in.
Encode = Callable[[Sequence[str]], Flat]
# Of every chunk, so many rows are rendered by the template itself and compared with what its layout gave.
NUM_COMPARED = 2


class Distrust(Exception):
    """A row's remembered layout gave another text than the template itself: its place."""


@dataclass(frozen=True, slots=True)
class Made:
    """What a row became: its examples, trained tokens of each, the stop token of each turn, answers that the template trimmed."""

    examples: list[Example]
    num_trained: list[int]
    stops: list[int]
    num_trimmed: int


@dataclass(slots=True)
class Chunk:
    """Some rows on their way. `spans[k]` are the drafts of row k, None for a row in `refused`; `turns[k]` its turns' weights."""

    rows: Sequence[Conversation]
    renderer: Renderer
    weighing: Weighing
    turns: list[dict[int, float]] = field(default_factory=list)
    drafts: list[Draft] = field(default_factory=list)
    spans: list[range | None] = field(default_factory=list)
    refused: dict[int, Refusal] = field(default_factory=dict)
    by_hand: frozenset[int] = frozenset()
    texts: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, rows: Sequence[Conversation], renderer: Renderer, weighing: Weighing) -> Chunk:
        """Render the rows; their ids are still to be made of `texts`."""
        chunk = cls(rows, renderer, weighing)
        for k, c in enumerate(rows):
            turns = weighing.turns(c.messages)
            chunk.turns.append(turns)
            made = renderer.draft(c, tuple(turns))
            if isinstance(made, Refusal):
                chunk.refused[k] = made
                chunk.spans.append(None)
            else:
                chunk.spans.append(range(len(chunk.drafts), len(chunk.drafts) + len(made)))
                chunk.drafts += made
        chunk.by_hand = needing_care(chunk.drafts, renderer.tokenizer)
        chunk.texts = texts_of(chunk.drafts, chunk.by_hand)
        return chunk

    def compare(self) -> None:
        """Ask the template itself about some rows. Raises `Distrust`."""
        for k in range(0, len(self.rows), max(1, len(self.rows) // NUM_COMPARED)):
            fresh = self.renderer.draft(self.rows[k], tuple(self.turns[k]), fresh=True)
            span = self.spans[k]
            mine = [self.drafts[n].rendering() for n in span] if span is not None else self.refused[k]
            if mine != (fresh if isinstance(fresh, Refusal) else [d.rendering() for d in fresh]):
                raise Distrust(str(self.rows[k].source))

    def prove(self, flat: Flat) -> Proved:
        """Raises `Distrust` where the prompt of some rows, encoded whole, has other ids than its stretches."""
        proved = prove(self.drafts, self.by_hand, flat, self.renderer.tokenizer)
        for n in range(0, len(self.drafts), max(1, len(self.drafts) // NUM_COMPARED)):
            if n not in self.by_hand and n not in proved.wrong:
                first = proved.first_run[n]
                ids = proved.ids_B[proved.edges[first] : proved.edges[first + 1]].tolist()
                if ids != self.renderer.tokenizer.encode(self.drafts[n].texts[0]):
                    raise Distrust(f"{self.drafts[n].texts[0][-80:]!r}")
        return proved

    def rendered(self, k: int, proved: Proved) -> list[Rendered] | Refusal:
        """The sequences of row k, or why it is refused."""
        span = self.spans[k]
        if span is None:
            return self.refused[k]
        tokenizer = self.renderer.tokenizer
        try:
            try:
                return [proved.rendered(n, tokenizer) for n in span]
            except (
                Unshared
            ):  # each turn as a sequence of its own: its prompt's ids are a server's, whatever came before
                again = self.renderer.render(self.rows[k], tuple(self.turns[k]), apart=True)
                if isinstance(again, Refusal):
                    return again
                made = assemble_many(again, tokenizer)
                if wrong := next((m for m in made if isinstance(m, Unproved)), None):
                    raise wrong from None
                return [m for m in made if isinstance(m, Rendered)]
        except Unproved as e:
            code, found, fix = e.args
            return Refusal(code=code, where=str(self.rows[k].source), found=found, fix=fix)

    def examples(self, proved: Proved, max_tokens: int) -> list[Made | Refusal]:
        """Every row as examples of at most `max_tokens` tokens. A longer one refuses the row: an answer is never cut."""
        quick = _Quick(self, proved) if self.weighing.is_even_inside else None
        made: list[Made | Refusal] = []
        for k, span in enumerate(self.spans):
            row = quick.row(k, span, max_tokens) if quick is not None and span is not None else None
            made.append(row if row is not None else self._carefully(k, proved, max_tokens))
        return made

    def _carefully(self, k: int, proved: Proved, max_tokens: int) -> Made | Refusal:
        built, c = self.rendered(k, proved), self.rows[k]
        if isinstance(built, Refusal):
            return built
        longest = max(r.ids_T.size for r in built)
        if longest > max_tokens:
            return _too_long(c, longest, max_tokens)
        made = Made([], [], [], 0)
        for n, r in enumerate(built):
            weights_T = weigh(r, c.messages, self.renderer.tokenizer, self.weighing)
            if not weights_T.any():
                found, fix = "the weights leave no token to train.", "Give a turn a weight above 0."
                return Refusal(code="E-CHAT-310", where=str(c.source), found=found, fix=fix)
            prefix = _shared(built[n - 1].ids_T, r.ids_T) if n else 0
            made.examples.append(Example(ids_T=r.ids_T, weights_T=weights_T, prefix_of=prefix))
            made.num_trained.append(int((weights_T > 0).sum()))
            made.stops.extend(int(r.ids_T[run.end - 1]) for run in r.runs if run.trained)
        return Made(
            made.examples, made.num_trained, made.stops, _trimmed([self.drafts[n] for n in self.spans[k] or ()])
        )


class _Quick:
    """Examples of a whole chunk as slices of a few arrays, where each completion has one weight and the rest none."""

    def __init__(self, chunk: Chunk, proved: Proved) -> None:
        self._chunk, self._proved = chunk, proved
        weights = [
            0.0 if turn is None else chunk.turns[k][turn]
            for k, span in enumerate(chunk.spans)
            for n in span or ()
            if n not in chunk.by_hand
            for turn in chunk.drafts[n].plan.turns
        ]
        edges_B: Int64[np.ndarray, " n"] = np.array(proved.edges, np.int64)
        self._weights_B: Float32[np.ndarray, " b"] = np.repeat(np.array(weights, np.float32), np.diff(edges_B))
        self._trained_B = np.concatenate([[0], np.cumsum(self._weights_B > 0)]).tolist()

    def row(self, k: int, span: range, max_tokens: int) -> Made | Refusal | None:
        """Row k; None where it needs more than slices."""
        chunk, proved = self._chunk, self._proved
        made = Made([], [], [], 0)
        for n in span:
            draft = chunk.drafts[n]
            if n in proved.wrong or n in chunk.by_hand or draft.plan.appended:
                return None
            first = proved.first_run[n]
            low, high = proved.edges[first], proved.edges[first + len(draft.texts)]
            trained = self._trained_B[high] - self._trained_B[low]
            if not trained or self._weights_B[low]:
                return None
            if high - low > max_tokens:
                longest = max(
                    proved.edges[proved.first_run[m] + len(chunk.drafts[m].texts)] - proved.edges[proved.first_run[m]]
                    for m in span
                )
                return _too_long(chunk.rows[k], longest, max_tokens)
            ids_T = proved.ids_B[low:high]
            prefix = _shared(made.examples[-1].ids_T, ids_T) if made.examples else 0
            made.examples.append(Example(ids_T=ids_T, weights_T=self._weights_B[low:high], prefix_of=prefix))
            made.num_trained.append(trained)
            for j, turn in enumerate(draft.plan.turns, first + 1):
                if turn is not None:
                    made.stops.append(int(proved.ids_B[proved.edges[j] - 1]))
        trimmed = _trimmed([chunk.drafts[n] for n in span])
        return Made(made.examples, made.num_trained, made.stops, trimmed) if trimmed else made


def build_stream(
    chunks: Iterable[Sequence[Conversation]],
    renderer: Renderer,
    weighing: Weighing,
    encode: Encode,
    *,
    threaded: bool = True,
) -> Iterator[tuple[Chunk, Proved]]:
    """Chunks of rows, proved; ids of the next chunk are made in a thread while the last one is proved (unless every core has
    a process already).

    Raises `Distrust` where the template does not do for a row what it did for the row that was remembered.
    """
    if not threaded:
        for rows in chunks:
            chunk = Chunk.of(rows, renderer, weighing)
            ids = encode(chunk.texts)
            chunk.compare()
            yield chunk, chunk.prove(ids)
        return
    with _nimble(), ThreadPoolExecutor(1, thread_name_prefix="encode") as pool:
        ahead: list[tuple[Chunk, Future[Flat]]] = []
        for rows in chunks:
            chunk = Chunk.of(rows, renderer, weighing)
            ahead.append((chunk, pool.submit(encode, chunk.texts)))
            chunk.compare()
            if len(ahead) > 1:
                done, coming = ahead.pop(0)
                yield done, done.prove(coming.result())
        for chunk, coming in ahead:
            yield chunk, chunk.prove(coming.result())


@contextlib.contextmanager
def _nimble() -> Iterator[None]:
    """Threads take turns more often: one that comes back from encoding does not wait 5 ms for Python."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def build_rendered(
    conversations: Sequence[Conversation], renderer: Renderer, weighing: Weighing = EVEN
) -> list[list[Rendered] | Refusal]:
    """All sequences of each row, proved; a row with one that cannot be proved is refused."""
    chunk = Chunk.of(conversations, renderer, weighing)
    proved = chunk.prove(renderer.tokenizer.encode_many(chunk.texts))
    return [chunk.rendered(k, proved) for k in range(len(conversations))]


def made_of(c: Conversation, renderer: Renderer, weighing: Weighing, max_tokens: int) -> Made | Refusal:
    """One row by itself; see `Chunk.examples`."""
    chunk = Chunk.of([c], renderer, weighing)
    return chunk.examples(chunk.prove(renderer.tokenizer.encode_many(chunk.texts)), max_tokens)[0]


def build_examples(
    conversations: Sequence[Conversation], renderer: Renderer, *, max_tokens: int, weighing: Weighing = EVEN
) -> list[list[Example] | Refusal]:
    """Rows as examples; see `Chunk.examples`."""
    chunk = Chunk.of(conversations, renderer, weighing)
    made = chunk.examples(chunk.prove(renderer.tokenizer.encode_many(chunk.texts)), max_tokens)
    return [m if isinstance(m, Refusal) else m.examples for m in made]


def _too_long(c: Conversation, longest: int, max_tokens: int) -> Refusal:
    found = f"{longest} tokens, more than data.max_tokens ({max_tokens})."
    fix = "Raise data.max_tokens or shorten the row."
    return Refusal(code="E-DATA-201", where=str(c.source), found=found, fix=fix)


def _trimmed(drafts: Sequence[Draft]) -> int:
    """Answers that stand in their completion without white space that the row has at their ends."""
    lost: set[int | None] = set()
    for d in drafts:
        for s in d.plan.slots:
            if s.segment.trained and s.segment.part == "content" and (s.piece is None or s.piece.ops):
                given, kept = d.row.get((s.segment.message, "content")), s.filled(d.row).text
                if given is not None and len(given) != len(kept) and given.strip() == kept.strip():
                    lost.add(s.segment.message)
    return len(lost)


def _shared(one: np.ndarray, other: np.ndarray) -> int:
    """Leading ids that two sequences share."""
    length = min(one.size, other.size)
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if differ.size else length
