"""Files → rows → conversations: every format, every refusal with its place, impostors, real files, and held-out splits."""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from educe.data.formats import FORMATS, detect
from educe.data.reading import Reading, read_row, to_conversation
from educe.data.sources import read_rows
from educe.data.split import Shares, nearness, prompt_key, row_key
from educe.errors import DataError, Refusal
from educe.types import ROLES, Conversation, Message, Pair, Source
from hypothesis import given, settings
from hypothesis import strategies as st

few = settings(max_examples=60, deadline=None, derandomize=True)
HERE = Source(file="rows.jsonl", line=3)
USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def pairs(made: Conversation | Refusal) -> list[tuple[str, str]]:
    assert isinstance(made, Conversation), made
    return [(m.role, m.content) for m in made.messages]


# formats

GOOD: list[tuple[str, dict[str, Any], list[tuple[str, str]]]] = [
    ("messages", {"messages": [USER, ASSISTANT], "id": 7}, [("user", "q"), ("assistant", "a")]),
    (
        "messages",
        {"messages": [USER, ASSISTANT, USER], "tools": None},
        [("user", "q"), ("assistant", "a"), ("user", "q")],
    ),
    ("messages", {"messages": [ASSISTANT | {"tool_calls": None, "name": "x"}]}, [("assistant", "a")]),
    (
        "sharegpt",
        {
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
            "system": "s",
            "tools": "[]",
        },
        [("system", "s"), ("user", "q"), ("assistant", "a")],
    ),
    (
        "sharegpt",
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "user", "value": ""},
                {"from": "assistant", "value": "a"},
            ]
        },
        [("system", "s"), ("user", ""), ("assistant", "a")],
    ),
    ("alpaca", {"instruction": "q", "input": "", "output": "a"}, [("user", "q"), ("assistant", "a")]),
    ("alpaca", {"instruction": "q", "input": None, "output": "a", "history": []}, [("user", "q"), ("assistant", "a")]),
    ("alpaca", {"instruction": "q", "input": "x", "output": "a"}, [("user", "q\n\nx"), ("assistant", "a")]),
    (
        "alpaca",
        {"instruction": "q", "output": "a", "system": "s"},
        [("system", "s"), ("user", "q"), ("assistant", "a")],
    ),
    ("prompt/completion", {"prompt": "q", "completion": " a"}, [("user", "q"), ("assistant", " a")]),
    ("prompt/response", {"prompt": "q", "response": "a\n"}, [("user", "q"), ("assistant", "a\n")]),
]


