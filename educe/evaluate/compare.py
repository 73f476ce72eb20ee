"""Stored answers → scores.json: each system with its interval, its manner, paired tests, and the verdict in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from types import MappingProxyType
from typing import Any

from educe.evaluate.manner import manners
from educe.evaluate.metrics.code import pass_at_k
from educe.evaluate.metrics.question import Grader, Question
from educe.evaluate.numbers import Graded, compare, measure
from educe.evaluate.verdict import verdict
from educe.stats import holm, paired_means
from educe.types import Answer, ToolCall, Verdict

SYSTEMS = ("untouched", "few_shot", "tuned")  # the run's own; others have names of their own
# What may be known of a system besides: of another one its price, of the untouched one its prompts.
ABOUT = ("label", "server", "price_in", "price_out", "cost", "tokens_in", "prompt", "prompt_tokens")
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
    measured: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """scores.json from the graded lines of each system, all over the same rows in the same order.

    `dev_loss`: held-out loss before and after, in nats per token, where it was measured. `about`: what is known of a system besides.
    `measured`: what else the verdict weighs, `general` (see `forgetting`), `loss` (see `expected_loss`), `pairs`, `training_s`.
    """
    manner = manners(graded)
    found = {name: Graded.of(lines) for name, lines in graded.items()}
    plain = all(g.plain for g in found.values())
    systems = {
        name: {
            "correct": found[name].num_correct,
            **measure(found[name]),
            "seconds": seconds.get(name),
            "stopped": sum(bool(line["stopped"]) for line in lines) / len(lines),
            "mean_tokens": sum(int(line["num_tokens"]) for line in lines) / len(lines),
            "manner": asdict(manner[name]),
            **about.get(name, {}),
        }
        for name, lines in graded.items()
    }
    comparisons = [
        {"before": before, "after": "tuned", **compare(found[before], found["tuned"], plain=plain)}
        for before in found
        if before != "tuned" and "tuned" in found
    ]
    others = [c for c in comparisons if c["before"] not in SYSTEMS]
    if len(others) > 1:  # the more models are asked beside, the likelier one seems better or worse by chance
        for c, p in zip(others, holm([c["p"] for c in others]), strict=True):
            c["p_holm"] = p
    made = {
        "metric": metric,
        "measure": "share" if plain else "mean",
        "num_rows": len(next(iter(graded.values()))),
        "dev_loss": list(dev_loss) if dev_loss is not None else None,
        "systems": systems,
        "comparisons": comparisons,
        **measured,
    }
    return {"verdict": verdict(made), **made}


def ungraded(
    graded: Mapping[str, Sequence[Any]],
    seconds: Mapping[str, float | None],
    about: Mapping[str, Mapping[str, Any]],
    measured: Mapping[str, Any],
) -> dict[str, Any]:
    """scores.json beside answers that no grader has seen yet: who answered, and what was `measured`."""
    return {
        "verdict": "Not graded: `educe eval --regrade` grades the stored answers.",
        "metric": "none",
        "measure": "share",
        "num_rows": len(next(iter(graded.values()))),
        "dev_loss": None,
        "systems": {name: {"seconds": seconds.get(name), **about.get(name, {})} for name in graded},
        "comparisons": [],
        **measured,
    }


def expected_loss(nll: Mapping[str, Sequence[float]], tokens_R: Sequence[float]) -> dict[str, Any] | None:
    """`loss` of scores.json from the nll of each row's expected answer, in nats: per token, and the tuned model against the others."""
    if not nll:
        return None
    return {
        "rows": len(tokens_R),
        "systems": {name: math.fsum(rows) / math.fsum(tokens_R) for name, rows in nll.items()},
        "comparisons": [
            {"before": name, "after": "tuned", "difference": asdict(paired_means(rows, nll["tuned"], tokens_R))}
            for name, rows in nll.items()
            if name != "tuned"
        ],
    }
