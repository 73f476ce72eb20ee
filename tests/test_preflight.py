"""Checks before a model is loaded: each passes on a healthy run, and fails for the right reason on one that is not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
from educe.config import Recipe, load_recipe
from educe.errors import TrainError
from educe.files.atomic import directory
from educe.files.run_dir import RunDir
from educe.model.describe import describe_model
from educe.pack.plan import PackPlan
from educe.recipes.finding import Before, Finding, before, finding, unchecked
from educe.recipes.machine import chosen_device
from educe.recipes.memory import memory_of_run
from educe.recipes.mixing import draw
from educe.recipes.plan import plan_run
from educe.recipes.preflight import CHECKS, keep, passed_line, refuse, tell, without_model, worst_first
from educe.recipes.preflight_machine import _older, lost_updates
from educe.recipes.prepare import Prepared, prepare
from educe.recipes.provenance import settings_of

from check_command import row

TOKEN = "hf_" + "aB3" * 11
HEAD = "device: cpu\ndtype: float32\n"


def quiet(line: str) -> None:
    """Say nothing."""


def lines(n: int, start: int = 0) -> list[str]:
    return [
        row(f"the cat {i} sat on the mat and the user said {i * 7}", f"refund {i}") for i in range(start, start + n)
    ]


@dataclass(frozen=True)
class Bench:
    """A place with a model, where recipes are written and looked at."""

    place: Path
    model: Path

    def recipe(self, rows: list[str], more: str = "max_tokens: 128", rest: str = "", name: str = "t") -> Recipe:
        (self.place / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        head = f"name: {name}\nmodel: {self.model}\n{HEAD}data: {{train: rows.jsonl, {more}}}\n"
        file = self.place / "recipe.yaml"
        train = "train: {batch_tokens: 256, micro_batch_tokens: 128}\n"
        file.write_text(head + (rest or train), encoding="utf-8")
        return load_recipe(file)

    def before(self, recipe: Recipe, *, prepared: Prepared | None = None, text: str = "", ranks: int = 1) -> Before:
        prepared = prepared or prepare(recipe, quiet)
        facts = describe_model(prepared.model_dir, recipe.model)
        order_K, device = draw(recipe, prepared), chosen_device("cpu", "float32")
        plan = plan_run(recipe, prepared, facts, order_K, num_ranks=ranks)
        memory = memory_of_run(recipe, prepared, facts, plan, device, compiled=False)
        return before(recipe, prepared, facts, plan, memory, "cpu", 1e4, text=text, argv=["train"], hang_after_s=60.0)


@pytest.fixture
def bench(tmp_path: Path, tiny_model: Path) -> Bench:
    model = tmp_path / "tiny"
    shutil.copytree(tiny_model, model)
    return Bench(tmp_path, model)


def found(b: Before, id: str) -> Finding:
    """The finding of one check."""
    return next(f for f in without_model(b) if f.id == id)


def damaged(b: Before, bench: Bench, name: str, change: Callable[[np.ndarray, Prepared], Any]) -> Before:
    """Prepared again from a copy in which an array of the training store was changed."""
    place = bench.place / "copy"
    shutil.copytree(b.prepared.path, place)
    copy = replace(b.prepared, path=place)
    array = np.load(place / "train" / f"{name}.npy")
    change(array, copy)
    np.save(place / "train" / f"{name}.npy", array)
    return bench.before(b.recipe, prepared=copy)


def test_a_healthy_run_passes_every_check(bench: Bench) -> None:
    b = bench.before(bench.recipe(lines(40)))
    findings = without_model(b)
    assert [str(f) for f in findings if f.verdict not in ("pass", "skip")] == []
    assert [f.id for f in findings] == sorted(f.id for f in findings)
    assert len(findings) == len(CHECKS) >= 30
    assert all(f.name and f.number and f.evidence for f in findings)
    kept = b.prepared.summary["rows"]["train"]
    assert [found(b, p).number for p in ("P08", "P15")] == [f"{kept} of {kept} rows"] * 2


def test_every_check_has_the_id_of_its_finding(bench: Bench) -> None:
    b = bench.before(bench.recipe(lines(12)))
    assert [check(b).id for check in CHECKS.values()] == list(CHECKS)


def test_ids_are_known_without_docstrings() -> None:
    """`python -OO` drops them: a check that ends in an error is told by its id all the same."""
    code = """
