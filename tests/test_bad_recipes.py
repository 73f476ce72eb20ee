"""`educe check` on bad recipes and model directories: an exit code, a coded message with its place, never a traceback."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bad_inputs.models import LOADED, MODELS
from bad_inputs.recipes import DOUBTFUL, RECIPES
from check_command import DATA, ROWS, Checker

pytest.importorskip("torch")


@pytest.fixture
def check(tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> Checker:
    return Checker(tmp_path, tiny_model, capsys)


# --- recipes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("item", RECIPES)
def test_bad_recipes_are_refused_with_the_place(check: Checker, item: str) -> None:
    recipe, code, place, words = RECIPES[item]
    outcome = check(ROWS, recipe)
    assert outcome.exit_code == 2
    assert outcome.told.startswith(code)
    assert words in outcome.told
    if code.startswith("E-RECIPE") and place is not None:
        assert f"recipe.yaml{place}" in outcome.told


@pytest.mark.parametrize("item", DOUBTFUL)
def test_doubtful_recipes_are_told(check: Checker, item: str) -> None:
    recipe, words = DOUBTFUL[item]
    outcome = check(ROWS, recipe)
    assert words in outcome.told, outcome.told
    assert "secret" not in outcome.told


def test_numbers_of_yaml_1_2_are_numbers(check: Checker) -> None:
    """66, 69: 1e-5 is a number and 010 is ten."""
    outcome = check(ROWS, DATA + "train: {learning_rate: 1e-4, seed: 010, epochs: 2}\n")
    assert outcome.exit_code == 0, outcome.told
    assert "learning_rate" not in outcome.told


def test_paths_relative_to_home_and_upwards(check: Checker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """77: `~` and `..` are followed."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("~/rows.jsonl", f"../{tmp_path.name}/rows.jsonl"):
        assert check(ROWS, f"data: {{train: {path}, max_tokens: 256}}\n").exit_code == 0


# --- model directories ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("item", MODELS)
def test_bad_model_directories_are_refused(check: Checker, tiny_model: Path, tmp_path: Path, item: str) -> None:
    spoil, code, words = MODELS[item]
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    spoil(model)
    outcome = check(ROWS, model=model)
    assert outcome.exit_code == 2
    assert outcome.told.startswith(code)
    assert words in outcome.told


@pytest.mark.parametrize("item", LOADED)
def test_weights_that_cannot_be_meant_are_refused(tiny_model: Path, tmp_path: Path, item: str) -> None:
    from educe.config import Full
    from educe.errors import ModelError
    from educe.model.device import Device
    from educe.model.load import load_model

    spoil, words = LOADED[item]
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    device = Device(kind="cpu", dtype="float32", name="CPU", flops=1e9, why="")
    load_model(model, device, Full(kind="full"))
    spoil(model)
    with pytest.raises(ModelError, match="E-MODEL-203") as refused:
        load_model(model, device, Full(kind="full"))
    assert words in refused.value.found
