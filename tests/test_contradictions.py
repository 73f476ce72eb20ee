"""P16: one prompt, several answers: counted while rows are prepared, whatever the parts, and told where it matters."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")
from educe.recipes import build

from check_command import row
from test_preflight import Bench, bench, found, lines  # noqa: F401

GRADED = "train: {batch_tokens: 256, micro_batch_tokens: 128}\nevaluation: {metric: {kind: label}}\n"
FREE = "train: {batch_tokens: 256, micro_batch_tokens: 128}\n"
ALL = "max_tokens: 128, dev: {kind: file, file: held.jsonl}, test: {kind: file, file: test.jsonl}"


def look(bench: Bench, rows: list[str], rest: str = GRADED) -> tuple[Any, dict[str, Any]]:  # noqa: F811
    for name, start in (("held", 900), ("test", 950)):
        (bench.place / f"{name}.jsonl").write_text("\n".join(lines(3, start)) + "\n", encoding="utf-8")
    b = bench.before(bench.recipe(rows, ALL, rest))
    return found(b, "P16"), b.prepared.summary["contradictions"]


def test_it_counts_and_shows_two_places(bench: Bench) -> None:  # noqa: F811
    again = [row("the cat 3 sat", "yes"), row("the cat 3 sat", "no"), row("the cat 3 sat", "yes")]
    f, counted = look(bench, [*lines(30), *again])
    assert counted == {"prompts": 1, "rows": 3, "first": ["rows.jsonl:31", "rows.jsonl:32"]}
    assert (f.verdict, f.number) == ("warn", "9.1% of the rows")
    assert "such as rows.jsonl:31 and rows.jsonl:32: none of them can be learned" in f.evidence


def test_copies_and_other_system_prompts_contradict_nothing(bench: Bench) -> None:  # noqa: F811
    def with_system(system: str, answer: str) -> str:
        turns = json.loads(row("what now", answer))["messages"]
        return json.dumps({"messages": [{"role": "system", "content": system}, *turns]})

    rows = [
        *lines(10),
        *lines(2),
        with_system("be brief", "so"),
        with_system("be long", "so it is"),
        row("What now", "x"),
    ]
    f, counted = look(bench, rows)
    assert (f.verdict, counted["rows"]) == ("pass", 0)
    assert f.evidence == "every prompt has one answer"


@pytest.mark.parametrize(
    ("num", "rest", "verdict", "words"),
    [
        (1, GRADED, "warn", "none of them can be learned"),
        (1, FREE, "pass", "answers that differ"),
        (30, FREE, "pass", "look drawn by design"),
        (4, FREE, "warn", "none of them can be learned"),
    ],
)
def test_it_is_told_where_it_matters(bench: Bench, num: int, rest: str, verdict: str, words: str) -> None:  # noqa: F811
    twice = [row(f"ask {i} of it", answer) for i in range(num) for answer in ("one", "two")]
    f, _ = look(bench, [*lines(50), *twice], rest)
    assert (f.verdict, words in f.evidence) == (verdict, True)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), min_size=1, max_size=30))
def test_counts_are_those_of_a_plain_count(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[int, int]]
) -> None:
    answers = defaultdict(set)
    for asked, answer in pairs:
        answers[asked].add((asked, answer))
    bad = {asked for asked, found in answers.items() if len(found) > 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "open_store", lambda _: type("Store", (), {"rows": np.arange(len(pairs))}))
        patch.setattr(build, "_lines", lambda *_: iter([]))
        asked = np.array([a for a, _ in pairs], np.uint64)
        rows = np.array([a * 10 + b for a, b in pairs], np.uint64)
        made = build._contradictions(Path(), rows, asked)
    assert (made["prompts"], made["rows"]) == (len(bad), sum(a in bad for a, _ in pairs))
