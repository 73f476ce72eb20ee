"""pass@k: programs that answers hold, run against the tests that the rows expect (Chen et al. 2021, arXiv 2107.03374)."""

from __future__ import annotations

import ast
import math
import re
import textwrap

from educe.evaluate.jail.outside import run_program
from educe.evaluate.metrics.question import Question, judged
from educe.types import Verdict

_FENCE = re.compile(r"^```[ \t]*([\w+-]*)[^\n]*\n(.*?)^```", re.M | re.S)
_PYTHON = ("", "python", "py", "python3")


def grade_code(answer: str, question: Question) -> Verdict:
    """The answer's program runs, then the expected text, a program that ends with an error where the answer is wrong.

    The answer's program is its fenced block of Python, the longest of several, or all of it; it stands behind the definitions that
    the last question begins with, where that holds any, so that an answer may go on with them or write them anew. Runs foreign
    code: only for whoever consented.
    """
    ran = run_program(program_of(answer, question), question.expected)
    return judged(not ran.failed, ran.failed or "the test passes")


def no_test(expected: str) -> str:
    """Why an expected text tests no program, in words; "" where it may. It is not run."""
    try:
        tree = ast.parse(expected)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as e:
        return f"it is no Python program ({e})"
    tests = any(isinstance(node, (ast.Assert, ast.Call, ast.Raise)) for node in ast.walk(tree))
    return "" if tests else "it asserts nothing, calls nothing and raises nothing"


def program_of(answer: str, question: Question) -> str:
    """What runs before the test."""
    start = _definitions(str(question.prompt[-1]["content"])) if question.prompt else ""
    code = _code_in(answer)
    if not start:
        return code
    indented = code if code[:1] in (" ", "\t") else textwrap.indent(code, "    ")
    for whole in (f"{start}\n{code}", f"{start}\n{indented}"):
        if _parses(whole):  # the rest of a body, its first line perhaps without the indentation that the prompt gave
            return whole
    return code


def pass_at_k(num: int, num_right: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k answers is right, from `num` of which `num_right` are: 1 - C(n-c, k) / C(n, k)
    as a product that neither overflows nor cancels (Chen et al. 2021, section 2.1). Raises `ValueError`."""
    if not 0 <= num_right <= num or not 1 <= k <= num:
        raise ValueError(f"need 0 <= right <= answers and 1 <= k <= answers, got {num_right}, {num} and {k}")
    if num - num_right < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(num - num_right + 1, num + 1))


def _code_in(text: str) -> str:
    blocks = [m[2] for m in _FENCE.finditer(text) if m[1].lower() in _PYTHON]
    return max(blocks, key=len) if blocks else text


def _definitions(text: str) -> str:
    """The code of a question, if it is Python that defines or imports something."""
    code = _code_in(text)
    kinds = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
    for whole in (code, f"{code.rstrip()}\n    pass\n"):  # a signature alone is no whole function
        try:
            tree = ast.parse(whole)
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            continue
        return code if any(isinstance(node, kinds) for node in tree.body) else ""
    return ""


def _parses(code: str) -> bool:
    try:
        compile(code, "answer", "exec", dont_inherit=True)  # and not only parsed: a `return` may stand in no function
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return True
