"""Records → what each section of the page shows: sums, choices of rows, tables. Pure functions."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from educe.errors import CODES
from educe.report import wording
from educe.report.charts import Bar
from educe.report.records import Answered, Checked, Field, LedgerRow, Point, RunFiles, Sample, Scores, Step

_STATUS = {
    "train": "trained",
    "dev": "dev",
    "test": "test",
    "not drawn": "not drawn by the mixture",
    "dropped": "dropped",
    "refused": "refused",
}
_METRIC = {"exact": "exact text", "json": "equal JSON", "label": "the same label", "sql": "the same SQL statement"}
_GROUPS = (  # heading, right before, right after, rows shown at most
    ("Won: wrong before tuning, right after", False, True, 3),
    ("Lost: right before tuning, wrong after", True, False, 3),
    ("Still wrong", False, False, 3),
    ("Right before and after", True, True, 1),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A key figure: what it is, the number, and what one must know to read it."""

    label: str
    value: str
    note: str


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
class Ledger:
    terms: tuple[Term, ...]
    reasons: tuple[Reason, ...]

    @property
    def rows(self) -> int:
        return sum(t.rows for t in self.terms)

    @property
    def tokens(self) -> int:
        return sum(t.tokens for t in self.terms)

    @property
    def trained(self) -> Term:
        return self.terms[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """One system's answer to a row."""

    who: str
    answer: Answered


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    row: str
    asked: str
    expected: str
    said: tuple[Said, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Test rows with the same fate: `cases` are some of `num_rows`."""

    heading: str
    num_rows: int
    cases: tuple[Case, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """The answers to one sample prompt, in order of training."""

    row: str
    asked: str
    expected: str
    answers: tuple[Sample, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TableStep:
    step: int
    train: Step | None
    dev: float | None


def system_names(few_shot: int | None) -> dict[str, str]:
    """What the page calls each system."""
    shots = f"{few_shot}-shot" if few_shot else "Few-shot"
    return {"untouched": "Untouched", "few_shot": f"{shots} prompt", "tuned": "Tuned"}


def graded_as(metric: str) -> str:
    return _METRIC.get(metric, metric)


def score_bars(scores: Scores, names: dict[str, str]) -> list[Bar]:
    return [
        Bar(
            label=names[s.name],
            kind=s.name.replace("_", "-"),
            score=s.score,
            text=f"{wording.percent(s.score.value)} ({wording.span(s.score.low, s.score.high)})",
        )
        for s in scores.systems
    ]


def sum_ledger(rows: Sequence[LedgerRow]) -> Ledger:
    """Every row counted once, under its status; rows with a code also under their reason."""
    by_status: dict[str, list[LedgerRow]] = {s: [] for s in _STATUS}
    by_reason: dict[tuple[str, str], list[LedgerRow]] = defaultdict(list)
    for r in rows:
        by_status.setdefault(r.status, []).append(r)
        if r.code or r.status in ("dropped", "refused"):
            by_reason[r.code, r.status].append(r)
    terms = tuple(
        Term(
            label=_STATUS.get(status, status),
            rows=len(found),
            tokens=sum(r.tokens for r in found),
            trained_tokens=sum(r.trained_tokens for r in found),
        )
        for status, found in by_status.items()
        if found or status != "not drawn"
    )
    reasons = tuple(
        Reason(
            code=code,
            meaning=CODES.get(code, ""),
            outcome=_STATUS.get(status, status),
            rows=len(found),
            example=found[0].reason,
            places=tuple(r.place for r in found[:5]),
        )
        for (code, status), found in sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[0]))
    )
    return Ledger(terms=terms, reasons=reasons)


def _spread(rows: Sequence[Case], most: int) -> tuple[Case, ...]:
    """`most` rows evenly spaced over the list: a rule, not a taste."""
    if len(rows) <= most:
        return tuple(rows)
    return tuple(rows[(2 * i + 1) * len(rows) // (2 * most)] for i in range(most))


def group_answers(files: RunFiles, names: dict[str, str]) -> tuple[Group, ...]:
    """Test rows by their fate from untouched to tuned; empty when either was not answered."""
    stored = (("untouched", files.untouched), ("few_shot", files.few_shot), ("tuned", files.tuned))
    by_row = {name: {a.row: a for a in found} for name, found in stored}
    groups = []
    if files.scores and not files.scores.graded:
        cases = [
            Case(
                row=a.row,
                asked=a.asked,
                expected=a.expected,
                said=tuple(Said(who=names[n], answer=by_row[n][a.row]) for n, _ in stored if a.row in by_row[n]),
            )
            for a in files.tuned
        ]
        return (Group(heading="Not graded", num_rows=len(cases), cases=_spread(cases, 8)),) if cases else ()
    for heading, before, after, most in _GROUPS:
        cases = []
        for a in files.tuned:
            first = by_row["untouched"].get(a.row)
            if first is None or (first.correct, a.correct) != (before, after):
                continue
            said = tuple(Said(who=names[n], answer=by_row[n][a.row]) for n, _ in stored if a.row in by_row[n])
            cases.append(Case(row=a.row, asked=a.asked, expected=a.expected, said=said))
        groups.append(Group(heading=heading, num_rows=len(cases), cases=_spread(cases, most)))
    return tuple(groups) if any(g.num_rows for g in groups) else ()


def tell_stories(samples: Sequence[Sample]) -> tuple[Story, ...]:
    """Samples by row, each in order of steps."""
    by_row: dict[str, dict[int, Sample]] = defaultdict(dict)
    for s in samples:
        by_row[s.row][s.step] = s
    stories = []
    for row, found in by_row.items():
        answers = tuple(found[step] for step in sorted(found))
        stories.append(Story(row=row, asked=answers[0].asked, expected=answers[0].expected, answers=answers))
    return tuple(stories)


def loss_table(steps: Sequence[Step], dev: Sequence[Point], most: int = 20) -> tuple[tuple[TableStep, ...], int]:
    """Every k-th step, the last one, and every held-out measurement; and k."""
    every = max(1, math.ceil(len(steps) / most))
    train = {s.step: s for i, s in enumerate(steps) if i % every == 0 or i == len(steps) - 1}
    held = {p.step: p.loss for p in dev}
    known = {s.step: s for s in steps}
    wanted = sorted(train.keys() | held.keys())
    return tuple(TableStep(step=i, train=known.get(i), dev=held.get(i)) for i in wanted), every


def _training_s(files: RunFiles) -> float | None:
    p = files.provenance
    if p and p.training_s is not None:
        return p.training_s
    return files.steps[-1].elapsed_s if files.steps else None


def _peak(files: RunFiles) -> float | None:
    p = files.provenance
    if p and p.peak_memory_bytes is not None:
        return p.peak_memory_bytes
    return max((s.peak_memory_bytes for s in files.steps if s.peak_memory_bytes is not None), default=None)


def _steps_done(files: RunFiles) -> str:
    done = files.steps[-1].step if files.steps else 0
    planned = files.provenance.planned_steps if files.provenance else None
    return wording.count(done) if planned in (None, done) else f"{done:,} of {planned:,}"


def _kept(files: RunFiles) -> Point:
    """The held-out measurement of the weights that the run keeps."""
    step = files.provenance.weights_step if files.provenance else None
    return next((p for p in files.dev if p.step == step), files.dev[-1])


def _weights(files: RunFiles) -> str:
    """Said only where the weights kept are not the last ones."""
    step = files.provenance.weights_step if files.provenance else None
    early = step is not None and bool(files.steps) and step < files.steps[-1].step
    return f"those of step {step:,}, which had the lowest held-out loss" if early else wording.ABSENT


def key_figures(files: RunFiles, ledger: Ledger | None) -> list[Figure]:
    """Three or four numbers for the top of the page: only what was measured."""
    made = []
    before = files.scores.system("untouched") if files.scores else None
    after = files.scores.system("tuned") if files.scores else None
    if files.scores and files.scores.graded and before and after:
        value = f"{wording.percent(before.score.value)} → {wording.percent(after.score.value)}"
        interval = wording.span(after.score.low, after.score.high)
        note = f"95 % interval after tuning: {interval}. {files.scores.num_rows:,} test rows"
        made.append(Figure(label=f"Right answers ({graded_as(files.scores.metric)})", value=value, note=note))
    elif len(files.dev) > 1:
        kept = _kept(files)
        value = f"{wording.number(files.dev[0].loss)} → {wording.number(kept.loss)}"
        made.append(Figure(label="Held-out loss", value=value, note=f"step 0 → step {kept.step:,}"))
    if (seconds := _training_s(files)) is not None:
        made.append(Figure(label="Training time", value=wording.duration(seconds), note=f"{_steps_done(files)} steps"))
    if (peak := _peak(files)) is not None:
        note = f"{wording.large(files.provenance.parameters)} parameters" if files.provenance else ""
        made.append(Figure(label="Peak memory", value=wording.size(peak), note=note))
    if ledger:
        note = f"{ledger.trained.trained_tokens:,} tokens carry loss"
        made.append(Figure(label="Rows trained on", value=wording.count(ledger.trained.rows), note=note))
    return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Checks:
    """The checks of a run: those to look at, worst first, and the others."""

    open: tuple[Checked, ...]
    passed: tuple[Checked, ...]
    skipped: tuple[Checked, ...]


def sort_checks(found: Sequence[Checked]) -> Checks | None:
    """By verdict; one that is not known is to be looked at. None where nothing was checked."""
    if not found:
        return None
    by = {v: tuple(c for c in found if c.verdict == v) for v in ("fail", "pass", "skip")}
    rest = tuple(c for c in found if c.verdict not in by)
    return Checks(open=by["fail"] + rest, passed=by["pass"], skipped=by["skip"])


def cost(files: RunFiles) -> list[Field]:
    """What the run took."""
    speeds = [s.tokens_per_s for s in files.steps if s.tokens_per_s is not None]
    tokens, trained = sum(s.tokens for s in files.steps), sum(s.trained_tokens for s in files.steps)
    rows = [
        ("Training time", wording.duration(_training_s(files))),
        ("Evaluation time", wording.duration(files.provenance.evaluation_s if files.provenance else None)),
        ("Speed", f"{wording.number(statistics.median(speeds))} tokens/s (median step)" if speeds else wording.ABSENT),
        ("Peak memory", wording.size(_peak(files))),
        ("Steps", _steps_done(files) if files.steps else wording.ABSENT),
        ("Weights kept", _weights(files)),
        ("Tokens processed", f"{tokens:,}, {trained:,} of them with loss" if tokens else wording.ABSENT),
    ]
    return [Field(key=k, value=v) for k, v in rows if v != wording.ABSENT]
