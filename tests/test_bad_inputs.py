"""`educe check` on bad files and rows: an exit code, a coded message with its place, never a traceback."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from educe.cli.main import main
from educe.data import opening
from educe.data.sources import read_rows
from educe.errors import DataError
from educe.recipes import hands

from bad_inputs.files import BOMB, FILES, HANDLED, MADE, TABLE
from bad_inputs.rows import BAD_ROWS, WARNED, write_mixed
from check_command import GOOD, ROWS, Checker, Outcome, row

pytest.importorskip("torch")
HERE = Path(__file__).parent


@pytest.fixture
def check(tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> Checker:
    return Checker(tmp_path, tiny_model, capsys)


def _refuses(outcome: Outcome, code: str, *words: str) -> None:
    assert (outcome.exit_code, outcome.prepared) == (2, None), outcome.told
    for word in (code, *words):
        assert word in outcome.told


# --- files that are no data ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("item", FILES)
def test_files_that_are_no_data_are_refused(check: Checker, item: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "bomb" in item:
        monkeypatch.setattr(opening, "BOMB_BYTES", 2 * 10**7)
    if "Parquet" in item:
        pytest.importorskip("pyarrow")
    data, code, hint = FILES[item]
    _refuses(check(data), code, "rows.jsonl", hint)


@pytest.mark.slow
def test_a_bomb_of_a_gigabyte_is_refused(check: Checker) -> None:
    _refuses(check(BOMB * (opening.BOMB_BYTES // 10**7 + 5)), "E-DATA-009", "rows.jsonl", "200 times")


@pytest.mark.skipif(os.name == "nt", reason="links and sparse files are others there")
@pytest.mark.parametrize("item", MADE)
def test_what_stands_for_a_file_is_refused(check: Checker, tmp_path: Path, item: str) -> None:
    make, code, words = MADE[item]
    make(tmp_path / "rows.jsonl")
    _refuses(check(None), code, "rows.jsonl", words)
    if (tmp_path / "rows.jsonl").is_file():
        (tmp_path / "rows.jsonl").unlink()


def test_a_table_is_read_by_its_columns(check: Checker, tmp_path: Path) -> None:
    """23: a field may hold a line break in quotes; a row of another number of fields is refused."""
    (tmp_path / "rows.csv").write_text(TABLE + "one,two,three\n")
    outcome = check(None, "data: {train: rows.csv, max_tokens: 256}\n")
    assert outcome.exit_code == 0, outcome.told
    assert outcome.said_by_users == {"the cat\n0", *(f"the cat {i}" for i in range(1, 8))}
    assert [(line["code"], line["line"]) for line in outcome.unused] == [("E-DATA-108", 11)]


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    """27."""
    file = tmp_path / "rows.jsonl"
    file.write_text(ROWS * 500)
    rows = read_rows(file)
    next(rows)
    with file.open("a") as f:
        f.write(ROWS)
    with pytest.raises(DataError, match="E-DATA-008"):
        list(rows)


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
    """5."""
    (tmp_path / "rows.jsonl").write_text(ROWS)
    (tmp_path / "rows.jsonl").chmod(0)
    _refuses(check(None), "E-DATA-002", "rows.jsonl", "ermission")


# --- forms of a file that are handled ------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("item", WARNED)
def test_rows_that_are_odd_are_trained_and_told(check: Checker, item: str) -> None:
    data, words = WARNED[item]
    outcome = check(data)
    assert outcome.exit_code == 0, outcome.told
    assert words in " ".join(outcome.told.split()) or words in outcome.told
    assert not [line for line in outcome.unused if line["code"] != "E-DATA-203"]


def test_rows_of_another_format_than_the_files_are_refused(check: Checker) -> None:
    """52: unless the recipe says `format: mixed`."""
    others = ['{"instruction": "hi", "output": "yes"}', '{"text": "raw"}', '{"prompt": "a", "completion": "b"}']
    outcome = check(ROWS + "\n".join(others) + "\n")
    assert [line["code"] for line in outcome.unused] == ["E-DATA-109"] * 3
    outcome = check(None, "data: {train: {files: rows.jsonl, format: mixed}, max_tokens: 256}\n")
    assert "11 in = " in outcome.told
    assert "+ 0 not used" in outcome.told


@pytest.mark.parametrize("rows", [8_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_every_bad_row_among_many_is_reported(
    check: Checker, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """All of them in one file, read by several processes: each has its code and place."""
    monkeypatch.setattr(hands, "WORTH_BYTES", 40 * rows)
    placed = write_mixed(tmp_path / "rows.jsonl", rows)
    assert (tmp_path / "rows.jsonl").stat().st_size > 2 * hands.WORTH_BYTES
    recipe = "data: {train: {files: rows.jsonl, format: mixed}, max_tokens: 256, near_copies: keep}\n"
    outcome = check(None, recipe)
    assert outcome.exit_code == 0, outcome.told
    assert [(line["line"], line["code"]) for line in outcome.unused] == placed
    lines = (tmp_path / "rows.jsonl").read_bytes()
    for line in outcome.unused:
        start = 0 if line["line"] == 1 else lines.rindex(b"\n", 0, line["offset"]) + 1
        assert start == line["offset"]
    with pytest.raises(SystemExit) as ended:
        main(["data", str(tmp_path / "rows.jsonl"), "--json"])
    assert ended.value.code == 2
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == rows
    unseen = ("E-DATA-201", "E-CHAT-310")  # what needs a model to be told
    assert found["refused"] == len([code for _, code in placed if code not in unseen])


def test_all_bad_inputs_are_here() -> None:
    """The numbers of the list, each at least once in a table or a test."""
    text = "".join(p.read_text(encoding="utf-8") for p in [*HERE.glob("bad_inputs/*.py"), *HERE.glob("test_*.py")])
    named = {int(n) for n in re.findall(r'"(\d{1,2}) [a-zA-Z0-9]', text)}
    for numbers in re.findall(r'"""((?:\d{1,2}(?:, | and )?)+)[:.]', text):
        named |= {int(n) for n in re.findall(r"\d+", numbers)}
    named |= {int(n) for n in re.findall(r"# (\d{1,2})[:\s]", text)}
    assert set(range(1, 88)) - named == set()


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
