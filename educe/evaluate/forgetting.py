"""What was forgotten: general text, general questions and how far the predictions moved, before and after. Pure numbers in and out.

The intervals are over passages and questions, not over training seeds.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from educe.stats import mcnemar, paired_difference, paired_means
from educe.types import Interval

FEW = 0.1  # of a model's answers end: the others are cut before they say much


@dataclass(frozen=True, slots=True, kw_only=True)
class TextChange:
    """General text in bits per byte, and its KL(base || tuned) in nats per token. `change` is after - before: above 0 is lost."""

    before: float
    after: float
    change: Interval
    kl: float
    passages: int
    bytes: int
    file: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """A model's answer to a general question."""

    right: bool
    ended: bool
    empty: bool
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptChange:
    """General questions: how many are answered right, do not end, are empty, and how long answers are, (before, after) each; right
    ones by kind too, as (questions, before, after). `kl`: KL(base || tuned) along the base model's own answers, nats per token."""

    questions: int
    right: tuple[int, int]
    right_change: Interval
    p: float
    endless: tuple[int, int]
    endless_change: Interval
    empty: tuple[int, int]
    empty_change: Interval
    mean_tokens: tuple[float, float]
    kinds: dict[str, tuple[int, int, int]]
    kl: float

    @property
    def unfit(self) -> str:
        """Why these questions say little of this model; "" where they do. One that thinks first is cut before it answers, and a very
        small one knows nothing."""
        ended, little = self.questions - self.endless[0], "general questions say little, the untouched model"
        if ended <= FEW * self.questions:
            return f"{little} ends {ended} of its {self.questions} answers in time"
        if self.right[0] <= FEW * self.questions:
            right = f"{self.right[0]} of {self.questions} right ({self.right[1]} after tuning)"
            return f"{little} answers {right}: there is not much to lose"
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskChange:
    """KL(base || tuned) on the expected answers of dev rows, nats per token: what forgetting follows (Shenfeld et al. 2025, arXiv
    2509.04259); it is large where much had to change."""

    rows: int
    tokens: int
    kl: float


def text_change(
    before_R: Sequence[float], after_R: Sequence[float], kl_R: Sequence[float], bytes_R: Sequence[float], tokens: float,
    file: str | None,
) -> TextChange:  # fmt: skip
    """From nll and KL summed over each passage, in nats."""
    bits_before, bits_after = ([n / math.log(2) for n in nll_R] for nll_R in (before_R, after_R))
    size = math.fsum(bytes_R)
    return TextChange(
        before=math.fsum(bits_before) / size,
        after=math.fsum(bits_after) / size,
        change=paired_means(bits_before, bits_after, bytes_R),
        kl=math.fsum(kl_R) / tokens,
        passages=len(bytes_R),
        bytes=int(size),
        file=file,
    )


def prompt_change(kinds: Sequence[str], before: Sequence[Said], after: Sequence[Said], kl: float) -> PromptChange:
    """Of the same questions in the same order; `kinds` are theirs."""
    by_kind: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for kind, b, a in zip(kinds, before, after, strict=True):
        by_kind[kind] = [n + x for n, x in zip(by_kind[kind], (1, b.right, a.right), strict=True)]

    def both(what: str) -> tuple[list[bool], list[bool]]:
        return [getattr(s, what) for s in before], [getattr(s, what) for s in after]

    right, empty = both("right"), both("empty")
    endless = [not s.ended for s in before], [not s.ended for s in after]
    return PromptChange(
        questions=len(kinds),
        right=(sum(right[0]), sum(right[1])),
        right_change=paired_difference(*right),
        p=mcnemar(*right)[2],
        endless=(sum(endless[0]), sum(endless[1])),
        endless_change=paired_difference(*endless),
        empty=(sum(empty[0]), sum(empty[1])),
        empty_change=paired_difference(*empty),
        mean_tokens=tuple(sum(s.num_tokens for s in of) / len(of) for of in (before, after)),  # type: ignore[arg-type]
        kinds={k: (n[0], n[1], n[2]) for k, n in by_kind.items()},
        kl=kl,
    )


def flags(text: TextChange, prompts: PromptChange) -> list[str]:
    """Each general metric that fell by more than its 95 % interval, in words."""
    return [words for _, words in _fallen(text, prompts)]


def _fallen(text: TextChange, prompts: PromptChange) -> list[tuple[float, str]]:
    """And by what share: of the bits, of the questions. An interval over many passages leaves out 0 at a change of no weight."""
    found = []
    if text.change.low > 0:
        share = text.change.value / text.before
        words = f"general text costs {share:.1%} more bits per byte ({text.before:.3f} → {text.after:.3f})"
        found.append((share, words))
    if prompts.right_change.high < 0:
        b, a = prompts.right
        words = f"{a} of {prompts.questions} general questions are answered right, {b} before"
        found.append((-prompts.right_change.value, words))
    for what, change, pair in (
        ("do not end", prompts.endless_change, prompts.endless),
        ("are empty", prompts.empty_change, prompts.empty),
    ):
        if change.low > 0:
            words = f"{pair[1]} of {prompts.questions} answers to general questions {what}, {pair[0]} before"
            found.append((change.value, words))
    return found


def as_scores(text: TextChange, prompts: PromptChange, task: TaskChange | None, seconds: float) -> dict[str, Any]:
    """`general` of scores.json; `most` is the largest share that a flag tells of."""
    fallen = _fallen(text, prompts)
    return {
        "text": asdict(text),
        "prompts": asdict(prompts) | {"unfit": prompts.unfit},
        "task": asdict(task) if task is not None else None,
        "flags": [words for _, words in fallen],
        "most": max((share for share, _ in fallen), default=0.0),
        "seconds": round(seconds, 3),
    }
