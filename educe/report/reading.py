"""Files of a run directory → records. What is missing becomes None or empty: a page about a run must not fail on it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from educe.files.run_dir import RunDir
from educe.report.ledger import LedgerRow, sum_ledger
from educe.report.opening import Kept, Row, opened
from educe.report.records import (
    Answered,
    Checked,
    Comparison,
    DevPairs,
    Field,
    Graded,
    MaskRow,
    MaskRun,
    Point,
    Provenance,
    RunFiles,
    Sample,
    Scores,
    Settings,
    Step,
    System,
    TaskLoss,
)
from educe.types import Interval

SYSTEMS = ("untouched", "few_shot", "tuned")
MOST_OTHERS = 9
T = TypeVar("T")


def _dict(value: Any) -> Row:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(row: Row, key: str) -> str:
    """The text at `key`; other values as JSON would show them, nothing as ''."""
    value = row.get(key)
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _real(row: Row, key: str) -> float | None:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer too large for a float
        return None


def _whole(row: Row, key: str) -> int | None:
    value = _real(row, key)
    return None if value is None else int(value)


def _flat(value: Any, prefix: str = "") -> Iterator[Field]:
    """Every leaf of nested settings under its dotted name."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield Field(key=prefix, value=value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _settings(loaded: Any) -> Settings:
    recipe = _dict(_dict(loaded).get("recipe"))
    tuning, evaluation = _dict(recipe.get("tuning")), _dict(recipe.get("evaluation"))
    words = {"full": "all weights tuned", "lora": f"LoRA adapters of rank {_whole(tuning, 'rank') or '?'}"}
    objective = _dict(recipe.get("objective"))
    return Settings(
        name=_text(recipe, "name"),
        objective=_text(objective, "kind") or "sft",
        pair_loss=_text(_dict(objective.get("loss")), "kind"),
        model=_text(recipe, "model"),
        tuning=words.get(_text(tuning, "kind"), ""),
        metric=_text(_dict(evaluation.get("metric")), "kind"),
        few_shot=_whole(evaluation, "few_shot"),
        rows=tuple(_flat(recipe)),
    )


def _hashes(row: Row, model: Row) -> Iterator[Field]:
    yield Field(key="model weights", value=_text(model, "sha256"))
    yield Field(key="chat template", value=_text(row, "template_sha256"))
    yield Field(key="tokenizer", value=_text(row, "tokenizer_sha256"))
    for name, entry in _dict(row.get("data")).items():
        yield Field(key=f"{name} data, {_text(_dict(entry), 'file')}", value=_text(_dict(entry), "sha256"))
    yield Field(key="prepared data", value=_text(row, "prepared"))
    yield Field(key="order of training", value=_text(row, "plan_sha256"))


def _versions(row: Row) -> Iterator[Field]:
    for key in ("educe", "python", "platform"):
        yield Field(key=key, value=_text(row, key))
    packages = _dict(row.get("packages"))
    for key in packages:
        yield Field(key=str(key), value=_text(packages, key))


def _provenance(loaded: Any) -> Provenance:
    row = _dict(loaded)
    device, model = _dict(row.get("device")), _dict(row.get("model"))
    packed = row.get("packed")
    return Provenance(
        device=_text(device, "name") or _text(device, "kind"),
        device_why=_text(device, "why"),
        dtype=_text(device, "dtype"),
        model=_text(model, "name"),
        architecture=_text(model, "architecture"),
        parameters=_whole(model, "parameters"),
        trainable=_whole(row, "trainable_parameters"),
        licence=_text(model, "licence"),
        directory=_text(model, "directory"),
        planned_steps=_whole(row, "steps"),
        weights_step=_whole(row, "weights_step"),
        started=_text(row, "started"),
        finished=_text(row, "finished"),
        training_s=_real(row, "training_s"),
        evaluation_s=_real(row, "evaluation_s"),
        peak_memory_bytes=_real(row, "peak_memory_bytes"),
        packed=packed if isinstance(packed, bool) else None,
        versions=tuple(f for f in _versions(row) if f.value),
        hashes=tuple(f for f in _hashes(row, model) if f.value),
    )


def _ledger(row: Row) -> LedgerRow:
    return LedgerRow(
        place=f"{_text(row, 'file')}:{_text(row, 'line')}",
        status=_text(row, "status"),
        code=_text(row, "code"),
        reason=_text(row, "reason"),
        tokens=_whole(row, "tokens") or 0,
        trained_tokens=_whole(row, "trained_tokens") or 0,
        task=_text(row, "task"),
        draws=max(0, _whole(row, "draws") or 0),
    )


