"""curve.json: what the points of a curve are worth, with intervals over rows, and over rows and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from educe.config import Recipe
from educe.evaluate.curves import By, Measured, gained, judge, level
from educe.model.describe import ModelFacts
from educe.model.device import Device
from educe.recipes.curve_plan import OWN, Planned, Wish
from educe.recipes.wanted import metric_of
from educe.stats.crossed import Crossed


def numbers_of(
    recipe: Recipe,
    facts: ModelFacts,
    device: Device,
    wish: Wish,
    held: Sequence[str],
    base: dict[str, Any],
    runs: Sequence[Planned],
    points: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """The lines of a curve; `points[k]` is what was measured of `runs[k]`."""
    weights_R = base["weights"]
    untouched = _measured("0", [base])
    lines, last = [], {}
    for name in dict.fromkeys(run.line for run in runs):
        grouped: dict[int, list[tuple[Planned, dict[str, Any]]]] = {}
        for run, point in zip(runs, points, strict=True):
            if run.line == name:
                grouped.setdefault(run.part.count, []).append((run, point))
        measured = [_measured(f"{count:,}", [p for _, p in pairs]) for count, pairs in grouped.items()]
        last[name] = measured
        told = [
            {
                "count": count,
                "rows": pairs[0][0].part.num_rows,
                "tasks": list(pairs[0][0].part.tasks) if wish.by == "tasks" else None,
                **_levels(m, untouched, weights_R),
                "runs": [_run(run, point) for run, point in pairs],
            }
            for (count, pairs), m in zip(grouped.items(), measured, strict=True)
        ]
        verdict = asdict(judge(measured, weights_R, wish.by)) if len(measured) > 1 else None
        lines.append({"name": name, "points": told, "verdict": verdict})
    own = last[OWN][-1]
    against = [
        {"name": name, **_gained(own, measured[-1], weights_R)} for name, measured in last.items() if name != OWN
    ]
    return {
        "name": recipe.name,
        "model": facts.name,
        "tuning": recipe.tuning.model_dump(),
        "metric": metric_of(recipe).kind,
        "device": {"kind": device.kind, "dtype": device.dtype, "name": device.name},
        "by": wish.by,
        "held_out_tasks": list(held),
        "seeds": sorted({run.seed for run in runs}),
        "epochs": recipe.train.epochs,
        "same_steps": wish.same_steps,
        "dev_rows": len(weights_R),
        "answered": len(base["scores"]),
        "untouched": {**_levels(untouched, None, weights_R), "measure_s": base["measure_s"]},
        "lines": lines,
        "against": against,
    }


def _measured(label: str, points: Sequence[dict[str, Any]]) -> Measured:
    return Measured(
        label=label,
        nll_SR=tuple(tuple(p["nll"]) for p in points),
        scores_SQ=tuple(tuple(p["scores"]) for p in points if p["scores"]),
    )


def _levels(m: Measured, untouched: Measured | None, weights_R: Sequence[float]) -> dict[str, Any]:
    """Loss and score with their intervals, and what was gained on the untouched model."""
    found: dict[str, Any] = {"loss": _as_json(level(m.nll_SR, weights_R, "loss")), "score": None}
    if m.scores_SQ:
        found["score"] = _as_json(level(m.scores_SQ, [1.0] * len(m.scores_SQ[0]), "score"))
    return found | ({"gained": _gained(untouched, m, weights_R)} if untouched is not None else {})


def _gained(before: Measured, after: Measured, weights_R: Sequence[float]) -> dict[str, Any]:
    kinds: tuple[By, ...] = ("loss", "score") if after.scores_SQ else ("loss",)
    return {"score": None} | {by: _as_json(gained(before, after, weights_R, by)) for by in kinds}


def _as_json(c: Crossed) -> dict[str, Any]:
    return {
        "rows": asdict(c.rows),
        "both": asdict(c.both) if c.both is not None else None,
        "spread": c.spread,
    }


def _run(run: Planned, point: dict[str, Any]) -> dict[str, Any]:
    weight = sum(point["weights"])
    scores = point["scores"]
    return {
        "seed": run.seed,
        "key": run.key,
        "loss": sum(point["nll"]) / weight,
        "score": sum(scores) / len(scores) if scores else None,
        **{k: point[k] for k in ("steps", "tokens", "train_s", "measure_s", "weights_step")},
    }
