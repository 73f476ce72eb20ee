"""Sequences of text → token ids, proved: what a server computes, what decodes to the text, ends in a stop token, and holds no
control token but the template's.

Shape legend: T tokens of one sequence, B tokens of all sequences of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
from jaxtyping import Int32, Int64

from educe.chat.drafts import Draft, TokenizerKey, draft_of, run_of, written
from educe.chat.engine import Flat
from educe.chat.pieces import control_in
from educe.chat.tokens import ChatTokenizer
from educe.chat.turns import Unproved
from educe.types import Rendered, Rendering, Run, Segment


class Unshared(Unproved):
    """The turns of a sequence are one text, but a later prompt's ids are not those of what came before."""


@dataclass(frozen=True, slots=True)
class Proved:
    """Sequences proved together. `edges[k]` is where run k of all runs begins in `ids_B`; draft n has the runs from
    `first_run[n]` on. `wrong[n]` says why draft n is not proved. A draft in `by_hand` has no ids here.
    """

    drafts: Sequence[Draft]
    ids_B: Int32[np.ndarray, " b"]
    edges: Sequence[int]
    first_run: Sequence[int]
    wrong: Mapping[int, Unproved]
    by_hand: frozenset[int]

    def rendered(self, n: int, tokenizer: ChatTokenizer) -> Rendered:
        """Draft n with its ids and runs. Raises `Unproved`."""
        if n in self.wrong:
            raise self.wrong[n]
        draft = self.drafts[n]
        if n in self.by_hand:
            return _by_hand(draft.rendering(), tokenizer)
        first = self.first_run[n]
        edges = self.edges[first : first + len(draft.texts) + 1]
        return _whole(draft, self.ids_B[edges[0] : edges[-1]], [e - edges[0] for e in edges], tokenizer)


def assemble_many(renderings: Sequence[Rendering], tokenizer: ChatTokenizer) -> list[Rendered | Unproved]:
    """Ids of many sequences at once, each proved, or why one is not."""
    drafts = [draft_of(r, tokenizer) for r in renderings]
    by_hand = needing_care(drafts, tokenizer)
    return assembled(prove(drafts, by_hand, tokenizer.encode_many(texts_of(drafts, by_hand)), tokenizer), tokenizer)


def assembled(proved: Proved, tokenizer: ChatTokenizer) -> list[Rendered | Unproved]:
    """Every draft with its ids, or why it has none."""
    made: list[Rendered | Unproved] = []
    for n in range(len(proved.drafts)):
        try:
            made.append(proved.rendered(n, tokenizer))
        except Unproved as e:
            made.append(e)
    return made


def needing_care(drafts: Sequence[Draft], tokenizer: ChatTokenizer) -> frozenset[int]:
    """Drafts that are done one by one: their texts hold control strings, or the tokenizer's ids are not bytes in a row."""
    if tokenizer.table is None:
        return frozenset(range(len(drafts)))
    varying = {id(d.row): d.row for d in drafts}.values()
    fixed = {id(d.plan): d.plan for d in drafts}.values()
    tame = not tokenizer.holds_control("\ue000".join([t for row in varying for t in row.values()]))  # one look at all
    odd = {
        id(p) for p in fixed if any(s.segment.from_data and tokenizer.holds_control(s.segment.text) for s in p.slots)
    }
    if tame and not odd:
        return frozenset()
    return frozenset(
        n
        for n, d in enumerate(drafts)
        if id(d.plan) in odd or (not tame and any(map(tokenizer.holds_control, d.row.values())))
    )


def texts_of(drafts: Sequence[Draft], by_hand: frozenset[int]) -> list[str]:
    """What is to be encoded for these drafts, all in one call."""
    ready = [d for n, d in enumerate(drafts) if n not in by_hand] if by_hand else drafts
    texts = [t for d in ready for t in d.stretches()]
    texts += [t for d in ready if d.joints for _, t in d.joints]
    return texts


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