def _step(row: Row) -> Step:
    return Step(
        step=_whole(row, "step") or 0,
        loss=_real(row, "loss"),
        learning_rate=_real(row, "learning_rate"),
        grad_norm=_real(row, "grad_norm"),
        tokens=_whole(row, "tokens") or 0,
        trained_tokens=_whole(row, "trained_tokens") or 0,
        tokens_per_s=_real(row, "tokens_per_s"),
        elapsed_s=_real(row, "elapsed_s"),
        peak_memory_bytes=_real(row, "peak_memory_bytes"),
    )


def _steps(rows: list[Row]) -> tuple[Step, ...]:
    """In order; where a resumed run wrote a step twice, the later line counts."""
    by_step = {s.step: s for s in (_step(r) for r in rows if r.get("kind") == "step")}
    return tuple(by_step[i] for i in sorted(by_step))


def _dev(rows: list[Row]) -> tuple[Point, ...]:
    measured = {_whole(r, "step") or 0: _real(r, "loss") for r in rows if r.get("kind") == "dev"}
    return tuple(Point(step=i, loss=loss) for i, loss in sorted(measured.items()) if loss is not None)


def _graded(rows: list[Row]) -> tuple[Graded, ...]:
    """Counts that cannot be are left out; so is what came before another metric or other rows: it is no part of the same line."""
    made: dict[int, Graded] = {}
    for r in (r for r in rows if r.get("kind") == "score"):
        step, right, asked = _whole(r, "weights_step"), _whole(r, "right"), _whole(r, "rows")
        value, low, high = (_real(_dict(r.get("score")), key) for key in ("value", "low", "high"))
        if step is None or right is None or not asked or not 0 <= right <= asked:
            continue
        if value is None or low is None or high is None or not 0 <= low <= value <= high <= 1:
            continue
        metric, seconds = _text(r, "metric"), _real(r, "took_s")
        found = Graded(
            step=step, metric=metric, value=value, low=low, high=high, right=right, rows=asked, seconds=seconds
        )
        made = {i: g for i, g in made.items() if (g.metric, g.rows) == (metric, asked)} | {step: found}
    return tuple(made[i] for i in sorted(made))


def _pairs(rows: list[Row]) -> tuple[DevPairs, ...]:
    """Measurements of dev pairs; a share that cannot be is left out."""
    made: dict[int, DevPairs] = {}
    for r in (r for r in rows if r.get("kind") == "dev" and r.get("pairs")):
        step, of = _whole(r, "step") or 0, _dict(r.get("pairs"))
        ranked, others = _real(of, "ranked"), ("accuracy", "margin", "chosen", "rejected")
        if ranked is not None and 0 <= ranked <= 1:
            made[step] = DevPairs(
                step=step, ranked=ranked, kl=_real(r, "kl"), **{key: _real(of, key) for key in others}
            )
    return tuple(made[i] for i in sorted(made))


def _task_losses(rows: list[Row]) -> tuple[TaskLoss, ...]:
    measured = [_dict(r.get("tasks")) for r in rows if r.get("kind") == "dev" and r.get("tasks")]
    if not measured:
        return ()
    first, last = measured[0], measured[-1]
    return tuple(TaskLoss(name=n, first=_real(first, n), last=_real(last, n)) for n in sorted({*first, *last}))


def _asked(row: Row) -> str:
    """The last user message of a prompt (the last message when no user spoke)."""
    messages = [_dict(m) for m in _list(row.get("prompt"))]
    users = [m for m in messages if m.get("role") == "user"] or messages
    return _text(users[-1], "content") if users else ""


def _sample(row: Row) -> Sample:
    return Sample(
        step=_whole(row, "step") or 0,
        row=_text(row, "row"),
        asked=_asked(row),
        expected=_text(row, "expected"),
        answer=_text(row, "answer"),
        stopped=bool(row.get("stopped")),
    )


def _answered(row: Row) -> Answered:
    return Answered(
        row=_text(row, "row"),
        asked=_asked(row),
        expected=_text(row, "expected"),
        answer=_text(row, "answer"),
        stopped=bool(row.get("stopped")),
        correct=bool(row.get("correct")),
        reason=_text(row, "reason"),
        score=float(bool(row.get("correct"))) if (score := _real(row, "score")) is None else min(1.0, max(0.0, score)),
        weight=1.0 if (weight := _real(row, "weight")) is None else min(1e9, max(0.0, weight)),
    )


def _mask(row: Row) -> MaskRow:
    runs = [_dict(r) for r in _list(row.get("runs"))]
    return MaskRow(
        row=_text(row, "row"),
        runs=tuple(
            MaskRun(
                text=_text(r, "text"),
                kind=_text(r, "kind"),
                control=bool(r.get("control")),
                tokens=_whole(r, "tokens") or 0,
            )
            for r in runs
        ),
    )


