"""Checks of the loaded model: each passes on a healthy one and fails when a known mistake is made again; nothing of them stays."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import educe  # noqa: E402
from educe.config import load_recipe  # noqa: E402
from educe.errors import TrainError  # noqa: E402
from educe.loss.cross_entropy import LossOut  # noqa: E402
from educe.model.describe import describe_model  # noqa: E402
from educe.model.documents import documents_of  # noqa: E402
from educe.model.load import CausalLM  # noqa: E402
from educe.recipes import preflight_run, preflight_saved  # noqa: E402
from educe.recipes.finding import Finding  # noqa: E402
from educe.recipes.mixing import draw  # noqa: E402
from educe.recipes.preflight_run import on_model  # noqa: E402
from educe.recipes.prepare import Prepared, prepare  # noqa: E402
from educe.recipes.trainee import Trainee, loop_config, trainee  # noqa: E402
from educe.training.loop import train  # noqa: E402
from educe.training.optim import Adam, AdamSettings  # noqa: E402
from educe.types import Batch  # noqa: E402

from check_command import row  # noqa: E402
from test_engine import _one_thread, cpu  # noqa: E402, F401

ROWS = [
    row(f"the cat {i} sat on the mat" + " and said hello" * (i % 4), "refund item " * (1 + i % 5) + str(i))
    for i in range(30)
]
FULL, LORA = "{kind: full}", "{kind: lora, rank: 4, dropout: 0.1}"


@dataclass(frozen=True)
class Ready:
    """A trainee before its first step."""

    recipe: Any
    prepared: Prepared
    t: Trainee
    place: Path

    def findings(self) -> dict[str, Finding]:
        """By id and name."""
        return {f"{f.id} {f.name}": f for f in on_model(self.recipe, self.prepared, self.t, self.place)}

    def of(self, id: str) -> Finding:
        return next(f for key, f in self.findings().items() if key.startswith(id))


Make = Callable[..., Ready]


@pytest.fixture
def make(tmp_path: Path, tiny_model: Path) -> Make:
    def made(tuning: str = FULL, dtype: str = "float32", rate: str = "1e-3", template: str = "") -> Ready:
        (tmp_path / "rows.jsonl").write_text("\n".join(ROWS) + "\n", encoding="utf-8")
        data = "data: {train: rows.jsonl, max_tokens: 128, dev: {kind: share, share: 0.2}}\n"
        steps = f"train: {{batch_tokens: 256, micro_batch_tokens: 128, learning_rate: {rate}, epochs: 3}}\n"
        head = f"name: t\nmodel: {tiny_model}\ndevice: cpu\ndtype: {dtype}\ntuning: {tuning}\n{template}"
        file = tmp_path / "recipe.yaml"
        file.write_text(head + data + steps, encoding="utf-8")
        recipe = load_recipe(file)
        said: list[str] = []
        prepared = prepare(recipe, said.append)
        facts = describe_model(prepared.model_dir, recipe.model)
        t = trainee(recipe, prepared, facts, draw(recipe, prepared), cpu(dtype), None, said.append, compiled=False)
        return Ready(recipe=recipe, prepared=prepared, t=t, place=tmp_path)

    return made


@pytest.mark.parametrize(
    "tuning,dtype,template",
    [(FULL, "float32", ""), (FULL, "bfloat16", ""), (LORA, "float32", "template: {kind: chatml}\n")],
)
def test_a_healthy_model_passes_every_check_and_nothing_is_left(
    make: Make, tuning: str, dtype: str, template: str
) -> None:
    ready = make(tuning, dtype, template=template)
    found = ready.findings()
    assert [str(f) for f in found.values() if f.verdict != "pass"] == []
    wanted = {"P22", "P24", "P26", "P27", "P28", "P29", "P41", "P50"}
    assert {f.id for f in found.values()} == wanted
    assert "P27 export and load" in found
    assert not list(ready.place.glob(".*"))
    assert ready.t.state.step == 0
    assert ready.t.state.model.network.training


@pytest.mark.parametrize("tuning,dtype", [(FULL, "float32"), (FULL, "bfloat16"), (LORA, "bfloat16")])
def test_a_run_with_the_checks_ends_in_the_same_bits(make: Make, tuning: str, dtype: str) -> None:
    ended = []
    for checks in (True, False):
        ready = make(tuning, dtype)
        if checks:
            assert all(f.verdict != "fail" for f in ready.findings().values())
        state, t = ready.t.state, ready.t
        train(state, t.batches_of, t.loss, [], loop_config(ready.recipe, ready.prepared, 4))
        kept = {**state.optimizer.masters, **state.optimizer.state_tensors()}
        ended.append({n: m.detach().clone() for n, m in kept.items()})
    one, two = ended
    assert one.keys() == two.keys()
    assert [n for n in one if not torch.equal(one[n], two[n])] == []


def test_p22_what_is_trained_and_not_saved(make: Make) -> None:
    ready = make()
    parameters = ready.t.state.model.trainable()
    parameters.pop(next(iter(parameters)))
    ready.t.state.optimizer = Adam(parameters, AdamSettings())
    assert ready.of("P22").verdict == "fail"
    assert "would not be saved" in ready.of("P22").evidence


def test_p22_a_layer_without_adapters(make: Make) -> None:
    ready = make(LORA)
    layer = ready.t.state.model.layers[0].mlp
    layer.up_proj = layer.up_proj.base_layer
    ready.t.state.optimizer = Adam(ready.t.state.model.trainable(), AdamSettings())
    assert "13 of 14 linear layers have adapters" in ready.of("P22").evidence


def test_p24_and_p50_attention_that_sees_the_other_documents(make: Make) -> None:
    ready = make()

    def as_one(module: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**given, "documents": documents_of([given["input_ids"].shape[1]], "cpu")}

    ready.t.state.model.base.get_decoder().register_forward_pre_hook(as_one, with_kwargs=True)
    found = ready.findings()
    assert found["P24 packs are blind"].verdict == "fail"
    assert found["P50 held-out loss and batch"].verdict == "fail"
    assert found["P26 gradient and split"].verdict == "fail"


def test_p26_losses_averaged_for_each_micro_batch(make: Make) -> None:
    ready = make()
    right = ready.t.loss

    def mean_of_means(model: CausalLM, batch: Batch, denominator: float) -> LossOut:
        return right(model, batch, batch.total_weight)

    wrong = Ready(ready.recipe, ready.prepared, replace(ready.t, loss=mean_of_means), ready.place)
    assert wrong.of("P26").verdict == "fail"
    assert ready.of("P26").verdict == "pass"


def test_p27_state_that_no_checkpoint_holds(make: Make) -> None:
    ready = make()
    steps = [0.0]

    def drift(module: Any, args: Any, out: Any) -> Any:
        steps[0] += 1.0 if torch.is_grad_enabled() else 0.0
        return out + 1e-2 * steps[0]

    ready.t.state.model.base.get_input_embeddings().register_forward_hook(drift)
    assert ready.findings()["P27 save and load"].verdict == "fail"


@pytest.mark.parametrize("tuning", [FULL, LORA])
def test_of_a_large_model_a_share_is_written(make: Make, tuning: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen by the seed; the others are neither written nor stepped, and all of them are afterwards what they were."""
    ready = make(tuning)
    masters = ready.t.state.optimizer.masters
    size, before = sum(4 * m.numel() for m in masters.values()), {n: m.clone() for n, m in masters.items()}
    monkeypatch.setattr(preflight_saved, "_WHOLE_BYTES", size - 1)
    monkeypatch.setattr(preflight_saved, "_SHARE_BYTES", size // 3)
    found = ready.findings()
    assert [str(f) for f in found.values() if f.verdict not in ("pass", "unchecked")] == []
    assert [name for name, f in found.items() if f.verdict == "unchecked"] == ["P27 export and load"]
    assert float(found["P41 probe checkpoint"].number.split()[0]) * 1e6 < size / 3 + 20_000  # and header and manifest
    for name in ("P41 probe checkpoint", "P27 save and load", "P28 one step"):
        assert f"of {len(masters)} tensors, chosen by the seed" in found[name].evidence
    assert f"{len(masters)} names and shapes are right" in found["P27 save and load"].evidence
    assert [n for n, m in masters.items() if not torch.equal(m, before[n])] == []
    monkeypatch.setattr(preflight_saved, "_WHOLE_BYTES", size)
    monkeypatch.setattr(preflight_saved, "_SMALL_EXPORT_BYTES", 10)
    f = ready.findings()["P27 export and load"]
    assert f.verdict == "unchecked"
    assert f.evidence.startswith("not checked, because it takes a second model")


def test_p28_a_rate_that_moves_nothing(make: Make) -> None:
    f = make(rate="1e-12").of("P28")
    assert f.verdict == "fail"
    assert f.number == "0.00% moved" or float(f.number.split("%")[0]) < 50


def test_p28_a_frozen_weight_that_moves(make: Make) -> None:
    ready = make(LORA)
    network = ready.t.state.model.network
    frozen = next(p for n, p in network.named_parameters() if not p.requires_grad)

    def touch(module: Any, args: Any, out: Any) -> None:
        if module.training:
            frozen.data[0, 0] += 1.0

    ready.t.state.model.layers[0].register_forward_hook(touch)
    f = ready.of("P28")
    assert f.verdict == "fail"
    assert "is frozen and has changed" in f.evidence


def test_p29_a_model_that_is_worse_than_guessing(make: Make) -> None:
    ready = make()
    with torch.no_grad():
        ready.t.state.model.base.model.norm.weight.mul_(1000)
    assert ready.of("P29").verdict == "fail"


def test_p29_a_model_that_knows_the_answers(make: Make) -> None:
    ready = make(rate="1e-2")
    train(
        ready.t.state,
        lambda s: ready.t.batches_of(0)[:1],
        ready.t.loss,
        [],
        loop_config(ready.recipe, ready.prepared, 250),
    )
    ready.t.state.step = 0
    assert ready.of("P29").verdict == "warn"


def test_p41_a_place_that_cannot_be_written(make: Make) -> None:
    ready = make()
    found = on_model(ready.recipe, ready.prepared, ready.t, Path("/proc"))
    assert [f.number for f in found if f.id == "P41"] == ["E-SYS-004"]


def test_p27_an_export_whose_tokenizer_gives_other_ids(make: Make) -> None:
    ready = make()
    files = json.loads(ready.prepared.tokenizer.json)
    for token in files["added_tokens"]:
        token["lstrip"] = True  # eats the line ends before it
    wrong = replace(ready.prepared.tokenizer, json=json.dumps(files))
    other = replace(ready, prepared=replace(ready.prepared, tokenizer=wrong))
    assert ready.findings()["P27 export and load"].verdict == "pass"
    failed = [f for f in other.findings().values() if f.verdict == "fail"]
    assert [f.number for f in failed] == ["E-MODEL-202"]


# The verbs


def test_a_run_keeps_its_checks_and_the_report_shows_them(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(ROWS) + "\n", encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    text = (
        f"name: t\nmodel: {tiny_model}\nruns: {tmp_path / 'runs'}\ndevice: cpu\ndtype: float32\n"
        "data: {train: rows.jsonl, max_tokens: 128, dev: {kind: share, share: 0.2}}\n"
        "train: {batch_tokens: 256, micro_batch_tokens: 128}\nevaluation: {max_new_tokens: 8}\n"
    )
    recipe.write_text(text, encoding="utf-8")
    said: list[str] = []
    run = educe.train(recipe, say=said.append)
    kept = json.loads(run.dir.preflight.read_text(encoding="utf-8"))
    assert len(kept["before"]) > 35
    assert [f["id"] for f in kept["after"]] == ["P91", "P92", "P93", "P94", "P95", "P96"]
    assert [f["verdict"] for f in kept["after"] if f["id"] not in ("P92", "P95")] == ["pass"] * 4
    assert any("checks passed" in line for line in said)
    run.export(tmp_path / "out")
    assert json.loads(run.dir.preflight.read_text(encoding="utf-8"))["export"][0]["id"] == "P90"
    spoilt = {**kept["before"][0], "verdict": "fail", "evidence": "<script>alert(1)</script>"}
    run.dir.preflight.write_text(json.dumps({**kept, "before": [*kept["before"][1:], spoilt]}))
    page = run.report().read_text(encoding="utf-8")
    assert '<h2 id="checks">Checks</h2>' in page
    assert "✗ fail" in page
    assert "<script>alert" not in page
    run.dir.preflight.unlink()
    assert "Checks</h2>" not in run.report().read_text(encoding="utf-8")

    shutil.rmtree(run.path)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["educe", "train", f"hf_{'aB3' * 11}"])
        with pytest.raises(TrainError, match="E-TRAIN-302 P63 secrets: 1 found"):
            educe.train(recipe)
    assert not (run.path / "checkpoints").exists()
    recipe.write_text(text, encoding="utf-8")
    assert educe.train(recipe).finished


def test_check_on_model_as_json(tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from educe.cli.main import main

    (tmp_path / "rows.jsonl").write_text("\n".join(ROWS) + "\n", encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: t\nmodel: {tiny_model}\ndevice: cpu\ndtype: float32\ndata: {{train: rows.jsonl, max_tokens: 128}}\n"
        "train: {batch_tokens: 256, micro_batch_tokens: 128}\n",
        encoding="utf-8",
    )
    with pytest.raises(SystemExit) as ended:
        main(["check", str(recipe), "--on-model", "--json"])
    value = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0
    assert value["ready"]
    assert {"P01", "P15", "P26", "P28", "P46"} <= {f["id"] for f in value["findings"]}
    assert value["estimate"]["training_s"] > 0
    assert not list((tmp_path / "runs").glob(".*"))


@pytest.mark.parametrize(
    "held_up, verdict",
    [((0.0, 0.0), "pass"), ((9.0, 20.0), "pass"), ((11.0, 1000.0), "pass"), ((31.0, 1000.0), "warn")],
)
def test_checkpoints_that_hold_a_run_up_are_said(held_up: tuple[float, float], verdict: str) -> None:
    assert preflight_run._checkpoints_beside(*held_up).verdict == verdict
