"""Where a tuned model's own answers leave the base model: at each of their tokens, which rank the base model gave it.

Rank 1 is unshifted, 2 and 3 marginal, lower ones shifted (Lin et al. 2023, arXiv 2312.01552): both models read the same prompt and the
same answer so far. Shape legend: N tokens of answers in a pack, C of a chunk.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch

from educe.evaluate.drift import pieces
from educe.model.load import CausalLM
from educe.pack.batch import build_batch
from educe.pack.plan import plan_once
from educe.stats import clustered_rate
from educe.types import Example

MARGINAL = 3
RECURS = 0.1  # of the answers: a token that shifts in so many of them is form, not content
_EDGES = (0, 1, 2, 3, 4, 8, 16, 32, 64, 128, 1 << 31)
_MOST_TOKENS = 30

Kind = Literal["end", "form", "prompt", "new"]
KINDS: dict[Kind, str] = {
    "end": "where the answer ends",
    "form": f"tokens that shift in at least {RECURS:.0%} of the answers",
    "prompt": "tokens that stand in the prompt",
    "new": "tokens that do neither",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A prompt and the tuned model's answer to it, as it made it, its stop token included."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A token of an answer: its rank under the base model, from 1, and the token that has rank 1 there."""

    token: int
    rank: int
    first: int


def base_ranks(base: CausalLM, asked: Sequence[Asked], capacity_tokens: int) -> list[list[Place]]:
    """The places of each answer, by one packed pass of teacher forcing; empty answers have none."""
    said = [k for k, a in enumerate(asked) if a.answer]
    examples = [_example(asked[k]) for k in said]
    found: list[list[Place]] = [[] for _ in asked]
    lengths = np.array([e.ids_T.size for e in examples], np.int64)
    for group in plan_once(lengths, capacity_tokens=capacity_tokens) if examples else ():
        batch = build_batch([examples[i] for i in group])
        ranks_N, first_N = _ranks(base, base.tensor(batch.predict_N), base.tensor(batch.targets_N), batch)
        at = 0
        for i in group:
            k = said[i]
            end = at + len(asked[k].answer)
            found[k] = [
                Place(token=t, rank=r, first=f)
                for t, r, f in zip(asked[k].answer, ranks_N[at:end], first_N[at:end], strict=True)
            ]
            at = end
    return found


def _example(a: Asked) -> Example:
    ids = np.array([*a.prompt, *a.answer], np.int32)
    weights = np.zeros(ids.size, np.float32)
    weights[len(a.prompt) :] = 1
    return Example(ids_T=ids, weights_T=weights)


def _ranks(base: CausalLM, predict_N: Any, targets_N: Any, batch: Any) -> tuple[list[int], list[int]]:
    ranks, first = [], []
    with torch.no_grad():
        hidden_ND = base.hidden_states(batch)[predict_N]
        for piece in pieces(base, len(hidden_ND)):
            logits_CV = base.head(hidden_ND[piece])
            target_C1 = logits_CV.gather(1, targets_N[piece][:, None])
            ranks.append((logits_CV > target_C1).sum(1).cpu() + 1)
            first.append(logits_CV.argmax(1).cpu())
    return torch.cat(ranks).tolist(), torch.cat(first).tolist()


def shift_record(
    asked: Sequence[Asked], places: Sequence[Sequence[Place]], text_of: Callable[[int], str], stop: frozenset[int]
) -> dict[str, Any]:
    """shift.json: shares of all places, by position in the answer, by kind of token, and the tokens that shifted most."""
    everywhere = [p for answer in places for p in answer]
    recurring = _recurring(places, stop)
    kinds: Counter[Kind] = Counter()
    tokens: dict[int, _Token] = defaultdict(_Token)
    for a, answer in zip(asked, places, strict=True):
        said = set(a.prompt)
        for p in answer:
            tokens[p.token].count += 1
            if p.rank > MARGINAL:
                kind = _kind(p.token, said, recurring, stop)
                kinds[kind] += 1
                tokens[p.token].shifted += 1
                tokens[p.token].instead[p.first] += 1
    most = sorted((t for t in tokens if tokens[t].shifted), key=lambda t: (-tokens[t].shifted, t))[:_MOST_TOKENS]
    shares = _counts(everywhere)
    return {
        "answers": sum(bool(p) for p in places),
        "tokens": len(everywhere),
        "counts": shares,
        "by_position": by_position(places),
        "kinds": {k: kinds[k] for k in KINDS},
        "most": [
            {
                "token": text_of(t),
                "count": tokens[t].count,
                "shifted": tokens[t].shifted,
                "end": t in stop,
                "recurs": t in recurring,
                "instead": [{"token": text_of(f), "count": n} for f, n in tokens[t].instead.most_common(3)],
            }
            for t in most
        ],
        "text": said_of(shares, kinds),
    }


class _Token:
    """What is counted of one token."""

    def __init__(self) -> None:
        self.count = self.shifted = 0
        self.instead: Counter[int] = Counter()


def _recurring(places: Sequence[Sequence[Place]], stop: frozenset[int]) -> frozenset[int]:
    """Tokens that shift in many answers: three at least."""
    rows = Counter(t for answer in places for t in {p.token for p in answer if p.rank > MARGINAL} - stop)
    least = max(3.0, RECURS * len(places))
    return frozenset(t for t, n in rows.items() if n >= least)


def _kind(token: int, prompt: set[int], recurring: frozenset[int], stop: frozenset[int]) -> Kind:
    if token in stop:
        return "end"
    if token in recurring:
        return "form"
    return "prompt" if token in prompt else "new"


def _counts(places: Sequence[Place]) -> dict[str, int]:
    return {
        "unshifted": sum(p.rank == 1 for p in places),
        "marginal": sum(1 < p.rank <= MARGINAL for p in places),
        "shifted": sum(p.rank > MARGINAL for p in places),
    }


def by_position(places: Sequence[Sequence[Place]]) -> list[dict[str, Any]]:
    """Counts at positions `first` to `last` of the answers, from 1: ranges that double; the `share` that is shifted with its interval
    over answers, whose tokens shift together (two answers at least)."""
    made = []
    for low, high in pairwise(_EDGES):
        there = [answer[low:high] for answer in places if len(answer) > low]
        if there:
            longest = max(len(answer) for answer in places)
            counts = _counts([p for answer in there for p in answer])
            shifted, sizes = [_counts(answer)["shifted"] for answer in there], [len(answer) for answer in there]
            share = asdict(clustered_rate(shifted, sizes)) if len(there) > 1 else None
            made.append({"first": low + 1, "last": min(high, longest), **counts, "share": share})
    return made


def said_of(counts: Mapping[str, int], kinds: Mapping[Kind, int]) -> str:
    """In a sentence: how much shifted, and what."""
    total, shifted = sum(counts.values()), counts["shifted"]
    if not total:
        return "The tuned model gave no answers."
    head = f"At {counts['unshifted'] / total:.0%} of its tokens the tuned model says what the base model would have said first"
    if not shifted:
        return f"{head}; at none does it say what the base model ranks below third."
    parts = ", ".join(f"{kinds[k] / shifted:.0%} {what}" for k, what in KINDS.items() if kinds[k])
    return f"{head}; {shifted / total:.0%} are shifted (ranked below third). Of those: {parts}."