def _interval(row: Row) -> Interval:
    value = _real(row, "value") or 0.0
    low, high = _real(row, "low"), _real(row, "high")
    return Interval(value=value, low=value if low is None else low, high=value if high is None else high)


def _prompt(row: Row) -> str:
    return f"{_text(row, 'label')} in its prompt: {_text(row, 'how')}" if row else ""


def _system(name: str, row: Row) -> System:
    return System(
        name=name,
        label=_text(row, "label"),
        prompt=_prompt(_dict(row.get("prompt"))),
        cost=_real(row, "cost"),
        correct=_whole(row, "correct") or 0,
        score=_interval(row),
        seconds=_real(row, "seconds"),
        stopped=_real(row, "stopped"),
        mean_tokens=_real(row, "mean_tokens"),
    )


def _comparison(row: Row) -> Comparison:
    p = _real(row, "p")
    return Comparison(
        before=_text(row, "before"),
        after=_text(row, "after"),
        won=_whole(row, "won") or 0,
        lost=_whole(row, "lost") or 0,
        p=1.0 if p is None else p,
        difference=_interval(_dict(row.get("difference"))),
        p_holm=_real(row, "p_holm"),
    )


def _others(systems: Row) -> tuple[str, ...]:
    """Other models, by what can be a file's name here and nowhere else."""
    return tuple(n for n in systems if n not in SYSTEMS and re.fullmatch(r"\w[\w.-]{0,99}", n, re.ASCII))[:MOST_OTHERS]


def _scores(loaded: Any) -> Scores:
    row = _dict(loaded)
    systems = _dict(row.get("systems"))
    return Scores(
        metric=_text(row, "metric"),
        measure=_text(row, "measure"),
        num_rows=_whole(row, "num_rows") or 0,
        verdict=_text(row, "verdict"),
        systems=tuple(_system(n, _dict(systems[n])) for n in (*SYSTEMS, *_others(systems)) if n in systems),
        comparisons=tuple(_comparison(_dict(c)) for c in _list(row.get("comparisons"))),
    )


def _checks(loaded: Any) -> tuple[Checked, ...]:
    """In the order they were made."""
    return tuple(
        Checked(when=when, **{key: _text(row, key) for key in ("id", "name", "verdict", "number", "evidence")})
        for when in ("before", "after", "export")
        for row in map(_dict, _list(_dict(loaded).get(when)))
    )


class Metrics(NamedTuple):
    """metrics.jsonl, read once."""

    steps: tuple[Step, ...] = ()
    dev: tuple[Point, ...] = ()
    graded: tuple[Graded, ...] = ()
    pairs: tuple[DevPairs, ...] = ()
    tasks: tuple[TaskLoss, ...] = ()


def _metrics(lines: Iterator[Row]) -> Metrics:
    rows = list(lines)
    return Metrics(
        steps=_steps(rows), dev=_dev(rows), graded=_graded(rows), pairs=_pairs(rows), tasks=_task_losses(rows)
    )


def _each(read: Callable[[Row], T]) -> Callable[[Iterator[Row]], tuple[T, ...]]:
    return lambda rows: tuple(read(r) for r in rows)


def read_run(run: RunDir, kept: Kept | None = None) -> RunFiles:
    """Everything the page needs. Files that are not there are not an error; files that are not JSON are named.

    `kept` remembers what was read, so that a page that is made again and again reads only files that changed.
    """
    unreadable: list[str] = []
    kept = {} if kept is None else kept

    def get(file: Path, read: Callable[[Any], T]) -> T | None:
        try:
            return opened(file, read, kept)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError):
            unreadable.append(file.relative_to(run.path).as_posix())
            return None

    metrics = get(run.metrics, _metrics) or Metrics()
    scores = get(run.scores, _scores)
    names = dict.fromkeys([*SYSTEMS, *(s.name for s in scores.systems)]) if scores else SYSTEMS
    return RunFiles(
        settings=get(run.resolved, _settings),
        provenance=get(run.provenance, _provenance),
        ledger=get(run.ledger, lambda rows: sum_ledger(map(_ledger, rows))),
        steps=metrics.steps,
        dev=metrics.dev,
        graded=metrics.graded,
        pairs=metrics.pairs,
        tasks=metrics.tasks,
        samples=get(run.samples, _each(_sample)) or (),
        masks=get(run.path / "preview.json", lambda rows: tuple(map(_mask, filter(_dict, _list(rows))))) or (),
        answers={n: get(run.answers / f"{n}.jsonl", _each(_answered)) or () for n in names},
        scores=scores,
        checks=get(run.preflight, _checks) or (),
        unreadable=tuple(unreadable),
        goes_on=run.goes_on,
    )
