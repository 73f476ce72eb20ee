"""What once went wrong between a file and its conversations: names of roles, trees in pieces, groups, texts, names of files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import educe
import pytest
from educe.data.finding import find_files
from educe.data.reading import Expression, Group, Reading, read_row, reading_for
from educe.data.sources import read_rows
from educe.data.trees import joined
from educe.errors import DataError, EduceError, RecipeError, Refusal
from educe.files.jsonl import parse_json
from educe.types import Conversation, Source

HERE = Source(file="f", line=1)
BOT = Reading(roles={"bot": "assistant"})


def weights(row: dict[str, Any], reading: Reading = BOT) -> list[float | None]:
    (made,) = read_row(row, HERE, reading)
    assert isinstance(made, Conversation), made
    return [m.weight for m in made.messages]


def test_names_of_roles_are_replaced_before_anything_looks_at_them() -> None:
    asked, said = {"role": "user", "content": "a"}, {"role": "bot", "content": "b"}
    assert weights({"messages": [asked, said], "weight": 0.0}) == [None, 0.0]
    shares = [{"from": "human", "value": "a"}, {"from": "bot", "value": "b"}]
    assert weights({"conversations": shares, "weight": 0.5}) == [None, 0.5]
    assert weights({"prompt": [asked, said, asked], "completion": [said]}) == [None, 0.0, None, None]


def message(number: Any, parent: Any, role: str = "prompter", **more: Any) -> dict[str, Any]:
    return {"message_id": number, "parent_id": parent, "role": role, "text": f"t{number}", **more}


FLAT = [
    message("a", None), message("b", "a", "assistant"), message("c", ""), message("d", "c", "assistant"),
    message("lost", "gone", "assistant"), message("e", -1), message("f", "e", "assistant"), message("e", "f"),
]  # fmt: skip


@pytest.mark.parametrize("named", [False, True])
def test_single_messages_make_trees_and_none_is_lost(tmp_path: Path, named: bool) -> None:
    file = tmp_path / "flat.jsonl"
    file.write_text("".join(json.dumps(m) + "\n" for m in FLAT))
    reading = Reading(format="oasst message") if named else reading_for(Reading(), file)
    trees = list(joined(read_rows(file), messages=reading.of_messages))
    assert [s.line for s, _ in trees] == [1, 3, 5, 6, 8]
    made = [read_row(row, source, reading)[0] for source, row in trees]
    assert [getattr(m, "code", "") for m in made] == ["", "", "E-DATA-152", "", "E-DATA-152"]
    # rows of another kind that have such keys stay rows
    columns = {"prompt": Expression("text", "c"), "completion": Expression("message_id", "c")}
    assert not Reading(columns=columns, of_file="oasst message").of_messages


@pytest.mark.parametrize(
    "row",
    [
        {"message_tree_id": 1, "prompt": {"role": ["x"], "text": "a"}},
        {"message_tree_id": 1, "prompt": {"role": "prompter", "text": "a", "replies": 3}},
        message([1], None), message("a", [2]), message("a", {}),
        {"messages": [{"role": "user", "content": [{"type": []}]}]},
    ],
)  # fmt: skip
def test_odd_rows_are_refused_not_crashed_on(row: dict[str, Any]) -> None:
    for reading in (Reading(), Reading(format="oasst message"), Reading(format="preference"), Reading(format="text")):
        for at, one in joined([(HERE, row)], messages=reading.of_messages):
            assert all(isinstance(item, Refusal) or item for item in read_row(one, at, reading))


def test_an_expression_that_can_never_work_stops_the_run() -> None:
    for text in ("fooo(bar)", "a[", "length()", ""):
        with pytest.raises(RecipeError):
            Expression(text, "where")
    (made,) = read_row({"a": [1]}, HERE, Reading(where=Expression("a[::0]", "where")))
    assert isinstance(made, Refusal)
    assert Group("user.name").of({"user": {"name": "x"}}) == "x"
    assert Group("user.name").of({}) is None


def test_texts_are_whole_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_text("x\n\n" * 40_000 + "end\n<|endoftext|>\nsecond\n\nstill second\n")
    assert [row["text"][-12:] for _, row in read_rows(file) if isinstance(row, dict)] == [
        "x\n\nx\n\nx\n\nend",
        "still second",
    ]
    file.write_bytes(b"one\ncaf\xe9\nthree\n\nfour\n")
    found = [(s.line, row if isinstance(row, dict) else row.code) for s, row in read_rows(file)]
    assert found == [(1, "E-DATA-101"), (5, {"text": "four"})]


def test_a_key_given_twice_is_seen_whatever_the_spaces() -> None:
    for text in ('{"a":1,"a":2,"b" :3}', '{"a": 1, "a" : 2}', '{"a"\t:1,"a":2}'):
        found = parse_json(text, "f:1")
        assert isinstance(found, Refusal)
        assert found.code == "E-DATA-103"


def test_files_with_ordinary_names_are_data(tmp_path: Path) -> None:
    for name in (
        "state-capitals.jsonl",
        "config.jsonl",
        "license-plates.csv",
        "train.jsonl",
        "test.jsonl",
        "extra.jsonl",
    ):
        (tmp_path / name).write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    assert {f.name for f in find_files(str(tmp_path))} == {
        "state-capitals.jsonl", "config.jsonl", "license-plates.csv", "train.jsonl", "extra.jsonl"
    }  # fmt: skip
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for spec in (
        f"{tmp_path}/**.jsonl",
        "~nobody-here/x.jsonl",
        "data/rows--v2.jsonl",
        "some/where.jsonl",
    ):
        with pytest.raises(DataError):
            find_files(spec)
    with pytest.raises(DataError):
        list(read_rows(tmp_path / "loop"))
    with pytest.raises(DataError):
        find_files(f"{tmp_path}/loop", tmp_path / "runs")


def prepared(place: Path, model: Path, data: str, **files: str) -> Any:
    for name, text in files.items():
        path = place / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
    (place / "r.yaml").write_text(f"name: t\nmodel: {model}\ndata: {data}\n")
    return educe.prepare(place / "r.yaml")


def lines(what: str, number: int = 12) -> str:
    return "".join(json.dumps({"prompt": f"{what} {n}", "completion": f"{n}"}) + "\n" for n in range(number))


def test_what_is_passed_over_is_said(tmp_path: Path, tiny_model: Path) -> None:
    row = {"prompt": "what is <|im_end|> for", "completion": "it ends", "wieght": 1}
    files = {"d__train_dot_jsonl": json.dumps(row) + "\n" + lines("cat"), "d__test_dot_jsonl": lines("dog")}
    prepared(tmp_path, tiny_model, "{train: d, max_tokens: 128}", **files)
    notes = educe.inspect(tmp_path / "r.yaml", 1).notes
    assert [n for n in notes if "keys that are not read: wieght" in n]
    assert [n for n in notes if "control token" in n]
    assert educe.inspect(tmp_path / "r.yaml", 2).notes == ()
    assert [w for w in educe.check(tmp_path / "r.yaml").warnings if w.endswith("not read, by their names: test.jsonl")]


def test_a_renamed_file_is_read_anew(tmp_path: Path, tiny_model: Path) -> None:
    data = "{tasks: {a: {files: NAME}, b: {files: q.jsonl}}, max_tokens: 512}"
    files = {"r_dot_txt": lines("cat").replace("}\n", "}\n\n", 2), "q_dot_jsonl": lines("dog")}
    one = prepared(tmp_path, tiny_model, data.replace("NAME", "r.txt"), **files)
    (tmp_path / "r.txt").rename(tmp_path / "r.jsonl")
    two = prepared(tmp_path, tiny_model, data.replace("NAME", "r.jsonl"))
    assert one.summary["rows_in"] == 12 + 3  # texts, of which some are held out
    assert one.summary["documents"] in (1, 2, 3)
    assert (two.summary["rows_in"], two.summary["documents"]) == (24, 0)


def test_files_of_one_name_are_tasks_of_their_own(tmp_path: Path, tiny_model: Path) -> None:
    data = "{tasks: {t: {files: d, per_file: true}}, replay: {files: g.txt}, max_tokens: 128}"
    files = {"d__a__x_dot_jsonl": lines("one"), "d__b__x_dot_jsonl": lines("two"), "d__b__y_dot_jsonl": lines("three")}
    made = prepared(tmp_path, tiny_model, data, g_dot_txt="hello the cat\n\n" * 9, **files)
    assert made.tasks == ("t/a/x.jsonl", "t/b/x.jsonl", "t/b/y.jsonl", "replay")


@pytest.mark.parametrize(
    "data, words",
    [
        ("{train: a.jsonl, test: {kind: file, file: b.jsonl}, max_tokens: 128}", "nearly repeats a held-out row"),
        ("{tasks: {a: {files: a.jsonl}}, hold_out: [a], max_tokens: 128}", "row"),
        ("{tasks: {a: {files: a.jsonl, rate: 0.0}}, rates: {kind: explicit}, max_tokens: 128}", "a rate above 0"),
    ],
)
def test_nothing_to_train_on_is_told(tmp_path: Path, tiny_model: Path, data: str, words: str) -> None:
    text = "".join(
        json.dumps(
            {
                "prompt": f"what is {n} and then {n * 31} and then some more of it {n * 7}",
                "completion": f"the answer is {n}",
            }
        )
        + "\n"
        for n in range(12)
    )
    with pytest.raises(EduceError, match=words):
        checked(tmp_path, tiny_model, data, text)


def checked(place: Path, model: Path, data: str, text: str) -> None:
    prepared(place, model, data, a_dot_jsonl=text, b_dot_jsonl=text)
    educe.check(place / "r.yaml")
