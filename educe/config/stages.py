"""A recipe of several stages: each is a run like any other, begun from the weights of an earlier one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from educe.config.data import Data
from educe.config.knobs import Contradiction, Knobs, Name
from educe.config.objective import Preference, Pretrain, Sft
from educe.config.recipe import Evaluation, Full, Lora, OwnTemplate, Recipe, Template, Train, Tuning, with_rate

# Where a stage may start besides the stages before it.
BASE = "base"
# Of a stage that starts from random weights, where the recipe gives none.
SCRATCH_RATE = 1e-3


class PretrainTrain(Train):
    """Defaults for raw text: one pass, re-warmed (Ibrahim et al. 2024, arXiv 2403.08763)."""

    epochs: float | None = Field(default=1.0, ge=1, le=100, description="passes over the texts")
    learning_rate: float = Field(default=5e-5, gt=0, lt=1, description="peak learning rate")


class PreferenceTrain(Train):
    """Defaults for pairs: one pass, at a rate far below that of tuning, and room for two answers in a pack."""

    epochs: float | None = Field(default=1.0, ge=1, le=100, description="passes over the pairs")
    batch_tokens: int = Field(default=32_768, ge=16, description="tokens of one optimizer step, of both answers")
    micro_batch_tokens: int = Field(default=4096, ge=16, description="tokens of a pack of pairs, in memory at once")
    learning_rate: float = Field(default=1e-6, gt=0, lt=1, description="peak learning rate")


class _Stage(Knobs):
    name: Name | None = Field(default=None, description="name of the stage (default: its kind)")
    start: str | None = Field(
        default=None, description="whose weights it starts from: an earlier stage or `base` (default: the one before)"
    )
    data: Data
    tuning: Tuning = Field(default=Full(kind="full"), description="what is trained")


class PretrainStage(_Stage, Pretrain):
    """Continued pre-training on raw text."""

    train: PretrainTrain = Field(default=PretrainTrain(), description="the optimizer run")


class SftStage(_Stage, Sft):
    """Supervised tuning on answers."""

    train: Train = Field(default=Train(), description="the optimizer run")


class PreferenceStage(_Stage, Preference):
    """Preference tuning on pairs of answers."""

    train: PreferenceTrain = Field(default=PreferenceTrain(), description="the optimizer run")


_TRAINS: dict[str, type[Train]] = {"pretrain": PretrainTrain, "sft": Train, "preference": PreferenceTrain}
Stage = Annotated[PretrainStage | SftStage | PreferenceStage, Field(discriminator="kind")]


def _with_rate(stage: Any, *, fresh: bool, first: bool) -> Any:
    """A stage as given, with its peak rate: that of its kind and tuning, or of random weights where it starts from those."""
    if isinstance(stage, _Stage):
        stage = dict(stage)
    train = _TRAINS.get(str(stage.get("kind"))) if isinstance(stage, dict) else None
    if train is None:
        return stage
    if fresh and (stage.get("start") == BASE or (first and stage.get("start") is None)):
        return with_rate(stage, SCRATCH_RATE, adapters=1.0)
    return with_rate(stage, train().learning_rate)


class Scratch(Knobs):
    """A small model of the Llama architecture with random weights, and a tokenizer trained on the first stage's texts."""

    init: Literal["random"]
    vocabulary: int = Field(default=4096, ge=300, le=200_000, description="tokens of its tokenizer (byte-level BPE)")
    layers: int = Field(default=6, ge=1, le=128, description="its layers")
    width: int = Field(default=256, ge=8, le=16_384, description="its hidden size")
    heads: int = Field(default=4, ge=1, le=256, description="its attention heads")
    kv_heads: int = Field(default=2, ge=1, le=256, description="its key and value heads")
    positions: int = Field(default=2048, ge=16, le=1_048_576, description="the longest text it can read, in tokens")

    @model_validator(mode="after")
    def _fits(self) -> Scratch:
        if self.width % (2 * self.heads) or self.heads % self.kv_heads:
            raise Contradiction(
                f"width ({self.width}) must be a multiple of 2 x heads ({self.heads}), heads one of kv_heads ({self.kv_heads})",
                "Change one of the three.",
            )
        return self