def prove(drafts: Sequence[Draft], by_hand: frozenset[int], flat: Flat, tokenizer: ChatTokenizer) -> Proved:
    """Prove all drafts with a few operations on whole arrays, given the ids of `texts_of` them."""
    ready = [n for n in range(len(drafts)) if n not in by_hand]
    texts = [t for n in ready for t in drafts[n].texts]
    ids_B, bounds, num_used = _woven([drafts[n] for n in ready], *flat)
    edges = bounds.tolist()
    first_run, run = [0] * len(drafts), 0
    for n in ready:
        first_run[n] = run
        run += len(drafts[n].texts)
    wrong: dict[int, Unproved] = {}
    if ready:
        control_B = tokenizer.is_control_V[ids_B]
        misread = _misread_runs(texts, ids_B, bounds, tokenizer)
        suspects = ready if misread else _suspects(drafts, ready, first_run, ids_B, edges, control_B, tokenizer)
        for n in suspects:
            if (
                why := _why_wrong(drafts[n], first_run[n], texts, ids_B, edges, control_B, misread, tokenizer)
            ) is not None:
                wrong[n] = why
        joints = (flat[0], flat[1][num_used:].tolist())
        _prove_joints(drafts, ready, first_run, joints, ids_B, edges, control_B, wrong)
    return Proved(drafts, ids_B, edges, first_run, wrong, by_hand)


def _woven(
    drafts: Sequence[Draft], ids: Int32[np.ndarray, " m"], starts: Int64[np.ndarray, " n"]
) -> tuple[Int32[np.ndarray, " b"], Int64[np.ndarray, " r"], int]:
    """The ids of all runs: those that were made for this row between those that are the same in every row; where each run
    begins; how many of the encoded texts were used."""
    at = starts.tolist()
    parts: list[np.ndarray] = [ids[:0]]
    sizes: list[int] = []
    k = 0
    for d in drafts:
        for run in d.plan.cuts:
            size = 0
            for part in run:
                if isinstance(part, tuple):
                    part, k = ids[at[k] : at[k + 1]], k + 1
                parts.append(part)
                size += part.size
            sizes.append(size)
    return np.concatenate(parts), np.cumsum([0, *sizes]), k


def _suspects(
    drafts: Sequence[Draft],
    ready: Sequence[int],
    first_run: Sequence[int],
    ids_B: Int32[np.ndarray, " b"],
    edges: Sequence[int],
    control_B: np.ndarray,
    tokenizer: ChatTokenizer,
) -> Sequence[int]:
    """None, if all control tokens in order, their number in each draft and the last token of each completion are right; else
    all are looked at one by one."""
    end = edges[-1]
    wanted = [i for n in ready for i in drafts[n].plan.control]
    numbers = [len(drafts[n].plan.control) for n in ready]
    ends = np.concatenate([[0], np.cumsum(control_B[:end])])
    firsts = np.array([edges[first_run[n]] for n in ready] + [end])
    lasts = [edges[first_run[n] + k + 1] - 1 for n in ready for k in _closed_by_stop(drafts[n])]
    right = (
        ids_B[:end][control_B[:end]].tolist() == wanted
        and np.diff(ends[firsts]).tolist() == numbers
        and bool(tokenizer.is_stop_V[ids_B[lasts]].all())
    )
    return () if right else ready


def _closed_by_stop(draft: Draft) -> Iterable[int]:
    """Runs whose own text ends in a stop token."""
    last = len(draft.texts) - 1
    return [k for k, t in enumerate(draft.plan.turns) if t is not None and not (draft.plan.appended and k == last)]


def _why_wrong(
    draft: Draft,
    first: int,
    texts: Sequence[str],
    ids_B: Int32[np.ndarray, " b"],
    edges: Sequence[int],
    control_B: np.ndarray,
    misread: set[int],
    tokenizer: ChatTokenizer,
) -> Unproved | None:
    end = first + len(draft.texts)
    for k in range(first, end):
        if k in misread:
            ids = ids_B[edges[k] : edges[k + 1]].tolist()
            # A context whose characters the vocabulary lacks is what a server sends; an answer could not be learned.
            if draft.plan.turns[k - first] is not None or ids != tokenizer.encode(texts[k]):
                return _misread(ids, texts[k], tokenizer)
    span = slice(edges[first], edges[end])
    if ids_B[span][control_B[span]].tolist() != list(draft.plan.control):
        return _foreign_control()
    for k in _closed_by_stop(draft):
        low, high = edges[first + k], edges[first + k + 1]
        if low == high or not tokenizer.is_stop_V[ids_B[high - 1]]:
            return _no_stop(ids_B[max(low, high - 1) : high].tolist(), tokenizer)
    return None


