"""Where a known failure is shown: a place with a tiny real model, the real verbs, and what they notice."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import educe
import pytest
from educe.config import load_recipe
from educe.errors import EduceError
from educe.model.describe import describe_model
from educe.parallel.world import ALONE, World
from educe.recipes.finding import Before, Finding, before
from educe.recipes.machine import chosen_device
from educe.recipes.memory import memory_of_run
from educe.recipes.mixing import draw
from educe.recipes.plan import plan_run
from educe.recipes.preflight import without_model
from educe.recipes.preflight_run import on_model
from educe.recipes.prepare import prepare
from educe.recipes.trainee import Trainee, trainee

from check_command import row
from test_engine import cpu

DATA = "data: {train: rows.jsonl, max_tokens: 128, dev: {kind: share, share: 0.2}}\n"
TRAIN = "train: {batch_tokens: 256, micro_batch_tokens: 128, learning_rate: 1e-3, epochs: 3}\n"
RUN = (
    "data: {train: rows.jsonl, max_tokens: 128, dev: {kind: share, share: 0.2}}\n"
    "train: {batch_tokens: 256, micro_batch_tokens: 128, learning_rate: 1e-3, epochs: 6, checkpoint_every_steps: 2}\n"
    "evaluation: {max_new_tokens: 4, few_shot: 0}\n"
)
ROWS = [
    row(f"the cat {i} sat on the mat" + " and said hello" * (i % 4), "refund item " * (1 + i % 5) + str(i))
    for i in range(30)
]


@dataclass(frozen=True)
class Stand:
    """`place` holds rows, recipe, runs and the model; `patch` undoes what is done to the program. `said` is what runs said."""

    place: Path
    model: Path
    patch: pytest.MonkeyPatch
    said: list[str] = field(default_factory=list)

    @classmethod
    def at(cls, place: Path, tiny_model: Path, patch: pytest.MonkeyPatch) -> Stand:
        place.mkdir(parents=True)
        shutil.copytree(tiny_model, place / "tiny")
        patch.chdir(place)
        return cls(place, place / "tiny", patch)

    def everywhere(self, right: Callable[..., Any], wrong: Callable[..., Any]) -> None:
        """`wrong` takes the place of a function of the program wherever it is called by its name."""
        for name, module in list(sys.modules.items()):
            if name.startswith("educe.") and getattr(module, right.__name__, None) is right:
                self.patch.setattr(module, right.__name__, wrong)

    def recipe(self, rest: str = DATA + TRAIN, rows: Iterable[str] = ROWS, dtype: str = "float32") -> Path:
        self.rows(rows)
        head = f"name: t\nmodel: {self.model}\ndevice: cpu\ndtype: {dtype}\n"
        (self.place / "recipe.yaml").write_text(head + rest, encoding="utf-8")
        return self.place / "recipe.yaml"

    def rows(self, rows: Iterable[str]) -> None:
        (self.place / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")

    def template(self, source: str) -> str:
        """The line of a recipe that names it."""
        (self.place / "other.jinja").write_text(source, encoding="utf-8")
        return f"template: {{kind: file, file: {self.place / 'other.jinja'}}}\n"

    def before(self, file: Path, ranks: int = 1) -> Before:
        recipe = load_recipe(file)
        prepared = prepare(recipe, self.said.append)
        facts = describe_model(prepared.model_dir, recipe.model)
        order_K, device = draw(recipe, prepared), chosen_device("cpu", "float32")
        plan = plan_run(recipe, prepared, facts, order_K, num_ranks=ranks)
        memory = memory_of_run(recipe, prepared, facts, plan, device, compiled=False)
        return before(recipe, prepared, facts, plan, memory, "cpu", 1e4, text="", argv=["train"])

    def look(self, file: Path, ranks: int = 1) -> set[str]:
        """What every check without a model says, or the codes of the error that rows or files end in."""
        return noticed(lambda: without_model(self.before(file, ranks)))

    def look_on_model(
        self, file: Path, then: Callable[[Trainee], Any] = lambda t: None, world: World = ALONE, ranks: int = 1
    ) -> set[str]:
        """What every check of the loaded model says; `then` is done to it before."""

        def findings() -> list[Finding]:
            recipe = load_recipe(file)
            prepared = prepare(recipe, self.said.append)
            facts = describe_model(prepared.model_dir, recipe.model)
            say, device, order_K = self.said.append, cpu(recipe.dtype), draw(recipe, prepared)
            how: dict[str, Any] = {"compiled": False, "world": world, "planned_ranks": ranks}
            t = trainee(recipe, prepared, facts, order_K, device, None, say, **how)
            return on_model(recipe, prepared, then(t) or t, self.place, world=world)

        return noticed(findings)

    def train(self, file: Path, screen: Any = None) -> set[str]:
        """What a run says that was not as it should be."""
        said: list[str] = []

        def findings() -> list[Finding]:
            educe.train(file, say=said.append, screen=screen)
            return []

        seen = noticed(findings)
        self.said.extend(said)
        seen |= {f"{line.split()[1]} fail" for line in said if line.startswith("FAILED: ")}
        return seen | ({"moved aside"} if any("is damaged: " in line for line in said) else set())


def noticed(look: Callable[[], Iterable[Finding]]) -> set[str]:
    """Ids with their verdicts where these are no pass; codes and ids of an error instead."""
    try:
        findings = look()
    except EduceError as e:
        ids = re.findall(r"\bP\d\d\b", f"{e.where} {e.found}")
        return {e.code, *re.findall(r"E-[A-Z]+-\d{3}", str(e)), *(f"{id} fail" for id in ids)}
    codes = {f.number for f in findings if f.verdict == "fail" and re.fullmatch(r"E-[A-Z]+-\d{3}", f.number)}
    told = {code for f in findings for code in re.findall(r"E-CHAT-\d{3}", f.evidence)}
    return codes | told | {f"{f.id} {f.verdict}" for f in findings if f.verdict in ("warn", "fail")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A known silent failure. `show(stand, wrong)` makes a healthy setup, with the failure in it where `wrong`, and says what was
    noticed; `by` is in that with the failure and never without. `fast`: shown in every run of the tests."""

    number: int
    what: str
    how: str
    by: str
    show: Callable[[Stand, bool], set[str]]
    fast: bool = False


def talk(*turns: str, **more: Any) -> str:
    """A row whose turns are, in order, the user's and the assistant's."""
    roles = ("user", "assistant")
    return json.dumps({"messages": [{"role": roles[k % 2], "content": t} for k, t in enumerate(turns)], **more})
