"""A model directory is foreign: its code and pickles never run, and the user is told why it is refused. See docs/security.md."""

from __future__ import annotations

import ast
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
from educe.config import Full
from educe.errors import ModelError
from educe.model.device import Device
from educe.model.load import load_model

from payloads import LOADED, PAYLOADS, Plant, bomb, module
from security_job import TRAIN, command, write_job

pytestmark = pytest.mark.skipif(os.name == "nt", reason="pipes, links and sparse files are others there")
# What `describe_model` or the tokenizer's reader finds: loading the network alone does not look there.
ELSEWHERE = ("a huge template", "a deep tokenizer", "a deep index", "a million layers")
DEVICE = Device(kind="cpu", dtype="float32", name="CPU", flops=1e9, why="")


def planted(tiny_model: Path, place: Path, plant: Plant) -> tuple[Path, Path]:
    """A copy of the model with a payload in it, and the payload's sentinel."""
    shutil.copytree(tiny_model, place / "model")
    plant(place / "model", place / "ran")
    return place / "model", place / "ran"


@pytest.mark.parametrize("what", PAYLOADS)
def test_no_payload_runs_and_each_is_refused(tiny_model: Path, tmp_path: Path, what: str) -> None:
    plant, code = PAYLOADS[what]
    model, sentinel = planted(tiny_model, tmp_path, plant)
    recipe = write_job(tmp_path / "job", model)
    for verb in ("check", "train") if what not in LOADED else ("train",):
        exit_code, said = command(verb, recipe)
        assert exit_code == 2, said
        assert said.splitlines()[-3].startswith(f"{code} "), said
        assert "Traceback" not in said
        assert len(said) < 5000
    if what not in ELSEWHERE:
        with pytest.raises(ModelError):  # the second line, where somebody calls it without the first
            load_model(model, DEVICE, Full(kind="full"))
    assert not sentinel.exists()


def test_what_became_foreign_after_training_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """eval and export look again: the directory may have changed since."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    exit_code, said = command("train", write_job(tmp_path / "job", model, TRAIN))
    assert exit_code == 0, said
    run = tmp_path / "job" / "runs" / "t"
    for what in ("a .bin beside weights", "code beside weights", "auto_map of the tokenizer", "config is a pipe"):
        plant, code = PAYLOADS[what]
        shutil.rmtree(model)
        shutil.copytree(tiny_model, model)
        plant(model, tmp_path / "ran")
        for words in (["eval", run], ["export", run, tmp_path / "out"]):
            exit_code, said = command(*words)
            assert (exit_code, code in said) == (2, True), said
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


FETCHED = ("pytorch_model.bin", "training_args.bin", "modeling_x.py")
LEFT = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth")


@pytest.mark.parametrize("place,names", [("models--a--b/snapshots/abc", FETCHED), ("checkpoint-500", LEFT)])
def test_what_others_left_beside_weights_is_not_opened(
    tiny_model: Path, tmp_path: Path, place: str, names: tuple[str, ...]
) -> None:
    """Other tools fetch code and pickles into the Hub's cache, and transformers' Trainer leaves pickles beside its weights: such a
    model stays usable, and nothing else is opened."""
    model = tmp_path / place
    shutil.copytree(tiny_model, model)
    for name in names:
        (model / name).write_bytes(
            module(tmp_path / "ran").encode() if name.endswith(".py") else bomb(tmp_path / "ran")
        )
    opened: list[str] = []
    watching = True

    def hook(event: str, args: tuple[Any, ...]) -> None:  # stays for the life of the process, so it can be switched off
        if watching and event == "open" and isinstance(args[0], (str, os.PathLike)):
            opened.append(Path(args[0]).name)

    sys.addaudithook(hook)
    exit_code, said = command("check", write_job(tmp_path / "job", model))
    load_model(model, DEVICE, Full(kind="full"))
    watching = False
    assert exit_code == 0, said
    assert "config.json" in opened
    assert not set(names) & set(opened)
    assert not (tmp_path / "ran").exists()


def test_every_loader_is_told_not_to_run_code() -> None:
    """Each call of transformers' from_pretrained in educe forbids remote code and the network; weights must be safetensors."""
    calls = []
    for file in sorted((Path(__file__).parents[1] / "educe").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if node.func.attr == "from_pretrained":
                    given = {k.arg: k.value for k in node.keywords}
                    calls.append((f"{file.name}:{node.lineno}", ast.unparse(node.func.value), given))
                loads = ("load", "loads", "Unpickler")
                assert not (node.func.attr in loads and ast.unparse(node.func.value) in ("torch", "pickle", "joblib"))
    assert len(calls) >= 5
    for place, what, given in calls:
        if place.startswith("convert.py"):  # our own download, its hash checked, read as GGUF
            continue
        if what == "PeftModel":  # what was written a moment ago, onto a model that is there: peft runs no code of it
            assert given["local_files_only"].value is True, place
            continue
        for name, value in (("trust_remote_code", False), ("local_files_only", True)):
            assert isinstance(given.get(name), ast.Constant), f"{place} {name}"
            assert given[name].value is value, f"{place} {name}"
        if what == "maker":
            assert given["use_safetensors"].value is True, place
