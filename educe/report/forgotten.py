"""scores.json and shift.json → the page's section on what was forgotten and where answers shift. What is damaged is left out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from educe.files.run_dir import RunDir
from educe.report.charts import Bar, Drawn, draw_bars
from educe.report.wording import number, percent, span
from educe.types import Interval

T = TypeVar("T")
_MOST_TOKENS = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A row of the table: before, after, and what the difference's interval says."""

    what: str
    before: str
    after: str
    change: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgotten:
    flags: tuple[str, ...]
    rows: tuple[Change, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shifted:
    """A token that the tuned model chose where the base model ranked it below third."""

    token: str
    shifted: int
    count: int
    instead: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift:
    text: str
    answers: int
    drawn: Drawn
    tokens: tuple[Shifted, ...]


def read_forgotten(run: RunDir) -> Forgotten | None:
    return _read(run.scores, _forgotten)


def read_shift(run: RunDir) -> Shift | None:
    return _read(run.shift, _shift)


def _read(file: Path, made: Callable[[dict[str, Any]], T | None]) -> T | None:
    try:
        return made(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError, IndexError):
        return None


def _forgotten(scores: dict[str, Any]) -> Forgotten | None:
    general = scores.get("general")
    if not general:
        return None
    text, prompts, task = general["text"], general["prompts"], general["task"]
    change, of = text["change"], int(prompts["questions"])
    rows = [
        Change(
            what=f"Bits per byte of general text ({text['file'] or 'educe’s own'})",
            before=f"{text['before']:.3f}",
            after=f"{text['after']:.3f}",
            change=f"{change['value']:+.3f} ({change['low']:+.3f} to {change['high']:+.3f})",
        ),
        *(
            Change(what=what, before=f"{int(pair[0])} of {of}", after=f"{int(pair[1])} of {of}", change=_points(d))
            for what, pair, d in (
                ("General questions answered right", prompts["right"], prompts["right_change"]),
                ("Answers to them that do not end", prompts["endless"], prompts["endless_change"]),
                ("Answers to them that are empty", prompts["empty"], prompts["empty_change"]),
            )
        ),
        *_moved(text, prompts, task),
        *_manners(scores["systems"]),
    ]
    return Forgotten(flags=tuple(map(str, general["flags"])), rows=tuple(rows))


def _points(d: dict[str, float]) -> str:
    return f"{100 * d['value']:+.0f} ({100 * d['low']:+.0f} to {100 * d['high']:+.0f}) points"


def _moved(text: dict[str, Any], prompts: dict[str, Any], task: dict[str, Any] | None) -> list[Change]:
    """How far the predictions are from the untouched model's."""
    where = [("general text", text["kl"]), ("general questions", prompts["kl"])]
    where += [("the task’s dev rows", task["kl"])] if task is not None else []
    return [
        Change(what=f"KL from the untouched model on {name}", before="0", after=number(kl), change="nats per token")
        for name, kl in where
    ]


def _manners(systems: dict[str, Any]) -> list[Change]:
    """Of the answers to the test rows."""
    before, after = (systems[n]["manner"] for n in ("untouched", "tuned"))
    named: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
        ("words", "Words of an answer", number),
        ("empty", "Empty answers", percent),
        ("endless", "Answers that do not end", percent),
        ("distinct_1", "Different words", percent),
        ("distinct_2", "Different pairs of words", percent),
        ("repeated", "Repeated runs of four words", percent),
    )
    finite = [(k, what, word) for k, what, word in named if _is_number(before[k]) and _is_number(after[k])]
    return [
        Change(what=f"{what} (test rows)", before=word(before[k]), after=word(after[k]), change="")
        for k, what, word in finite
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _shift(found: dict[str, Any]) -> Shift | None:
    bars = []
    for r in found["by_position"][:12]:
        total = sum(int(r[k]) for k in ("unshifted", "marginal", "shifted"))
        value, share = int(r["shifted"]) / total, r.get("share")
        of = Interval(**{k: float(share[k]) for k in ("value", "low", "high")}) if share else None
        first, last = int(r["first"]), int(r["last"])
        label = f"token {first}" if first == last else f"{first} to {last}"
        said = percent(value) + (f" ({span(of.low, of.high)})" if of is not None else "")
        bars.append(Bar(label=label, kind="tuned", score=of or Interval(value=value, low=value, high=value), text=said))
    if not bars:
        return None
    title = "Share of shifted tokens by their place in the answer, with 95 % intervals over answers"
    wide, narrow = (draw_bars(bars, narrow=narrow, name="shift", title=title) for narrow in (False, True))
    return Shift(
        text=str(found["text"]),
        answers=int(found["answers"]),
        drawn=Drawn(wide=wide, narrow=narrow),
        tokens=tuple(
            Shifted(
                token=str(t["token"]),
                shifted=int(t["shifted"]),
                count=int(t["count"]),
                instead=", ".join(f"{str(i['token'])[:20]} ({int(i['count'])})" for i in t["instead"][:3]),
            )
            for t in found["most"][:_MOST_TOKENS]
        ),
    )
