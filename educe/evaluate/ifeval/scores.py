"""Graded answers to IFEval's prompts → scores with intervals, paired differences, and what they say.

Prompt level: Wilson, McNemar and Newcombe over prompts. Instruction level: a prompt has one to three instructions that one answer
meets or fails together, so errors are clustered by prompt (Miller 2024, arXiv 2411.00640). Types of instruction: Holm over all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from educe.evaluate.ifeval.grading import grade
from educe.evaluate.ifeval.prompts import Task, task_of
from educe.stats import (
    FEWEST,
    clustered_rate,
    holm,
    mcnemar,
    paired_difference,
    paired_scores,
    smallest_shown,
    wilson,
)
from educe.types import Answer

Line = dict[str, Any]
FORMS = ("strict", "loose")
HEADLINE = "prompt_strict"
BEFORE, AFTER = "untouched", "tuned"
_ALPHA = 0.05


def line_of(task: Task, answer: Answer) -> Line:
    """A line of RUN/suites/ifeval/NAME.jsonl: the prompt in the official format, the answer, its verdicts."""
    answered = {"answer": answer.text, "num_tokens": answer.num_tokens, "stopped": answer.stopped}
    return regraded({**task.as_json(), **answered}, task.key)


def regraded(line: Line, place: str) -> Line:
    """A stored line with the verdicts as the verifiers give them now. Raises `EvalError` where it holds no prompt of IFEval."""
    return {**line, **asdict(grade(task_of(line, place), line["answer"]))}


def score(lines: Mapping[str, Sequence[Line]], seconds: Mapping[str, float | None]) -> dict[str, Any]:
    """All figures. The systems' lines are of the same prompts in the same order, two or more."""
    both = BEFORE in lines and AFTER in lines
    comparisons = [_compared(lines[BEFORE], lines[AFTER], form) for form in FORMS] if both else []
    flat = [c for pair in comparisons for c in pair]
    systems = {name: _system(mine, seconds.get(name)) for name, mine in lines.items()}
    first = next(iter(lines.values()))
    return {
        "num_prompts": len(first),
        "num_instructions": sum(len(x["strict"]) for x in first),
        "verdict": _verdict(systems, flat, len(first)),
        "systems": systems,
        "comparisons": flat,
        "kinds": _kinds(lines, both),
    }


def _system(lines: Sequence[Line], seconds: float | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    sizes = [len(x["strict"]) for x in lines]
    for form in FORMS:
        whole, parts = sum(all(x[form]) for x in lines), [sum(x[form]) for x in lines]
        found[f"prompt_{form}"] = {"correct": whole, **asdict(wilson(whole, len(lines)))}
        found[f"instruction_{form}"] = {"correct": sum(parts), **asdict(clustered_rate(parts, sizes))}
    return {
        **found,
        "stopped": sum(bool(x["stopped"]) for x in lines) / len(lines),
        "mean_tokens": sum(x["num_tokens"] for x in lines) / len(lines),
        "seconds": seconds,
    }


def _compared(before: Sequence[Line], after: Sequence[Line], form: str) -> list[dict[str, Any]]:
    whole_before, whole_after = ([all(x[form]) for x in lines] for lines in (before, after))
    parts_before, parts_after = ([float(sum(x[form])) for x in lines] for lines in (before, after))
    won, lost, p = mcnemar(whole_before, whole_after)
    shared = {"before": BEFORE, "after": AFTER}
    apart = asdict(paired_difference(whole_before, whole_after))
    instructions = asdict(paired_scores(parts_before, parts_after, [len(x[form]) for x in before]))
    return [
        {**shared, "measure": f"prompt_{form}", "won": won, "lost": lost, "p": p, "difference": apart},
        {**shared, "measure": f"instruction_{form}", "difference": instructions},
    ]


def _kinds(lines: Mapping[str, Sequence[Line]], both: bool) -> list[dict[str, Any]]:
    """Each type of instruction; a prompt has a type once, so its verdicts are paired by prompt."""
    right: dict[str, dict[str, dict[str, list[bool]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for name, mine in lines.items():
        for line in mine:
            for k, kind in enumerate(line["instruction_id_list"]):
                for form in FORMS:
                    right[kind][name][form].append(bool(line[form][k]))
    found: list[dict[str, Any]] = []
    for kind in sorted(right):
        of = right[kind]
        counts = {name: {form: sum(of[name][form]) for form in FORMS} for name in of}
        paired = mcnemar(of[BEFORE]["strict"], of[AFTER]["strict"]) if both else None
        tested = {"won": paired[0], "lost": paired[1], "p": paired[2]} if paired is not None else {}
        total = len(next(iter(of.values()))["strict"])
        found.append({"kind": kind, "total": total, "systems": counts, **tested})
    if both:
        for kind_row, p in zip(found, holm([k["p"] for k in found]), strict=True):
            kind_row["p_holm"] = p
    return found


def _verdict(systems: Mapping[str, Any], comparisons: Sequence[Mapping[str, Any]], num_prompts: int) -> str:
    """In words, only as surely as the paired test allows. First sentence: the headline."""
    if not comparisons:
        name, found = next(iter(systems.items()))
        return f"Instructions (IFEval): the {name} model follows all of a prompt's in {_percent(found[HEADLINE])} of prompts."
    c = next(c for c in comparisons if c["measure"] == HEADLINE)
    change = f"{_percent(systems[BEFORE][HEADLINE])} → {_percent(systems[AFTER][HEADLINE])} of prompts"
    chance = "p < 0.001" if c["p"] < 0.001 else f"p = {c['p']:.2g}"
    if c["p"] < _ALPHA:
        what = "better" if c["won"] > c["lost"] else "worse"
        return f"Instructions are followed {what} (IFEval, strict): {change}. Paired test: {chance}."
    changed = (c["won"] + c["lost"]) / num_prompts
    seen = f"No difference in following instructions shown (IFEval, strict): {change}. Paired test: {chance}."
    if not changed:
        seen = f"{seen} No prompt's verdict changed."
    least = smallest_shown(num_prompts, changed)
    if least is None:
        return f"{seen} {num_prompts} prompts cannot show one: the paired test needs {FEWEST} that change."
    return f"{seen} {num_prompts} prompts show a difference of {100 * least:.1f} points four times in five."


def _percent(share: Mapping[str, Any]) -> str:
    return f"{100 * float(share['value']):.1f} %"
