"""Stored answers → scores.json: each system with its interval, paired tests, and the verdict in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from educe.evaluate.metrics.code import pass_at_k
from educe.evaluate.metrics.question import Grader, Question
from educe.evaluate.numbers import Graded, compare, measure
from educe.types import Answer, ToolCall, Verdict

SYSTEMS = ("untouched", "few_shot", "tuned")  # the run's own; others have names of their own
ABOUT = ("label", "server", "price_in", "price_out", "cost", "tokens_in")  # what may be known of another system
_ALPHA = 0.05
_K = (2, 5, 10, 20, 50, 100)


def unjudged(questions: Sequence[Question], answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Lines of answers/NAME.jsonl before they are graded: they are kept whatever a grader then does.

    Several answers to each row follow each other; the first is `answer`, and the one that is counted and shown.
    """
    return [
        {
            "row": q.row,
            "prompt": list(q.prompt),
            "expected": q.expected,
            **({"calls": [{"name": c.name, "arguments": c.arguments} for c in q.calls]} if q.calls else {}),
            "answer": given[0].text,
            **({"others": [a.text for a in given[1:]]} if len(given) > 1 else {}),
            "num_tokens": given[0].num_tokens,
            "stopped": given[0].stopped,
        }
        for q, given in zip(questions, _by_row(answers, len(questions)), strict=True)
    ]


def _by_row(answers: Sequence[Answer], rows: int) -> list[Sequence[Answer]]:
    """The answers to each row, which follow each other."""
    each = len(answers) // rows
    if not each or len(answers) != each * rows:
        raise ValueError(f"need as many answers to each row, got {len(answers)} to {rows}")
    return [answers[i : i + each] for i in range(0, len(answers), each)]


def question_of(line: dict[str, Any]) -> Question:
    """What a stored line answers."""
    calls = tuple(ToolCall(**call) for call in line.get("calls", ()))
    return Question(row=line["row"], prompt=tuple(line["prompt"]), expected=line["expected"], calls=calls)


def regrade(lines: Sequence[dict[str, Any]], grader: Grader) -> list[dict[str, Any]]:
    """The same stored answers with the verdict of a grader as it is now; no model is asked."""
    return [_judged(line, _verdict_of(line, grader)) for line in lines]


def _verdict_of(line: dict[str, Any], grader: Grader) -> Verdict:
    """Of several answers the score is the share that is right, and pass@k is told beside it for every k of a few."""
    question = question_of(line)
    first = grader(line["answer"], question)
    if not line.get("others"):
        return first
    right = sum(v.correct for v in (first, *(grader(text, question) for text in line["others"])))
    num = 1 + len(line["others"])
    parts = {f"pass@{k}": (pass_at_k(num, right, k), 1.0) for k in sorted({*_K, num}) if k <= num}
    return replace(first, score=right / num, parts=parts, reason=f"{right} of {num} answers right; {first.reason}")


def _judged(line: dict[str, Any], v: Verdict) -> dict[str, Any]:
    kept = {k: x for k, x in line.items() if k not in ("weight", "parts")}
    more = {"weight": v.weight} if v.weight != 1 else {}
    parts = {"parts": {name: list(pair) for name, pair in v.parts.items()}} if v.parts else {}
    return {**kept, "correct": v.correct, "score": v.score, "reason": v.reason, **more, **parts}


def grade(questions: Sequence[Question], answers: Sequence[Answer], grader: Grader) -> list[dict[str, Any]]:
    """Lines of answers/NAME.jsonl: question, answer and verdict of each row."""
    return regrade(unjudged(questions, answers), grader)


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
    found = {name: Graded.of(lines) for name, lines in graded.items()}
    plain = all(g.plain for g in found.values())
    systems = {
        name: {
            "correct": found[name].num_correct,
            **measure(found[name]),
            "seconds": seconds.get(name),
            "stopped": sum(bool(line["stopped"]) for line in lines) / len(lines),
            "mean_tokens": sum(int(line["num_tokens"]) for line in lines) / len(lines),
            **about.get(name, {}),
        }
        for name, lines in graded.items()
    }
    comparisons = [
        {"before": before, "after": "tuned", **compare(found[before], found["tuned"], plain=plain)}
        for before in found
        if before != "tuned" and "tuned" in found
    ]
    verdict = _verdict(systems, comparisons, plain)
    if metric == "text" and dev_loss is not None:
        verdict = _loss_verdict(dev_loss)
    return {
        "metric": metric,
        "measure": "share" if plain else "mean",
        "num_rows": len(next(iter(graded.values()))),
        "verdict": verdict,
        "dev_loss": list(dev_loss) if dev_loss is not None else None,
        "systems": systems,
        "comparisons": comparisons,
    }


def _verdict(systems: dict[str, dict[str, Any]], comparisons: list[dict[str, Any]], shares: bool) -> str:
    """Was tuning worth it, and would a prompt have done? Only as surely as the paired tests allow. First sentence: the headline."""
    against = {c["before"]: c for c in comparisons}
    if "untouched" not in against:
        return "Nothing to compare yet."
    plain, shots = against["untouched"], against.get("few_shot")
    told = _percent if shares else _mean
    values = f"{told(systems['untouched'])} → {told(systems['tuned'])}"
    change = f"{values} of the test rows right" if shares else f"mean score {values}"
    if shots is None:
        prompt, unsure = "", False
    else:
        reach = f"With examples in its prompt the untouched model reaches {told(systems['few_shot'])}"
        unsure = not _better(shots)
        than = "the tuned one is better" if _better(shots) else "the tuned one is not shown to be better"
        prompt = f" {reach}; {than} ({_chance(shots)})."
    prompt += "".join(_other(systems[name], c, told) for name, c in against.items() if name not in SYSTEMS)
    if _better(plain):
        but = ", but not shown to beat a prompt" if unsure else ""
        return f"Tuning helped{but}: {change}. Paired test: {_chance(plain)}.{prompt}"
    if plain["p"] < _ALPHA:
        return f"Tuning did harm: {change}. Keep the untouched model (paired test: {_chance(plain)}).{prompt}"
    return f"No difference shown: {change}. Paired test: {_chance(plain)}; more test rows would show smaller differences.{prompt}"


def _other(system: dict[str, Any], comparison: dict[str, Any], told: Callable[[dict[str, Any]], str]) -> str:
    """A sentence on a model that was asked beside."""
    label, known = system.get("label", comparison["before"]), system.get("cost") is not None
    price = f" for {system['cost']:.2g} USD" if known else ""
    than = "the tuned one is better" if _better(comparison) else "the tuned one is not shown to be better"
    return f" {label} reaches {told(system)}{price}; {than} ({_chance(comparison)})."


def _better(comparison: dict[str, Any]) -> bool:
    return bool(comparison["p"] < _ALPHA and comparison["difference"]["value"] > 0)


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


def _mean(system: dict[str, Any]) -> str:
    return f"{float(system['value']):.2f}"
