"""The numbers behind the page, as plain values: `educe report --format json`, and what the comparison of runs is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from educe.files.run_dir import RunDir
from educe.report import sections
from educe.report.charts import LARGEST, MOST_POINTS, thin
from educe.report.opening import plain_json
from educe.report.reading import read_run
from educe.report.records import Answered, Point, RunFiles, System
from educe.report.sections import Price
from educe.seeds import exchanges
from educe.stats import holm, mcnemar, paired_difference, paired_ratios
from educe.types import Interval

MOST_RUNS = 8  # as many lines as one plot can tell apart


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """A run and what the page calls it."""

    name: str
    run: RunDir
    files: RunFiles


def named(runs: Sequence[RunDir]) -> list[Named]:
    """By the recipes' names; by their directories where two are called the same."""
    files = [read_run(run) for run in runs]
    names = [(f.settings.name if f.settings else "") or r.path.name for r, f in zip(runs, files, strict=True)]
    if len(set(names)) < len(names):
        names = [str(run.path) for run in runs]
    return [Named(name=n, run=r, files=f) for n, r, f in zip(names, runs, files, strict=True)]


def numbers_of(one: Named, hourly: Price | None = None) -> dict[str, Any]:
    """A run in numbers. What was not measured is null or empty."""
    f = one.files
    made, scores, settings = f.provenance, f.scores, f.settings
    checks = sections.sort_checks(f.checks)
    names = sections.system_names(settings.few_shot if settings else None, scores)
    train = [Point(step=s.step, loss=s.loss) for s in f.steps if s.loss is not None and abs(s.loss) < LARGEST]
    return {
        "name": one.name,
        "path": str(one.run.path),
        "model": settings.model if settings else None,
        "tuning": settings.tuning if settings else None,
        "objective": f.objective,
        "headline": sections.headline(f),
        "verdict": scores.verdict if scores else None,
        "metric": scores.metric if scores else None,
        "measure": ("mean" if scores.mean else "share") if scores and scores.graded else None,
        "test_rows": scores.num_rows if scores else None,
        "systems": [_system(s, names) for s in scores.systems] if scores and scores.graded else [],
        "comparisons": [asdict(c) for c in scores.comparisons] if scores and scores.graded else [],
        "training_loss": [asdict(p) for p in thin(train, MOST_POINTS)[0]],
        "dev_loss": [asdict(p) for p in f.dev],
        "dev_loss_of_tasks": [asdict(t) for t in f.tasks],
        "dev_right": [asdict(g) for g in f.graded],
        "dev_pairs": [asdict(p) for p in f.pairs],
        "data": asdict(f.ledger) if f.ledger else None,
        "checks": [asdict(c) for c in checks.open] if checks else [],
        "checks_passed": len(checks.passed) if checks else 0,
        **_besides(one.run),
        "cost": cost_of(f, hourly),
        "settings": {s.key: s.value for s in settings.rows} if settings else {},
        "provenance": asdict(made) if made else None,
        "unreadable": list(f.unreadable),
    }


def _besides(run: RunDir) -> dict[str, Any]:
    """What other verbs measured, as their files have it."""
    scores = plain_json(run.scores)
    return {
        "general": scores.get("general") if isinstance(scores, dict) else None,
        "shift": plain_json(run.shift),
        "judged": {f.stem: plain_json(f) for f in sorted(run.judged.glob("*.json"))},
        "suites": {f.stem: plain_json(f) for f in sorted(run.suites.glob("*.json"))},
    }


def _system(s: System, names: dict[str, str]) -> dict[str, Any]:
    found = {**asdict(s), "label": names[s.name]}
    return {**{k: v for k, v in found.items() if k != "score"}, **found["score"]}


