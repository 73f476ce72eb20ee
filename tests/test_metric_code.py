"""pass@k: programs pass, fail and attack in the locked room; the estimator; consent."""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path

import pytest
from educe.cli.screens import console, show_scores
from educe.data.reading import Expression
from educe.errors import EvalError
from educe.evaluate.compare import regrade, score, unjudged
from educe.evaluate.jail import outside
from educe.evaluate.jail.outside import Limits, Ran, run_program, what_stays_open
from educe.evaluate.metrics import Question
from educe.evaluate.metrics.code import grade_code, pass_at_k, program_of
from educe.recipes.grading import check_fit, grading_of, metric_named
from educe.types import Answer
from hypothesis import given, settings
from hypothesis import strategies as st

TEST = "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(-1) == 0\n\ncheck(add_one)\n"
PROMPT = 'from typing import List\n\n\ndef add_one(x: int) -> int:\n    """One more."""\n'
SHORT = Limits(cpu_s=1, wall_s=15.0, memory_bytes=2**28)


def asked(prompt: str = PROMPT, expected: str = TEST) -> Question:
    return Question(row="t.jsonl:1", prompt=({"role": "user", "content": prompt},), expected=expected)


@pytest.mark.parametrize(
    "prompt,answer,right",
    [
        (PROMPT, "    return x + 1\n", True),  # the rest of the body
        (PROMPT, "return x + 1", True),
        (PROMPT, "Sure!\n```python\ndef add_one(x: int) -> int:\n    return x + 1\n```\nDone.", True),
        (PROMPT, "```\ndef add_one(x: List) -> int:\n    return x + 1\n```", True),  # with what the prompt imports
        (f"Complete this:\n```python\n{PROMPT}```", "```python\n    return x + 1\n```", True),
        ("def add_one(x):", "    return x + 1", True),
        ("Write add_one.", "def add_one(x):\n    return x + 1", True),
        (PROMPT, "    return x + 2\n", False),
        (PROMPT, "    return abs(x) + 1\n", False),  # right for the first assert alone
        (PROMPT, "def add_1(x):\n    return x + 1", False),
        (PROMPT, "It adds one.", False),
        ("Write add_one.", "def add_one(x)\n    return x + 1", False),
        (PROMPT, "", False),
    ],
)
def test_programs_pass_and_fail(prompt: str, answer: str, right: bool) -> None:
    v = grade_code(answer, asked(prompt))
    assert v.correct is right, v.reason
    assert v.score == right
    assert v.reason


def test_the_program_of_an_answer() -> None:
    assert program_of("```bash\nls\n```\n```py\nx = 1\n```", asked("Write it.")) == "x = 1\n"
    assert program_of("x = 1", asked("import this thing")) == "x = 1"
    assert program_of("return x", asked("def f(x):")) == "def f(x):\n    return x"


