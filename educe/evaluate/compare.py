"""Stored answers → scores.json: each system with its interval, paired tests, and the verdict in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from educe.evaluate.metrics import METRICS
from educe.stats import mcnemar, paired_difference, wilson
from educe.types import Answer

SYSTEMS = ("untouched", "few_shot", "tuned")  # the run's own; others have names of their own
ABOUT = ("label", "server", "price_in", "price_out", "cost", "tokens_in")  # what may be known of another system
_ALPHA = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A test row: where it is, what is asked (messages before the answer), what is expected."""

    row: str
    prompt: tuple[dict[str, str], ...]
    expected: str


def grade(questions: Sequence[Question], answers: Sequence[Answer], metric: str) -> list[dict[str, Any]]:
    """Lines of answers/NAME.jsonl: question, answer and verdict of each row."""
    lines = []
    for q, a in zip(questions, answers, strict=True):
        verdict = METRICS[metric](a.text, q.expected)
        lines.append(
            {
                "row": q.row,
                "prompt": list(q.prompt),
                "expected": q.expected,
                "answer": a.text,
                "num_tokens": a.num_tokens,
                "stopped": a.stopped,
                "correct": verdict.correct,
                "reason": verdict.reason,
            }
        )
    return lines


def regrade(lines: Sequence[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """The same stored answers under the metric as it is now; no model is asked."""
    verdicts = [METRICS[metric](line["answer"], line["expected"]) for line in lines]
    return [{**line, "correct": v.correct, "reason": v.reason} for line, v in zip(lines, verdicts, strict=True)]


def score(
    graded: dict[str, list[dict[str, Any]]],
    metric: str,
    seconds: dict[str, float | None],
    dev_loss: tuple[float, float] | None,
    about: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> dict[str, Any]:
    """scores.json from the graded lines of each system, all over the same rows in the same order.

    `dev_loss`: held-out loss before and after, in nats per token, where it was measured. `about`: what is known of a system besides.
    """
    systems, right = {}, {}
    for name, lines in graded.items():
        right[name] = [bool(line["correct"]) for line in lines]
        interval = wilson(sum(right[name]), len(lines))
        systems[name] = {
            "correct": sum(right[name]),
            **asdict(interval),
            "seconds": seconds.get(name),
            "stopped": sum(bool(line["stopped"]) for line in lines) / len(lines),
            "mean_tokens": sum(int(line["num_tokens"]) for line in lines) / len(lines),
            **about.get(name, {}),
        }
    comparisons = []
    for before in right:
        if before != "tuned" and "tuned" in right:
            won, lost, p = mcnemar(right[before], right["tuned"])
            difference = asdict(paired_difference(right[before], right["tuned"]))
            comparisons.append(
                {"before": before, "after": "tuned", "won": won, "lost": lost, "p": p, "difference": difference}
            )
    verdict = _verdict(systems, comparisons)
    if metric == "text" and dev_loss is not None:
        verdict = _loss_verdict(dev_loss)
    return {
        "metric": metric,
        "num_rows": len(next(iter(right.values()))),
        "verdict": verdict,
        "dev_loss": list(dev_loss) if dev_loss is not None else None,
        "systems": systems,
        "comparisons": comparisons,
    }


def _verdict(systems: dict[str, dict[str, Any]], comparisons: list[dict[str, Any]]) -> str:
    """Was tuning worth it, and would a prompt have done? Only as surely as the paired tests allow. First sentence: the headline."""
    against = {c["before"]: c for c in comparisons}
    if "untouched" not in against:
        return "Nothing to compare yet."
    plain, shots = against["untouched"], against.get("few_shot")
    change = f"{_percent(systems['untouched'])} → {_percent(systems['tuned'])} of the test rows right"
    if shots is None:
        prompt, unsure = "", False
    else:
        reach = f"With examples in its prompt the untouched model reaches {_percent(systems['few_shot'])}"
        unsure = not _better(shots)
        than = "the tuned one is better" if _better(shots) else "the tuned one is not shown to be better"
        prompt = f" {reach}; {than} ({_chance(shots)})."
    prompt += "".join(_other(systems[name], c) for name, c in against.items() if name not in SYSTEMS)
    if _better(plain):
        but = ", but not shown to beat a prompt" if unsure else ""
        return f"Tuning helped{but}: {change}. Paired test: {_chance(plain)}.{prompt}"
    if plain["p"] < _ALPHA:
        return f"Tuning did harm: {change}. Keep the untouched model (paired test: {_chance(plain)}).{prompt}"
    return f"No difference shown: {change}. Paired test: {_chance(plain)}; more test rows would show smaller differences.{prompt}"


def _other(system: dict[str, Any], comparison: dict[str, Any]) -> str:
    """A sentence on a model that was asked beside."""
    label, known = system.get("label", comparison["before"]), system.get("cost") is not None
    price = f" for {system['cost']:.2g} USD" if known else ""
    than = "the tuned one is better" if _better(comparison) else "the tuned one is not shown to be better"
    return f" {label} reaches {_percent(system)}{price}; {than} ({_chance(comparison)})."


def _better(comparison: dict[str, Any]) -> bool:
    return bool(comparison["p"] < _ALPHA and comparison["won"] > comparison["lost"])


def _chance(comparison: dict[str, Any]) -> str:
    return "p < 0.001" if comparison["p"] < 0.001 else f"p = {comparison['p']:.2g}"


def _loss_verdict(dev_loss: tuple[float, float]) -> str:
    """Free text has many right answers: what can be said without a judge is how likely the expected ones became."""
    before, after = dev_loss
    change = "fell" if after < before else "rose"
    advice = "Read the answers side by side." if after < before else "Tuning did harm, or went on too long."
    return f"Held-out loss {change} from {before:.2f} to {after:.2f} nats per token; free text has no exact score. {advice}"


def _percent(system: dict[str, Any]) -> str:
    return f"{100 * float(system['value']):.0f} %"
