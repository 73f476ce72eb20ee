"""Names of rows: short, and no two alike."""

from __future__ import annotations

import pytest
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