GOOD = "def add_one(x): return x + 1\n"
ATTACKS = {
    "exit before the asserts": ("import sys; sys.exit(0)", "ended the program"),
    "exit below Python": (f"{GOOD}import os; os._exit(0)", "ended before its test did"),
    "exit when called": ("import os\ndef add_one(x): os._exit(0)", "ended before its test did"),
    "quit when called": ("def add_one(x): raise SystemExit(0)", "ended the program"),
    "a fake pass is printed": ("print('passed'); print('{\"passed\": true}')", "NameError"),
    "a fake pass on every pipe": (
        "import os\nfor f in range(100):\n  try: os.write(f, b'{\"passed\": \"0\"}\\n')\n  except OSError: pass\nos._exit(0)",
        "ended before its test did",
    ),
    "the checker is changed": (
        "import builtins\nbuiltins.AssertionError = SystemExit\nbuiltins.exec = print\ndef add_one(x): return 7", "AssertionError"
    ),
    "the test's library is changed": ("import math\nmath.isclose = lambda *a: True\ndef add_one(x): return 7", "AssertionError"),
    "check is defined": ("def check(f): pass\ndef add_one(x): return 7", "AssertionError"),
    "a trace function swallows": (
        "import sys\nsys.settrace(lambda *a: sys.exit(0))\ndef add_one(x): return 7", "AssertionError"
    ),
    "endless": ("while True: pass", "1 s of CPU"),
    "memory": ("x = bytearray(10**10)", "MemoryError"),
    "memory by and by": ("x = []\nwhile True: x.append(bytearray(10**7))", "MemoryError"),
    "deep": ("def add_one(x): return add_one(x)", "RecursionError"),
    "a file too large": ("open('a', 'wb').write(bytes(10**8))", "File too large"),
    "secrets of the environment": ("import os\nraise ValueError(os.environ.get('EDUCE_TEST_SECRET'))", "ValueError: None"),
}  # fmt: skip
LOCKED = {
    "fork bomb": ("import os\nwhile True: os.fork()", "not permitted"),
    "a program": ("import subprocess; subprocess.run(['/bin/true'])", "not permitted"),
    "a thread": ("import threading; threading.Thread(target=print).start()", "can't start new thread"),
    "write outside": ("open('OUTSIDE', 'w').write('x')", "Permission denied"),
    "remove outside": ("import os; os.remove('KEPT')", "Permission denied"),
    "change modes outside": ("import os; os.chmod('KEPT', 0)", "not permitted"),
    "read outside": ("raise ValueError(open('KEPT').read())", "Permission denied"),
    "a link outside": ("import os; os.symlink('KEPT', 'a'); raise ValueError(open('a').read())", "Permission denied"),
    "the parent's environment": (
        "import os; raise ValueError(open(f'/proc/{os.getppid()}/environ').read())",
        "Permission denied",
    ),
    "the network": ("import socket; socket.create_connection(('127.0.0.1', 9))", "not permitted"),
    "kill the parent": ("import os; os.kill(os.getppid(), 9)", "not permitted"),
    "empty a file outside": ("import os; os.truncate('KEPT', 0)", "not permitted"),
    "slow the parent": ("import os; os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)", "not permitted"),
    "pin the parent": ("import os; os.sched_setaffinity(os.getppid(), {0})", "not permitted"),
    "the parent's turns": (
        "import os; os.sched_setscheduler(os.getppid(), os.SCHED_IDLE, os.sched_param(0))",
        "not permitted",
    ),
    "limits raised": ("import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1))", "not "),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_fail(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDUCE_TEST_SECRET", "hunter2")
    attack, why = ATTACKS[name]
    test = "import math\nassert math.isclose(add_one(1), 2)\n" if "library" in name else TEST
    ran = run_program(attack, test, SHORT)
    assert why in ran.failed


@pytest.mark.skipif(sys.platform != "linux", reason="Landlock and seccomp are Linux's")
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", LOCKED)
def test_what_is_locked_on_linux(
    name: str, old: bool, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By this kernel, and as before Linux 6.2, whose Landlock is of the second version."""
    if old:
        newest = "libc.syscall(_RULES, None, 0, 1)"
        before, made, after = outside._INSIDE.read_text().partition(newest)
        assert made
        inside = tmp_path_factory.mktemp("old") / "inside.py"
        inside.write_text(f"{before}min(2, {newest}){after}")
        monkeypatch.setattr(outside, "_INSIDE", inside)
    if what_stays_open():
        pytest.skip(f"this kernel locks less: {what_stays_open()}")
    kept = tmp_path / "kept"
    kept.write_text("private")
    kept.chmod(0o644)
    attack, why = LOCKED[name]
    ran = run_program(attack.replace("OUTSIDE", str(tmp_path / "made")).replace("KEPT", str(kept)), TEST, SHORT)
    assert why in ran.failed
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
    assert (kept.read_text(), kept.stat().st_mode & 0o777) == ("private", 0o644)


def test_a_program_that_sleeps_is_killed_with_its_group_and_leaves_nothing() -> None:
    began = time.monotonic()
    ran = run_program("import os, time\nos.close(1)\ntime.sleep(60)", TEST, Limits(wall_s=1.5))
    assert "longer than 1.5 s" in ran.failed
    assert time.monotonic() - began < 15


def test_a_right_program_may_use_the_library_and_its_own_directory() -> None:
    code = "import collections.abc, decimal, os, tempfile\nopen('a', 'w').write('x')\nassert os.listdir() == ['a']\n"
    test = f"import collections.abc\nassert issubclass(list, collections.abc.Sequence)\n{TEST}"
    assert run_program(code + GOOD, test, SHORT) == Ran(failed="", still_open=what_stays_open())


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 200), st.data())
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(n: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    assert pass_at_k(n, c, k) == pytest.approx(1 - math.comb(n - c, k) / math.comb(n, k), abs=1e-12)
    assert pass_at_k(n, c, 1) == pytest.approx(c / n)


def test_pass_at_k_for_many_answers_and_impossible_numbers() -> None:
    assert pass_at_k(100_000, 1, 10) == pytest.approx(1e-4)
    for n, c, k in ((0, 0, 1), (3, 4, 1), (3, 1, 4), (3, -1, 1), (3, 1, 0)):
        with pytest.raises(ValueError, match="need"):
            pass_at_k(n, c, k)


def test_nothing_runs_without_consent() -> None:
    said: list[str] = []
    with pytest.raises(EvalError, match=r"E-EVAL-303.*--allow-code"):
        grading_of(metric_named("pass_at_k"), said.append, allow_code=False)
    grading = grading_of(metric_named("pass_at_k"), said.append, allow_code=True)
    assert len(said) == len(what_stays_open())
    check_fit(grading, [asked()])


def test_a_test_that_tests_nothing_is_refused_and_humanevals_are_read_with_their_call() -> None:
    """Rows of HumanEval define `check` and leave the call to whoever runs them."""
    grading = grading_of(metric_named("pass_at_k"), print, allow_code=True)
    row = {"prompt": PROMPT, "entry_point": "add_one", "test": TEST.replace("\ncheck(add_one)\n", "")}
    with pytest.raises(EvalError, match=r"E-EVAL-201 t\.jsonl:1 .*passes without any program.*check\(add_one\)"):
        check_fit(grading, [asked(), asked(expected=row["test"])])
    written = (
        Path(__file__).parents[1].joinpath("README.md").read_text().partition('response: "join')[2].partition('"')[0]
    )
    test = Expression("join" + written.replace("\\n", "\n"), "response").of(row)
    check_fit(grading, [asked(expected=test)])
    assert grading.grader("return x + 1", asked(expected=test)).correct
    assert not grading.grader("return x", asked(expected=test)).correct


def test_several_answers_to_a_row_are_one_score() -> None:
    texts = ["return x + 1", "return x", "return x", "return x + 1", *["return 0"] * 4]
    answers = [Answer(text=t, num_tokens=i, stopped=True) for i, t in enumerate(texts)]
    lines = regrade(unjudged([asked(), asked()], answers), grade_code)
    assert [line["score"] for line in lines] == [0.5, 0]
    assert lines[0]["parts"] == {"pass@2": [pytest.approx(1 - 1 / 6), 1], "pass@4": [1, 1]}
    assert [(line["answer"], line["num_tokens"], len(line["others"])) for line in lines] == [
        ("return x + 1", 0, 3),
        ("return 0", 4, 3),
    ]
    assert lines[0]["reason"].startswith("2 of 4 answers right")
    found = score({"untouched": lines, "tuned": lines}, "pass_at_k", {}, None)
    assert (found["systems"]["tuned"]["value"], found["systems"]["tuned"]["correct"]) == (0.25, 0)
    with console.capture() as screen:
        show_scores(found)
    assert "fully right" in screen.get()
    assert "0/2" in screen.get()
    assert found["systems"]["tuned"]["parts"]["pass@2"]["value"] == pytest.approx(5 / 12)
    assert found["comparisons"][0]["difference"]["value"] == 0


@pytest.mark.skipif(os.name != "posix", reason="limits are POSIX's")
def test_a_flood_is_cut() -> None:
    assert run_program("import os\nwhile True:\n  for f in range(3, 20):\n    try: os.write(f, b'x' * 4000)\n    except OSError: pass",
                       TEST, SHORT).failed  # fmt: skip