def cost_of(f: RunFiles, hourly: Price | None) -> dict[str, Any]:
    """Seconds, bytes, tokens; the price where an hour's is known."""
    training, evaluation = sections.training_s(f), f.provenance.evaluation_s if f.provenance else None
    paid = (training or 0.0) + (evaluation or 0.0)
    known = hourly is not None and training is not None
    return {
        "training_s": training,
        "evaluation_s": evaluation,
        "answering_dev_rows_s": sum(g.seconds or 0.0 for g in f.graded),
        "peak_memory_bytes": sections.peak_bytes(f),
        "steps": f.steps[-1].step if f.steps else 0,
        "tokens": sum(s.tokens for s in f.steps),
        "trained_tokens": sum(s.trained_tokens for s in f.steps),
        "price": hourly.amount * paid / 3600 if hourly is not None and known else None,
        "currency": hourly.currency if hourly is not None else None,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """The tuned models of two runs on the test rows that both answered; `why` says where there is no test. `measure`: share (exact
    McNemar, Newcombe) or mean (paired randomisation, as evaluate does). `p_holm`: corrected for the number of runs compared."""

    before: str
    after: str
    measure: str
    rows: int
    won: int
    lost: int
    p: float | None
    p_holm: float | None
    difference: Interval | None
    why: str


def metrics_of(runs: Sequence[Named]) -> dict[str, str]:
    """What each run is graded by, in words, by its name, where they differ; nothing where one word would do for all."""
    scores = {r.name: r.files.scores for r in runs if r.files.scores is not None and r.files.scores.graded}
    found = {name: sections.graded_as(s.metric) for name, s in scores.items()}
    return found if len(set(found.values())) > 1 else {}


def pair(runs: Sequence[Named]) -> list[Paired]:
    """Each run against the first."""
    found = [_pair(runs[0], other) for other in runs[1:]]
    corrected = iter(holm([f.p for f in found if f.p is not None]))
    return [f if f.p is None else replace(f, p_holm=next(corrected)) for f in found]


def _pair(first: Named, other: Named) -> Paired:
    """Without the correction for others."""
    why, before, after = _shared(first.files, other.files)
    mean = any(r.files.scores is not None and r.files.scores.mean for r in (first, other))
    if not why and mean and not all(sum(x.weight for x in rows) > 0 for rows in (before, after)):
        why = "the rows they share have no weight"
    tested = None if why else _by_mean(before, after) if mean else _by_share(before, after)
    won, lost, p, difference = tested or (0, 0, None, None)
    return Paired(
        before=first.name,
        after=other.name,
        measure="mean" if mean else "share",
        rows=len(before),
        won=won,
        lost=lost,
        p=p,
        p_holm=None,
        difference=difference,
        why=why,
    )


Tested = tuple[int, int, float, Interval]
"""Rows won, rows lost, p, the difference."""


def _by_share(before: Sequence[Answered], after: Sequence[Answered]) -> Tested:
    right_before, right_after = [x.correct for x in before], [x.correct for x in after]
    return *mcnemar(right_before, right_after), paired_difference(right_before, right_after)


def _by_mean(before: Sequence[Answered], after: Sequence[Answered]) -> Tested:
    of_before, of_after = (([x.score * x.weight for x in rows], [x.weight for x in rows]) for rows in (before, after))
    p, difference = paired_ratios(of_before, of_after, exchanges(len(before)))
    both = list(zip(before, after, strict=True))
    return sum(b.score < a.score for b, a in both), sum(b.score > a.score for b, a in both), p, difference


def _shared(a: RunFiles, b: RunFiles) -> tuple[str, list[Answered], list[Answered]]:
    """Why two runs cannot be paired (empty: they can), and what each said to the rows that both answered."""
    if not (a.scores and b.scores and a.answers.get("tuned") and b.answers.get("tuned")):
        return "one of them is not evaluated", [], []
    if not (a.scores.graded and b.scores.graded):
        return "the answers of one of them are not graded", [], []
    if a.scores.metric != b.scores.metric:
        by = " and ".join(sections.graded_as(of.scores.metric) for of in (a, b) if of.scores)
        return f"they are not graded by the same metric, but by {by}", [], []
    of_b = {_asked(x): x for x in b.answers["tuned"]}
    rows = [(x, of_b[_asked(x)]) for x in a.answers["tuned"] if _asked(x) in of_b]
    return ("" if rows else "they share no test row"), [x for x, _ in rows], [y for _, y in rows]


def _asked(x: Answered) -> tuple[str, str, str]:
    """What makes two rows the same row: its place alone may be another file's."""
    return x.row, x.asked, x.expected


def settings_that_differ(runs: Sequence[Named]) -> list[dict[str, Any]]:
    """Every setting that is not the same in all runs; its name aside."""
    each = [{s.key: s.value for s in r.files.settings.rows} if r.files.settings else {} for r in runs]
    keys = [k for k in dict.fromkeys(k for settings in each for k in settings) if k != "name"]
    rows = [{"setting": k, "values": [settings.get(k) for settings in each]} for k in keys]
    return [r for r in rows if len(set(r["values"])) > 1]


def comparison_of(runs: Sequence[Named], hourly: Price | None = None) -> dict[str, Any]:
    """Several runs in numbers."""
    return {
        "runs": [numbers_of(r, hourly) for r in runs],
        "settings_that_differ": settings_that_differ(runs),
        "paired": [asdict(p) for p in pair(runs)],
    }
