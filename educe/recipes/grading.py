"""A recipe's metric → its grader: settings bound, code of the user's loaded, consent to run a model's asked for."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from educe.config.recipe import CustomMetric, Metric
from educe.errors import EvalError, UsageError
from educe.evaluate.jail.outside import run_program, what_stays_open
from educe.evaluate.metrics import METRICS, Grader, Question
from educe.evaluate.metrics.code import grade_code, no_test
from educe.evaluate.metrics.custom import find_custom, load_custom
from educe.model.source import Say

_NAMES = (*METRICS, "pass_at_k")


@dataclass(frozen=True, slots=True, kw_only=True)
class Grading:
    """A grader with its name."""

    kind: str
    grader: Grader


def metric_named(name: str) -> Metric:
    """A metric without settings of its own, by its name on the command line. Raises `UsageError`."""
    if name == "custom" or ":" in name:
        fix = "Write it in the recipe, evaluation: {metric: {kind: custom, function: file.py:function}}, and `educe eval --regrade`."
        raise UsageError(101, "--metric", f"{name!r}: a function of yours is named in the recipe alone.", fix)
    try:
        made: Metric = TypeAdapter(Metric).validate_python({"kind": name})
    except ValidationError as e:
        near = difflib.get_close_matches(name, _NAMES, 1)
        fix = f"Did you mean {near[0]}? " if near else ""
        raise UsageError(101, "--metric", f"{name!r} is not a metric.", f"{fix}One of {', '.join(_NAMES)}.") from e
    return made


def grading_of(metric: Metric, say: Say, *, allow_code: bool) -> Grading:
    """Raises `EvalError` for programs without consent, and for a custom metric that cannot be loaded."""
    if isinstance(metric, CustomMetric):
        say(f"grading by your own function, {metric.function}: it runs as you")
        return Grading(kind=metric.kind, grader=load_custom(metric.function))
    if metric.kind != "pass_at_k":
        return Grading(kind=metric.kind, grader=METRICS[metric.kind])
    if not allow_code:
        found = "runs programs that a model wrote, on this machine."
        raise EvalError(303, "pass_at_k", found, "Read docs/security.md, then add --allow-code.")
    for still_open in what_stays_open():
        say(f"warning: programs of the model run with limits, but on this system {still_open}")
    return Grading(kind=metric.kind, grader=grade_code)


def check_fit(grading: Grading, questions: Sequence[Question]) -> None:
    """Before minutes are spent, and before scores are replaced: an expected answer that is not right by its own metric can never be
    reached, and one that says nothing by it is right whatever is said. Raises `EvalError`."""
    if grading.kind == "custom":
        return
    if grading.kind == "pass_at_k":
        _check_tests(questions)
        _check_programs(questions)
        return
    if grading.kind == "tool_calls" and questions and not any(q.calls for q in questions):
        found = f"the expected answer calls no tool, and none of the {len(questions)} rows does."
        raise EvalError(201, questions[0].row, found, "Choose another metric, or give the rows' answers `tool_calls`.")
    for q in questions:
        verdict = grading.grader(q.expected, q)
        if not verdict.correct:
            found = f"the expected answer is itself graded wrong: {verdict.reason}."
            raise EvalError(201, q.row, found, "Choose another metric, or mend the row.")


def check_fit_unrun(metric: Metric, questions: Sequence[Question]) -> None:
    """`check_fit` as far as it is known while no code of a user's runs, neither a metric nor a test. Raises `EvalError`."""
    if isinstance(metric, CustomMetric):
        find_custom(metric.function)
    elif metric.kind == "pass_at_k":
        _check_tests(questions)
    else:
        check_fit(Grading(kind=metric.kind, grader=METRICS[metric.kind]), questions)


def _check_tests(questions: Sequence[Question]) -> None:
    for q in questions:
        if why := no_test(q.expected):
            fix = "Choose another metric, or let the row's answer be the test of its program; README's `columns` has HumanEval's."
            raise EvalError(201, q.row, f"the expected answer is no test: {why}.", fix)


def _check_programs(questions: Sequence[Question]) -> None:
    """A test that passes without a program says nothing of one."""
    passed: set[str] = set()
    for q in questions:
        if q.expected not in passed and not run_program("", q.expected).failed:
            found = "its test passes without any program, so that every program is right."
            fix = "End it with a call of what it tests, such as check(add_one); README's `columns` has HumanEval's."
            raise EvalError(201, q.row, found, fix)
        passed.add(q.expected)