import educe.recipes.preflight as p
from educe.errors import ModelError
def broken(b):
    raise ModelError(2, "here", "is broken.", "Mend it.")
p.CHECKS = dict.fromkeys(p.CHECKS, broken)
found = p.without_model(None)
print(__debug__, p.without_model.__doc__, *(f.id for f in found), {f.verdict for f in found}, {f.name for f in found})
"""
    done = subprocess.run([sys.executable, "-OO", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["False", "None", *CHECKS, "{'fail'}", "{'broken'}"]


def test_p01_files_that_change_while_they_are_prepared(bench: Bench) -> None:
    b = bench.before(bench.recipe(lines(12)))
    assert found(b, "P01").verdict == "pass"
    bench.recipe(lines(13))
    assert found(b, "P01").verdict == "fail"
    assert "changed while" in found(b, "P01").evidence


def test_p02_and_p04_rows_that_are_not_used(bench: Bench) -> None:
    b = bench.before(bench.recipe([*lines(12), "{not json"], "max_tokens: 128, max_unused: 0.01"))
    assert found(b, "P02").verdict == "fail"
    assert "1 E-DATA-102" in found(b, "P02").evidence
    template = bench.place / "strict.jinja"
    source = (bench.model / "chat_template.jinja").read_text()
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template.write_text(refuses + source)
    turns = [{"role": "system", "content": "x"}, *json.loads(lines(1)[0])["messages"]]
    recipe = bench.recipe(
        [*lines(12), json.dumps({"messages": turns})], rest=f"template: {{kind: file, file: {template}}}\n"
    )
    strict = bench.before(recipe)
    assert found(strict, "P04").verdict == "warn"
    assert found(b, "P04").verdict == "pass"


def test_p03_a_ledger_line_that_is_gone(bench: Bench) -> None:
    b = bench.before(bench.recipe(lines(12)))

    def cut(_: np.ndarray, copy: Prepared) -> None:
        text = (copy.path / "ledger.jsonl").read_text().splitlines(keepends=True)
        (copy.path / "ledger.jsonl").write_text("".join(text[:-1]))

    f = found(damaged(b, bench, "weights", cut), "P03")
    assert f.verdict == "fail"
    assert "rows: the ledger has 11, what was prepared 12" in f.evidence


def test_p05_an_example_without_a_trained_token(bench: Bench) -> None:
    b = bench.before(bench.recipe(lines(12)))

    def mute(weights: np.ndarray, copy: Prepared) -> None:
        weights[: int(copy.store("train").lengths[0])] = 0

    assert found(damaged(b, bench, "weights", mute), "P05").evidence.startswith("1 examples without")


def test_p06_a_stop_token_that_is_not_trained(bench: Bench) -> None:
    b = bench.before(bench.recipe(lines(12)))

    def open_ends(weights: np.ndarray, copy: Prepared) -> None:
        last = np.flatnonzero((weights > 0) & (np.append(weights[1:], 0) == 0))
        weights[last[3:]] = 0

    f = found(damaged(b, bench, "weights", open_ends), "P06")
    assert f.verdict == "fail"
    assert f.number.startswith("3 of ")


def test_p07_two_begin_tokens(bench: Bench) -> None:
    b = bench.before(bench.recipe(lines(12)))

    def double(ids: np.ndarray, copy: Prepared) -> None:
        first = np.load(copy.path / "train" / "offsets.npy")[:-1]
        ids[first + 1] = ids[first]

    f = found(damaged(b, bench, "ids", double), "P07")
    assert f.verdict == "fail"
    assert "begin otherwise" in f.evidence


def test_p08_and_p15_a_stale_store(bench: Bench) -> None:
    b = bench.before(bench.recipe(lines(12)))

    def other(ids: np.ndarray, copy: Prepared) -> None:
        ids[np.load(copy.path / "train" / "offsets.npy")[4] + 3] += 1

    stale = damaged(b, bench, "ids", other)
    assert [found(stale, p).verdict for p in ("P08", "P15")] == ["fail", "fail"]
    assert "rows.jsonl:" in found(stale, "P15").evidence


def test_p15_a_weight_that_is_another(bench: Bench) -> None:
    b = bench.before(bench.recipe(lines(12)))

    def half(weights: np.ndarray, _: Prepared) -> None:
        weights[np.flatnonzero(weights)[-1]] = 0.5

    one = damaged(b, bench, "weights", half)
    assert [found(one, p).verdict for p in ("P06", "P08", "P15")] == ["pass", "pass", "fail"]


def test_what_lies_in_texts_is_told(bench: Bench) -> None:
    tall = [row(f"the cat {i}", "x y " * 60) for i in range(4)]
    odd = row("what is <|im_end|> for", f"the key is {TOKEN}")
    b = bench.before(bench.recipe([*lines(30), odd, *tall], "max_tokens: 128, too_long: cut"))
    assert {p: found(b, p).verdict for p in ("P06", "P10", "P11", "P12")} == dict.fromkeys(
        ("P06", "P10", "P11", "P12"), "warn"
    )
    assert TOKEN not in json.dumps([f.as_json() for f in without_model(b)])


def test_p13_a_prompt_that_is_trained_and_tested(bench: Bench) -> None:
    (bench.place / "test.jsonl").write_text("\n".join(lines(4)) + "\n")
    held = "max_tokens: 128, test: {kind: file, file: test.jsonl}, near_copies: keep"
    f = found(bench.before(bench.recipe(lines(12), held)), "P13")
    assert f.verdict == "warn"
    assert "prompts of the test rows are trained too" in f.evidence


def test_p14_packs_that_are_mostly_empty(bench: Bench) -> None:
    b = bench.before(bench.recipe([*lines(20), row("the cat " * 50, "x")]))
    alone = plan_run(b.recipe, b.prepared, b.facts, draw(b.recipe, b.prepared), packed=False)
    assert [found(x, "P14").verdict for x in (b, replace(b, plan=alone))] == ["pass", "warn"]


def test_what_does_not_fit_the_model_or_the_machine(bench: Bench) -> None:
    b = bench.before(bench.recipe(lines(12)))
    huge = replace(b.facts, num_parameters=10**13)
    new = replace(b.prepared, tokenizer=replace(b.prepared.tokenizer, new_tokens={"<x>": 10**6}))
    slow = b.recipe.model_copy(update={"train": b.recipe.train.model_copy(update={"learning_rate": 1e-12})})
    away = b.recipe.model_copy(update={"runs": "/proc/none"})
    cases = {
        "P09": replace(b, facts=replace(b.facts, vocab_size=10)),
        "P22": replace(b, prepared=new),
        "P23": replace(b, recipe=slow),
        "P40": replace(b, facts=huge),
        "P42": replace(b, run=RunDir(away.run_path())),
        "P43": replace(b, memory=replace(b.memory, weights=1e16)),
    }
    assert {p: found(x, p).verdict for p, x in cases.items()} == dict.fromkeys(cases, "fail")
    assert found(replace(b, memory=replace(b.memory, fits=False)), "P43").verdict == "warn"


def test_predicted_lost_updates_are_those_that_were_measured() -> None:
    assert 0.8 < lost_updates(1e-5, 8) < 0.9
    assert lost_updates(1e-5, 24) < 1e-6


def test_p20_and_p60_a_model_directory_that_is_damaged_or_runs_code(bench: Bench) -> None:
    b = bench.before(bench.recipe(lines(12)))
    assert found(b, "P60").verdict == "pass"
    (bench.model / "modeling.py").write_text("x = 1")
    assert found(b, "P60").verdict == "fail"
    assert "modeling.py" in found(b, "P60").evidence
    (bench.model / "modeling.py").unlink()
    weights = bench.model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert found(b, "P20").number == "E-MODEL-002"
    config = json.loads((bench.model / "config.json").read_text())
    (bench.model / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "modeling.X"}}))
    assert found(b, "P60").verdict == "fail"


def test_p21_a_stop_token_without_an_embedding(bench: Bench) -> None:
    b = bench.before(bench.recipe(lines(12)))
    (bench.model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 70_000]}))
    assert "stop token 70000 has no embedding" in found(b, "P21").evidence
    assert found(b, "P21").verdict == "fail"


def test_p45_ranks_that_see_the_same_rows(bench: Bench) -> None:
    class Undealt(PackPlan):
        """Every rank computes the whole step."""

        def step(self, s: int, rank: int = 0, of: int = 1) -> list[list[int]]:
            return super().step(s)

    b = bench.before(bench.recipe(lines(40)), ranks=2)
    same = {name: getattr(b.plan, name) for name in PackPlan.__slots__}
    assert [found(x, "P45").verdict for x in (b, replace(b, plan=Undealt(**same)))] == ["pass", "fail"]


def test_p47_is_a_table_of_ten_points(bench: Bench) -> None:
    f = found(
        bench.before(bench.recipe(lines(60), rest="train: {batch_tokens: 128, micro_batch_tokens: 128, epochs: 4}\n")),
        "P47",
    )
    assert f.verdict == "pass"
    assert f.evidence.count("step ") == 10


def test_p48_a_run_of_other_settings(bench: Bench) -> None:
    b = bench.before(bench.recipe(lines(12)))
    assert found(b, "P48").number == "a new run"
    settings = settings_of(b.recipe, b.prepared, b.facts, 1)
    for step, seed, verdict in ((2, 0, "pass"), (3, 1, "fail")):
        about = {"step": step, "finished": False, "settings": {**settings, "train.seed": seed}}
        with directory(b.run.checkpoints / f"step-{step:06d}", about=about) as part:
            (part / "weights.safetensors").write_bytes(b"x")
        f = found(b, "P48")
        assert f.verdict == verdict
        assert f.number == f"after step {step}" if verdict == "pass" else "train.seed was 1, now 0" in f.evidence
    anew = found(replace(b, settings=settings), "P48")  # a run that found no checkpoint, where some lie
    assert (anew.number, anew.verdict) == ("a new run", "fail")


def test_p49_a_clock_that_is_behind(bench: Bench) -> None:
    b = bench.before(bench.recipe(lines(12)))
    later = time.time() + 7200
    os.utime(bench.model / "config.json", (later, later))
    assert found(b, "P49").verdict == "warn"


def test_p61_rows_prepared_with_another_template(bench: Bench) -> None:
    b = bench.before(bench.recipe(lines(12)))
    (b.prepared.path / "chat_template.jinja").write_text("{{ messages }}")
    assert found(b, "P61").verdict == "fail"


@pytest.mark.parametrize("secret", [TOKEN, "sk-" + "aB1" * 12, "AKIA" + "Z9" * 8, "ghp_" + "Q7" * 18])
def test_p63_a_secret_in_the_recipe(bench: Bench, secret: str) -> None:
    b = bench.before(bench.recipe(lines(12)), text=f"# token: {secret}\n")
    f = found(b, "P63")
    assert f.verdict == "fail"
    assert secret not in f.evidence
    assert found(replace(b, text="", argv=["--key", secret]), "P63").verdict == "fail"
    assert found(replace(b, text="a task-force with sk-learn"), "P63").verdict == "pass"


def test_p64_an_old_package() -> None:
    assert _older("numpy", "999.1") == np.__version__
    assert _older("no-such-package", "1") == "(not installed)"
    assert _older("numpy", "1.26") == ""


def test_a_failed_check_refuses_the_run_and_is_kept(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    good = finding("P05", "tokens that carry loss", "33.0%", "fine")
    bad, odd = finding("P63", "secrets", "1 found", "why", fail=True), finding("P13", "copies", "2", "so", warn=True)
    refuse([good, odd], "elsewhere")
    with pytest.raises(TrainError, match=r"E-TRAIN-302 P63 secrets: 1 found. why"):
        refuse([good, odd, bad], "elsewhere")
    keep(run, "before", [good, odd, bad])
    keep(run, "after", [good])
    kept = json.loads(run.preflight.read_text())
    assert [f["id"] for f in kept["before"]] == ["P05", "P13", "P63"]
    assert kept["after"] == [good.as_json()]
    open_ = unchecked("P27", "export and load", "it is too large")
    assert [f.verdict for f in worst_first([good, open_, odd, bad])] == ["fail", "warn", "unchecked", "pass"]
    assert passed_line([good, open_]) == "1 check passed (1 not checked)"
    said: list[str] = []
    tell([good, open_], said.append)
    assert said[0] == "P27 export and load: not checked, because it is too large"
    assert passed_line([good, odd, bad]) == "1 check passed (1 warn, 1 failed)"
