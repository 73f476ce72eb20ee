"""A user's own metric: a function that the recipe names, which is the consent to run it."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from educe.errors import Ended, EvalError
from educe.evaluate.metrics.question import Grader, Question
from educe.types import Verdict

Scoring = Callable[[str, str, dict[str, Any]], Any]
_TAKES = "(answer, expected, row)"


def find_custom(entry: str) -> tuple[Path, str]:
    """The file and the function of `file.py:function`; nothing of it runs. Raises `EvalError` where they are not there."""
    file, _, name = entry.rpartition(":")
    path = Path(file)
    if path.suffix != ".py" or not path.is_file():
        fix = "Name a function in a Python file beside the recipe, module:function."
        what = "is no Python file" if path.exists() else "does not exist"
        raise EvalError(202, entry, f"{path} {what}.", fix)
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError) as e:
        raise EvalError(202, entry, f"cannot be read: {type(e).__name__}: {e}", "Mend the file.") from e
    if not any(_names(node, name) for node in ast.walk(tree)):
        raise _absent(entry, path, name)
    return path, name


def _names(node: ast.AST, name: str) -> bool:
    """Whether a part of a program may give something that name."""
    if isinstance(node, ast.alias):
        return name in (node.asname or node.name, node.name) or node.name == "*"
    if isinstance(node, ast.Constant):  # globals()["mark"] = ...
        return bool(node.value == name)
    return name in (getattr(node, "name", None), getattr(node, "id", None))


def _absent(entry: str, path: Path, name: str) -> EvalError:
    return EvalError(202, entry, f"{path.name} has no function {name!r}.", f"Define {name}{_TAKES}.")


def load_custom(entry: str) -> Grader:
    """The grader of `file.py:function`. The file's directory is searched for what it imports, while it is loaded.

    Raises `EvalError` with what the file raised, for a function that is not there, or one that takes other arguments.
    """
    path, name = find_custom(entry)
    spec = importlib.util.spec_from_file_location(f"educe_custom_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # noqa: PT018  (of a file that ends in .py)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except Ended:
        raise
    except (Exception, SystemExit) as e:
        raise EvalError(202, entry, f"cannot be imported: {type(e).__name__}: {e}", "Mend the file.") from e
    finally:
        sys.path.remove(str(path.parent))
    function = getattr(module, name, None)
    if not callable(function):
        raise _absent(entry, path, name)
    try:
        inspect.signature(function).bind("", "", {})
    except TypeError as e:
        fix = f"Define {name}{_TAKES}: two texts, and a dict of the row (docs/evaluation.md)."
        raise EvalError(202, entry, f"takes {inspect.signature(function)}, and is given {_TAKES}.", fix) from e
    except ValueError:  # written in C: its signature is not known
        pass
    return lambda answer, question: _graded(function, entry, answer, question)


def _graded(function: Scoring, entry: str, answer: str, question: Question) -> Verdict:
    """Its verdict of one row. What it raises, and what is no score, ends the grading: a row that is left out would change the mean."""
    row = {
        "row": question.row,
        "prompt": [dict(m) for m in question.prompt],
        "calls": [{"name": c.name, "arguments": dict(c.arguments)} for c in question.calls],
    }
    try:
        score = function(answer, question.expected, row)
    except Ended:
        raise
    except (Exception, SystemExit) as e:
        found = f"{entry} raised {type(e).__name__}: {e}"
        raise EvalError(
            202, question.row, found, "Mend it and run this again; `educe eval --regrade` grades stored answers."
        ) from e
    if not isinstance(score, (bool, int, float)) or not math.isfinite(score) or not 0 <= score <= 1:
        found = f"{entry} gave {score!r:.60}."
        raise EvalError(202, question.row, found, "Give a number from 0 to 1, or True or False.")
    return Verdict(correct=score == 1, reason=f"{entry.rpartition(':')[2]} {float(score):.3f}", score=float(score))
