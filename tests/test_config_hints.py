"""Keys that other trainers have, keys in the wrong block, and numbers out of bounds: each names what was meant."""

from __future__ import annotations

from pathlib import Path

import pytest
from educe.config import Recipe, load_any, parse_recipe
from educe.config.elsewhere import ELSEWHERE
from educe.config.hints import hint_of, knobs_of
from educe.errors import RecipeError

BASE = "name: a\nmodel: m\ndata:\n  train: t\n"
# What a tuning run is told of: `objective` is for recipes of stages, which say it in their own words.
KNOBS = {place: knob for place, knob in knobs_of(Recipe) if not place.startswith("objective")}


def refused(text: str) -> RecipeError:
    with pytest.raises(RecipeError) as e:
        parse_recipe(BASE + text, "r.yaml")
    return e.value


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_name_of_another_trainer_says_which_knob_it_is(name: str) -> None:
    knob, note = ELSEWHERE[name]
    assert knob in KNOBS or (not knob and note)
    assert name not in {k for k in KNOBS if "." not in k}
    for text in (f"{name}: 1\n", f"train:\n  {name}: 1\n", f"tuning: {{kind: lora, {name}: 1}}\n"):
        e = refused(text)
        assert e.code == "E-RECIPE-102"
        assert f"`{knob}`" in e.fix or note in e.fix or knob.rpartition(".")[2] in e.fix


@pytest.mark.parametrize("place", [p for p in KNOBS if "." in p])
def test_a_knob_in_the_wrong_place_is_sent_home(place: str) -> None:
    name = place.rpartition(".")[2]
    same = [p for p in KNOBS if p.rpartition(".")[2] == name]
    assert (hint_of(name) == f"Here it is `{place}`.") == (same == [place] and name not in ELSEWHERE)


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("tuning: {kind: full, base_bits: 4}\n", "It belongs to `kind: lora`."),
        ("train: {schedule: {kind: linear, decay_share: 0.1}}\n", "It belongs to `kind: wsd`."),
        ("learning_rate: 1e-4\n", "Here it is `train.learning_rate`."),
        ("train: {lr: 1e-4}\n", "Here it is `train.learning_rate`."),
        ("train: {max_tokens: 9}\n", "Here it is `data.max_tokens`."),
        ("train: {warmup_ratio: 0.1}\n", "Here it is `train.warmup_share`."),
        ("train: {packing: true}\n", "There is no such setting: rows are always packed, and blind to each other."),
        ("train: {learning_rates: 1}\n", "Did you mean 'learning_rate'?"),
    ],
)
def test_what_was_meant_is_named(text: str, fix: str) -> None:
    assert refused(text).fix == fix


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("train: {learning_rate: 2.0}\n", "It must be above 0 and below 1: peak learning rate."),
        ("train: {epochs: 0.5}\n", "It must be at least 1 and at most 100: passes over the rows"),
        ("train: {betas: [0.9, 1.5]}\n", "It must be less than 1."),
        ("train: {seed: '4'}\n", "It must be a valid integer."),
    ],
)
def test_bounds_are_said_with_what_they_bound(text: str, fix: str) -> None:
    e = refused(text)
    assert e.code == "E-RECIPE-103"
    assert e.fix.startswith(fix)


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        ("train: {measure_every_share: 1}", r"stage 1 of 1: train\.measure_every_share is 1.*below 1"),
        ("train: {learning_rate: fast}", r"stage 1 of 1: train\.learning_rate is 'fast'.*valid number"),
        ("tuning: {kind: full, base_bits: 4}", r"stage 1 of 1: tuning\.base_bits is not a known key.*kind: lora"),
    ],
)
def test_a_mistake_in_a_stage_is_told_as_in_a_recipe_of_one(stage: str, says: str, tmp_path: Path) -> None:
    text = f"name: a\nmodel: m\nstages:\n  - kind: sft\n    data: {{train: t}}\n    {stage}\n"
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=says):
        load_any(tmp_path / "r.yaml")
