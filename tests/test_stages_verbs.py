"""Every verb on a stage of a chain, by FILE#STAGE and by its run: it says what is true of what the stage learns from, or why it is
refused; and what RUN means where the latest is a chain."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import educe  # noqa: E402
from educe.config import StagedRecipe, load_any  # noqa: E402
from educe.errors import EduceError  # noqa: E402
from educe.evaluate.stages import amount  # noqa: E402
from educe.parallel.world import World  # noqa: E402
from educe.recipes.job import How  # noqa: E402
from educe.recipes.report import report_stages  # noqa: E402
from educe.recipes.run import Run, quiet  # noqa: E402
from educe.recipes.run_stages import check_stages, room_of_chain  # noqa: E402
from educe.recipes.stage_ahead import refuse_ahead  # noqa: E402
from educe.report.stage_page import change_text  # noqa: E402
from educe.training.saver import SPARE_BYTES  # noqa: E402
from educe.training.watchdog import ASLEEP  # noqa: E402

from report_payloads import PAYLOADS, poison  # noqa: E402
from run_directory import Page  # noqa: E402
from test_engine import _one_thread  # noqa: E402, F401
from test_export import command  # noqa: E402
from test_stages import DIRECT, place, recipe  # noqa: E402, F401

pytestmark = pytest.mark.usefixtures("_one_thread")


@pytest.fixture(scope="module")
def chain(place: Path) -> Path:  # noqa: F811
    found: Path = educe.train(recipe(place, "chain")).path
    return found


def test_raw_text_has_nothing_to_answer(chain: Path) -> None:
    code, said = command("eval", "runs/chain/1-pretrain")
    assert code == 2
    assert "E-RUN-004" in said
    assert "learns from raw text" in said
    assert "educe eval" in said


@pytest.mark.slow
def test_evaluating_pairs_goes_by_the_dev_pairs(chain: Path) -> None:
    code, _said = command("eval", "chain.yaml#preference")
    assert code == 0
    found = json.loads((chain / "3-preference" / "scores.json").read_text())
    assert found["metric"] == "text"
    assert re.match(
        r"\d+ % → \d+ % of 2 dev pairs ranked right \(log-probability per token; 95 % interval after", found["verdict"]
    )
    assert re.search(r"; held-out loss of a pair \w+, \S+ → \S+; KL from the stage's start", found["verdict"])
    assert "for the prompt" not in found["verdict"]
    page = Page(educe.Run("runs/chain/3-preference").report().read_text())
    assert "no answer is graded right or wrong" in page.text
    assert "loss of the expected answers" not in page.text


@pytest.mark.parametrize("verb", [("curve", "chain.yaml#preference"), ("blend", "runs/chain/3-preference")])
def test_verbs_that_go_by_the_loss_of_answers_refuse_pairs(chain: Path, verb: tuple[str, str]) -> None:
    code, said = command(*verb)
    assert code == 2
    assert "E-RUN-004" in said
    assert "learns from pairs of answers" in said


def test_a_judge_of_answers_that_are_not_there_is_told_what_to_do(chain: Path) -> None:
    code, said = command("judge", "runs/chain/1-pretrain", "--judge", "http://127.0.0.1:9/v1", "--judge-model", "x")
    assert code == 2
    assert "educe eval runs/chain/1-pretrain" in said


def test_rates_for_pairs_are_compared_by_the_loss_of_a_pair(chain: Path, place: Path) -> None:  # noqa: F811
    found = educe.lr(place / "chain.yaml#preference", rates=[1e-3, 1e-2], steps=2)
    assert found.start_loss == pytest.approx(math.log(2), abs=1e-5)
    assert all(o.loss is not None and o.loss < found.start_loss for o in found.outcomes)
    assert "Held-out loss, of a pair" in (found.path / "lr.html").read_text()


def test_inspect_shows_what_each_stage_trains(chain: Path, place: Path) -> None:  # noqa: F811
    (text,) = educe.inspect(place / "chain.yaml#pretrain", 1).sequences
    assert [s.weight for s in text.spans] == [0.0] + [1.0] * (len(text.spans) - 1)
    row = json.loads((place / "pairs.jsonl").read_text().splitlines()[1])
    pair = educe.inspect(place / "chain.yaml#preference", 2)
    for shown, answer in zip(pair.sequences, (row["chosen"], row["rejected"]), strict=True):
        trained = "".join(s.text for s in shown.spans if s.weight > 0)
        assert trained == f"{answer}<|im_end|>"
    assert [s.label for s in pair.sequences] == ["chosen answer", "rejected answer"]
    assert pair.sequences[0].prompt == pair.sequences[1].prompt
    code, said = command("inspect", "chain.yaml#preference", "--diff", "whole")
    assert code == 2
    assert "the row is none" in said
    code, said = command("inspect", "chain.yaml#preference", "--html", "row.html")
    assert code == 0
    assert "Chosen answer: " in (place / "row.html").read_text()


def test_data_and_ledger_take_a_stage_by_its_recipe(chain: Path) -> None:
    code, said = command("data", "chain.yaml#preference")
    assert code == 0
    assert "40 preference pairs" in said
    assert "pairs.jsonl" in command("data", "chain.yaml")[1]
    assert command("ledger", "chain.yaml#sft") == command("ledger", "runs/chain/2-sft")
    code, said = command("data", "chain.yaml#rlhf")
    assert code == 2
    assert "none of them called 'rlhf'" in said


def test_what_is_prepared_ahead_is_what_the_stages_train_on(chain: Path, place: Path) -> None:  # noqa: F811
    """Whatever weights a stage starts from by then."""
    recipe(place, "ahead-of")
    code, said = command("prepare", "ahead-of.yaml")
    assert (code, said.count("Prepared: ")) == (0, 3)
    made = {p.name for p in (place / "runs" / "ahead-of" / "prepared").iterdir()}
    assert made == {p.name for p in (chain / "prepared").iterdir()}


@pytest.mark.parametrize("moved,said", [(0.25, "0.250"), (-0.0004, "0.0004"), (0.000021, "2.1e-05")])
def test_a_small_change_is_no_nought(moved: float, said: str) -> None:
    line = {"kind": "ratio", "unit": "bits/byte"}
    assert amount(line, {"value": moved}).startswith(said)
    assert not change_text(line, dict.fromkeys(("value", "low", "high"), moved)).lstrip("+−").startswith("0.000 ")


def test_a_stage_is_named_by_its_run_too(chain: Path) -> None:
    assert Run("runs/chain#sft").path.name == "2-sft"
    for words, said in (
        ("chain#rlhf", "has no stage 'rlhf'. Name one: runs/chain#pretrain"),
        ("chain/2-sft#a", "is no run of stages"),
    ):
        with pytest.raises(EduceError, match=said):
            Run(f"runs/{words}")


def test_what_run_means_where_the_latest_is_a_chain(chain: Path) -> None:
    code, said = command("ledger")
    assert code == 2
    assert "runs/chain/2-sft" in said
    code, said = command("report", "runs/chain", "runs/chain/2-sft")
    assert code == 2
    assert "is a run of stages" in said
    code, said = command("eval", "--samples", "3")
    assert code == 2
    assert "is of one run, and runs/chain is a run of stages" in said
    code, said = command("eval", "--suite-rows", "3")
    assert code == 2
    assert "is not given, but an option of it is" in said
    code, said = command("export", "exported")
    assert code == 0, said
    assert "the last is taken: 3-preference" in said
    code, said = command("report")
    assert code == 2
    assert "educe eval runs/chain" in said


def scores_of(*names: str) -> dict[str, Any]:
    """stage_scores.json of a chain."""
    value = {"value": 0.5, "low": 0.4, "high": 0.6}
    stage = {
        "kind": "sft", "start": "base", "tuning": "full", "epochs": 1.0, "learning_rate": 1e-5, "steps": 3, "tokens": 9,
        "trained_tokens": 4, "train_s": 60.0, "peak_memory_bytes": 10**9, "dev": [[0, 2.0], [3, 1.0]], "run": "1-sft",
        "finished": "2026-11-27T08:00:00Z", "said": ["right answers better by 10.0 points"],
    }  # fmt: skip
    measure = {"key": "task", "title": "right answers", "unit": "", "kind": "share", "better": "more", "rows": 8}
    return {
        "name": "chain",
        "model": "tiny",
        "metric": "exact",
        "suite": {"num_prompts": 4, "num_in_file": 9, "max_new_tokens": 1280},
        "device": {"kind": "cpu", "name": "CPU", "dtype": "float32"},
        "last": names[-1],
        "stages": dict.fromkeys(names, stage),
        "measures": [
            measure | {"values": dict.fromkeys(["base", *names], value), "changes": dict.fromkeys(names, value)}
        ],
    }


def written(path: Path, found: Any) -> Path:
    (path / "1-sft").mkdir(parents=True)
    (path / "stages.resolved.json").write_text(json.dumps({"recipe": {}, "stages": {"sft": "1-sft"}}))
    (path / "stage_scores.json").write_text(json.dumps(found))
    return path


@pytest.mark.parametrize("payload", PAYLOADS[::2])
def test_texts_of_damaged_scores_never_become_markup(tmp_path: Path, payload: str) -> None:
    def page(name: str, word: str) -> Page:
        found = poison(scores_of("sft"), word, False)
        found["stages"] = {word: found["stages"]["sft"] | {"run": f"1-{word}", "start": "base"}}
        found["last"] = word
        for line in found["measures"]:
            line |= {"kind": "share", "key": "task"}
            line["values"], line["changes"] = (
                {k if k == "base" else word: v for k, v in line[n].items()} for n in ("values", "changes")
            )
        made = report_stages(written(tmp_path / name, found), None, "html")
        assert isinstance(made, Path)
        return Page(made.read_text(encoding="utf-8"))

    harmless, found = page("a", "word"), page("b", payload)
    assert found.shape == harmless.shape
    assert not found.open
    assert not found.links
    assert payload.split()[0] in found.text


@pytest.mark.parametrize("form", ["html", "md"])
@pytest.mark.parametrize("found", [[], {"name": "x"}, poison(scores_of("sft"), "<script>", True)])
def test_scores_that_are_not_scores_are_refused(tmp_path: Path, found: Any, form: str) -> None:
    with pytest.raises(EduceError, match="is damaged, or was written by another version"):
        report_stages(written(tmp_path / "run", found), None, form)


@pytest.mark.parametrize("where", ["../elsewhere", "/tmp", "1-a/../..", 3, None])
def test_a_stage_lies_within_its_run(tmp_path: Path, where: Any) -> None:
    path = written(tmp_path / "run", scores_of("sft"))
    (path / "stages.resolved.json").write_text(json.dumps({"recipe": {}, "stages": {"sft": where}}))
    with pytest.raises(EduceError, match="is damaged, or was written by another version"):
        report_stages(path, None, "html")


def test_an_adapter_of_a_stage_names_a_base_that_can_be_made(place: Path) -> None:  # noqa: F811
    """The command in its card writes the model that its config names; peft puts the adapter onto it."""
    peft = pytest.importorskip("peft")
    path = recipe(place, "adapted")
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("kind: sft", "kind: sft\n    tuning: {kind: lora, rank: 4}"), encoding="utf-8")
    for stage in ("pretrain", "sft"):
        educe.train(path.with_name(f"adapted.yaml#{stage}"))
    code, said = command("export", "runs/adapted/2-sft", "adapter", "--as", "adapter")
    assert code == 0, said
    card = (place / "adapter" / "README.md").read_text(encoding="utf-8")
    words = card[card.index("`educe export ") + 1 :].split("`")[0].split()
    assert " ".join(words) in " ".join(said.split())
    code, said = command(*words[1:])
    assert code == 0, (words, said)
    assert f"base_model: {words[-1]}" in card
    assert json.loads((place / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == words[-1]
    assert peft.AutoPeftModelForCausalLM.from_pretrained("adapter").peft_config


# What any stage would refuse


@pytest.mark.parametrize(
    "kept,old,new,said",
    [
        ("4-direct", "learning_rate: 1e-2}", "learning_rate: 2e-2}", r"4 of 4: direct, .*rate was 0.01, now 0.02.*--redo direct"),
        ("2-sft", "", "", r"2 of 4: sft, .*from stage pretrain, which is not there any more.*--redo pretrain"),
        ("", "pairs.jsonl, test", "rows.jsonl, test", r"3 of 4: preference, .*rows.jsonl has no usable row"),
        ("", "", "", r"1 of 4: pretrain, P63 secrets: 1 found"),
        ("", "micro_batch_tokens: 128, learning_rate: 5e-3", "micro_batch_tokens: 256, learning_rate: 5e-3",
         r"2 of 4: sft, --devices 2 devices need 2 packs of 256 tokens a step"),
    ],
)  # fmt: skip
def test_what_can_be_known_is_refused_before_the_first_step(
    chain: Path,
    place: Path,  # noqa: F811
    kept: str,
    old: str,
    new: str,
    said: str,
) -> None:
    """Of every stage, by its name, and nothing is written of it."""
    path = recipe(place, "ahead", more=DIRECT)
    run = place / "runs" / "ahead"
    shutil.rmtree(run, ignore_errors=True)
    if kept == "4-direct":
        educe.train(path.with_name("ahead.yaml#direct"))
    elif kept:
        shutil.copytree(chain / kept, run / kept)
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(old, new) if new else text, encoding="utf-8")
    staged, secret = load_any(path), "" if new else f"# hf_{'a1B2' * 9}"
    assert isinstance(staged, StagedRecipe)
    world = World(size=2 if "micro" in old else 1)
    with pytest.raises(EduceError, match=f"stage {said}"):
        educe.train(path) if kept else refuse_ahead(staged, secret, quiet, How(), world, ASLEEP)
    assert [p.name for p in run.glob("?-*")] == ([kept] if kept else [])


def test_check_plans_for_several_devices(place: Path, chain: Path) -> None:  # noqa: F811
    """More of them hold less each, and have as many packs; a step that has not a pack for each is no step."""
    path = recipe(place, "devices")
    one, two = check_stages(path), check_stages(path, devices=2)
    for name in one:
        assert one[name].ready
        assert two[name].ready
        assert two[name].plan.num_ranks == 2
        assert two[name].memory.optimizer < one[name].memory.optimizer
    code, said = command("check", "devices.yaml")
    assert code == 0
    assert "the models that later stages begin with" in " ".join(said.split())
    code, said = command("check", "devices.yaml#sft", "--devices", "3")
    assert code == 2
    assert "--devices 3: 3 devices need 3 packs of 128 tokens a step, train.batch_tokens holds 2" in said


def test_a_chain_needs_room_for_its_fullest_moment_before_the_first_step(
    place: Path,  # noqa: F811
    chain: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Checkpoints of the stage that trains, weights that earlier ones leave, and the models that later ones begin with."""
    path = recipe(place, "room", more=DIRECT)
    staged, checks = load_any(path), check_stages(path)
    assert isinstance(staged, StagedRecipe)
    weights = 4 * checks["sft"].facts.num_parameters
    trains = 3 * 3 * weights  # weights and two moments; two are kept while a third is written
    room = room_of_chain(path, checks)  # fullest in the third stage: the branch's adapters need less
    assert (room.runs, room.models, room.both) == (2 * weights + trains, 2 * weights, 4 * weights + trains)
    world = World()

    def free(num: int) -> None:
        usage = shutil.disk_usage(place)._replace(free=num)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    free(room.both + SPARE_BYTES)
    refuse_ahead(staged, path.read_text(), quiet, How(), world, ASLEEP)
    assert all(c.ready for c in check_stages(path).values())
    free(room.both + SPARE_BYTES - 1)
    with pytest.raises(EduceError, match=r"E-SYS-002.*the chain \(.*for what later stages begin with\).*EDUCE_CACHE"):
        refuse_ahead(staged, path.read_text(), quiet, How(), world, ASLEEP)
    checked = check_stages(path)
    assert [c.ready for c in checked.values()] == [True, True, True, False]
    assert "E-SYS-002" in checked["direct"].blockers[-1]
    shutil.copytree(chain / "1-pretrain", place / "runs" / "room" / "1-pretrain")  # what is there is not needed again
    room = room_of_chain(path, checks)
    assert (room.runs, room.models) == (weights + trains, weights)