class StagedRecipe(Knobs):
    """A chain of stages: one model, one run directory, one report."""

    name: Name = Field(description="name of the run")
    model: Annotated[str, Field(min_length=1)] | Scratch = Field(
        description="a directory, a Hub id, pypi:PACKAGE, or {init: random, ...} for a small model from scratch"
    )
    runs: str = Field(default="runs", description="directory that holds the run directories")
    device: Literal["auto", "cuda", "mps", "cpu"] = Field(default="auto", description="auto: the fastest")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(default="auto", description="arithmetic")
    template: Template = Field(default=OwnTemplate(kind="own"), description="the chat template")
    stages: tuple[Stage, ...] = Field(min_length=1, max_length=20, strict=False, description="one after the other")
    evaluation: Evaluation = Field(default=Evaluation(), description="what every stage's model is tested with")

    @model_validator(mode="before")
    @classmethod
    def _rates_of_stages(cls, given: Any) -> Any:
        stages = given.get("stages") if isinstance(given, dict) else None
        if not isinstance(stages, list | tuple):
            return given
        fresh = not isinstance(given.get("model"), str)
        return {**given, "stages": [_with_rate(s, fresh=fresh, first=k == 0) for k, s in enumerate(stages)]}

    @model_validator(mode="after")
    def _agree(self) -> StagedRecipe:
        names: list[str] = []
        for k, stage in enumerate(self.stages):
            name, at = stage.name or stage.kind, ("stages", k, "name" if stage.name else "kind")
            if name in (BASE, "start"):
                raise Contradiction(
                    f"{name!r} is what the model before all stages is called", "Take another `name:`.", at
                )
            if name in names:
                raise Contradiction(f"{name!r} is the name of another one", "Give each its own `name:`.", at)
            if stage.start not in (None, BASE, *names):
                found = f"start is {stage.start!r}, and before it there is {', '.join((BASE, *names))}"
                fix = "Name one of them." if k else "Leave it out: the first stage starts from the model."
                raise Contradiction(found, fix, ("stages", k, "start"))
            names.append(name)
            if isinstance(self.model, Scratch) and self.start_of(k) is None and isinstance(stage.tuning, Lora):
                found = "adapters of random weights leave those random"
                raise Contradiction(found, "Set tuning: {kind: full}.", ("stages", k, "tuning"))
            self.recipe(k, "model")  # what only the whole of a stage shows
        if isinstance(self.model, Scratch) and self.stages[0].kind != "pretrain":
            found = "model: {init: random} needs texts that teach it, and the first stage has none"
            raise Contradiction(found, "Begin with a stage of `kind: pretrain`.", ("stages", 0, "kind"))
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Of the stages, in order."""
        return tuple(s.name or s.kind for s in self.stages)

    def run_path(self) -> Path:
        return Path(self.runs) / self.name

    def stage_path(self, k: int) -> Path:
        """The run directory of stage k: where it is, whatever number it had when it was made, else where it will be."""
        name, path = self.names[k], self.run_path() / f"{k + 1}-{self.names[k]}"
        if path.exists() or not self.run_path().is_dir():
            return path
        there = [p for p in self.run_path().iterdir() if p.is_dir() and re.fullmatch(rf"\d+-{re.escape(name)}", p.name)]
        return there[0] if len(there) == 1 else path

    def scratch_path(self) -> Path:
        """Where a model from scratch is made."""
        return self.run_path() / "0-random"

    def start_of(self, k: int) -> int | None:
        """The stage whose weights stage k starts from; None for the model itself."""
        start = self.stages[k].start
        if start is None:
            return k - 1 if k else None
        return None if start == BASE else self.names.index(start)

    @property
    def last(self) -> str:
        """The stage that the longest chain ends with, the first of several: what the recipe is for, branches aside."""
        lengths: list[int] = []
        for k in range(len(self.stages)):
            start = self.start_of(k)
            lengths.append(1 if start is None else lengths[start] + 1)
        return self.names[lengths.index(max(lengths))]

    def recipe(self, k: int, model: str) -> Recipe:
        """Stage k as a recipe of its own, that starts from `model`. Raises `Contradiction`."""
        stage = self.stages[k]
        learnt = next(kind for kind in (Sft, Pretrain, Preference) if isinstance(stage, kind))
        objective = learnt(**{name: getattr(stage, name) for name in learnt.model_fields})
        shared: dict[str, Any] = {n: getattr(self, n) for n in ("device", "dtype", "template", "evaluation")}
        try:
            return Recipe(
                name=self.stage_path(k).name,
                model=model,
                runs=str(self.run_path()),
                objective=objective,
                data=stage.data,
                tuning=stage.tuning,
                train=Train.model_validate(stage.train.model_dump()),
                **shared,
            )
        except ValidationError as e:
            raise e.errors()[0]["ctx"]["error"].of_stage(k) from e
