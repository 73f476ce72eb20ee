"""What the documents say can be done, can be done."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import sys
from pathlib import Path
from typing import get_args

import click
import educe
import pytest
from educe.cli.main import cli
from educe.config import load_recipe, parse_recipe
from educe.config.recipe import CustomMetric, PlainMetric
from educe.errors import CODES
from educe.evaluate.metrics import Question
from educe.evaluate.metrics.custom import load_custom

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


EVALUATION = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def test_the_metric_in_the_docs_grades(tmp_path: Path) -> None:
    (recipe,), (code,) = blocks("yaml", EVALUATION), blocks("python", EVALUATION)
    (tmp_path / "grade.py").write_text(code, encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(f"name: r\nmodel: m\ndata: {{train: rows.jsonl}}\n{recipe}", encoding="utf-8")
    (tmp_path / "rows.jsonl").touch()
    metric = load_recipe(tmp_path / "recipe.yaml").evaluation.metric
    assert isinstance(metric, CustomMetric)
    grader = load_custom(metric.function)
    question = Question(row="t.jsonl:1", prompt=({"role": "user", "content": "6 * 7?"},), expected="42")
    given = {"It is 42": 1.0, "21.0": 0.5, "none": 0.0, "-1,000": 0.0}
    assert {answer: grader(answer, question).score for answer in given} == given
    assert [answer for answer in given if grader(answer, question).correct] == ["It is 42"]


def test_every_metric_is_in_the_docs() -> None:
    named = {k for m in (PlainMetric, CustomMetric) for k in get_args(m.model_fields["kind"].annotation)}
    assert {*re.findall(r"^\| `(\w+)`", EVALUATION, re.M)} == named


def test_recipes_in_the_readme_are_valid() -> None:
    assert blocks("yaml")
    for text in blocks("yaml"):
        parse_recipe(text, "README.md")


@pytest.mark.parametrize(
    "line",
    [x for t in (README, EVALUATION) for b in blocks("sh", t) for x in b.splitlines() if x.startswith("educe ")],
)
def test_commands_in_the_readme_parse(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    command = cli.commands[words[0]]
    context = command.make_context(words[0], words[1:])
    assert isinstance(context, click.Context)


def test_python_in_the_readme_calls_what_exists() -> None:
    """Every call of `educe.X(...)` and `run.X(...)` binds to the real signature."""
    calls = [n for b in blocks("python") for n in ast.walk(ast.parse(b)) if isinstance(n, ast.Call)]
    checked = 0
    for call in calls:
        if not isinstance(call.func, ast.Attribute) or not isinstance(call.func.value, ast.Name):
            continue
        owner = {"educe": educe, "run": educe.Run}.get(call.func.value.id)
        if owner is None:
            continue
        target = getattr(owner, call.func.attr)
        args = [ast.literal_eval(a) for a in call.args]
        kwargs = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        inspect.signature(target).bind(*([None] if owner is educe.Run else []), *args, **kwargs)
        checked += 1
    assert checked >= 6


def test_error_page_is_current() -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    from errors_page import page

    assert (ROOT / "docs" / "errors.md").read_text(encoding="utf-8") == page()
    assert len(CODES) > 30


def test_links_in_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target
