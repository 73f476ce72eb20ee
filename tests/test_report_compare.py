"""Several runs compared, the report as Markdown and as numbers, what a page of any size stays below, words that differ."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from educe.cli.main import main
from educe.errors import UsageError
from educe.files.run_dir import RunDir
from educe.recipes.report import price_of, text_of, write_report
from educe.report import build_report
from educe.report.compare import build_comparison
from educe.report.markdown import plain
from educe.report.numbers import named, pair
from educe.report.records import DevPairs
from educe.report.words import differences
from educe.stats import mcnemar, paired_difference
from hypothesis import given, settings
from hypothesis import strategies as st

from report_payloads import PAYLOADS, poisoned
from run_directory import Page, ledger_records, make_run, metric_records, recipe_record, sample_records, write_file


def other(path: Path, name: str, wrong_every: int, **train: Any) -> RunDir:
    """A run of another name and rate whose tuned model is wrong on every so many rows more."""
    run = make_run(path, steps=80)
    recipe = recipe_record()
    write_file(run.resolved, {"recipe": {**recipe, "name": name, "train": {**recipe["train"], **train}}})
    lines = run.load(run.answers / "tuned.jsonl")
    changed = [{**x, "correct": x["correct"] and i % wrong_every > 0} for i, x in enumerate(lines)]
    write_file(run.answers / "tuned.jsonl", changed)
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunDir]:
    place = tmp_path_factory.mktemp("runs")
    return [
        make_run(place / "a"),
        other(place / "b", "orders-fast", 9, learning_rate=0.001),
        other(place / "c", "third", 10**6),
    ]


def test_runs_are_compared_on_the_rows_they_share(runs: list[RunDir]) -> None:
    page = Page(build_comparison(runs, hourly=price_of("2.50 EUR")))
    assert not page.open
    assert "orders-135m beats orders-fast." in page.text
    assert "240 shared rows: 0 won, 21 lost; McNemar p < 0.001, p < 0.001 after Holm’s correction." in page.text
    assert "train.learning_rate 0.0003 0.001 0.0003" in page.text
    assert "0.259 EUR" in page.text
    assert "name" not in set(re.findall(r"<code>(\w+)</code>", build_comparison(runs)))


def test_paired_tests_are_those_of_stats(runs: list[RunDir]) -> None:
    first, second, third = pair(named(runs))[:2][0], *pair(named(runs))[1:], None
    before, after = ([x["correct"] for x in r.load(r.answers / "tuned.jsonl")] for r in runs[:2])
    assert (first.won, first.lost, first.p) == mcnemar(before, after)
    assert first.difference == paired_difference(before, after)
    assert first.p_holm == pytest.approx(min(1.0, 2 * (first.p or 0)))
    assert second is not None
    assert (second.p, second.won, third) == (1.0, 0, None)


@pytest.mark.parametrize("change, why", [
    (lambda r: r.scores.unlink(), "one of them is not evaluated"),
    (lambda r: write_file(r.scores, {**r.load(r.scores), "metric": "exact"}),
     "they are not graded by the same metric, but by equal JSON and exact text"),
    (lambda r: write_file(r.answers / "tuned.jsonl", [{**x, "expected": "else"} for x in r.load(r.answers / "tuned.jsonl")]),
     "they share no test row"),
])  # fmt: skip
def test_what_cannot_be_paired_says_why(tmp_path: Path, change: Any, why: str) -> None:
    both = [make_run(tmp_path / "a", rows=20), make_run(tmp_path / "b", rows=20)]
    change(both[1])
    (found,) = pair(named(both))
    assert why in found.why
    assert found.p is None
    page, text = Page(build_comparison(both)).text, text_of(both, "md")
    assert f"2 runs side by side, none tested against {found.before}: {why}." in page
    assert why in text
    # Figures of different metrics are named one by one, and no bars stand side by side.
    differ = "same metric" in why
    assert ("Tuned exact text" in page, "| exact text" in text, "whiskers are" in page) == (differ, differ, not differ)


def test_runs_without_anything_still_compare(tmp_path: Path) -> None:
    both = [RunDir(tmp_path / "x"), RunDir(tmp_path / "y")]
    assert not Page(build_comparison(both)).open
    assert "side by side" in text_of(both, "md")
    assert json.loads(text_of(both, "json"))["paired"][0]["why"]


def test_json_holds_the_numbers_of_the_page(runs: list[RunDir]) -> None:
    found = json.loads(text_of(runs[:1], "json", price_of("3")))
    assert found["systems"][2]["value"] == 0.8
    assert found["dev_right"][-1] | {"right": 26, "rows": 32} == found["dev_right"][-1]
    assert found["data"]["terms"][0]["rows"] == 840
    assert [t["task"] for t in found["data"]["mixture"]] == ["orders", "returns"]
    assert found["general"]["prompts"]["right"] == [24, 3]
    assert found["shift"]["answers"] == 16
    assert found["judged"]["mt_bench"]["systems"]["tuned"]["interval"]["value"] == 5.1
    assert found["suites"]["ifeval"]["systems"]["tuned"]["prompt_strict"]["value"] == 0.4
    assert found["cost"]["price"] == pytest.approx(3 * (312 + 60.4) / 3600)
    assert len(json.loads(text_of(runs, "json"))["runs"]) == 3


AS_FILES = {"general", "shift", "judged", "suites", "settings"}  # these have keys of their own


def test_the_table_of_the_docs_has_all_keys_of_json(runs: list[RunDir]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "report.md").read_text(encoding="utf-8")
    table = [line.split(" | ", 1) for line in page.partition("| key | content |\n|---|---|\n")[2].splitlines()]
    said = {key: {*re.findall(r"`(\w+)`", content)} for keys, content in table for key in re.findall(r"`(\w+)`", keys)}
    found = json.loads(text_of(runs[:1], "json"))
    found["dev_pairs"] = [{field.name: 0.0 for field in fields(DevPairs)}]
    assert said.keys() == found.keys() - {"educe_report"}
    for key, value in found.items():
        if key not in AS_FILES:
            assert _keys(value) <= said.get(key, set()), key


def _keys(value: Any) -> set[str]:
    """Of all objects in a value."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return {*(value if isinstance(value, dict) else ())}.union(*map(_keys, inner))


