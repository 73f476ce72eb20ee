"""The recipe: every knob, its default and its bounds. Frozen; unknown keys are errors; a choice is a tagged union."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from educe.config.data import Data
from educe.config.knobs import Knobs, Share


class _Template(Knobs):
    stop: tuple[str, ...] = Field(default=(), strict=False, description="more control tokens that end a turn")
    settings: dict[str, bool | int | str] | None = Field(
        default=None, description="variables given to the template, such as enable_thinking (default: found by probing)"
    )


class OwnTemplate(_Template):
    """The model's own chat template; `plain` where it has none."""

    kind: Literal["own"]


class NamedTemplate(_Template):
    """One of educe's templates for base models."""

    kind: Literal["plain", "chatml", "alpaca"]


class FileTemplate(_Template):
    """A Jinja file."""

    kind: Literal["file"]
    file: str = Field(description="the file")


def _by_name(value: object) -> object:
    """`template: plain` is short for `template: {kind: plain}`."""
    return {"kind": value} if isinstance(value, str) else value


Template = Annotated[OwnTemplate | NamedTemplate | FileTemplate, Field(discriminator="kind"), BeforeValidator(_by_name)]


class Full(Knobs):
    """Every weight is trained."""

    kind: Literal["full"]


class Lora(Knobs):
    """Low-rank adapters on all linear layers (Hu et al. 2021, arXiv 2106.09685)."""

    kind: Literal["lora"]
    rank: int = Field(default=16, ge=1, le=1024, description="rank of the adapters")
    alpha: float = Field(default=32.0, gt=0, description="their scale is alpha / rank")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout on their input")


Tuning = Annotated[Full | Lora, Field(discriminator="kind")]


class Train(Knobs):
    """One optimizer run."""

    epochs: float = Field(
        default=2.0, ge=1, le=100, description="passes over the rows, at least one; 1.5 draws half of them twice"
    )
    batch_tokens: int = Field(default=8192, ge=8, description="tokens of one optimizer step")
    micro_batch_tokens: int = Field(default=2048, ge=8, description="tokens of a pack of rows, in memory at once")
    learning_rate: float = Field(default=2e-5, gt=0, lt=1, description="peak learning rate")
    schedule: Literal["linear", "cosine", "constant"] = Field(default="linear", description="decay after the warm-up")
    warmup_share: float = Field(default=0.05, ge=0, lt=1, description="share of the steps that warm up")
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="AdamW's decoupled weight decay")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's first moment")
    beta2: float = Field(default=0.99, ge=0, lt=1, description="AdamW's second moment")
    clip_norm: float = Field(default=1.0, gt=0, description="gradients are scaled down to this norm")
    activation_checkpointing: bool = Field(
        default=False, description="recompute activations: less memory, a third slower"
    )
    router_loss: float | None = Field(
        default=None, ge=0, le=10, description="of a mixture of experts: weight of the loss that balances its router"
    )
    checkpoint_every_steps: int = Field(default=500, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(default=2, ge=1, le=1000, description="checkpoints kept while training")
    sample_every_share: Share = Field(default=0.34, description="answer the sample prompts and measure dev this often")
    seed: int = Field(default=0, ge=0, lt=2**63, description="everything random follows from it")


class Metric(Knobs):
    """How an answer is graded against the expected one."""

    kind: Literal["exact", "json", "label", "sql", "text"] = Field(
        description="same text, equal JSON values, same label, same SQL statement, or free text (held-out loss decides)"
    )


class Evaluation(Knobs):
    """The before/after test."""

    metric: Metric = Field(default=Metric(kind="text"), description="how answers are graded")
    max_new_tokens: int = Field(default=256, ge=1, le=100_000, description="an answer is cut here")
    few_shot: int = Field(
        default=5, ge=0, le=64, description="examples in the untouched model's few-shot prompt; 0 skips it"
    )
    max_rows: int = Field(default=1000, ge=1, description="at most this many test rows are answered")


class Recipe(Knobs):
    """A whole job: one model, one data set, one run directory."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = Field(description="name of the run")
    model: str = Field(min_length=1, description="a directory or a Hub id")
    runs: str = Field(default="runs", description="directory that holds the run directories")
    device: Literal["auto", "cuda", "mps", "cpu"] = Field(
        default="auto", description="auto: the fastest, by a timed matmul"
    )
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        default="auto", description="arithmetic; weights are kept in fp32"
    )
    template: Template = Field(default=OwnTemplate(kind="own"), description="the chat template")
    data: Data
    tuning: Tuning = Field(default=Full(kind="full"), description="what is trained")
    train: Train = Field(default=Train(), description="the optimizer run")
    evaluation: Evaluation = Field(default=Evaluation(), description="the before/after test")

    @model_validator(mode="after")
    def _agree(self) -> Recipe:
        if self.train.micro_batch_tokens > self.train.batch_tokens:
            raise ValueError(
                f"train.micro_batch_tokens ({self.train.micro_batch_tokens}) exceeds "
                f"train.batch_tokens ({self.train.batch_tokens}); lower the one or raise the other"
            )
        if self.data.max_tokens > self.train.micro_batch_tokens:
            raise ValueError(
                f"data.max_tokens ({self.data.max_tokens}) exceeds train.micro_batch_tokens "
                f"({self.train.micro_batch_tokens}): the longest row must fit a micro-batch; lower the one or raise the other"
            )
        return self

    def run_path(self) -> Path:
        return Path(self.runs) / self.name
