"""`train.steps`: a run of exactly so many steps, with its mixture; what is told of it is what it drew."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import educe  # noqa: E402
from educe.config import Recipe, StagedRecipe, load_any, load_recipe  # noqa: E402
from educe.errors import RecipeError, TrainError  # noqa: E402
from educe.files.jsonl import read_jsonl  # noqa: E402
from educe.model.describe import describe_model  # noqa: E402
from educe.recipes.mixing import draw, mixture_of  # noqa: E402
from educe.recipes.plan import plan_run  # noqa: E402
from educe.recipes.prepare import Prepared, prepare  # noqa: E402
from educe.recipes.run import quiet  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from small_runs import Dying, final, recipe, same, small_place, story  # noqa: E402
from test_engine import _one_thread  # noqa: E402, F401

some = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Path]:
    with small_place(tmp_path_factory, tiny_model) as found:
        yield found


def row(k: int, words: int) -> str:
    ask, say = {"role": "user", "content": f"order {k}"}, {"role": "assistant", "content": "the user said " * words}
    return json.dumps({"messages": [ask, say]}) + "\n"


@pytest.fixture(scope="module")
def several(place: Path) -> tuple[Recipe, Prepared]:
    """Two tasks of unlike size and length, and text against forgetting."""
    (place / "a.jsonl").write_text("".join(row(k, 1 + k % 7) for k in range(30)))
    (place / "b.jsonl").write_text("".join(row(100 + k, 1 + k % 3) for k in range(9)))
    (place / "general.txt").write_text("\n\n".join(f"once upon a time {k}" for k in range(12)))
    (place / "several.yaml").write_text(
        "name: several\nmodel: ./tiny\ndevice: cpu\ndata:\n  tasks:\n    a: a.jsonl\n    b: {files: b.jsonl}\n"
        "  replay: {files: general.txt, share: 0.1}\n  rates: {kind: uniform}\n  max_tokens: 128\n"
        "train: {steps: 3, batch_tokens: 512, micro_batch_tokens: 128}\n",
        encoding="utf-8",
    )
    r = load_recipe(place / "several.yaml")
    return r, prepare(r, quiet)


@some
@given(
    st.integers(1, 60), st.sampled_from([128, 300, 512, 2048]), st.booleans(), st.integers(1, 3),
    st.sampled_from([{"kind": "proportional"}, {"kind": "uniform"}, {"kind": "unimax", "epochs": 1000.0}]), st.integers(0, 99),
)  # fmt: skip
def test_a_run_has_exactly_the_steps_it_is_given(
    several: tuple[Recipe, Prepared], steps: int, batch: int, packed: bool, ranks: int, rates: dict[str, Any], seed: int
) -> None:
    given, prepared = several
    ranks = min(ranks, batch // 128)
    told = given.model_dump(mode="json")
    told["train"] |= {"steps": steps, "batch_tokens": batch, "seed": seed}
    told["data"]["rates"] = rates
    r = Recipe.model_validate(told)
    store = prepared.store("train")
    plan = plan_run(
        r, prepared, describe_model(prepared.model_dir, r.model), draw(r, prepared), packed=packed, num_ranks=ranks
    )
    assert plan.num_steps == steps
    per_step = np.diff(plan.step_edges)
    if packed:  # no step is short
        assert set(per_step.tolist()) == {max(1, batch // 128 // ranks) * ranks}
    mixture = mixture_of(r, prepared, plan)
    assert sum(t.tokens for t in mixture.tasks) == plan.num_tokens <= steps * batch
    assert sum(t.draws for t in mixture.tasks) == mixture.draws_N.sum() == plan.examples_K.size
    # The mixture is that of a whole run: what is drawn of a task is its share, give or take the window that was cut.
    drawn = {t.name: t.draws for t in mixture.tasks}
    if rates["kind"] == "uniform" and steps * batch > 20_000:
        assert drawn["a"] / drawn["b"] == pytest.approx(1, abs=0.15)
    assert store.lengths[plan.examples_K].sum() == plan.num_tokens


@pytest.mark.parametrize("steps", [1, 5, 40])
@pytest.mark.parametrize(
    "more", ["tasks: {a: {files: a.jsonl, cap: 2}}", "train: a.jsonl\n  replay: {files: long.txt}"]
)
def test_few_rows_beside_much_that_is_not_drawn(
    place: Path, several: tuple[Recipe, Prepared], more: str, steps: int
) -> None:
    """The first guess of how often to go through them is far below one row."""
    (place / "long.txt").write_text("\n\n".join("once upon a time the user said " * 3 + str(k) for k in range(2000)))
    (place / "few.yaml").write_text(
        f"name: few\nmodel: ./tiny\ndevice: cpu\ndata:\n  {more}\n  max_tokens: 128\n"
        f"train: {{steps: {steps}, batch_tokens: 256, micro_batch_tokens: 128}}\n",
        encoding="utf-8",
    )
    r = load_recipe(place / "few.yaml")
    prepared = prepare(r, quiet)
    assert plan_run(r, prepared, describe_model(prepared.model_dir, r.model), draw(r, prepared)).num_steps == steps


def test_rates_that_cannot_fill_the_steps_are_refused(several: tuple[Recipe, Prepared]) -> None:
    given, prepared = several
    told = given.model_dump(mode="json")
    told["train"]["steps"], told["data"]["rates"] = 500, {"kind": "unimax", "epochs": 2.0}
    with pytest.raises(TrainError, match=r"train\.steps.*draws no task more than 2 times") as e:
        draw(Recipe.model_validate(told), prepared)
    assert "data.rates.epochs" in e.value.fix


def test_what_a_run_of_steps_did_is_what_is_told(place: Path) -> None:
    """Killed on its way, it ends in the same bits; its ledger and its record count what was drawn."""
    whole, killed = (
        recipe(place, name, epochs=None, steps=23, checkpoint_every_steps=5) for name in ("whole", "killed")
    )
    for path in (whole, killed):
        path.write_text(path.read_text().replace("  epochs: None\n", ""), encoding="utf-8")
    educe.train(whole)
    with pytest.raises(MemoryError):
        educe.train(killed, screen=Dying(step=13))
    run = educe.train(killed).path
    assert same(final(place / "runs" / "whole"), final(run))
    assert story(place / "runs" / "whole") == story(run)
    steps = [x for x in read_jsonl(run / "metrics.jsonl") if x["kind"] == "step"]
    assert [s["step"] for s in steps] == list(range(1, 24))
    assert steps[-1]["learning_rate"] == pytest.approx(1.5e-2)
    draws = [x["draws"] for x in read_jsonl(run / "ledger.jsonl") if x["status"] == "train"]
    r = load_recipe(killed)
    prepared = prepare(r, quiet)
    lengths = prepared.store("train").lengths
    assert len(draws) == lengths.size == 12
    assert int(np.dot(draws, lengths)) == sum(s["tokens"] for s in steps)
    (run / "ledger.jsonl").unlink()
    educe.train(killed)  # nothing is left to do, and what it drew is written down again
    assert [x["draws"] for x in read_jsonl(run / "ledger.jsonl") if x["status"] == "train"] == draws


@pytest.mark.parametrize(
    "train, told",
    [
        ("{epochs: 2, steps: 5}", "epochs (2) and steps (5) each say how long the run is"),
        ("{epochs: null}", "neither epochs nor steps say how long the run is"),
        ("{steps: 0}", "It must be at least 1"),
        ("{max_steps: 5}", "`train.steps`: in place of train.epochs"),
    ],
)
def test_one_length_is_given(tmp_path: Path, train: str, told: str) -> None:
    alone, chain = tmp_path / "alone.yaml", tmp_path / "chain.yaml"
    alone.write_text(f"name: a\nmodel: m\ndata: {{train: a.jsonl}}\ntrain: {train}\n", encoding="utf-8")
    chain.write_text(
        f"name: a\nmodel: m\nstages:\n  - kind: pretrain\n    data: {{train: a.txt}}\n    train: {train}\n",
        encoding="utf-8",
    )
    for path, line in ((alone, 4), (chain, 6)):
        with pytest.raises(RecipeError) as e:
            load_any(path)
        assert told in str(e.value)
        assert f"{path.name}:{line}:" in e.value.where


@pytest.mark.parametrize("model", ["m", "{init: random}"])
def test_a_chain_is_written_down_with_the_rates_it_trains_with(tmp_path: Path, model: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        f"name: a\nmodel: {model}\nstages:\n  - {{kind: pretrain, data: {{train: a.txt}}}}\n"
        "  - {kind: sft, data: {train: a.jsonl}, tuning: {kind: lora}}\n"
        "  - {kind: preference, data: {train: p.jsonl, max_tokens: 1024}, train: {learning_rate: 3e-6}}\n"
        "  - {kind: sft, name: branch, start: base, data: {train: a.jsonl}}\n",
        encoding="utf-8",
    )
    staged = load_any(path)
    assert isinstance(staged, StagedRecipe)
    made = [staged.recipe(k, "m").train.learning_rate for k in range(4)]
    assert made == [1e-3 if model != "m" else 5e-5, 2e-4, 3e-6, 1e-3 if model != "m" else 2e-5]
    held = staged.model_dump(mode="json")
    assert [s["train"]["learning_rate"] for s in held["stages"]] == made
    again = StagedRecipe.model_validate(held)
    assert [again.recipe(k, "m") for k in range(4)] == [staged.recipe(k, "m") for k in range(4)]


def test_a_stage_has_its_own_steps(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "name: a\nmodel: m\nstages:\n  - kind: pretrain\n    data: {train: a.txt}\n    train: {steps: 7}\n"
        "  - kind: sft\n    data: {train: a.jsonl}\n",
        encoding="utf-8",
    )
    staged = load_any(path)
    assert isinstance(staged, StagedRecipe)
    lengths = [(r.train.epochs, r.train.steps) for r in (staged.recipe(k, "m") for k in range(2))]
    assert lengths == [(None, 7), (2.0, None)]
    assert Recipe.model_validate(staged.recipe(0, "m").model_dump(mode="json")).train.steps == 7