def test_markdown_reads_as_text_and_as_tables(runs: list[RunDir]) -> None:
    text = text_of(runs[:1], "md")
    assert "| Tuned       |   192 | 80.0\u202f% |" in text
    assert "| 125  |          0.08 |       26 of 32 |" in text
    for said in (
        "## What was forgotten",
        "24 of 46",
        "## Judged by a model",
        "MT-Bench: tuned",
        "## Following instructions",
    ):
        assert said in text
    for rows in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        assert len({line.count("|") for line in rows.splitlines()}) == 1


@pytest.mark.parametrize(
    "payload", [*PAYLOADS[:8], "[x](javascript:alert(1))", "![x](//evil.test)", "| a | b |", "**x** `y`", "a\n# b"]
)
def test_text_never_becomes_markup_elsewhere(tmp_path: Path, payload: str) -> None:
    both = [poisoned(tmp_path / "a", payload, "texts"), make_run(tmp_path / "b", rows=30, steps=12)]
    found = Page(build_comparison(both))
    assert not found.open
    assert not {t for t, _ in found.shape} & {"img", "iframe", "x", "base", "plaintext"}
    assert not any(a.startswith("on") or a in ("src", "style") for _, names in found.shape for a in names)
    for text in (text_of(both[:1], "md"), text_of(both, "md")):
        assert not re.search(
            r"(?<!\\)[<`]|(?<!\\)\]\(|(?<!\\)!\[", text.replace("`educe eval`", "").replace("p\u00a0<\u00a0", "")
        )
    assert "\n" not in plain(payload)


def test_the_command_writes_and_prints(runs: list[RunDir], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(r.path) for r in runs]
    for args, start in ((["--format", "json", paths[0]], "{"), (["--format", "md", *paths], "# 3 runs compared")):
        with pytest.raises(SystemExit) as end:
            main(["report", *args])
        assert end.value.code == 0
        assert capsys.readouterr().out.startswith(start)
    assert write_report(runs, None, "html").name == "compare.html"
    out = tmp_path / "numbers.json"
    assert write_report(runs, out, "json") == write_report(runs[:1], out, "json")
    out.write_text("mine")
    with pytest.raises(UsageError, match="nothing that this command wrote"):
        write_report(runs, out, "json")
    with pytest.raises(UsageError, match="too many"):
        text_of(runs * 3, "html")
    with pytest.raises(UsageError, match="no price"):
        price_of("much")


@pytest.mark.parametrize("form, mine", [
    ("md", "# My project\n"), ("json", '{"name": "package"}'), ("json", '{\n "name": 1}'),
    ("html", "<!doctype html>\n<title>Mine</title>"), ("html", "<!doctype html><html></html>"),
])  # fmt: skip
def test_a_report_is_never_written_over_files_of_the_user(tmp_path: Path, form: str, mine: str) -> None:
    run, out = make_run(tmp_path / "r", steps=9, rows=9), tmp_path / f"mine.{form}"
    out.write_text(mine)
    with pytest.raises(UsageError, match="nothing that this command wrote"):
        write_report([run], out, form)
    assert out.read_text() == mine
    out.unlink()
    write_report([run], out, form)
    run.scores.unlink()
    assert write_report([run], out, form).stat().st_size > 100  # over its own, though it says something else now
    beside = tmp_path / "compare.html"
    beside.write_text(mine)
    with pytest.raises(UsageError, match="nothing that this command wrote"):
        write_report([run, run], None, "html")


