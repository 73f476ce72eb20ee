"""Preparing in parts: the result is that of one part, to the byte, and a process that dies is told."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from educe.chat.tokens import load_tokenizer
from educe.config import Recipe
from educe.data.sources import read_rows, read_span, spans_of
from educe.recipes import build as building
from educe.recipes.prepare import inputs_of
from hypothesis import given, settings
from hypothesis import strategies as st

ROWS = [
    *(
        {"messages": [{"role": "user", "content": f"q {k}"}, {"role": "assistant", "content": f"the cat {k}"}]}
        for k in range(60)
    ),
    {"messages": [{"role": "user", "content": "q 1"}, {"role": "assistant", "content": "the cat 1"}]},
    {"messages": [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "a<|im_end|>"}]},
    {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "\n\ny"}] * 2},
    {"nothing": 1},
]


def _prepared(place: Path, file: Path, model: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    monkeypatch.setattr(building, "num_hands", lambda num_bytes: min(number, 3))
    monkeypatch.setattr(building, "MOST_BYTES", 10**9 if number == 1 else file.stat().st_size // number + 1)
    data = {"train": str(file), "dev": {"kind": "share", "share": 0.1}, "test": {"kind": "share", "share": 0.1}}
    recipe = Recipe.model_validate({"name": "a", "model": str(model), "data": data})
    out = place / f"parts{number}"
    inputs, names = inputs_of(recipe)
    building.build(recipe, load_tokenizer(model), inputs, names, out, {}, print)
    files = {str(f.relative_to(out)): f.read_bytes() for f in sorted(out.rglob("*")) if f.is_file()}
    del files["manifest.json"]  # holds the time
    return files


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")
def test_parts_in_processes_give_what_one_gives(
    tmp_path: Path, tiny_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in ROWS) + "{broken\n", encoding="utf-8")
    one = _prepared(tmp_path, file, tiny_tokenizer_dir, 1, monkeypatch)
    for number in (2, 5):
        many = _prepared(tmp_path, file, tiny_tokenizer_dir, number, monkeypatch)
        assert many == one
    ledger = [json.loads(line) for line in one["ledger.jsonl"].splitlines()]
    assert [line["line"] for line in ledger] == list(range(1, len(ROWS) + 2))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(['{"a": 1}', '{"b": "é\u2028"}', "", "  ", "{bad", '{"c": "x"}']), max_size=12),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
    st.integers(1, 6),
)
def test_spans_of_a_file_are_the_file(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], end: str, last: bool, number: int
) -> None:
    file = tmp_path_factory.mktemp("spans") / "rows.jsonl"
    file.write_bytes(("\ufeff" + end.join(['{"first": 0}', *lines]) + (end if last else "")).encode())

    def shown(rows: Any) -> list[tuple[int, str]]:
        return [(source.line, str(row)) for source, row in rows]

    about = max(1, file.stat().st_size // number)
    assert shown(row for span in spans_of(file, about) for row in read_span(span)) == shown(read_rows(file))
