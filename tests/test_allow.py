"""`--allow`: a name that can be compared, or a refusal with the one that was meant; one that allows nothing is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
from educe.config import Recipe
from educe.errors import RunError, UsageError
from educe.files.run_dir import RunDir
from educe.model.describe import describe_model
from educe.recipes.prepare import prepare
from educe.recipes.provenance import settings_of
from educe.recipes.resume import changes_since

from test_preflight import Bench, bench, lines, quiet  # noqa: F401


def ask(bench: Bench, allowed: list[str], old: dict[str, Any]) -> tuple[list[str], list[str]]:  # noqa: F811
    """What has changed and what is said, of a run at step 4 that was begun with some settings of `old`."""
    recipe: Recipe = bench.recipe(lines(12))
    prepared = prepare(recipe, quiet)
    settings = settings_of(recipe, prepared, describe_model(prepared.model_dir, recipe.model), 1)
    assert old.keys() <= settings.keys()
    found = (Path("step-000004"), {"step": 4, "finished": False, "settings": {**settings, **old}})
    said: list[str] = []
    made = changes_since(RunDir(bench.place / "run"), found, recipe, settings, allowed, said.append)
    return [m["field"] for m in made], said


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("train.lr", "Here it is `train.learning_rate`."),
        ("lr", "Here it is `train.learning_rate`."),
        ("learning_rate", "Here it is `train.learning_rate`."),
        ("train.max_seq_length", "Here it is `data.max_tokens`."),
        ("seeds", "Did you mean train.seed?"),
        ("train.schedule.kind", "--allow train.schedule"),
        ("data.dev.share", "--allow data.dev"),
        ("train.keep_checkpoints", "Leave it out: it may change at any time"),
        ("train.checkpoint_every_steps", "Leave it out: it may change at any time"),
        ("runs", "Leave it out: it may change at any time"),
        ("files.training", "Did you mean files.train?"),
    ],
)
def test_a_name_that_is_never_compared_is_refused(bench: Bench, field: str, words: str) -> None:  # noqa: F811
    with pytest.raises(UsageError, match="E-CLI-101 --allow") as refused:
        ask(bench, [field], {})
    assert words in refused.value.fix


def test_a_refusal_names_the_flags_and_the_one_that_allows_nothing(bench: Bench) -> None:  # noqa: F811
    old = {"files.train": "0" * 64, "train.learning_rate": 1.0}
    with pytest.raises(RunError, match="E-RUN-201") as refused:
        ask(bench, ["data.train"], old)
    assert "(--allow data.train: that has not changed.)" in refused.value.found
    assert "--allow files.train --allow train.learning_rate" in refused.value.fix
    assert ask(bench, list(old), old)[0] == list(old)


def test_what_is_as_it_was_is_said_and_no_error(bench: Bench) -> None:  # noqa: F811
    assert ask(bench, ["train.learning_rate"], {}) == ([], ["--allow train.learning_rate: that is as this run has it"])
