"""What lm-evaluation-harness gives of both models → suites/lm-eval-TASK.json: its values and errors, paired row by row."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from educe.seeds import exchanges
from educe.stats import clustered_mean, flip_signs, mcnemar, paired_difference, paired_scores

BEFORE, AFTER = "untouched", "tuned"


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """The rows of one measure before and after, if the difference of its values is the mean of theirs; else `why` not."""

    before: tuple[float, ...] = ()
    after: tuple[float, ...] = ()
    why: str = ""


def measures_of(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every measure of every task and group; `found` has what `lm_eval.evaluator.evaluate` returned for each model."""
    told = []
    for task, results in found[AFTER]["results"].items():
        for key, value in results.items():
            name, _, filtered = key.partition(",")
            if not filtered or name.endswith("_stderr") or not _is_number(value):
                continue
            systems = {n: _value(of["results"][task], name, filtered) for n, of in found.items()}
            paired = _paired(found, task, name, filtered, {n: s["value"] for n, s in systems.items()})
            higher = found[AFTER]["higher_is_better"].get(task, {}).get(name)
            told.append(
                {
                    "task": task,
                    "measure": name,
                    "filter": filtered,
                    "higher_is_better": higher if isinstance(higher, bool) else None,
                    "num_rows": results.get("sample_len"),
                    "num_in_task": found[AFTER]["n-samples"].get(task, {}).get("original"),
                    "shots": found[AFTER]["n-shot"].get(task),
                    "systems": systems,
                    **_compared(paired),
                }
            )
    return told


def lines_of(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One line for each row of each task and filter: what was asked, what the model said, what it scored."""
    return [
        {
            "task": task,
            "doc_id": sample["doc_id"],
            "filter": sample["filter"],
            "target": _plain(sample["target"]),
            "arguments": _plain(sample["arguments"]),
            "answers": _plain(sample["filtered_resps"]),
            "scores": {name: _plain(sample[name]) for name in sample["metrics"]},
        }
        for task, samples in found["samples"].items()
        for sample in samples
    ]


def _value(results: Mapping[str, Any], name: str, filtered: str) -> dict[str, float | None]:
    error = results.get(f"{name}_stderr,{filtered}")
    return {"value": _finite(results[f"{name},{filtered}"]), "stderr": _finite(error) if _is_number(error) else None}


def _paired(
    found: Mapping[str, Mapping[str, Any]], task: str, name: str, filtered: str, values: Mapping[str, float | None]
) -> Paired:
    rows: dict[str, dict[Any, float]] = {}
    for system, of in found.items():
        samples = [s for s in of["samples"].get(task, ()) if s["filter"] == filtered and name in s]
        if not samples:
            return Paired(why="a group of tasks has no rows of its own" if task in of.get("groups", {}) else "no rows")
        if not all(_is_number(s[name]) and math.isfinite(s[name]) for s in samples):
            return Paired(why="a row has no number of its own")
        rows[system] = {s["doc_id"]: float(s[name]) for s in samples}
        value = values[system]
        if value is None or not math.isclose(math.fsum(rows[system].values()) / len(samples), value, abs_tol=1e-9):
            return Paired(why="the value is not the mean of the rows")
    before, after = rows[BEFORE], rows[AFTER]
    if before.keys() != after.keys() or len(before) < 2:
        return Paired(why="fewer than two rows were scored of both models")
    return Paired(before=tuple(before.values()), after=tuple(after[k] for k in before))


def _compared(rows: Paired) -> dict[str, Any]:
    """Rows that are right or wrong: exact McNemar and Newcombe. Others: a paired randomisation test, Student's t over rows, wider
    where hardly a score from 0 to 1 differs."""
    if rows.why:
        return {"won": None, "lost": None, "p": None, "difference": None, "why": rows.why}
    if {*rows.before, *rows.after} <= {0.0, 1.0}:
        before, after = [bool(x) for x in rows.before], [bool(x) for x in rows.after]
        won, lost, p = mcnemar(before, after)
        difference = paired_difference(before, after)
    else:
        apart = [a - b for b, a in zip(rows.before, rows.after, strict=True)]
        won, lost = sum(d > 0 for d in apart), sum(d < 0 for d in apart)
        p, ones = flip_signs(apart, exchanges(len(apart))), [1.0] * len(apart)
        if all(0 <= x <= 1 for x in (*rows.before, *rows.after)):
            difference = paired_scores(rows.before, rows.after, ones)
        elif won or lost:
            difference = clustered_mean(apart, ones)
        else:  # of numbers without bounds that all agree there is no interval
            return {"won": 0, "lost": 0, "p": p, "difference": None, "why": "no row's number differs"}
    return {"won": won, "lost": lost, "p": p, "difference": asdict(difference), "why": ""}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (hasattr(value, "item") and getattr(value, "ndim", 1) == 0)


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def _plain(value: Any) -> Any:
    """As JSON can hold it; what it cannot is written out."""

    def finite(v: Any) -> Any:
        if isinstance(v, float) and not math.isfinite(v):
            return str(v)
        if isinstance(v, Mapping):
            return {str(k): finite(x) for k, x in v.items()}
        return [finite(x) for x in v] if isinstance(v, Sequence) and not isinstance(v, str) else v

    return finite(json.loads(json.dumps(value, default=lambda v: v.item() if hasattr(v, "item") else str(v))))
