"""Runs whose rows have scores between right and wrong: the comparison of runs tests what evaluate tests, and the words say so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from educe.evaluate.compare import score
from educe.evaluate.numbers import Graded, compare
from educe.files.run_dir import RunDir
from educe.recipes.report import text_of
from educe.report import build_report
from educe.report.compare import build_comparison
from educe.report.numbers import named, pair

from run_directory import Page, make_run, recipe_record, write_file


def run_of(path: Path, name: str, tuned: list[float], weights: list[float] | None = None) -> RunDir:
    """Graded by ROUGE-L: the untouched model has 0.1 everywhere."""
    run = make_run(path, rows=len(tuned))
    write_file(run.resolved, {"recipe": {**recipe_record(), "name": name}})
    (run.answers / "few_shot.jsonl").unlink()
    for file in run.suites.iterdir():  # followed or not, right or wrong: McNemar's test
        file.unlink()
    graded: dict[str, list[dict[str, Any]]] = {}
    for system, scores in (("untouched", [0.1] * len(tuned)), ("tuned", tuned)):
        rows = zip(run.load(run.answers / f"{system}.jsonl"), scores, weights or [1.0] * len(tuned), strict=True)
        graded[system] = [{**x, "correct": s == 1, "score": s, "weight": w} for x, s, w in rows]
        write_file(run.answers / f"{system}.jsonl", graded[system])
    write_file(run.scores, score(graded, "rouge_l", {}, None))
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunDir]:
    place, low = tmp_path_factory.mktemp("means"), [0.2 + 0.01 * (i % 21) for i in range(40)]
    weights = [1.0 + i % 3 for i in range(40)]
    return [run_of(place / "a", "low", low, weights), run_of(place / "b", "high", [x + 0.5 for x in low], weights)]


def test_means_are_paired_as_evaluate_pairs_them(runs: list[RunDir]) -> None:
    (found,) = pair(named(runs))
    graded = [Graded.of(r.load(r.answers / "tuned.jsonl")) for r in runs]
    wanted = compare(graded[0], graded[1], plain=False)
    assert found.difference is not None
    assert (found.won, found.lost, found.p) == (40, 0, wanted["p"])
    assert found.difference.low == pytest.approx(wanted["difference"]["low"])
    assert (found.measure, found.p_holm) == ("mean", found.p)
    assert "high beats low: its mean score is 50 percentage points higher" in Page(build_comparison(runs)).text
    (back,) = pair(named(runs[::-1]))
    assert (back.won, back.lost) == (0, 40)


def test_nothing_is_called_right_that_is_a_mean(runs: list[RunDir]) -> None:
    pages = [build_report(runs[0]), build_comparison(runs), text_of(runs[:1], "md"), text_of(runs, "md")]
    for text in pages:
        assert "McNemar" not in text
        assert "hare of right answers" not in text
        assert "✗ wrong" not in text
        assert "Mean score" in text
        assert "aired randomisation" in text
    assert "Won: a higher score after tuning" in Page(pages[0]).text
    assert "score 0.1 " in Page(pages[0]).text
    assert json.loads(text_of(runs, "json"))["paired"][0]["measure"] == "mean"


def test_rows_without_weight_are_not_tested(tmp_path: Path) -> None:
    both = [run_of(tmp_path / n, n, [0.2, 0.4, 0.3]) for n in ("a", "b")]
    lines = both[1].load(both[1].answers / "tuned.jsonl")
    write_file(both[1].answers / "tuned.jsonl", [{**x, "weight": 0, "score": 1e308} for x in lines])
    assert "have no weight" in pair(named(both))[0].why
