"""`educe check` on bad files and rows: an exit code, a coded message with its place, never a traceback."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from check_command import GOOD, ROWS, Checker, Outcome, row

pytest.importorskip("torch")


@pytest.fixture
def check(tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> Checker:
    return Checker(tmp_path, tiny_model, capsys)


def _refuses(outcome: Outcome, code: str, *words: str) -> None:
    assert (outcome.exit_code, outcome.prepared) == (2, None), outcome.told
    for word in (code, *words):
        assert word in outcome.told


# --- files that are no data ----------------------------------------------------------------------------------------------

FILES: dict[str, tuple[str | bytes, str, str]] = {
    "3 empty": (b"", "E-DATA-003", "empty"),
    "3 only a byte order mark": (b"\xef\xbb\xbf", "E-DATA-003", "empty"),
    "3 an array of nothing": ("[]", "E-DATA-003", "no row"),
    "4 white space": (" \n\t\r\n ", "E-DATA-003", "empty"),
    "4 much white space": ("\n" * 100_000, "E-DATA-003", "empty"),
    "9 UTF-16": (ROWS.encode("utf-16"), "E-DATA-004", "iconv -f utf-16"),
    "9 UTF-16 without a mark": (ROWS.encode("utf-16-le"), "E-DATA-005", "rows.jsonl:1:"),
    "17 gzip in name only": (b"\x1f\x8b\x08" + bytes(50), "E-DATA-004", "gzip stops"),
    "17 zstd in name only": (b"\x28\xb5\x2f\xfd" + bytes(50), "E-DATA-004", "zstd stops"),
    "18 a bomb": (gzip.compress(b"{" + b" " * 50_000_000) * 21, "E-DATA-009", "200 times"),
    "19 gzip cut short": (gzip.compress(ROWS.encode())[:-20], "E-DATA-004", "gzip stops"),
    "20 Git LFS pointer": ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "E-DATA-006", "git lfs pull"),
    "21 error page": ("<!DOCTYPE html>\n<html>Not found</html>", "E-DATA-006", "raw file"),
    "24 an array cut short": ("[" + ",\n\n".join(GOOD), "E-DATA-004", "rows.jsonl:15:"),
    "22 Parquet in name only": (b"PAR1" + bytes(100), "E-DATA-004", "Parquet"),
    "no row that fits": ('{"x": 1}\n' * 3, "E-DATA-005", "rows.jsonl:1"),
}


@pytest.mark.parametrize("item", FILES)
def test_files_that_are_no_data_are_refused(check: Checker, item: str) -> None:
    if "Parquet" in item:
        pytest.importorskip("pyarrow")
    data, code, hint = FILES[item]
    _refuses(check(data), code, "rows.jsonl", hint)


@pytest.mark.skipif(os.name == "nt", reason="devices and pipes have no path there")
def test_paths_that_are_no_files_are_refused(check: Checker, tmp_path: Path) -> None:
    _refuses(check(None), "E-DATA-001", "rows.jsonl", "does not exist")
    for path, code in (
        ("/dev/zero", "E-DATA-002"),  # 6: would be read forever
        ("recipe.yaml/rows.jsonl", "E-DATA-002"),
        ("a" * 300, "E-DATA-002"),
        ("rows.jsonl ", "E-DATA-001"),  # 77
        ("$NOPE/rows.jsonl", "E-DATA-001"),
        ('"a\\0b"', "E-RECIPE-103"),
    ):
        quoted = path if path.startswith('"') else f"'{path}'"
        _refuses(check(ROWS, f"data: {{train: {quoted}, max_tokens: 256}}\n"), code)
    (tmp_path / "rows.jsonl").unlink()
    os.mkfifo(tmp_path / "rows.jsonl")
    _refuses(check(None), "E-DATA-002", "rows.jsonl", "regular file")


@pytest.mark.skipif(
    getattr(os, "geteuid", int)() == 0, reason="root may read everything; Windows has other permissions"
)
def test_a_file_without_permission_is_refused(check: Checker, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(ROWS)
    (tmp_path / "rows.jsonl").chmod(0)
    _refuses(check(None), "E-DATA-002", "rows.jsonl", "ermission")


# --- forms of a file that are handled ------------------------------------------------------------------------------------

HANDLED: dict[str, str | bytes] = {
    "as it should be": ROWS,
    "8 byte order mark": b"\xef\xbb\xbf" + ROWS.encode(),
    "12 CRLF": ROWS.replace("\n", "\r\n"),
    "12 CR": ROWS.replace("\n", "\r"),
    "13 no final newline": ROWS.rstrip("\n"),
    "15 blank lines": "\n\n" + ROWS.replace("\n", "\n\n  \n"),
    "24 array named jsonl": "[" + ",\n\n".join(GOOD) + "]",
    "24 array on one line": "[" + ",".join(GOOD) + "]",
}


@pytest.mark.parametrize("item", HANDLED)
def test_forms_that_are_handled_give_the_same_rows(check: Checker, item: str) -> None:
    outcome = check(HANDLED[item])
    assert outcome.exit_code == 0, outcome.told
    assert outcome.unused == []
    assert outcome.said_by_users == {f"the cat {i}" for i in range(8)}


def test_text_stays_what_it_is(check: Checker) -> None:
    """35, 36: no line is split inside a string, nothing that looks like a number or a date becomes one."""
    texts = {"a\u2028b\u2029c\u0085d", "2024-01-01", "007", "1e5", "null", "yes", "\ufeffmark", "[/red][bold]"}
    outcome = check("\n".join(row(t, "mat") for t in sorted(texts)))
    assert outcome.exit_code == 0
    assert outcome.unused == []
    assert outcome.said_by_users == texts


# --- rows that are refused, one by one -----------------------------------------------------------------------------------


def _messages(*turns: Any) -> str:
    return json.dumps({"messages": list(turns)})


ASK, TELL = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}

# item: the row, its code, the column that is told (0: none), words of the message
BAD_ROWS: dict[str, tuple[str | bytes, str, int, str]] = {
    "10 Latin-1 byte": (row("caf?", "b").encode().replace(b"?", b"\xe9"), "E-DATA-101", 47, "0xe9"),
    "33 surrogate as bytes": (b'{"prompt": "\xed\xa0\x80", "completion": "b"}', "E-DATA-101", 13, "0xed"),
    "11 NUL": ('{"prompt": "\\u0000", "completion": "b"}', "E-DATA-104", 0, "NUL"),
    "11 raw NUL": (b'{"prompt": "\0", "completion": "b"}', "E-DATA-102", 13, "not JSON"),
    "14 cut short": (GOOD[0][:-9], "E-DATA-102", 90, "not JSON"),
    "25 two objects": (GOOD[0] + GOOD[1], "E-DATA-102", 100, "one JSON object per line"),
    "26 comment": ("// the cat", "E-DATA-102", 1, "comments"),
    "26 trailing comma": (GOOD[0][:-1] + ",}", "E-DATA-102", 100, "commas"),
    "29 duplicate key": (
        '{"prompt": "a", "prompt": "b", "completion": "c"}',
        "E-DATA-103",
        0,
        "'prompt' appears twice",
    ),
    "30 NaN": ('{"prompt": "a", "completion": NaN}', "E-DATA-104", 0, "NaN"),
    "30 Infinity": ('{"prompt": "a", "completion": -Infinity}', "E-DATA-104", 0, "-Infinity"),
    "30 1e999": ('{"prompt": "a", "completion": 1e999}', "E-DATA-104", 0, "1e999"),
    "31 5000 digits": ('{"prompt": "a", "completion": ' + "9" * 5000 + "}", "E-DATA-104", 0, "5000 digits"),
    "32 depth": ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "E-DATA-102", 0, "deeper"),
    "32 depth, unclosed": ('{"a": ' * 100_000, "E-DATA-102", 0, "deeper"),
    "33 lone surrogate": ('{"prompt": "\\ud800", "completion": "b"}', "E-DATA-104", 0, "surrogate"),
    "33 in a key": ('{"\\udfff": "a"}', "E-DATA-104", 0, "surrogate"),
    "34 number": ("42", "E-DATA-105", 0, "not an object"),
    "34 null": ("null", "E-DATA-105", 0, "not an object"),
    "34 list": ("[1]", "E-DATA-105", 0, "not an object"),
    "38 messages missing": ('{"massages": []}', "E-DATA-106", 0, "'massages'"),
    "38 messages null": ('{"messages": null}', "E-DATA-141", 0, "null"),
    "38 messages a string": ('{"messages": "hi"}', "E-DATA-141", 0, "str"),
    "38 messages empty": ('{"messages": []}', "E-DATA-141", 0, "no messages"),
    "39 message a string": (_messages(ASK, "hi"), "E-DATA-141", 0, "messages[1]"),
    "40 unknown role": (_messages(ASK, {"role": "asistant", "content": "b"}), "E-DATA-142", 0, 'mean "assistant"?'),
    "40 no role": (_messages({"content": "a"}, TELL), "E-DATA-142", 0, "messages[0].role"),
    "40 role a list": (_messages({"role": ["user"], "content": "a"}, TELL), "E-DATA-142", 0, "messages[0].role"),
    "40 ShareGPT role a list": ('{"conversations": [{"from": [], "value": "a"}]}', "E-DATA-142", 0, "messages[0].role"),
    "41 role in capitals": (_messages({"role": "User", "content": "a"}, TELL), "E-DATA-142", 0, 'mean "user"?'),
    "42 content null": (_messages({"role": "user", "content": None}, TELL), "E-DATA-143", 0, "messages[0].content"),
    "43 content a number": (_messages(ASK, {"role": "assistant", "content": 4}), "E-DATA-143", 0, "not text"),
    "43 content in parts": (
        _messages({"role": "user", "content": [{"type": "text"}]}, TELL),
        "E-DATA-143",
        0,
        "content[0].text is missing",
    ),
    "44 blank answer": (_messages(ASK, {"role": "assistant", "content": " \n"}), "E-DATA-144", 0, "messages[1]"),
    "45 no answer": (_messages(ASK), "E-DATA-145", 0, "no assistant"),
    "47 starts with the assistant": (_messages(TELL, ASK), "E-CHAT-310", 0, "no assistant turn"),
    "48 tool calls": (_messages(ASK, {**TELL, "tool_calls": [{}]}), "E-DATA-147", 0, "tool_calls[0]"),
    "51 weight a string": (_messages(ASK, {**TELL, "weight": "1"}), "E-DATA-148", 0, "messages[1].weight"),
    "53 an image": (
        _messages({"role": "user", "content": [{"type": "image_url"}]}, TELL),
        "E-DATA-146",
        0,
        "'image_url'",
    ),
    "50 two formats": ('{"messages": [], "prompt": "a", "completion": "b"}', "E-DATA-107", 0, "messages and prompt"),
    "59 too long": (row("the cat " * 300, "b"), "E-DATA-201", 0, "max_tokens"),
}


@pytest.mark.parametrize("item", BAD_ROWS)
def test_a_bad_row_is_counted_and_the_others_train(check: Checker, tmp_path: Path, item: str) -> None:
    bad, code, column, words = BAD_ROWS[item]
    rows = [line.encode() for line in GOOD]
    at = 8 if item == "14 cut short" else 4
    rows.insert(at, bad.encode() if isinstance(bad, str) else bad)
    outcome = check(b"\n".join(rows), "data: {train: {files: rows.jsonl, format: mixed}, max_tokens: 256}\n")
    assert outcome.exit_code == 0, outcome.told
    (line,) = outcome.unused
    assert (line["code"], line["line"], line["file"]) == (code, at + 1, str(tmp_path / "rows.jsonl"))
    assert line["status"] == ("dropped" if code in ("E-DATA-201", "E-CHAT-310") else "refused")
    place = f"{tmp_path / 'rows.jsonl'}:{at + 1}" + (f":{column}" if column else "")
    assert line["where"] == place
    for said in (f"{code} 1 row", "1 not used", f"{place} ", words):
        assert said in outcome.told
    assert outcome.said_by_users == {f"the cat {i}" for i in range(8)}


def test_many_bad_rows_are_counted_and_the_first_five_shown(check: Checker) -> None:
    outcome = check(ROWS + "42\n" * 300)
    assert outcome.exit_code == 2
    assert "300 of 308 rows are not used, more than the share of data.max_unused (0.5)" in outcome.told
    outcome = check(None, "data: {train: rows.jsonl, max_tokens: 256, max_unused: 1.0}\n")
    assert outcome.exit_code == 0
    assert len(outcome.unused) == 300
    assert "E-DATA-105 300 rows" in outcome.told
    assert [f"rows.jsonl:{n} " in outcome.told for n in (9, 13, 14)] == [True, True, False]


# --- the command itself --------------------------------------------------------------------------------------------------


def _educe(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-m", "educe", *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_as_a_process(tmp_path: Path) -> None:
    """Exit code 2 and one message on stderr: code and place, what was found, what to do; nothing on stdout."""
    (tmp_path / "recipe.yaml").write_text("name: t\nmodel: ./nowhere\ndata:\n  trian: rows.jsonl\n")
    for words, code in (
        (("check", "none.yaml"), "E-RECIPE-001 none.yaml"),
        (("check", "recipe.yaml"), "E-RECIPE-102 recipe.yaml:4:3"),
    ):
        done = _educe(*words, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        first, found, fix = done.stderr.rstrip("\n").split("\n")
        assert first == code
        assert found.startswith("  ")
        assert fix.startswith("  → ")
    wrong = _educe("check", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "Missing argument" in wrong.stderr
