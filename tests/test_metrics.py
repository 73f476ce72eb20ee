"""Graders with a score or calls: a pass, a fail and near misses each; ROUGE-L against the published package; custom functions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from educe.config import load_recipe
from educe.config.recipe import CustomMetric
from educe.errors import EvalError, RecipeError, UsageError
from educe.evaluate.compare import grade, question_of, regrade, score, unjudged
from educe.evaluate.metrics import METRICS, Question
from educe.evaluate.metrics.custom import load_custom
from educe.evaluate.metrics.fields import leaves
from educe.evaluate.metrics.rouge import common, words
from educe.recipes.grading import check_fit, grading_of, metric_named
from educe.types import Answer, ToolCall, Verdict
from hypothesis import given, settings
from hypothesis import strategies as st


def wanted(expected: str, *calls: ToolCall) -> Question:
    return Question(row="t.jsonl:1", prompt=({"role": "user", "content": "?"},), expected=expected, calls=calls)


# Fields of JSON

RIGHT = '{"a": 1, "b": {"c": "x", "d": [1, 2]}, "e": []}'
FIELDS = [
    # answer, equal leaves, leaves said (of the 5 expected), reason
    (RIGHT, 5, 5, "all fields equal"),
    ('{"e": [], "b": {"d": [1, 2], "c": "x"}, "a": 1}', 5, 5, "all fields equal"),
    ('{"a": 1, "b": {"c": "y", "d": [1, 2]}, "e": []}', 4, 5, "differs in $.b.c"),
    ('{"a": "1", "b": {"c": "x", "d": [1, 2]}, "e": []}', 4, 5, "differs in $.a"),
    ('{"a": 1, "b": {"c": "x", "d": [2, 1]}, "e": []}', 3, 5, "differs in $.b.d[0], $.b.d[1]"),
    ('{"a": 1}', 1, 1, "lacks $.b.c, $.b.d[0], $.b.d[1], $.e"),
    ('{"a": 1, "b": {"c": "x", "d": [1, 2]}, "e": [], "no": {"f g": 1}}', 5, 6, 'adds $.no["f g"]'),
    ('{"a": 1, "b": null, "e": {}}', 1, 3, "differs in $.e; lacks $.b.c, $.b.d[0], $.b.d[1]; adds $.b"),
    (f"Sure: {RIGHT}", 0, 0, "not JSON"),
    ("[]", 0, 1, "lacks $.a, $.b.c, $.b.d[0], $.b.d[1], $.e; adds $"),
    ("", 0, 0, "JSON"),
]


@pytest.mark.parametrize("answer,equal,said,reason", FIELDS)
def test_fields_are_found_missing_wrong_or_added(answer: str, equal: int, said: int, reason: str) -> None:
    v = METRICS["json_fields"](answer, wanted(RIGHT))
    assert v.score == 2 * equal / (said + 5)
    assert v.correct is (equal == said == 5)
    assert reason in v.reason
    assert v.parts == {"valid": (bool(said), 1), "precision": (equal, said), "recall": (equal, 5)}
    assert v.weight == said + 5


def test_f1_is_micro_over_rows_with_precision_recall_and_validity() -> None:
    small, large = '{"a": 1}', json.dumps({f"k{i}": i for i in range(9)})
    answers = [small, json.dumps({f"k{i}": 0 for i in range(9)}), "oops"]
    rows = [wanted(small), wanted(large), wanted(small)]
    lines = grade(rows, [Answer(text=t, num_tokens=1, stopped=True) for t in answers], METRICS["json_fields"])
    found = score({"tuned": lines}, "json_fields", {}, None)
    tuned = found["systems"]["tuned"]
    assert found["measure"] == "mean"
    assert tuned["value"] == pytest.approx(2 * 2 / (10 + 11))  # 2 leaves equal of 10 said and 11 expected
    assert {n: p["value"] for n, p in tuned["parts"].items()} == pytest.approx(
        {"valid": 2 / 3, "precision": 2 / 10, "recall": 2 / 11}
    )
    assert 0 <= tuned["low"] < tuned["value"] < tuned["high"] <= 1
    assert tuned["correct"] == 1


SCALARS = st.none() | st.booleans() | st.integers(-9, 9) | st.text('a".[ ', max_size=3)
VALUES = st.recursive(
    SCALARS,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text('a.["', max_size=2), v, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(VALUES, VALUES)
def test_f1_is_symmetric_and_one_only_for_equal_values(a: Any, b: Any) -> None:
    one, other = (METRICS["json_fields"](json.dumps(x), wanted(json.dumps(y))) for x, y in ((a, b), (b, a)))
    assert one.score == other.score
    assert (one.score == 1) is one.correct is METRICS["json"](json.dumps(a), wanted(json.dumps(b))).correct
    assert METRICS["json_fields"](json.dumps(a), wanted(json.dumps(a))).correct
    assert len(leaves(a)) >= 1


# ROUGE-L: F-measures of the package rouge-score 0.1.2, RougeScorer(["rougeL"]), without its stemmer
PUBLISHED = [
    ("the cat sat on the mat", "the cat was on the mat", 0.833333333333),
    ("police kill the gunman", "police killed the gunman", 0.75),  # the example of Lin 2004, section 3.1
    ("the gunman kill police", "police killed the gunman", 0.5),
    ("A re-run, of 3 tests: FAILED!", "a rerun of 3 tests failed", 0.769230769231),
    ("one two three four five six", "six five four three two one", 0.166666666667),
    (
        "the quick brown fox jumps over the lazy dog and runs away",
        "a quick fox jumped over a lazy dog then ran",
        0.454545454545,
    ),
    ("yes", "no", 0.0),
    ("snake_case name", "snake case name", 1.0),
]


@pytest.mark.parametrize("answer,expected,f", PUBLISHED)
def test_rouge_l_is_that_of_the_published_package(answer: str, expected: str, f: float) -> None:
    v = METRICS["rouge_l"](answer, wanted(expected))
    assert v.score == pytest.approx(f, abs=1e-11)
    assert v.correct is (f == 1)


def test_rouge_l_at_its_edges() -> None:
    assert METRICS["rouge_l"]("...", wanted("...")).score == 1
    assert METRICS["rouge_l"]("...", wanted("!")).score == 0
    assert METRICS["rouge_l"]("", wanted("a")).score == 0
    assert words("Größe 日本語 x_y") == ["grösse", "日", "本", "語", "x", "y"]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from("abcd"), max_size=70), st.lists(st.sampled_from("abcd"), max_size=70))
def test_the_longest_common_subsequence_is_that_of_the_table(a: list[str], b: list[str]) -> None:
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    assert common(a, b) == common(b, a) == row[-1]


# A custom function


def custom(place: Path, body: str) -> str:
    (place / "mine.py").write_text(body, encoding="utf-8")
    return f"{place / 'mine.py'}:mark"


def test_a_function_of_the_user_grades(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("HALF = 0.5\n")
    body = "from beside import HALF\ndef mark(answer, expected, row):\n    assert row['row'] == 't.jsonl:1'\n"
    grader = load_custom(
        custom(tmp_path, body + "    return True if answer == expected else HALF * (expected in answer)\n")
    )
    assert grader("a", wanted("a")) == Verdict(correct=True, score=1.0, reason="mark 1.000")
    assert grader("a b", wanted("a")) == Verdict(correct=False, score=0.5, reason="mark 0.500")
    assert grader("b", wanted("a")).score == 0


@pytest.mark.parametrize(
    "body,says",
    [
        ("def mark(answer, expected, row):\n    return 1 / 0\n", "t.jsonl:1 .*raised ZeroDivisionError"),
        ("def mark(answer, expected, row):\n    return 1.5\n", r"t.jsonl:1 .*gave 1\.5"),
        ("def mark(answer, expected, row):\n    return float('nan')\n", "gave nan"),
        ("def mark(answer, expected, row):\n    return None\n", "gave None"),
        ("def mark(answer, expected, row):\n    raise SystemExit(0)\n", "t.jsonl:1 .*raised SystemExit: 0"),
    ],
)
def test_what_a_function_does_wrong_is_told_with_the_row(tmp_path: Path, body: str, says: str) -> None:
    grader = load_custom(custom(tmp_path, body))
    with pytest.raises(EvalError, match=f"E-EVAL-202.*{says}"):
        grader("a", wanted("a"))


@pytest.mark.parametrize(
    "body,says",
    [
        ("other = 1\n", "no function 'mark'"),
        ("import nowhere_at_all\nmark = 1\n", "ModuleNotFound"),
        ("mark = 1\n", "no function 'mark'"),
        (
            "import sys\ndef mark(answer, expected, row):\n    return 1\nsys.exit(3)\n",
            "cannot be imported: SystemExit: 3",
        ),
        ("def mark(:\n", "SyntaxError"),
        ("def mark(answer):\n    return 1\n", r"takes \(answer\), and is given \(answer, expected, row\)"),
        ("def mark(answer, expected, row, more):\n    return 1\n", r"Define mark\(answer, expected, row\)"),
    ],
)
def test_a_function_that_is_not_there_or_takes_something_else(tmp_path: Path, body: str, says: str) -> None:
    with pytest.raises(EvalError, match=f"E-EVAL-202.*{says}"):
        load_custom(custom(tmp_path, body))
    with pytest.raises(EvalError, match="does not exist"):
        load_custom(f"{tmp_path / 'gone.py'}:mark")


RECIPE = "name: r\nmodel: m\ndata: {train: rows.jsonl}\nevaluation:\n  metric: "


def test_recipes_name_metrics(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    (tmp_path / "rows.jsonl").write_text("{}\n")
    file.write_text(RECIPE + "{kind: custom, function: 'sub.mine:mark'}\n")
    metric = load_recipe(file).evaluation.metric
    assert isinstance(metric, CustomMetric)
    assert metric.function == f"{tmp_path.resolve() / 'sub' / 'mine.py'}:mark"
    file.write_text(RECIPE + "rouge_l\n")
    assert load_recipe(file).evaluation.metric.kind == "rouge_l"
    for bad in ("{kind: custom}", "{kind: custom, function: mine}", "{kind: bleu}"):
        file.write_text(RECIPE + bad + "\n")
        with pytest.raises(RecipeError, match="E-RECIPE"):
            load_recipe(file)


def test_metrics_by_name_and_expected_answers_that_fit() -> None:
    said: list[str] = []
    for name in METRICS:
        assert grading_of(metric_named(name), said.append, allow_code=False).grader is METRICS[name]
    assert not said
    for name in ("bleu", "custom"):
        with pytest.raises(UsageError, match="E-CLI-101"):
            metric_named(name)
    calls = grading_of(metric_named("tool_calls"), said.append, allow_code=False)
    check_fit(calls, [wanted('{"name": "f", "arguments": {}}', ToolCall(name="f", arguments={}))])
    with pytest.raises(EvalError, match=r"E-EVAL-201 t.jsonl:1 .*f is not called"):
        check_fit(calls, [wanted("call f", ToolCall(name="f", arguments={}))])


def test_lines_keep_what_grades_them() -> None:
    row = wanted("x", ToolCall(name="f", arguments={"a": [1]}))
    (line,) = unjudged([row], [Answer(text="y", num_tokens=3, stopped=True)])
    assert question_of(json.loads(json.dumps(line))) == row
    graded = regrade([line], METRICS["rouge_l"])
    assert graded[0]["score"] == 0
    assert not graded[0]["correct"]
    fields = regrade(graded, METRICS["tool_calls"])
    assert "parts" not in fields[0]
