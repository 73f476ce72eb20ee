"""P17: the recipe's metric is one that its held-out rows can be right by."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch")
from test_preflight import Bench, bench, found, lines  # noqa: F401


@pytest.mark.parametrize(
    "metric, verdict, says",
    [
        ("text", "skip", "loss"),
        ("exact", "pass", "fits the expected answers of 13 held-out"),
        ("json", "fail", "E-EVAL-201. held.jsonl:1 the expected answer is not JSON"),
        ("tool_calls", "fail", "E-EVAL-201. held.jsonl:1 the expected answer calls no tool"),
        ("pass_at_k", "fail", "E-EVAL-201. held.jsonl:1 the expected answer is no test"),
        ("{kind: custom, function: 'gone:mark'}", "fail", "gone.py does not exist"),
        ("{kind: custom, function: 'mine:gone'}", "fail", "mine.py has no function 'gone'"),
        ("{kind: custom, function: 'mine:mark'}", "pass", "13 held-out rows as far as is known before its code runs"),
    ],
)
def test_p17_a_metric_that_grades_no_row(bench: Bench, metric: str, verdict: str, says: str) -> None:  # noqa: F811
    """Nothing of it runs."""
    (bench.place / "mine.py").write_text("def mark(answer, expected, row):\n    return 1\nraise SystemExit\n")
    (bench.place / "held.jsonl").write_text("\n".join(lines(12, 100)) + "\n")
    held = "test: {kind: file, file: held.jsonl}, dev: {kind: share, share: 0.000001}"
    b = bench.before(bench.recipe(lines(12), f"max_tokens: 128, {held}", f"evaluation: {{metric: {metric}}}\n"))
    f = found(b, "P17")
    assert f.verdict == verdict
    assert says in str(f)


def answers_json(k: int) -> str:
    asked, answer = {"role": "user", "content": f"order {k} the user said"}, {"role": "assistant", "content": f"[{k}]"}
    return json.dumps({"messages": [asked, answer]})


TEXT = [json.dumps({"text": "the user said"})]


@pytest.mark.parametrize(
    "test, dev, verdict, says",
    [
        ([answers_json(1)], [answers_json(2)], "pass", "2 held-out rows"),
        ([answers_json(1)], lines(3, 50), "warn", "dev rows will not be graded while training"),
        (lines(3, 50), [answers_json(1)], "fail", "is not JSON"),  # what `eval` would refuse
        (TEXT, [answers_json(1)], "pass", "1 held-out rows"),  # text among the rows answers nothing
        ([answers_json(1)], TEXT, "pass", "1 held-out rows"),
        (TEXT, TEXT, "skip", "no answer is held out"),
    ],
)
def test_p17_goes_by_each_split(
    bench: Bench,  # noqa: F811
    test: list[str],
    dev: list[str],
    verdict: str,
    says: str,
) -> None:
    for name, rows in (("held", test), ("dev", dev)):
        (bench.place / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    held = "test: {kind: file, file: held.jsonl}, dev: {kind: file, file: dev.jsonl}"
    rows = [answers_json(k) for k in range(20, 32)]
    f = found(bench.before(bench.recipe(rows, f"max_tokens: 128, {held}", "evaluation: {metric: json}\n")), "P17")
    assert f.verdict == verdict, f
    assert says in str(f)
