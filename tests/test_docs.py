"""What the documents say can be done, can be done."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import sys
from pathlib import Path

import click
import educe
import pytest
from educe.cli.main import cli
from educe.config import parse_recipe
from educe.errors import CODES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_recipes_in_the_readme_are_valid() -> None:
    assert blocks("yaml")
    for text in blocks("yaml"):
        parse_recipe(text, "README.md")


@pytest.mark.parametrize("line", [x for b in blocks("sh") for x in b.splitlines() if x.startswith("educe ")])
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
