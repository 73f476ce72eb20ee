"""The report page: every section, every absence, and no way for data to become markup."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from educe.files.run_dir import RunDir
from educe.recipes.report import text_of
from educe.report import build_report
from educe.report.markdown import plain
from educe.report.reading import read_run
from educe.report.visible import shown, visible
from hypothesis import given
from hypothesis import strategies as st

from report_payloads import FILES
from run_directory import (
    Page,
    ledger_records,
    make_run,
    metric_records,
    provenance_record,
    recipe_record,
    sample_records,
    write_file,
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(build_report(make_run(tmp_path_factory.mktemp("runs") / "orders")))


def test_page_is_well_formed_and_self_contained(page: Page, tmp_path: Path) -> None:
    html = build_report(make_run(tmp_path))
    assert html.startswith("<!doctype html>")
    assert not page.open
    assert len(page.ids) == len(set(page.ids))
    tags = {t for t, _ in page.shape}
    assert not tags & {"img", "link", "iframe", "object", "form", "base"}
    assert [t for t, _ in page.shape].count("script") == 1
    assert not re.search(r"url\(|@import|https?://", html)
    assert "Content-Security-Policy" in html
    assert "default-src 'none'" in html


def test_report_is_the_same_every_time(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert build_report(run) == build_report(run)


def test_verdict_and_key_figures_come_first(page: Page) -> None:
    head = page.text[: page.text.index("Before and after")]
    assert "Tuning was worth it: right answers rose from" in head
    for figure in ("1.7 % → 80.0 %", "5 min 12 s", "3.6 GB", "840"):
        assert figure in head


def test_before_and_after_is_told_in_words(page: Page) -> None:
    assert (
        "“Best prompt” is the untouched model with instruction + 5 examples in its prompt: the best of 5" in page.text
    )
    assert re.search(r"192 rows won, 4 lost, 44 unchanged; McNemar p < 0.001", page.text)
    assert re.search(r"\+78\.3 percentage points 95 % interval \+7\d\.?\d* to \+8\d", page.text)


def test_answers_show_each_fate_with_its_number(page: Page) -> None:
    assert "Won: wrong before tuning, right after 3 of 192 shown" in page.text
    assert "Lost: right before tuning, wrong after 3 of 4 shown" in page.text
    assert "Still wrong 3 of 44 shown" in page.text
    assert "Right before and after none" in page.text
    assert "✓ right" in page.text
    assert "✗ wrong" in page.text
    assert "Step 125 ✓ same text" in page.text


def test_mask_shows_line_ends_and_control_tokens(page: Page) -> None:
    assert "Only the highlighted text carries loss." in page.text
    assert "24 of 81 tokens carry loss" in page.text
    assert "<|im_start|>assistant↵" in page.text


def test_ledger_adds_up(page: Page, tmp_path: Path) -> None:
    assert "1,148 rows in = 840 trained + 60 dev + 240 test + 7 dropped + 1 refused" in page.text
    assert "7 dropped: row is longer than the sequence length E-DATA-201" in page.text
    assert "First five: train.jsonl:841, train.jsonl:842" in page.text
    assert "train.jsonl:846" not in page.text
    ledger = read_run(make_run(tmp_path)).ledger
    assert ledger is not None
    assert ledger.rows == sum(t.rows for t in ledger.terms) == 1148
    assert ledger.trained.trained_tokens == sum(20 + (i + 1) % 8 for i in range(840))


def test_a_status_the_page_does_not_know_still_counts(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with run.ledger.open("a") as f:
        f.write('{"file":"train.jsonl","line":900,"status":"not drawn"}\n')
    text = Page(build_report(run)).text
    assert "1,149 rows in" in text
    assert "+ 1 not drawn" in text


def test_cost_settings_and_provenance(page: Page) -> None:
    for said in ("340 tokens/s (median step)", "126,250, 40,000 of them with loss", "2 CPU threads, bfloat16",
                 "timed matmul", "train.learning_rate 0.0003", "a1a1a1a1a1a1…", "apache-2.0", "135 million",
                 "educe train recipe.yaml"):  # fmt: skip
        assert said in page.text


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["missing", "empty", "not json", "another type"])
def test_no_file_is_needed(tmp_path: Path, name: str, how: str) -> None:
    run = make_run(tmp_path)
    file = run.path / name
    content = {
        "empty": "",
        "not json": "{]\n{]\n",
        "another type": "[1, null]\n" if name.endswith("n") else "1\nnull\n",
    }
    file.unlink() if how == "missing" else file.write_text(content[how])
    html = build_report(run)
    assert not Page(html).open
    if how == "not json" and not name.startswith(("judged/", "suites/", "shift")):
        assert f"<code>{name}</code>" in html
        assert plain(name) in text_of([run], "md").partition("cannot be read as JSON: ")[2].splitlines()[0]


def test_the_verdict_is_whole_however_many_models_it_weighs(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    others = " ".join(
        f"lab/model-{k} reaches 33 % for 0.012 USD; the tuned one is better (p < 0.001)." for k in range(9)
    )
    write_file(
        run.scores, {**run.load(run.scores), "verdict": f"Tuning helped: 2 % → 80 %. With none. {others} Price: 5 min."}
    )
    assert f"{others} Price: 5 min." in Page(build_report(run)).text
    assert "better (p \\< 0.001). Price: 5 min.**" in text_of([run], "md")


def test_an_empty_directory_says_what_to_run(tmp_path: Path) -> None:
    text = Page(build_report(RunDir(tmp_path / "new"))).text
    assert "Not trained to its end yet" in text
    assert "educe eval" not in text
    assert text.count("educe train RECIPE") >= 6


def test_training_without_evaluation(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.scores.unlink()
    for file in run.answers.iterdir():
        file.unlink()
    text = Page(build_report(run)).text
    assert "Not evaluated yet: run educe eval" in text
    assert "Held-out loss 1.62 → 0.08" in text


@pytest.mark.parametrize("shots", [0, 5])
def test_without_few_shot_the_page_admits_what_it_cannot_say(tmp_path: Path, shots: int) -> None:
    run = make_run(tmp_path, few_shot=False)
    recipe = recipe_record()
    recipe["evaluation"]["few_shot"] = shots
    write_file(run.resolved, {"recipe": recipe})
    text = Page(build_report(run)).text
    assert "cannot say whether examples in the prompt would have done as well" in text
    assert ("switched off" in text) == (shots == 0)


def test_unfinished_training_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write_file(run.provenance, {**provenance_record(400), "finished": None, "training_s": None})
    text = Page(build_report(run)).text
    assert "Training has not finished" in text
    assert "125 of 400" in text


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 5000])
def test_any_number_of_steps(tmp_path: Path, steps: int) -> None:
    html = build_report(make_run(tmp_path, steps=steps))
    assert ("too many to draw one by one" in html) == (steps == 5000)
    assert len(html) < 400_000


def test_one_test_row_and_no_refusal(tmp_path: Path) -> None:
    run = make_run(tmp_path, rows=1)
    write_file(run.ledger, [r for r in ledger_records() if r["status"] == "train"])
    text = Page(build_report(run)).text
    assert "1 test row," in text
    assert "1 row won, 0 lost, 0 unchanged; McNemar p = 1." in text
    assert "No row was dropped or refused." in text


def test_losses_that_are_not_numbers_are_counted(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with run.metrics.open("a") as f:
        f.write(
            '{"kind":"step","step":126,"loss":NaN}\n{"kind":"step","step":127,"loss":null}\n{"kind":"step","step":128,"loss":1e308}\n'
        )
    html = build_report(run)
    assert "3 steps without a finite loss (below 1e30) left out" in html
    assert "nan" not in Page(html).text.lower().replace("provenance", "")


def test_all_steps_not_finite(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write_file(run.metrics, [{"kind": "step", "step": i, "loss": None} for i in (1, 2)])
    assert not Page(build_report(run)).open


def test_a_step_written_twice_counts_once(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write_file(run.metrics, metric_records(125) + metric_records(125)[60:])
    assert len(read_run(run).steps) == 125


def test_long_text_is_clamped_and_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    samples = sample_records(125)
    samples[0]["answer"] = "x" * 10_600
    write_file(run.samples, samples)
    html = build_report(run)
    assert "x" * 600 + '<span class="more">… (10,000 more characters)</span>' in html
    assert "x" * 601 not in html


@given(st.text())
def test_shown_text_comes_back_whole(text: str) -> None:
    plain = "".join(Page(f"<b>{shown(text, 10_000)}</b>").words)
    assert plain == visible(text)


def test_free_text_is_shown_and_not_graded(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    scores = run.load(run.scores)
    write_file(run.scores, {**scores, "metric": "text", "verdict": "Held-out loss fell from 2.10 to 1.40."})
    page = Page(build_report(run))
    assert "Free text has many right answers" in page.text
    assert "Held-out loss fell" in page.text
    assert "✓ right" not in page.text
    assert "✗ wrong" not in page.text
    assert "; McNemar" not in page.text


def test_the_page_says_what_was_forgotten_and_where_answers_shift(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    text = Page(build_report(run)).text
    assert "Worse by more than chance: general text costs 13.3% more bits per byte (1.170 → 1.325); 3 of 46" in text
    assert "General questions answered right 24 of 46 3 of 46 -46 (-59 to -29) points" in text
    assert "Best prompt" in text
    assert "instruction + 5 examples in its prompt: the best of 5 on 24 dev rows" in text
    assert "token 1: 100" in text
    assert '{" 16 of 16 The (8), I (5)' in text
    run.shift.write_text('{"by_position": [{"first": 1}]}')
    assert "Where the answers shift" not in Page(build_report(run)).text
    run.scores.write_text('{"general": {"text": 3}}')
    assert "What was forgotten" not in Page(build_report(run)).text
