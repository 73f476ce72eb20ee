"""Records → what each section of the page shows: sums, choices of rows, tables. Pure functions."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from educe.report import wording
from educe.report.charts import Bar
from educe.report.records import Answered, Checked, Field, Point, RunFiles, Sample, Scores, Step

T = TypeVar("T")
_METRIC = {
    "custom": "your own function",
    "exact": "exact text",
    "json": "equal JSON",
    "json_fields": "F1 of JSON's fields",
    "label": "the same label",
    "pass_at_k": "programs that pass their tests",
    "rouge_l": "ROUGE-L",
    "sql": "the same SQL statement",
    "tool_calls": "the same tool calls",
}
_KINDS = {"untouched": "untouched", "few_shot": "few-shot", "tuned": "tuned"}
_BAR_LABEL = 14  # characters
Fate = tuple[str, Callable[[Answered, Answered], bool], int]
"""Its heading, whether a row's answers before and after have it, rows shown at most."""
_FATES: tuple[Fate, ...] = (
    ("Won: wrong before tuning, right after", lambda b, a: not b.correct and a.correct, 3),
    ("Lost: right before tuning, wrong after", lambda b, a: b.correct and not a.correct, 3),
    ("Still wrong", lambda b, a: not b.correct and not a.correct, 3),
    ("Right before and after", lambda b, a: b.correct and a.correct, 1),
)
_MOVES: tuple[Fate, ...] = (  # of scores between
    ("Won: a higher score after tuning", lambda b, a: a.score > b.score, 3),
    ("Lost: a lower score after tuning", lambda b, a: a.score < b.score, 3),
    ("The same score", lambda b, a: a.score == b.score, 3),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A key figure: what it is, the number, and what one must know to read it."""

    label: str
    value: str
    note: str


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

    @property
    def shown(self) -> tuple[Sample, ...]:
        """The first, the last, and some evenly between."""
        last, most = len(self.answers) - 1, 7
        if last < most:
            return self.answers
        return tuple(self.answers[round(i * last / (most - 1))] for i in range(most))


@dataclass(frozen=True, slots=True, kw_only=True)
class TableStep:
    step: int
    train: Step | None
    dev: float | None


def system_names(few_shot: int | None, scores: Scores | None) -> dict[str, str]:
    """What the page calls each system."""
    prompted = scores.system("few_shot") if scores else None
    shots = "Best" if prompted and prompted.prompt else f"{few_shot}-shot" if few_shot else "Few-shot"
    own = {"untouched": "Untouched", "few_shot": f"{shots} prompt", "tuned": "Tuned"}
    return {s.name: s.label or s.name for s in scores.systems} | own if scores else own


def graded_as(metric: str) -> str:
    return _METRIC.get(metric, metric)


def _short(label: str) -> str:
    """As long as there is room beside a bar. The table has the whole of it."""
    return label if len(label) <= _BAR_LABEL else f"{label[: _BAR_LABEL - 1]}…"


def score_bars(scores: Scores, names: dict[str, str]) -> list[Bar]:
    return [
        Bar(
            label=_short(names[s.name]),
            kind=_KINDS.get(s.name, "other"),
            score=s.score,
            text=f"{wording.percent(s.score.value)} ({wording.span(s.score.low, s.score.high)})",
        )
        for s in scores.systems
    ]


def spread(rows: Sequence[T], most: int) -> tuple[T, ...]:
    """`most` rows evenly spaced over the list: a rule, not a taste."""
    if len(rows) <= most:
        return tuple(rows)
    return tuple(rows[(2 * i + 1) * len(rows) // (2 * most)] for i in range(most))


def group_answers(files: RunFiles, names: dict[str, str]) -> tuple[Group, ...]:
    """Test rows by their fate from untouched to tuned; empty when either was not answered."""
    by_row = {name: {a.row: a for a in found} for name, found in files.answers.items()}
    tuned = files.answers.get("tuned", ())
    groups = []
    if files.scores and not files.scores.graded:
        cases = [
            Case(
                row=a.row,
                asked=a.asked,
                expected=a.expected,
                said=tuple(Said(who=names[n], answer=by_row[n][a.row]) for n in by_row if a.row in by_row[n]),
            )
            for a in tuned
        ]
        return (Group(heading="Not graded", num_rows=len(cases), cases=spread(cases, 8)),) if cases else ()
    for heading, belongs, most in _MOVES if files.scores and files.scores.mean else _FATES:
        cases = []
        for a in tuned:
            first = by_row["untouched"].get(a.row)
            if first is None or not belongs(first, a):
                continue
            said = tuple(Said(who=names[n], answer=by_row[n][a.row]) for n in by_row if a.row in by_row[n])
            cases.append(Case(row=a.row, asked=a.asked, expected=a.expected, said=said))
        groups.append(Group(heading=heading, num_rows=len(cases), cases=spread(cases, most)))
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


def training_s(files: RunFiles) -> float | None:
    """As the run's end says, else so far."""
    p = files.provenance
    if p and p.training_s is not None:
        return p.training_s
    return files.steps[-1].elapsed_s if files.steps else None


def peak_bytes(files: RunFiles) -> float | None:
    """Of memory, the highest."""
    p = files.provenance
    if p and p.peak_memory_bytes is not None:
        return p.peak_memory_bytes
    return max((s.peak_memory_bytes for s in files.steps if s.peak_memory_bytes is not None), default=None)


def _steps_done(files: RunFiles) -> str:
    done = files.steps[-1].step if files.steps else 0
    planned = files.provenance.planned_steps if files.provenance else None
    return wording.count(done) if planned in (None, done) else f"{done:,} of {planned:,}"


class _Measured(Protocol):
    @property
    def step(self) -> int: ...


M = TypeVar("M", bound=_Measured)


def at_kept(files: RunFiles, measured: Sequence[M]) -> M:
    """The held-out measurement of the weights that the run keeps."""
    step = files.provenance.weights_step if files.provenance else None
    return next((p for p in measured if p.step == step), measured[-1])


def _weights(files: RunFiles) -> str:
    """Said only where the weights kept are not the last ones."""
    step = files.provenance.weights_step if files.provenance else None
    early = step is not None and bool(files.steps) and step < files.steps[-1].step
    return f"those of step {step:,}, which had the lowest held-out loss" if early else wording.ABSENT


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What an hour of the machine costs."""

    amount: float
    currency: str

    def of(self, seconds: float) -> str:
        return f"{wording.number(self.amount * seconds / 3600)} {self.currency}".rstrip()


def _price(files: RunFiles, hourly: Price) -> Figure | None:
    training, evaluation = training_s(files), files.provenance.evaluation_s if files.provenance else None
    if training is None:
        return None
    parts = f"steps {wording.duration(training)}"
    parts += f", answers {wording.duration(evaluation)}" if evaluation else ""
    at = f"at {wording.number(hourly.amount)} {hourly.currency} an hour".replace("  ", " ")
    note = f"{parts}, {at}; starting, checks, held-out loss, checkpoints and loading come on top"
    return Figure(label="Price of steps and answers", value=hourly.of(training + (evaluation or 0.0)), note=note)


def progress(files: RunFiles) -> str:
    """Where a run stands that is not evaluated yet."""
    if files.provenance and files.provenance.finished:
        return headline(files) or "Trained to its end, not evaluated yet."
    if not files.steps:
        return "Preparing: no step was made yet."
    step, loss = f"Step {_steps_done(files)}", files.steps[-1].loss
    held = f", held-out loss {wording.number(files.dev[-1].loss)}" if files.dev else ""
    if files.pairs:
        held += f", {wording.percent(files.pairs[-1].ranked)} of the dev pairs ranked right"
    return f"{step}: training loss {wording.number(loss)}{held}."


def headline(files: RunFiles) -> str:
    """What a run shows without questions that have a right answer: raw text and pairs have none. Empty for others."""
    if files.objective == "sft":
        return ""
    if len(files.pairs) > 1:
        kept = at_kept(files, files.pairs)
        before, after = (wording.percent(p.ranked) for p in (files.pairs[0], kept))
        return f"{before} → {after} of the dev pairs ranked right."
    if files.objective == "pretrain" and len(files.dev) > 1:
        last = at_kept(files, files.dev)
        return f"Held-out loss {wording.number(files.dev[0].loss)} → {wording.number(last.loss)} nats per token."
    return "Trained to its end." if files.provenance and files.provenance.finished else ""


def _ranked(files: RunFiles) -> Figure:
    first, kept = files.pairs[0], at_kept(files, files.pairs)
    moved = f"; KL on chosen answers {wording.number(kept.kl)} nats per token" if kept.kl is not None else ""
    value = f"{wording.percent(first.ranked)} → {wording.percent(kept.ranked)}"
    return Figure(label="Dev pairs ranked right", value=value, note=f"per token, step 0 → step {kept.step:,}{moved}")


def key_figures(files: RunFiles, hourly: Price | None = None) -> list[Figure]:
    """Three or four numbers for the top of the page: only what was measured."""
    made = []
    before = files.scores.system("untouched") if files.scores else None
    after = files.scores.system("tuned") if files.scores else None
    if files.scores and files.scores.graded and before and after:
        value = f"{wording.percent(before.score.value)} → {wording.percent(after.score.value)}"
        interval = wording.span(after.score.low, after.score.high)
        note = f"95 % interval after tuning: {interval}. {files.scores.num_rows:,} test rows, one training"
        of = "Mean score" if files.scores.measure == "mean" else "Right answers"
        made.append(Figure(label=f"{of} ({graded_as(files.scores.metric)})", value=value, note=note))
    elif len(files.pairs) > 1:
        made.append(_ranked(files))
    elif len(files.dev) > 1:
        kept = at_kept(files, files.dev)
        value = f"{wording.number(files.dev[0].loss)} → {wording.number(kept.loss)}"
        made.append(Figure(label="Held-out loss", value=value, note=f"step 0 → step {kept.step:,}"))
    if hourly is not None and (price := _price(files, hourly)) is not None:
        made.append(price)
    elif (seconds := training_s(files)) is not None:
        made.append(
            Figure(label="Time of the steps", value=wording.duration(seconds), note=f"{_steps_done(files)} steps")
        )
    if (peak := peak_bytes(files)) is not None:
        note = f"{wording.large(files.provenance.parameters)} parameters" if files.provenance else ""
        made.append(Figure(label="Peak memory", value=wording.size(peak), note=note))
    if ledger := files.ledger:
        note, done = f"{ledger.trained.trained_tokens:,} tokens carry loss", _steps_done(files)
        label = "Rows trained on"
        if " of " in done:  # a run that has not ended, or that patience ended
            label, note = "Rows to train on", f"{note}; step {done} is made"
        made.append(Figure(label=label, value=wording.count(ledger.trained.rows), note=note))
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


def cost(files: RunFiles, hourly: Price | None = None) -> list[Field]:
    """What the run took."""
    speeds = [s.tokens_per_s for s in files.steps if s.tokens_per_s is not None]
    tokens, trained = sum(s.tokens for s in files.steps), sum(s.trained_tokens for s in files.steps)
    price = _price(files, hourly) if hourly is not None else None
    graded = sum(g.seconds or 0.0 for g in files.graded)
    rows = [
        ("Price of steps and answers", f"{price.value} ({price.note})" if price else wording.ABSENT),
        ("Time of the steps", wording.duration(training_s(files))),
        (
            "Time of the evaluation’s answers",
            wording.duration(files.provenance.evaluation_s if files.provenance else None),
        ),
        ("Answering dev rows while training", wording.duration(graded) if graded else wording.ABSENT),
        ("Speed", f"{wording.number(statistics.median(speeds))} tokens/s (median step)" if speeds else wording.ABSENT),
        ("Peak memory", wording.size(peak_bytes(files))),
        ("Steps", _steps_done(files) if files.steps else wording.ABSENT),
        ("Weights kept", _weights(files)),
        ("Tokens processed", f"{tokens:,}, {trained:,} of them with loss" if tokens else wording.ABSENT),
    ]
    return [Field(key=k, value=v) for k, v in rows if v != wording.ABSENT]
