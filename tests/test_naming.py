"""Names of rows: short, and no two alike."""

from __future__ import annotations

import json
from pathlib import Path

import educe
import pytest
from educe.config import load_recipe
from educe.recipes.answers import questions_of
from educe.recipes.naming import row_names
from educe.types import Source
from hypothesis import given
from hypothesis import strategies as st

FILES = st.lists(st.sampled_from(["a", "b", "t.jsonl"]), min_size=1, max_size=4).map("/".join)
ROWS = st.lists(
    st.builds(
        lambda file, line, item: Source(file=file, line=line, item=item),
        FILES,
        st.integers(1, 3),
        st.none() | st.integers(0, 2),
    ),
    max_size=12,
)


@given(ROWS)
def test_no_two_rows_have_one_name(sources: list[Source]) -> None:
    names = row_names(sources)
    assert len(set(names)) == len(names) == len(sources)
    for name, s in zip(names, sources, strict=True):
        assert f"{s.file}:{s.line}".endswith(name.split(" (")[0].split("[")[0])


@pytest.mark.parametrize(
    "files, names",
    [
        (["x/test.jsonl", "x/test.jsonl"], ["test.jsonl:1", "test.jsonl:1 (2)"]),
        (["/d/a/test.jsonl", "/d/b/test.jsonl"], ["a/test.jsonl:1", "b/test.jsonl:1"]),
        (["test.jsonl", "a/test.jsonl", "c/dev.jsonl"], ["test.jsonl:1", "a/test.jsonl:1", "dev.jsonl:1"]),
    ],
)
def test_a_path_is_as_long_as_it_must_be(files: list[str], names: list[str]) -> None:
    assert row_names([Source(file=f, line=1) for f in files]) == names


def test_several_rows_of_a_line_have_their_numbers() -> None:
    assert row_names([Source(file="t.jsonl", line=3, item=i) for i in (0, 1)]) == ["t.jsonl:3[0]", "t.jsonl:3[1]"]


def test_files_of_one_name_give_questions_of_their_own_names(tmp_path: Path, tiny_model: Path) -> None:
    for place in ("a", "b"):
        rows = [json.dumps({"prompt": f"the {place} {i}", "completion": f"mat {i} {place}"}) for i in range(20)]
        (tmp_path / "d" / place).mkdir(parents=True)
        (tmp_path / "d" / place / "x.jsonl").write_text("\n".join(rows) + "\n")
    data = "{train: d, test: {kind: share, share: 0.5}, max_tokens: 128}"
    (tmp_path / "r.yaml").write_text(f"name: t\nmodel: {tiny_model}\ndata: {data}\n")
    prepared = educe.prepare(tmp_path / "r.yaml")
    asked = questions_of(prepared, load_recipe(tmp_path / "r.yaml"))
    names = [a.question.row for a in asked]
    assert len(set(names)) == len(names) > 5
    for a in asked:
        place, number = a.question.row[0], int(a.question.row.split(":")[1]) - 1
        assert a.question.row == f"{place}/x.jsonl:{number + 1}"
        assert a.question.expected == f"mat {number} {place}"
