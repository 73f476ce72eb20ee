"""What is made of lm-eval's results, without lm-eval: pairs, reasons for none, the terminal, pages, refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from educe.cli.main import cli
from educe.errors import MachineError, UsageError
from educe.evaluate.harness_scores import lines_of, measures_of
from educe.recipes.report import text_of
from educe.report import build_report
from educe.stats import clustered_mean, mcnemar, paired_difference, paired_scores
from hypothesis import given
from hypothesis import strategies as st

from run_directory import Page, harness_record, make_run, write_file

VERDICTS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40)
NUMBERS = st.lists(st.tuples(*[st.floats(-50, 50)] * 2), min_size=2, max_size=40)


def results(values: list[float], stderr: Any = 0.1, **more: Any) -> dict[str, Any]:
    """As `lm_eval.evaluator.evaluate` returns them, of one task with one measure."""
    samples = [
        {"doc_id": i, "filter": "none", "metrics": ["acc"], "acc": v, "target": "t", "arguments": [("c", " t")],
         "filtered_resps": [(-1.5, True)]}
        for i, v in enumerate(values)
    ]  # fmt: skip
    found = {"name": "tiny", "alias": "tiny", "sample_len": len(values), "acc,none": sum(values) / len(values),
             "acc_stderr,none": stderr}  # fmt: skip
    return {
        "results": {"tiny": found}, "samples": {"tiny": samples}, "higher_is_better": {"tiny": {"acc": True}},
        "n-samples": {"tiny": {"original": 99, "effective": len(values)}}, "n-shot": {"tiny": 3}, "versions": {"tiny": 1}, **more,
    }  # fmt: skip


@given(VERDICTS)
def test_rows_that_are_right_or_wrong_are_paired_as_elsewhere(pairs: list[tuple[bool, bool]]) -> None:
    before, after = [b for b, _ in pairs], [a for _, a in pairs]
    (m,) = measures_of({"untouched": results([float(b) for b in before]), "tuned": results([float(a) for a in after])})
    assert (m["won"], m["lost"], m["p"]) == mcnemar(before, after)
    d = paired_difference(before, after)
    assert m["difference"] == {"value": d.value, "low": d.low, "high": d.high}
    assert (m["num_rows"], m["num_in_task"], m["shots"], m["why"]) == (len(pairs), 99, 3, "")
    assert m["systems"]["tuned"] == {"value": sum(after) / len(after), "stderr": 0.1}


@given(NUMBERS)
def test_other_numbers_are_paired_by_their_differences(pairs: list[tuple[float, float]]) -> None:
    before, after = [b for b, _ in pairs], [a for _, a in pairs]
    (m,) = measures_of({"untouched": results(before), "tuned": results(after)})
    if not {*before, *after} <= {0.0, 1.0}:
        ones = [1.0] * len(pairs)
        d = clustered_mean([a - b for b, a in pairs], ones)
        if all(0 <= x <= 1 for x in (*before, *after)):
            d = paired_scores(before, after, ones)
        same = before == after and not all(0 <= x <= 1 for x in before)
        assert m["difference"] == (None if same else {"value": d.value, "low": d.low, "high": d.high})
        assert 0 < m["p"] <= 1
        assert bool(m["why"]) == same


def test_what_cannot_be_paired_says_why() -> None:
    good = results([1.0, 0.0])
    perplexity = results([1.0, 2.0])
    perplexity["results"]["tiny"]["acc,none"] = 3.3
    odd = results([1.0, 0.0])
    odd["samples"]["tiny"][0]["acc"] = (1, 2)
    other = results([1.0, 0.0])
    other["samples"]["tiny"][0]["doc_id"] = 7
    group = results([1.0, 0.0])
    group["samples"] = {}
    cases = {
        "not the mean of the rows": (perplexity, perplexity), "no number of its own": (good, odd),
        "fewer than two rows were scored of both": (good, other), "a group of tasks": (group | {"groups": {"tiny": {}}},) * 2,
    }  # fmt: skip
    for why, (before, after) in cases.items():
        (m,) = measures_of({"untouched": before, "tuned": after})
        assert why in m["why"], why
        assert m["difference"] is None


def test_lines_hold_what_json_can() -> None:
    found = results([1.0, float("inf")], stderr="N/A")
    (m,) = measures_of({"untouched": found, "tuned": found})
    assert m["systems"]["tuned"] == {"value": None, "stderr": None}
    lines = lines_of(found)
    json.dumps([m, lines], allow_nan=False)
    assert lines[1]["scores"] == {"acc": "inf"}
    assert lines[0]["arguments"] == [["c", " t"]]


def test_a_missing_extra_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from educe.recipes.harness import need_lm_eval

    for name in [n for n in sys.modules if n.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MachineError, match=r"E-SYS-001 lm-eval .*pip install 'educe\[lm-eval\]'"):
        need_lm_eval()


OTHERS = ("--suite=ifeval", "--choices=f", "--regrade", "--metric=exact", "--samples=2", "--general=g", "--suite-tokens=4",
          "--suite-file=f", "--also=http://a")  # fmt: skip


@pytest.mark.parametrize("args", [("--lm-eval", "a", o) for o in OTHERS] + [("--chat",), ("--lm-eval-dir", "d")])
def test_what_would_be_ignored_is_refused(args: tuple[str, ...]) -> None:
    with pytest.raises(UsageError):
        cli.main(["eval", "nowhere", *args], standalone_mode=False)


@pytest.mark.parametrize("tasks", [(), ("a", ""), ("a", "a")])
def test_no_list_of_tasks_is_refused(tasks: tuple[str, ...]) -> None:
    pytest.importorskip("torch")
    from educe.recipes.harness import Wish

    with pytest.raises(UsageError):
        Wish(tasks=tasks)


def test_measures_stand_on_the_page_in_markdown_and_beside_other_runs(tmp_path: Path) -> None:
    run, other = make_run(tmp_path / "a", rows=30, steps=12), make_run(tmp_path / "b", rows=30, steps=12)
    (other.suites / "lm-eval-tiny.json").unlink()
    page = Page(build_report(run))
    assert not page.open
    for text in (page.text, text_of([run], "md")):
        assert "lm-eval: tiny" in text
        assert "tiny: acc, 3 examples, 400 rows, higher is better" in text
        assert "0.4 ± 0.02" in text
        assert "the value is not the mean of the rows" in text
    assert json.loads(text_of([run], "json"))["suites"]["lm-eval-tiny"] == harness_record()
    for text in (Page(text_of([run, other], "html")).text, text_of([run, other], "md")):
        assert "lm-eval 0.4.13, chat: tiny: acc" in text
        assert "IFEval: All of a prompt's instructions, strict" in text
    write_file(run.suites / "lm-eval-tiny.json", {"measures": 3})
    assert "lm-eval: tiny" not in build_report(run)
