"""The ledger summed up line by line: rows by fate, why rows were left out, what each task gives. A ledger of millions of rows fits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from educe.errors import CODES

_STATUS = {
    "train": "trained",
    "dev": "dev",
    "test": "test",
    "not drawn": "not drawn by the mixture",
    "dropped": "dropped",
    "refused": "refused",
}
NUM_PLACES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerRow:
    """What happened to one input row."""

    place: str
    status: str
    code: str
    reason: str
    tokens: int
    trained_tokens: int
    task: str
    draws: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One term of the ledger's sum."""

    label: str
    rows: int
    tokens: int
    trained_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Why rows were not used: a code, how many, and the first places."""

    code: str
    meaning: str
    outcome: str
    rows: int
    example: str
    places: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskShare:
    """What one task of a mixture gives the run: its rows, how often they are drawn, the tokens of all draws."""

    task: str
    rows: int
    draws: int
    tokens: int
    trained_tokens: int
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """`mixture` is empty where there is one task."""

    terms: tuple[Term, ...]
    reasons: tuple[Reason, ...]
    mixture: tuple[TaskShare, ...]

    @property
    def rows(self) -> int:
        return sum(t.rows for t in self.terms)

    @property
    def tokens(self) -> int:
        return sum(t.tokens for t in self.terms)

    @property
    def trained(self) -> Term:
        return self.terms[0]


@dataclass(slots=True, kw_only=True)
class _Sum:
    rows: int = 0
    draws: int = 0
    tokens: int = 0
    trained: int = 0
    example: str = ""
    places: list[str] = field(default_factory=list)

    def add(self, r: LedgerRow, times: int = 1) -> None:
        self.rows += 1
        self.draws += times
        self.tokens += r.tokens * times
        self.trained += r.trained_tokens * times


def sum_ledger(rows: Iterable[LedgerRow]) -> Ledger:
    """Every row counted once, under its status; rows with a code also under their reason."""
    by_status: dict[str, _Sum] = {s: _Sum() for s in _STATUS}
    by_reason: dict[tuple[str, str], _Sum] = {}
    by_task: dict[str, _Sum] = {}
    for r in rows:
        by_status.setdefault(r.status, _Sum()).add(r)
        if r.code or r.status in ("dropped", "refused"):
            reason = by_reason.setdefault((r.code, r.status), _Sum(example=r.reason))
            reason.add(r)
            if len(reason.places) < NUM_PLACES:
                reason.places.append(r.place)
        elif r.status == "train":
            by_task.setdefault(r.task, _Sum()).add(r, r.draws)
    terms = tuple(
        Term(label=_STATUS.get(status, status), rows=s.rows, tokens=s.tokens, trained_tokens=s.trained)
        for status, s in by_status.items()
        if s.rows or status != "not drawn"
    )
    reasons = tuple(
        Reason(
            code=code,
            meaning=CODES.get(code, ""),
            outcome=_STATUS.get(status, status),
            rows=s.rows,
            example=s.example,
            places=tuple(s.places),
        )
        for (code, status), s in sorted(by_reason.items(), key=lambda item: (-item[1].rows, item[0]))
    )
    return Ledger(terms=terms, reasons=reasons, mixture=_mixture(by_task))


def _mixture(by_task: dict[str, _Sum]) -> tuple[TaskShare, ...]:
    total = sum(s.trained for s in by_task.values())
    if len(by_task) < 2:
        return ()
    return tuple(
        TaskShare(
            task=task,
            rows=s.rows,
            draws=s.draws,
            tokens=s.tokens,
            trained_tokens=s.trained,
            share=s.trained / total if total else 0.0,
        )
        for task, s in sorted(by_task.items())
    )
