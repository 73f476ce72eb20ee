"""The house rules that no linter knows: file and function sizes, no junk rooms, tests and bench alone name ../shared.

Run by `make check`. Exits 1 with one line per breach.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAX_FILE, MAX_FUNCTION = 400, 80
JUNK = {"utils", "helpers", "common", "misc"}


def breaches() -> list[str]:
    """Every breach in the package and the tests."""
    found = []
    for path in sorted([*ROOT.glob("educe/**/*.py"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("tools/*.py")]):
        name = path.relative_to(ROOT).as_posix()
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > MAX_FILE:
            found.append(f"{name}: {text.count(chr(10))} lines, at most {MAX_FILE}")
        if JUNK & set(path.with_suffix("").parts):
            found.append(f"{name}: a room needs a name that says what it is for")
        if name.startswith("educe/") and "../shared" in text:
            found.append(f"{name}: names a directory that users do not have")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION:
                    found.append(f"{name}:{node.lineno}: {node.name} has {lines} lines, at most {MAX_FUNCTION}")
    loop = (ROOT / "educe/training/loop.py").read_text(encoding="utf-8")
    train = next(n for n in ast.parse(loop).body if isinstance(n, ast.FunctionDef) and n.name == "train")
    if (train.end_lineno or 0) - train.lineno + 1 > MAX_FUNCTION:
        found.append("educe/training/loop.py: the heart does not fit on a page")
    return found


if __name__ == "__main__":
    problems = breaches()
    print("\n".join(problems) if problems else "house: in order")
    sys.exit(1 if problems else 0)
