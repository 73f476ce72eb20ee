"""Strict, line-accurate JSON: what is refused, with its place, and what only looks wrong."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from educe.errors import Refusal, RunError
from educe.files import jsonl
from educe.files.jsonl import MAX_DEPTH, parse_json, read_jsonl, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

few = settings(max_examples=50, deadline=None, derandomize=True)
text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=20)
leaves = (
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False) | text
)
values = st.recursive(leaves, lambda v: st.lists(v, max_size=4) | st.dictionaries(text, v, max_size=4), max_leaves=12)
objects = st.dictionaries(text, values, max_size=4)


@few
@given(values, st.booleans())
def test_what_json_can_hold_is_read_unchanged(value: Any, ascii_only: bool) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=ascii_only), "f:1") == value


@pytest.mark.parametrize(
    "row, code, found",
    [
        ('{"a": 1, "a": 2}', 103, "'a' appears twice"),
        ('{"a": {"b": 1, "b": 1}}', 103, "'b' appears twice"),
        ('{"a": NaN}', 104, "NaN"),
        ('{"a": [Infinity]}', 104, "Infinity"),
        ('{"a": -Infinity}', 104, "-Infinity"),
        ('{"a": 1e999}', 104, "too large"),
        ('{"a": -1e999}', 104, "too large"),
        ('{"a": ' + "9" * 5000 + "}", 104, "5000 digits"),
        ('{"a": "\\ud83d"}', 104, "surrogate"),
        ('{"a": ["x", {"\\ude00": 1}]}', 104, "surrogate"),
        ('{"a": "\ud83d"}', 104, "surrogate"),
        ('{"a": "b\\u0000"}', 104, "NUL"),
        ('{"a\\u0000": 1}', 104, "NUL"),
        ('{"a": "\x00"}', 102, "control character"),
        ('{"a": 1} {"b": 2}', 102, "Extra data"),
        ('{"a": 1,}', 102, "not JSON"),
        ('{"a": 1} // no', 102, "Extra data"),
        ("{'a': 1}", 102, "not JSON"),
        ('{"a": 1', 102, "not JSON"),
        ("", 102, "not JSON"),
    ],
)
def test_what_the_standard_parser_lets_pass_is_refused(row: str, code: int, found: str) -> None:
    refusal = parse_json(row, "f:7")
    assert isinstance(refusal, Refusal)
    assert refusal.code == f"E-DATA-{code}"
    assert refusal.where.startswith("f:7")
    assert found in refusal.found


@pytest.mark.parametrize(
    "row, value",
    [
        ('{"a": "\\ud83d\\ude00"}', {"a": "😀"}),  # a pair is a character
        ('{"a": "in C: \\\\u0000 and \\\\ud83d"}', {"a": "in C: \\u0000 and \\ud83d"}),  # text about escapes
        ('{"a": "NaN", "b": "1e999"}', {"a": "NaN", "b": "1e999"}),
        ('{"a": 1e-999, "date": "2024-01-01"}', {"a": 0.0, "date": "2024-01-01"}),
        ('{"a": {"x": 1}, "b": {"x": 1}}', {"a": {"x": 1}, "b": {"x": 1}}),
        ('{"a": "[[[\\"{{{"}'.replace("[[[", "[" * 500), {"a": "[" * 500 + '"{{{'}),
    ],
)
def test_what_only_looks_wrong_is_read(row: str, value: Any) -> None:
    assert parse_json(row, "f:1") == value


@pytest.mark.parametrize("opening, closing", ["[]", ("{" + '"a":', "}")])
def test_depth_is_limited_without_recursion(opening: str, closing: str) -> None:
    inside = "1" if opening != "[" else ""
    assert not isinstance(parse_json(opening * MAX_DEPTH + inside + closing * MAX_DEPTH, "f:1"), Refusal)
    for depth in (MAX_DEPTH + 1, 100_000):
        for row in (opening * depth + inside + closing * depth, opening * depth):
            refusal = parse_json(row, "f:1")
            assert isinstance(refusal, Refusal)
            assert refusal.code == "E-DATA-102"


@few
@given(text, st.integers(0, 5))
def test_the_column_counts_characters(content: str, blanks: int) -> None:
    before = json.dumps({"k": content}, ensure_ascii=False)[:-1] + "," + " " * blanks
    refusal = parse_json(before + '"b": oops}', "f:3")
    assert isinstance(refusal, Refusal)
    assert refusal.where == f"f:3:{len(before) + 6}"


def test_a_whole_file_is_placed_by_line_and_column() -> None:
    refusal = parse_json('[\n {"a": 1},\n\n {"b": oops}]', "f", at=(1, 1))
    assert isinstance(refusal, Refusal)
    assert refusal.where == "f:4:8"


# lines


def lines_of(data: bytes) -> list[tuple[int, str | Refusal]]:
    found = list(jsonl.lines_of(io.BytesIO(data), "rows"))
    for number, at, text in found:
        if isinstance(text, str) and number > 1:
            assert data[at:].startswith(text.encode())
    return [(number, text) for number, _, text in found]


line_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r\ufeff"), min_size=1, max_size=12)


@few
@given(
    st.lists(
        st.tuples(
            line_text.filter(lambda s: bool(s.encode().strip())), st.sampled_from(["\n", "\r\n", "\n\n", "\n \r\n"])
        )
    ),
    st.booleans(),
    st.booleans(),
)
def test_lines_keep_their_text_and_number(rows: list[tuple[str, str]], bom: bool, cut: bool) -> None:
    whole = "".join(t + end for t, end in rows)
    data = (b"\xef\xbb\xbf" if bom else b"") + (whole.rstrip("\r\n ") if cut else whole).encode()
    expected, number = [], 1
    for line, end in rows:
        expected.append((number, line))
        number += end.count("\n")
    if cut and expected:
        expected[-1] = (expected[-1][0], expected[-1][1].rstrip(" "))
    assert lines_of(data) == expected


def test_only_a_newline_ends_a_line() -> None:
    kept = "a\u2028b\u2029c\x0bd\x0ce\x85f\x1cg"
    assert lines_of(f"{kept}\nnext".encode()) == [(1, kept), (2, "next")]


def test_a_latin_1_byte_refuses_its_line_alone() -> None:
    found = lines_of(b"good\n" + "schön ".encode() + b"caf\xe9\nalso good\n")
    assert [n for n, _ in found] == [1, 2, 3]
    assert (found[0][1], found[2][1]) == ("good", "also good")
    refusal = found[1][1]
    assert isinstance(refusal, Refusal)
    assert (refusal.code, refusal.where) == ("E-DATA-101", "rows:2:10")
    assert "0xe9" in refusal.found


@few
@given(st.lists(objects, min_size=1, max_size=4), st.data())
def test_a_torn_last_line_is_left_out(rows: list[dict[str, Any]], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "rows.jsonl"
        write_jsonl(path, rows)
        assert read_jsonl(path) == rows
        whole = path.read_bytes()
        ends = [i for i, byte in enumerate(whole) if byte == 0x0A]
        kept = data.draw(st.integers(0, len(whole)))
        path.write_bytes(whole[:kept])
        assert read_jsonl(path) == rows[: sum(end <= kept for end in ends)]


def test_damage_before_the_last_line_is_not_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for damaged in (b'{"a": 1}\n{"b": \n{"c": 3}\n', b'{"a": 1}\n\xff\n'):
        path.write_bytes(damaged)
        with pytest.raises(RunError, match=r"E-RUN-002 .*rows\.jsonl:2 is damaged"):
            read_jsonl(path)
    with pytest.raises(ValueError, match="Out of range"):
        write_jsonl(path, [{"a": float("nan")}])