@pytest.mark.parametrize("name, row, expected", GOOD)
def test_each_format_is_read(name: str, row: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert detect(row) == [name]
    made = to_conversation(row, HERE)
    assert pairs(made) == expected
    assert isinstance(made, Conversation)
    assert made.source == HERE


def sharegpt(*turns: Any, **more: Any) -> dict[str, Any]:
    return {"conversations": list(turns), **more}


HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
BAD: list[tuple[dict[str, Any], int, str]] = [
    ({}, 106, "fits no known format"),
    ({"text": "x"}, 150, "document"),
    ({"prompt": "q", "completion": "a", "label": False}, 150, "label"),
    ({"prompt": "q"}, 106, "'prompt'"),
    ({"messages": [USER, ASSISTANT], "prompt": "q", "completion": "a"}, 107, "messages and prompt/completion"),
    ({"prompt": "q", "completion": "a", "response": "a"}, 107, "prompt/completion and prompt/response"),
    ({"messages": None}, 141, "null"),
    ({"messages": []}, 141, "messages"),
    ({"messages": "hello"}, 141, "str"),
    ({"messages": {"role": "user"}}, 141, "an object"),
    ({"messages": [USER, "hello"]}, 141, "messages[1] is a string"),
    (sharegpt(), 141, "conversations"),
    (sharegpt(HUMAN, 3), 141, "no object"),
    ({"messages": [USER, ASSISTANT | {"role": "asistant"}]}, 142, "messages[1].role 'asistant'"),
    ({"messages": [USER, ASSISTANT | {"role": "Assistant"}]}, 142, "'Assistant'"),
    ({"messages": [{"content": "q"}, ASSISTANT]}, 142, "messages[0].role None"),
    ({"messages": [USER | {"role": ["user"]}, ASSISTANT]}, 142, "['user']"),
    (sharegpt(HUMAN, GPT | {"from": "bot"}), 142, "'bot'"),
    (sharegpt(HUMAN | {"from": ["human"]}, GPT), 142, "['human']"),
    (sharegpt(HUMAN | {"from": {"a": 1}}, GPT), 142, "{'a': 1}"),
    ({"messages": [{"role": "user"}, ASSISTANT]}, 143, "messages[0].content is missing"),
    ({"messages": [USER, ASSISTANT | {"content": None}]}, 143, "messages[1].content is missing"),
    ({"messages": [USER | {"content": [{"type": "text"}]}, ASSISTANT]}, 143, "messages[0].content[0].text is missing"),
    ({"messages": [USER | {"content": True}, ASSISTANT]}, 143, "true or false"),
    ({"instruction": 5, "input": "x", "output": "a"}, 143, "messages[0].content is a number"),
    ({"instruction": "q", "input": ["x"], "output": "a"}, 143, "input is a list"),
    ({"instruction": "q", "output": "a", "system": 5}, 143, "system is a number"),
    ({"prompt": [USER], "completion": "a"}, 143, "prompt is a list"),
    ({"prompt": [USER], "response": [ASSISTANT]}, 143, "prompt is a list"),
    ({"messages": [USER, ASSISTANT | {"content": ""}]}, 144, "messages[1]"),
    ({"instruction": "q", "output": " \n\t"}, 144, "messages[1]"),
    ({"messages": [USER]}, 145, "no assistant"),
    ({"instruction": "q", "output": "a", "history": [["x"]]}, 146, "history"),
]


@pytest.mark.parametrize("row, code, found", BAD)
@pytest.mark.parametrize("system", [None, "be kind"])
def test_each_refusal_has_its_code_and_place(row: dict[str, Any], code: int, found: str, system: str | None) -> None:
    made = to_conversation(row, HERE, Reading(system=system))
    assert isinstance(made, Refusal)
    assert (made.code, made.where) == (f"E-DATA-{code}", "rows.jsonl:3")
    assert found in made.found
    assert made.fix


def test_the_nearest_role_is_suggested() -> None:
    made = to_conversation({"messages": [USER, ASSISTANT | {"role": "asistant"}]}, HERE)
    assert isinstance(made, Refusal)
    assert made.fix == 'Did you mean "assistant"?'


def test_a_system_prompt_is_given_to_rows_that_have_none() -> None:
    assert pairs(to_conversation({"messages": [USER, ASSISTANT]}, HERE, Reading(system="s")))[0] == ("system", "s")
    own = {"messages": [{"role": "system", "content": "own"}, USER, ASSISTANT]}
    assert pairs(to_conversation(own, HERE, Reading(system="s")))[0] == ("system", "own")
    assert pairs(to_conversation({"prompt": "q", "completion": "a"}, HERE, Reading(system="")))[0] == ("system", "")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from(["user", "assistant", "human", "gpt", "", "x"]),
    lambda v: (
        st.lists(v, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "weight", "tools"]), v, max_size=3)
    ),
    max_leaves=8,
)
KEYS = sorted(
    {k for f in FORMATS.values() for k in f.keys} | {"input", "system", "tools", "history", "replies", "label"}
)


@settings(few, max_examples=200)
@given(st.dictionaries(st.sampled_from(KEYS), json_values, max_size=4))
def test_any_row_is_a_conversation_or_a_refusal(row: dict[str, Any]) -> None:
    made = read_row(row, HERE)
    assert made
    for item in made:
        for c in (item.chosen, item.rejected) if isinstance(item, Pair) else (item,):
            if isinstance(c, Conversation):
                assert any(m.role == "assistant" for m in c.messages)
                assert all(m.role in ROLES and isinstance(m.content, str) for m in c.messages)


