"""Pages of runs that learn from pairs and from raw text: what their loss is called, what is drawn of pairs, nothing said of answers
where there are none; and every text of a damaged file stays text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from educe.files.run_dir import RunDir
from educe.recipes.report import text_of
from educe.report import build_report
from educe.report.compare import build_comparison
from educe.report.reading import read_run

from report_payloads import PAYLOADS, poison
from run_directory import Page, make_run, metric_records, recipe_record, write_file

STEPS = 12
PAIRS = {"kind": "preference", "loss": {"kind": "dpo", "beta": 0.1}, "nll_weight": 0.0}
SHARES = {0: 0.5, STEPS // 3: 0.625, 2 * STEPS // 3: 0.75, STEPS: 0.875}


def pair_lines() -> list[dict[str, Any]]:
    lines = [x for x in metric_records(STEPS) if x["kind"] != "score"]
    for x in lines:
        share = SHARES.get(x["step"], 0.5)
        x["pairs"] = {
            "ranked": share,
            "accuracy": 1 - share,
            "margin": 3 * share - 1.5,
            "chosen": -0.1,
            "rejected": -0.2,
        }
        if x["kind"] == "dev":
            x["kl"] = 0.01 * x["step"]
    return lines


def run_of(path: Path, objective: dict[str, Any]) -> RunDir:
    """A run of that objective that is not evaluated."""
    run = make_run(path, rows=4, steps=STEPS)
    write_file(run.resolved, {"recipe": {**recipe_record(), "name": path.name, "objective": objective}})
    gone = [run.scores, run.samples, *run.answers.iterdir(), run.path / "preview.json", run.shift]
    for file in (*gone, *run.judged.iterdir(), *run.suites.iterdir()):
        file.unlink()
    lines = [x for x in metric_records(STEPS) if x["kind"] != "score"]
    write_file(run.metrics, pair_lines() if objective["kind"] == "preference" else lines)
    return run


@pytest.fixture(scope="module")
def preference(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return run_of(tmp_path_factory.mktemp("pairs") / "pairs", PAIRS)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return run_of(tmp_path_factory.mktemp("texts") / "texts", {"kind": "pretrain"})


def test_the_loss_of_pairs_is_called_what_it_is(preference: RunDir) -> None:
    page = Page(build_report(preference))
    assert "loss of a pair" in page.text
    assert "Mean loss of a preference pair (dpo)" in page.text
    assert "per trained token" not in page.text
    assert "50.0 % → 87.5 % of the dev pairs ranked right." in page.text
    head = page.text[: page.text.index("Before and after")]
    assert "per token, step 0 → step 12; KL on chosen answers 0.12 nats per token" in head


def test_pairs_and_drift_are_drawn_for_pointer_and_keyboard(preference: RunDir) -> None:
    html = build_report(preference)
    for name in ("ranked", "kl"):
        assert all(f'id="{name}-{form}-title"' in html for form in ("wide", "narrow"))
    for step, share in SHARES.items():
        said = f"Step {step}: {100 * share:.1f}\u202f% of the dev pairs ranked right, mean margin"
        assert html.count(f'aria-label="{said}') == 2
        assert html.count(f'aria-label="Step {step}: KL on chosen answers') == 2
    assert not Page(html).open


def test_markdown_and_json_have_the_pairs(preference: RunDir) -> None:
    found = json.loads(text_of([preference], "json"))
    assert found["objective"] == "preference"
    assert {p["step"]: p["ranked"] for p in found["dev_pairs"]} == SHARES
    assert [p["kl"] for p in found["dev_pairs"]] == pytest.approx([0.01 * s for s in SHARES])
    text = text_of([preference], "md")
    assert "50.0 % → 87.5 % of the dev pairs ranked right." in text.replace("\u202f", " ")
    assert "Held-out loss, of a pair" in text
    assert "KL on chosen answers" in text
    assert "educe eval" not in text


def test_a_page_about_raw_text_does_not_speak_of_answers(texts: RunDir) -> None:
    page = Page(build_report(texts))
    assert "Pre-training report" in page.text
    assert "nats per token." in page.text
    said = page.text[: page.text.index("Data ledger")].lower()
    assert not [word for word in ("answer", "right", "evaluated", "ranked", "educe train") if word in said]
    assert set(page.links) <= {f"#{i}" for i in page.ids}
    assert "answers" not in page.ids


def test_a_comparison_says_that_the_losses_are_not_alike(preference: RunDir, texts: RunDir) -> None:
    mixed, alike = (Page(build_comparison([preference, other])) for other in (texts, preference))
    assert "not on one scale" in mixed.text
    assert "On each run’s own dev rows, loss of a preference pair" in alike.text
    assert not mixed.open
    assert text_of([preference, texts], "md").startswith("# 2 runs compared")


def test_shares_that_cannot_be_are_left_out(tmp_path: Path) -> None:
    run = run_of(tmp_path / "odd", PAIRS)
    wrong: list[Any] = [1.5, -0.1, None, "0.5", float("nan"), True]
    lines = [
        {"kind": "dev", "step": k, "loss": 0.6, "pairs": {"ranked": x}, "kl": -1} for k, x in enumerate([*wrong, 0.5])
    ]
    write_file(run.metrics, lines)
    assert [p.step for p in read_run(run).pairs] == [len(wrong)]
    assert 'id="kl-wide-title"' not in build_report(run)


@pytest.mark.parametrize("how", ["texts", "everything"])
def test_texts_of_a_preference_run_never_become_markup(tmp_path: Path, how: str) -> None:
    def page(name: str, word: str) -> Page:
        run = run_of(tmp_path / name, PAIRS)
        lines = pair_lines()
        for x in lines:
            x["pairs"]["ranked"] = x["pairs"]["ranked"] if how == "texts" else f"{word}"
        write_file(run.metrics, lines)
        wanted = run.load(run.resolved)
        wanted["recipe"]["objective"]["loss"] = poison(PAIRS["loss"], word, how == "everything") | {"kind": word}
        write_file(run.resolved, wanted)
        return Page(build_report(run))

    harmless = page("harmless", "plain words")
    for k, payload in enumerate(PAYLOADS[::8]):
        found = page(f"p{k}", payload)
        assert found.shape == harmless.shape
        assert not found.open
        assert payload.split()[0] in found.text