@pytest.mark.parametrize("form", ["html", "md", "json"])
def test_half_a_surrogate_pair_is_written(tmp_path: Path, form: str) -> None:
    run = make_run(tmp_path / "r", steps=9, rows=9)
    write_file(run.resolved, {"recipe": {**recipe_record(), "name": "half \ud83d"}})
    for runs in ([run], [run, run]):
        text = write_report(runs, tmp_path / f"{len(runs)}.{form}", form).read_text(encoding="utf-8")
        assert "half" in text
        if form == "json" and len(runs) == 1:
            assert json.loads(text)["name"] == "half \ud83d"


def test_a_page_stays_small_whatever_the_run_holds(tmp_path: Path) -> None:
    """Every list longer and every text dirtier than is shown: at most 2 MB."""
    run = make_run(tmp_path / "r", steps=1_500, rows=300)
    dirty = ("<&\"'\u202e\x00" * 200)[:1000]
    tasks = {f"task {i} {dirty[:60]}": 1.0 for i in range(100)}
    many = [{"kind": "dev", "step": i, "loss": 1.0, "tasks": tasks if i in (0, 299) else {}} for i in range(300)]
    many += [{"kind": "score", "step": i, "right": 3, "rows": 32, "took_s": 1.0} for i in range(300)]
    write_file(run.metrics, [*metric_records(1_500), *many])
    ledger = [{**r, "task": f"t{i}{dirty}", "reason": dirty, "code": f"{dirty}{i}" if r["code"] else None}
              for i, r in enumerate(ledger_records())]  # fmt: skip
    write_file(run.ledger, [*ledger, *({**ledger[841], "code": f"X{i}{dirty}"} for i in range(60))])
    samples = [
        {**s, "step": k, "row": f"r{i}{dirty}", "answer": dirty}
        for i, s in enumerate(sample_records(9)[:30])
        for k in range(9)
    ]
    write_file(run.samples, samples)
    mask = {"row": dirty, "runs": [{"text": dirty, "kind": "trained", "control": False, "tokens": 1}] * 60}
    write_file(run.path / "preview.json", [mask] * 5)
    check = {"id": dirty, "name": dirty, "verdict": "warn", "number": dirty, "evidence": dirty}
    write_file(run.preflight, {"before": [check] * 60, "after": [{**check, "verdict": "pass"}] * 60})
    recipe = recipe_record()
    write_file(run.resolved, {"recipe": {**recipe, "x": {f"{dirty}{i}": dirty for i in range(300)}}})
    for name in ("untouched", "few_shot", "tuned"):
        write_file(
            run.answers / f"{name}.jsonl",
            [{**x, "answer": dirty, "reason": dirty} for x in run.load(run.answers / f"{name}.jsonl")],
        )
    size = len(build_report(run).encode())
    assert 200_000 < size <= 2_000_000
    eight = []
    for k in range(8):  # links to the same files, but every setting is another
        place = RunDir(tmp_path / f"r{k}")
        place.path.mkdir()
        for file in run.path.iterdir():
            (place.path / file.name).symlink_to(file)
        place.resolved.unlink()
        write_file(place.resolved, {"recipe": {**recipe, "x": {f"{dirty}{i}": f"{k}{dirty}" for i in range(300)}}})
        eight.append(place)
    compared = build_comparison(eight)
    assert "120 of 300 shown" in Page(compared).text
    assert len(compared.encode()) <= 2_000_000


# Words


TEXT = st.text(alphabet='ab c.\n{}"', max_size=60)


@settings(deadline=None)
@given(TEXT, TEXT)
def test_pieces_make_both_texts_again(answer: str, expected: str) -> None:
    found = differences(answer, expected)
    assert "".join(p.text for p in found if p.kind != "missing") == answer
    if any(p.kind != "same" for p in found):
        assert "".join(p.text for p in found if p.kind != "more") == expected


def test_words_that_differ_are_marked() -> None:
    found = differences('{"intent": "refund", "order": "12"}', '{"intent": "cancel", "order": "12"}')
    assert [(p.kind, p.text) for p in found if p.kind != "same"] == [("missing", "cancel"), ("more", "refund")]
    assert [p.kind for p in differences("Sure! I am happy to help you.", '{"order": 12}')] == ["same"]
