"""What each stage gave and took: the same held-out sets measured under the start and under every stage's model. Pure numbers.

The intervals are over rows, not over training seeds; changes are paired by row, against the model that a stage starts from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from educe.stats import bounded_mean, paired_difference, paired_means, paired_scores, wilson
from educe.types import Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One column of the table. `kind`: a share of rows that are right or wrong, a mean score of rows from 0 to 1, or a ratio of sums
    over rows. `better`: which way is up; "" where neither is. `scale`: what the ratio is multiplied with to be in `unit`."""

    title: str
    unit: str
    kind: Literal["share", "score", "ratio"]
    better: Literal["more", "less", ""]
    scale: float = 1.0


_BITS = 1 / math.log(2)
MEASURES: dict[str, Measure] = {
    "domain": Measure(title="domain text", unit="bits/byte", kind="ratio", better="less", scale=_BITS),
    "general": Measure(title="general text", unit="bits/byte", kind="ratio", better="less", scale=_BITS),
    "task": Measure(title="task, right", unit="", kind="score", better="more"),
    "task_loss": Measure(title="expected answers", unit="nats/token", kind="ratio", better="less"),
    "ends": Measure(title="task, answers end", unit="", kind="share", better="more"),
    "instructions": Measure(title="instructions followed", unit="", kind="share", better="more"),
    "questions": Measure(title="general questions, right", unit="", kind="share", better="more"),
    "questions_end": Measure(title="general answers end", unit="", kind="share", better="more"),
    "pairs": Measure(title="preferred ranked first", unit="", kind="share", better="more"),
    "kl": Measure(title="KL from start, general text", unit="nats/token", kind="ratio", better=""),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What a measure found of one model, row by row: values (0 or 1 for a share), and what a ratio is divided by."""

    of: Sequence[float]
    out_of: Sequence[float] = ()


def found_of(key: str, rows: Rows) -> Interval:
    """A measure of one model, with its 95 % interval over rows."""
    measure = MEASURES[key]
    if measure.kind == "ratio":
        return _mean_ratio([measure.scale * v for v in rows.of], rows.out_of)
    if measure.kind == "share" or _is_plain(rows):
        return wilson(int(sum(rows.of)), len(rows.of))
    return bounded_mean(rows.of, [1.0] * len(rows.of))


def change_of(key: str, before: Rows, after: Rows) -> Interval | None:
    """after - before, paired by row; None for fewer than two rows."""
    measure = MEASURES[key]
    if len(before.of) < 2:
        return None
    if measure.kind == "ratio":
        scaled = [[measure.scale * v for v in rows.of] for rows in (before, after)]
        return paired_means(scaled[0], scaled[1], before.out_of)
    if measure.kind == "share" or (_is_plain(before) and _is_plain(after)):
        return paired_difference([bool(v) for v in before.of], [bool(v) for v in after.of])
    return paired_scores(before.of, after.of, [1.0] * len(before.of))


def numbers_of(points: Mapping[str, Mapping[str, Rows]], starts: Mapping[str, str], last: str) -> list[dict[str, Any]]:
    """A line for each measure: its value under each model, by name in order, how each differs from the one it starts from
    (`starts`; the first model has none), and on the `whole` how the last differs from the first."""
    names = list(points)
    lines = []
    for key, measure in MEASURES.items():
        if any(key not in points[name] for name in names):
            continue
        values = {name: asdict(found_of(key, points[name][key])) for name in names}
        changes = {
            name: _as_json(change_of(key, points[starts[name]][key], points[name][key]))
            for name in names
            if name in starts
        }
        rows = len(points[names[0]][key].of)
        whole = _as_json(change_of(key, points[names[0]][key], points[last][key]))
        made = {"rows": rows, "values": values, "changes": changes, "whole": whole}
        lines.append({"key": key, **asdict(measure), **made})
    return lines


def verdict_of(lines: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """What a stage gave and took, beyond its intervals, in words; empty where nothing is told apart."""
    said = []
    for line in lines:
        change = line["changes"].get(name)
        if change is None or not line["better"] or change["low"] <= 0 <= change["high"]:
            continue
        gained = (change["value"] > 0) == (line["better"] == "more")
        said.append(f"{line['title']} {'better' if gained else 'worse'} by {amount(line, change)}")
    return said


def amount(line: Mapping[str, Any], change: Mapping[str, float]) -> str:
    """How large a change is: points of a share, or its own unit."""
    if line["kind"] == "ratio":
        small = abs(change["value"]) < 0.001
        return f"{abs(change['value']):{'.2g' if small else '.3f'}} {line['unit']}"
    return f"{100 * abs(change['value']):.1f} points"


def _as_json(change: Interval | None) -> dict[str, float] | None:
    return asdict(change) if change is not None else None


def _is_plain(rows: Rows) -> bool:
    return all(v in (0, 1) for v in rows.of)


def _mean_ratio(of_R: Sequence[float], out_of_R: Sequence[float]) -> Interval:
    """Σ of / Σ out of: what differs from a model that has 0 on every row. No interval for fewer than two rows."""
    if len(of_R) < 2:
        value = of_R[0] / out_of_R[0]
        return Interval(value=value, low=value, high=value)
    return paired_means([0.0] * len(of_R), of_R, out_of_R)
