"""Sequences of text → token ids, proved: what a server computes, what decodes to the text, ends in a stop token, and holds no
control token but the template's.

Shape legend: T tokens of one sequence, B tokens of all sequences of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, groupby

import numpy as np
from jaxtyping import Int32, Int64

from educe.chat.engine import Flat
from educe.chat.pieces import control_in
from educe.chat.tokens import ChatTokenizer
from educe.chat.turns import Unproved
from educe.types import Rendered, Rendering, Run, Segment


class Unshared(Unproved):
    """The turns of a sequence are one text, but a later prompt's ids are not those of what came before."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A sequence whose ids are not known yet: its runs, each with its text, the control tokens the template wrote in it, and
    what is encoded besides to prove that a server agrees: (run, its text behind the end of the run before it).
    """

    rendering: Rendering
    runs: tuple[tuple[Segment, ...], ...]
    texts: tuple[str, ...]
    control: tuple[int, ...]
    joints: tuple[tuple[int, str], ...]

    @property
    def appended(self) -> bool:
        return self.rendering.segments[-1].part == "eos"


def assemble_many(renderings: Sequence[Rendering], tokenizer: ChatTokenizer) -> list[Rendered | Unproved]:
    """Ids of many sequences at once, each proved, or why one is not."""
    drafts = draft_many(renderings, tokenizer)
    return finish(drafts, tokenizer.encode_many(texts_of(drafts)), tokenizer)


def draft_many(renderings: Sequence[Rendering], tokenizer: ChatTokenizer) -> list[Draft | Rendering]:
    """Renderings ready for the batch. One that needs care stays a rendering: its texts hold control strings, or the tokenizer's
    ids are not bytes in a row."""
    if tokenizer.table is None:
        return list(renderings)
    texts = chain.from_iterable([s.text for s in r.segments if s.from_data] for r in renderings)
    tame = not tokenizer.holds_control("\ue000".join(texts))  # one look at the whole batch
    return [_draft(r, tokenizer) if tame or _tame(r, tokenizer) else r for r in renderings]


def texts_of(drafts: Sequence[Draft | Rendering]) -> list[str]:
    """What is to be encoded for these drafts, all in one call."""
    ready = [d for d in drafts if isinstance(d, Draft)]
    return [*(t for d in ready for t in d.texts), *(t for d in ready for _, t in d.joints)]


def finish(drafts: Sequence[Draft | Rendering], flat: Flat, tokenizer: ChatTokenizer) -> list[Rendered | Unproved]:
    """Prove all drafts, given the ids of `texts_of` them."""
    proved = iter(_prove_batch([d for d in drafts if isinstance(d, Draft)], *flat, tokenizer))
    made: list[Rendered | Unproved] = []
    for draft in drafts:
        try:
            made.append(next(proved) if isinstance(draft, Draft) else _by_hand(draft, tokenizer))
        except Unproved as e:
            made.append(e)
    return made


def assemble(rendering: Rendering, tokenizer: ChatTokenizer) -> Rendered:
    """Ids of one rendering. Raises `Unproved`."""
    made = assemble_many([rendering], tokenizer)[0]
    if isinstance(made, Unproved):
        raise made
    return made


def encode_pieces(pieces: Iterable[Segment], tokenizer: ChatTokenizer, *, inside: bool = False) -> list[int]:
    """Ids of consecutive segments. As a server does it, unless the row's own text holds a control string: then the text is
    split at the added tokens the template wrote and each stretch between them encoded whole, control strings as text.
    `inside`: they stand behind other text."""
    kept = list(pieces)
    if not any(tokenizer.holds_control(s.text) for s in kept if s.from_data):
        return tokenizer.encode("".join(s.text for s in kept), inside=inside)
    ids: list[int] = []
    stretch = eater = ""
    for s in kept:
        if s.from_data:
            stretch += s.text
            continue
        at = 0
        for start, end, word in control_in(s.text, tokenizer.control):
            stretch = _eaten(stretch + s.text[at:start], eater, word, tokenizer)
            ids += tokenizer.encode_plain(stretch, inside=inside or bool(ids)) if stretch else []
            ids.append(tokenizer.control[word])
            stretch, at, eater = "", end, word
        stretch += s.text[at:]
    stretch = _eaten(stretch, eater, "", tokenizer)
    return ids + (tokenizer.encode_plain(stretch, inside=inside or bool(ids)) if stretch else [])


def _eaten(text: str, before: str, after: str, tokenizer: ChatTokenizer) -> str:
    """A stretch without the white space that the control tokens around it take."""
    text = text.lstrip() if tokenizer.eats.get(before, (False, False))[1] else text
    return text.rstrip() if tokenizer.eats.get(after, (False, False))[0] else text


# --- many at once --------------------------------------------------------------------------------------------------------


def _tame(rendering: Rendering, tokenizer: ChatTokenizer) -> bool:
    return not any(s.from_data and tokenizer.holds_control(s.text) for s in rendering.segments)


def _draft(rendering: Rendering, tokenizer: ChatTokenizer) -> Draft:
    runs = tuple(tuple(g) for _, g in groupby(rendering.segments, key=_is_trained))
    texts = tuple(["".join([s.text for s in run]) for run in runs])
    key = _Key(tokenizer)
    control = tuple([n for s in rendering.segments if s.part == "template" for _, _, n in _written(s.text, key)])
    joints = [
        (k, loose + texts[k])
        for k in range(1, len(runs) - 1)  # the last completion is in no prompt of this sequence
        if runs[k][0].trained and (loose := _after_control(runs[k - 1], key))
    ]
    return Draft(rendering, runs, texts, control, tuple(joints))


def _is_trained(s: Segment) -> bool:
    return s.trained


def _after_control(run: Sequence[Segment], key: _Key) -> str:
    """The end of a run's text behind the last control token that the template wrote."""
    loose = ""
    for s in reversed(run):
        if s.part == "template" and (found := _written(s.text, key)):
            return s.text[found[-1][1] :] + loose
        loose = s.text + loose
    return loose