# sources


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


ROWS = [{"prompt": f"q{i}", "completion": "ä\u2028"} for i in range(5)]
JSONL = "\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS)


@pytest.mark.parametrize(
    "name, content, lines",
    [
        ("rows.jsonl", JSONL, [1, 2, 3, 4, 5]),
        ("rows.jsonl", "\ufeff" + JSONL.replace("\n", "\r\n") + "\r\n", [1, 2, 3, 4, 5]),
        ("rows.jsonl", "\n\n" + JSONL.replace("\n", "\n  \n") + "\n\n", [3, 5, 7, 9, 11]),
        ("rows.json", json.dumps(ROWS), [1, 2, 3, 4, 5]),
        ("rows.json", "\ufeff\n" + json.dumps(ROWS, indent=2, ensure_ascii=False), [1, 2, 3, 4, 5]),
        ("rows.jsonl", json.dumps(ROWS), [1, 2, 3, 4, 5]),  # an array under a wrong name
        ("rows", JSONL, [1, 2, 3, 4, 5]),
    ],
)
def test_rows_come_with_their_place(tmp_path: Path, name: str, content: str, lines: list[int]) -> None:
    path = write(tmp_path / name, content)
    assert list(read_rows(path)) == [(Source(file=str(path), line=n), r) for n, r in zip(lines, ROWS, strict=True)]


def test_bad_lines_are_refused_one_by_one(tmp_path: Path) -> None:
    good = b'{"prompt": "q", "completion": "a"}'
    bad = [b'{"a": \xff}', b'{"a" 1}', b'{"a": 1, "a": 2}', b'{"a": NaN}', b'"text"', b"[1]", b'{"a": 1', b"3"]
    path = write(tmp_path / "rows.jsonl", b"\n".join(x for b in bad for x in (good, b)))
    found = list(read_rows(path))
    assert [s.line for s, _ in found] == list(range(1, 17))
    assert all(isinstance(r, dict) for _, r in found[::2])
    refusals = [r for _, r in found[1::2] if isinstance(r, Refusal)]
    assert [r.code[-3:] for r in refusals] == ["101", "102", "103", "104", "105", "105", "102", "105"]
    assert [r.where for r in refusals[:2]] == [f"{path}:2:7", f"{path}:4:6"]
    assert all(r.where.startswith(f"{path}:{n}") for n, r in zip(range(2, 17, 2), refusals, strict=True))


def test_lines_that_are_arrays_are_not_taken_for_one(tmp_path: Path) -> None:
    found = list(read_rows(write(tmp_path / "rows.jsonl", '\n["a"]\n["b"]\n')))
    assert [(s.line, r.code) for s, r in found if isinstance(r, Refusal)] == [(2, "E-DATA-105"), (3, "E-DATA-105")]


def test_elements_of_an_array_are_refused_one_by_one(tmp_path: Path) -> None:
    found = list(read_rows(write(tmp_path / "rows.json", '[{"a": 1},\n 3, {"b": 1}]')))
    assert [(s.line, isinstance(r, Refusal)) for s, r in found] == [(1, False), (2, True), (3, False)]


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
IMPOSTORS: list[tuple[str, bytes, int, str]] = [
    ("a.jsonl", POINTER.encode(), 6, "LFS"),
    ("a.jsonl", gzip.compress(JSONL.encode(), mtime=0)[:-9], 4, "damaged"),
    ("a.jsonl", b"\x28\xb5\x2f\xfd rest", 4, "damaged"),
    ("a.jsonl", b"\n <!DOCTYPE html><html>", 6, "HTML"),
    ("a.json", b"<html><body>404", 6, "HTML"),
    ("a.jsonl", JSONL.encode("utf-16"), 4, "UTF-16"),
    ("a.jsonl", b"\xfe\xff" + JSONL.encode("utf-16-be"), 4, "UTF-16"),
    ("a.jsonl", b"", 3, "empty"),
    ("a.jsonl", b" \r\n\t\n", 3, "empty"),
    ("a.jsonl", b"\xef\xbb\xbf\n", 3, "empty"),
    ("a.json", b"[]", 3, "no row"),
    ("a.json", b"[\n\n]\n", 3, "no row"),
    ("a.parquet", b"PAR1 but not really", 4, "Parquet"),
    ("a.parquet", JSONL.encode(), 4, "Parquet"),
    ("a.jsonl", b"PAR1 but not really", 4, "Parquet"),
    ("a.json", b'[{"a": 1},]', 4, "missing"),
    ("a.json", b'[{"a": 1}] x', 4, "after the array"),
    ("a.json", b'{\n "a": oops}', 4, "not JSON"),
    ("a.json", b'[{"a": 1},\n {"b": "\xe9"}]', 4, "0xe9"),
    ("a.json", b'[{"a": 1}', 4, "ends inside"),
    ("a.json", b"[" * 100_000, 4, "ends inside"),
]


