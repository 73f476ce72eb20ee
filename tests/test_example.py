"""The shipped example that ends in "do not tune": its recipe and rows, and (slow) that it ends so."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from educe.config import load_recipe

PLACE = Path(__file__).parents[1] / "docs" / "examples" / "order-number"
CACHED = Path("~/.cache/educe/models/HuggingFaceTB--SmolLM2-135M-Instruct--b179c9523d0e").expanduser()


def rows(split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (PLACE / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_recipe_is_valid_and_its_rows_answer_themselves() -> None:
    recipe = load_recipe(PLACE / "recipe.yaml")
    assert recipe.evaluation.few_shot
    assert [len(rows(s)) for s in ("train", "dev", "test")] == [64, 24, 240]
    messages = [[m["content"] for m in row["messages"]] for s in ("train", "dev", "test") for row in rows(s)]
    for _, message, number in messages:
        assert re.findall(r"\d+", message) == [number]
    assert len({message for _, message, _ in messages}) == 328


@pytest.mark.slow
def test_the_example_ends_in_do_not_tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    if not CACHED.is_dir():
        pytest.skip("needs SmolLM2-135M-Instruct in the cache")
    from educe.recipes.run import train

    shutil.copytree(PLACE, tmp_path / "example")
    recipe = tmp_path / "example" / "recipe.yaml"
    text = recipe.read_text(encoding="utf-8")
    named = "model: HuggingFaceTB/SmolLM2-135M-Instruct"
    assert named in text
    recipe.write_text(text.replace(named, f"model: {CACHED}"), encoding="utf-8")
    monkeypatch.chdir(tmp_path / "example")
    scores = train("recipe.yaml").eval()
    assert scores["verdict"].startswith("Do not tune"), scores["verdict"]
    values = {name: s["value"] for name, s in scores["systems"].items()}
    assert values["few_shot"] > 0.95
    assert values["untouched"] < values["few_shot"]