class _Key:
    """A tokenizer as a key of the cache below."""

    __slots__ = ("tokenizer",)

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self.tokenizer = tokenizer

    def __hash__(self) -> int:
        return hash(self.tokenizer.tokenizer_hash)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and other.tokenizer.tokenizer_hash == self.tokenizer.tokenizer_hash


@lru_cache(maxsize=4096)
def _written(text: str, key: _Key) -> tuple[tuple[int, int, int], ...]:
    """Control tokens in a stretch of the template: (start, end, id)."""
    words = key.tokenizer.control
    return tuple((start, end, words[word]) for start, end, word in control_in(text, words))


def _prove_batch(
    drafts: Sequence[Draft],
    ids_B: Int32[np.ndarray, " b"],
    starts: Int64[np.ndarray, " n"],
    tokenizer: ChatTokenizer,
) -> list[Rendered | Unproved]:
    """Prove all runs with a few operations on whole arrays; where one fails, say which and why."""
    table = tokenizer.table
    assert table is not None or not drafts
    if not drafts or table is None:
        return []
    texts = [t for d in drafts for t in d.texts]
    bounds = starts[: len(texts) + 1]
    misread = _misread_runs(texts, ids_B[: bounds[-1]], bounds, tokenizer)
    is_control = tokenizer.is_control_V[ids_B]
    made: list[Rendered | Unproved] = []
    edges = bounds.tolist()
    run, joint = 0, len(texts)
    for d in drafts:
        end = run + len(d.runs)
        ids_T, control_T = ids_B[edges[run] : edges[end]], is_control[edges[run] : edges[end]]
        try:
            if misread and (wrong := misread.intersection(range(run, end))):
                raise _misread(ids_B[edges[min(wrong)] : edges[min(wrong) + 1]].tolist(), texts[min(wrong)], tokenizer)
            if ids_T[control_T].tolist() != list(d.control):
                raise _foreign_control()
            for n, (k, _) in enumerate(d.joints, joint):
                _prove_joint(ids_B, edges[run + k - 1 : run + k + 2], starts[n : n + 2], is_control)
            made.append(_whole(d, ids_T, [e - edges[run] for e in edges[run : end + 1]], tokenizer))
        except Unproved as e:
            made.append(e)
        run, joint = end, joint + len(d.joints)
    return made


def _misread_runs(
    texts: Sequence[str], ids_B: Int32[np.ndarray, " b"], bounds: Int64[np.ndarray, " n"], tokenizer: ChatTokenizer
) -> set[int]:
    """Runs whose ids do not decode to their text: none, if all bytes in a row and the number of each run's are right."""
    table = tokenizer.table
    assert table is not None
    written = b"".join(map(table.bytes_V.__getitem__, ids_B.tolist()))
    wanted = "".join(texts)
    sizes = np.fromiter((len(t) if t.isascii() else len(t.encode()) for t in texts), np.int64, len(texts))
    ends = np.concatenate([[0], np.cumsum(table.lengths_V[ids_B])])
    if np.array_equal(ends[bounds[1:]] - ends[bounds[:-1]], sizes) and written == wanted.encode():
        return set()
    at = ends[bounds].tolist()
    wrong = {k for k, t in enumerate(texts) if written[at[k] : at[k + 1]] != t.encode()}
    if table.normal_form:
        wrong = {k for k in wrong if written[at[k] : at[k + 1]] != tokenizer.normalized(texts[k]).encode()}
    return wrong