def _prove_joints(
    drafts: Sequence[Draft],
    ready: Sequence[int],
    first_run: Sequence[int],
    joints: tuple[Int32[np.ndarray, " m"], Sequence[int]],
    ids_B: Int32[np.ndarray, " b"],
    edges: Sequence[int],
    control_B: np.ndarray,
    wrong: dict[int, Unproved],
) -> None:
    """The end of a context and the completion behind it have, encoded together, the ids they have apart."""
    ids, starts = joints
    joint = 0
    for n in ready:
        for k, _ in drafts[n].joints:
            run = first_run[n] + k
            first, middle, end = edges[run - 1], edges[run], edges[run + 1]
            controls = np.flatnonzero(control_B[first:middle])
            loose = first + int(controls[-1]) + 1 if controls.size else first
            if n not in wrong and not np.array_equal(ids[starts[joint] : starts[joint + 1]], ids_B[loose:end]):
                wrong[n] = _unshared()
            joint += 1


def _misread_runs(
    texts: Sequence[str], ids_B: Int32[np.ndarray, " b"], bounds: Int64[np.ndarray, " n"], tokenizer: ChatTokenizer
) -> set[int]:
    """Runs whose ids do not decode to their text: none, if all bytes in a row and the number of each run's are right."""
    table = tokenizer.table
    assert table is not None
    found, ends = table.decode(ids_B)
    wanted = "".join(texts).encode()
    sizes = np.fromiter((len(t) if t.isascii() else len(t.encode()) for t in texts), np.int64, len(texts))
    if np.array_equal(np.diff(ends[bounds]), sizes) and np.array_equal(found, np.frombuffer(wanted, np.uint8)):
        return set()
    at, read = ends[bounds].tolist(), found.tobytes()
    wrong = {k for k, t in enumerate(texts) if read[at[k] : at[k + 1]] != t.encode()}
    if table.normal_form:
        wrong = {k for k in wrong if read[at[k] : at[k + 1]] != tokenizer.normalized(texts[k]).encode()}
    return wrong


def _whole(d: Draft, ids_T: Int32[np.ndarray, " t"], edges: Sequence[int], tokenizer: ChatTokenizer) -> Rendered:
    if d.plan.appended:
        ids_T = np.append(ids_T, np.int32(tokenizer.eos))
        edges = [*edges[:-1], edges[-1] + 1]
    rendering = d.rendering()
    groups = groupby(rendering.segments, key=run_of)
    runs = [Run(first=a, end=b, segments=tuple(g)) for (_, g), (a, b) in zip(groups, pairwise(edges), strict=True)]
    return Rendered(ids_T=ids_T, runs=tuple(runs), rendering=rendering)


def _no_stop(last: list[int], tokenizer: ChatTokenizer) -> Unproved:
    found = f"the completion ends in {tokenizer.decode(last)!r}, not in a stop token."
    return Unproved("E-CHAT-304", found, "Name the turn's end token: template: {kind: own, stop: ['…']} in the recipe.")


def _foreign_control() -> Unproved:
    found = "control tokens in the ids are not those the template wrote."
    return Unproved("E-CHAT-305", found, "Remove control strings from the row, or report this template.")


def _misread(ids: Sequence[int], text: str, tokenizer: ChatTokenizer) -> Unproved:
    back = tokenizer.decode(ids)
    at = next((k for k, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
    near = slice(max(0, at - 20), at + 20)
    found = f"decoded, it differs from character {at + 1} on: {text[near]!r} reads {back[near]!r}."
    white = text.rstrip() == back.rstrip()
    fix = (
        "The tokenizer drops white space at the end: remove it."
        if white
        else "The tokenizer cannot hold this text; change it."
    )
    return Unproved("E-CHAT-306", found, fix)


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
    for _, group in groupby(segments, key=run_of):
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
    key = TokenizerKey(tokenizer)
    expected = [n for s in segments if s.part == "template" for _, _, n in written(s.text, key)]
    expected += [tokenizer.eos for s in segments if s.part == "eos"]
    if [i for i in ids if i in tokenizer.control_ids] != expected:
        raise _foreign_control()
    ids_T = np.array(ids, np.int32)
    for run_ in made:
        if run_.trained and (run_.end == run_.first or ids[run_.end - 1] not in tokenizer.stop):
            raise _no_stop(ids[max(run_.first, run_.end - 1) : run_.end], tokenizer)
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