@pytest.mark.parametrize("name, content, code, found", IMPOSTORS, ids=range(len(IMPOSTORS)))
def test_impostors_are_refused_by_name(tmp_path: Path, name: str, content: bytes, code: int, found: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    assert caught.value.code == f"E-DATA-{code:03d}"
    assert caught.value.where.startswith(str(path))
    assert found in caught.value.found


def test_a_broken_element_is_placed_by_line_and_column(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", b'\n[{"a": 1},\n\n {"b": oops}, {"c": 1}]')
    rows = [row for _, row in read_rows(path)]
    assert isinstance(rows[1], Refusal)
    assert (rows[1].code, rows[1].where) == ("E-DATA-102", f"{path}:4:8")
    assert rows[0::2] == [{"a": 1}, {"c": 1}]


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    cases = [
        (tmp_path / "none.jsonl", 1),
        (tmp_path, 2),
        (tmp_path / "dangling", 1),
        (write(tmp_path / "f", "x") / "g", 2),
    ]
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.jsonl")
        cases.append((tmp_path / "pipe.jsonl", 2))
    for path, code in cases:
        with pytest.raises(DataError) as caught:
            next(read_rows(path))
        assert (caught.value.code, caught.value.where) == (f"E-DATA-{code:03d}", str(path))


def test_parquet_rows_are_read_and_damage_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    rows = [{"messages": [USER, ASSISTANT]}, {"messages": []}, {"messages": None}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    found = [to_conversation(r, s) for s, r in read_rows(path) if not isinstance(r, Refusal)]
    assert pairs(found[0]) == [("user", "q"), ("assistant", "a")]
    assert [(r.code, r.where) for r in found[1:] if isinstance(r, Refusal)] == [
        ("E-DATA-141", f"{path}:{n}") for n in (2, 3)
    ]
    pq.write_table(pa.table({"prompt": ["question"] * 3000}), path, compression="gzip", use_dictionary=False)
    good = path.read_bytes()
    footer = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
    for damaged in (good[:-1], good[: len(good) // 2], good[: footer // 2] + b"\0" * 8 + good[footer // 2 + 8 :]):
        with pytest.raises(DataError) as caught:
            list(read_rows(write(path, damaged)))
        assert caught.value.code == "E-DATA-004"
    pq.write_table(pa.table({"prompt": pa.array([b"caf\xe9"], pa.binary()).view(pa.string())}), path)
    with pytest.raises(DataError, match="E-DATA-004"):
        list(read_rows(path))
    pq.write_table(pa.table({"prompt": []}), path)
    with pytest.raises(DataError, match="no row"):
        list(read_rows(path))
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as where it is not installed
    with pytest.raises(DataError, match="E-DATA-007"):
        list(read_rows(path))


# real files

FITS = [
    ("alpaca_5000.json", {"ok": 4998, "E-DATA-144": 2}),
    ("sharegpt_dummy.json", {"ok": 500}),
    ("dolly_hhrlhf/dolly_hhrlhf_train_small.jsonl", {"ok": 1000}),
    ("dolly_hhrlhf/arxiv.jsonl", {"E-DATA-150": 20}),
    ("demos/alpaca_zh_demo.json", {"ok": 1000}),
    ("demos/glaive_toolcall_en_demo.json", {"ok": 300}),
    ("demos/v1_sft_demo.jsonl", {"ok": 500}),
    ("demos/reason_tool_use_demo_50.jsonl", {"ok": 50}),
    ("gsm8k/test.jsonl", {"ok": 1319}),
    ("oasst/en_100_text.jsonl", {"E-DATA-105": 100}),
    ("oasst/en_100_tree.jsonl", {"ok": 100}),
    ("super_ni/task1146_country_capital.json", {"ok": 1}),
    ("demos/c4_demo.jsonl", {"E-DATA-150": 300}),
]


@pytest.mark.parametrize("name, expected", FITS)
def test_every_row_of_a_real_file_is_accounted_for(shared: Path, name: str, expected: dict[str, int]) -> None:
    made = [r if isinstance(r, Refusal) else to_conversation(r, s) for s, r in read_rows(shared / "instruct" / name)]
    assert Counter(m.code if isinstance(m, Refusal) else "ok" for m in made) == expected


# splits


def conversation(*turns: tuple[str, str]) -> Conversation:
    messages = tuple(Message(role=role, content=content) for role, content in turns)  # type: ignore[arg-type]
    return Conversation(messages=messages, source=HERE)


hex_keys = st.text("0123456789abcdef", min_size=64, max_size=64)
shares = st.floats(0.01, 0.99)


@few
@given(st.lists(hex_keys, max_size=60), shares, shares)
def test_where_a_key_goes_depends_on_no_other_key(keys: list[str], dev: float, test: float) -> None:
    split = Shares(dev=dev, test=test, forced={})
    assert all((split.of(k) == "dev") == (int(k[:16], 16) < dev * 2**64) for k in keys)
    wider = Shares(dev=dev, test=min(0.999, test * 1.2), forced={})
    assert all(split.of(k) in (wider.of(k), "train") for k in keys)
    assert Shares(dev=0.0, test=0.0, forced=dict.fromkeys(keys[:1], "test")).of(keys[0] if keys else "0" * 64) in (
        "test" if keys else "train",
    )


@few
@given(st.lists(hex_keys, min_size=1, max_size=60), st.floats(0.01, 0.99))
def test_the_nearest_key_is_the_first_that_a_larger_share_takes(keys: list[str], share: float) -> None:
    near = min(keys, key=lambda k: nearness(k, "dev"))
    taken = [k for k in keys if Shares(dev=share, test=0.0, forced={}).of(k) == "dev"]
    assert not taken or near in taken


words = st.text("abcäö", min_size=1, max_size=5)


@few
@given(st.lists(words, min_size=1, max_size=4), words, words, st.sampled_from([" ", "\n", "\t  "]))
def test_equal_prompts_stay_together(question: list[str], answer: str, other: str, gap: str) -> None:
    plain = conversation(("user", " ".join(question)), ("assistant", answer))
    spaced = (gap + gap.join(question) + gap).upper()
    same = conversation(("system", other), ("user", spaced), ("assistant", other))
    assert prompt_key(plain) == prompt_key(same)
    asked = conversation(("user", " ".join([*question, "more"])), ("assistant", answer))
    assert prompt_key(plain) != prompt_key(asked)
    assert row_key(plain) == row_key(conversation(("user", " ".join(question)), ("assistant", answer)))
    assert row_key(plain) != row_key(same)


def test_the_prompt_is_everything_before_the_last_answer() -> None:
    two = [("user", "a"), ("assistant", "b"), ("user", "c")]
    key = prompt_key(conversation(*two, ("assistant", "d")))
    assert key == prompt_key(conversation(*two, ("assistant", "e"), ("user", "later")))
    different = [
        conversation(("user", "a"), ("assistant", "x"), ("user", "c"), ("assistant", "d")),
        conversation(("user", "a b c"), ("assistant", "d")),
        conversation(("user", "a"), ("user", "b"), ("user", "c"), ("assistant", "d")),
    ]
    assert len({key, *map(prompt_key, different)}) == 4