def _prove_joint(
    ids_B: Int32[np.ndarray, " b"], edges: Sequence[int], joint: Int64[np.ndarray, " 2"], is_control: np.ndarray
) -> None:
    """The end of a context and the completion behind it have, encoded together, the ids they have apart."""
    first, middle, end = edges
    controls = np.flatnonzero(is_control[first:middle])
    loose = first + int(controls[-1]) + 1 if controls.size else first
    if not np.array_equal(ids_B[joint[0] : joint[1]], ids_B[loose:end]):
        raise _unshared()


def _whole(d: Draft, ids_T: Int32[np.ndarray, " t"], edges: Sequence[int], tokenizer: ChatTokenizer) -> Rendered:
    if d.appended:
        ids_T = np.append(ids_T, np.int32(tokenizer.eos))
        edges = [*edges[:-1], edges[-1] + 1]
    runs = tuple(
        [Run(first=first, end=end, segments=run) for run, first, end in zip(d.runs, edges, edges[1:], strict=False)]
    )
    _prove_stops(ids_T, runs, tokenizer)
    return Rendered(ids_T=ids_T, runs=runs, rendering=d.rendering)


def _prove_stops(ids_T: Int32[np.ndarray, " t"], runs: Sequence[Run], tokenizer: ChatTokenizer) -> None:
    for run in runs:
        if run.trained and (run.end == run.first or int(ids_T[run.end - 1]) not in tokenizer.stop):
            last = tokenizer.decode(ids_T[max(run.first, run.end - 1) : run.end].tolist())
            found = f"the completion ends in {last!r}, not in a stop token."
            fix = "Name the turn's end token: template: {kind: own, stop: ['…']} in the recipe."
            raise Unproved("E-CHAT-304", found, fix)


def _foreign_control() -> Unproved:
    found = "control tokens in the ids are not those the template wrote."
    return Unproved("E-CHAT-305", found, "Remove control strings from the row, or report this template.")


def _misread(ids: Sequence[int], text: str, tokenizer: ChatTokenizer) -> Unproved:
    found = f"decoded, {text[:40]!r} reads {tokenizer.decode(ids)[:40]!r}."
    return Unproved("E-CHAT-306", found, "The tokenizer cannot hold this text; change it.")


def _unshared() -> Unshared:
    found = "a server computes other ids for this prompt than the conversation so far has."
    return Unshared("E-CHAT-303", found, "Report this tokenizer.")


# --- one by one ----------------------------------------------------------------------------------------------------------


def _by_hand(rendering: Rendering, tokenizer: ChatTokenizer) -> Rendered:
    """The same proof with the tokenizer's own decoder, run by run, each prompt encoded whole as a server does."""
    segments = rendering.segments
    ids: list[int] = []
    made: list[Run] = []
    start = 0
    for _, group in groupby(segments, key=lambda s: s.trained):
        run = tuple(group)
        end = start + len(run)
        if not run[0].trained:
            whole = encode_pieces(segments[:end], tokenizer)
            if whole[: len(ids)] != ids:
                raise _unshared()
            new = whole[len(ids) :]
        else:
            new = _completion_ids(segments[:start], run, ids, tokenizer)
        made.append(Run(first=len(ids), end=len(ids) + len(new), segments=run))
        ids += new
        start = end
    key = _Key(tokenizer)
    expected = [n for s in segments if s.part == "template" for _, _, n in _written(s.text, key)]
    expected += [tokenizer.eos for s in segments if s.part == "eos"]
    if [i for i in ids if i in tokenizer.control_ids] != expected:
        raise _foreign_control()
    ids_T = np.array(ids, np.int32)
    _prove_stops(ids_T, made, tokenizer)
    return Rendered(ids_T=ids_T, runs=tuple(made), rendering=rendering)


def _completion_ids(
    before: Sequence[Segment], run: tuple[Segment, ...], prompt: list[int], tokenizer: ChatTokenizer
) -> list[int]:
    """Ids of a completion in its place: behind the prompt where the prompt's ids stay what they are, else encoded apart."""
    text = "".join(s.text for s in run)
    eos = [tokenizer.eos] if run[-1].part == "eos" else []
    behind = encode_pieces([*before, *run], tokenizer)
    apart = encode_pieces(run, tokenizer, inside=bool(prompt))
    candidates = [behind[len(prompt) :]] if behind[: len(prompt)] == prompt else []
    for new in (*candidates, apart):
        if new and _reads(prompt, new, text, tokenizer):
            return [*new, *eos]
    if not text:
        return eos
    raise _misread(apart, text, tokenizer)


def _reads(prompt: list[int], new: list[int], text: str, tokenizer: ChatTokenizer) -> bool:
    """Whether the new ids, behind the prompt, add the text: to the letter, or as the tokenizer normalises it.

    Decoders cannot be asked for ids alone where they treat the start of a text differently, so the end of the prompt is kept.
    """
    tail = prompt[-8:]
    before, now = tokenizer.decode(tail), tokenizer.decode([*tail, *new])
    if not now.startswith(before):
        return False
    return now[len(before) :] in (text, tokenizer.normalized(text).replace("▁", " "))
