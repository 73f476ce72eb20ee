"""The recipe: every knob, its default and its bounds. Frozen; unknown keys are errors; a choice is a tagged union."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from educe.config.data import Data
from educe.config.knobs import Contradiction, FunctionName, Knobs, Name, Share, by_name
from educe.config.objective import Objective, Preference, Sft


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


Template = Annotated[OwnTemplate | NamedTemplate | FileTemplate, Field(discriminator="kind"), BeforeValidator(by_name)]


class Full(Knobs):
    """Every weight is trained."""

    kind: Literal["full"]


class Lora(Knobs):
    """Low-rank adapters on all linear layers (Hu et al. 2021, arXiv 2106.09685); rslora: Kalajdzievski 2023, arXiv 2312.03732;
    dora: Liu et al. 2024, arXiv 2402.09353; QLoRA: Dettmers et al. 2023, arXiv 2305.14314."""

    kind: Literal["lora"]
    rank: int = Field(default=16, ge=1, le=1024, description="rank of the adapters")
    alpha: float = Field(default=32.0, gt=0, description="their scale is alpha / rank; rslora: alpha / sqrt(rank)")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout on their input")
    variant: Literal["lora", "rslora", "dora"] = Field(
        default="lora", description="rslora: for high ranks; dora: lengths of weights apart from directions, slower"
    )
    base_bits: Literal[16, 4] = Field(
        default=16, description="4: the frozen linear layers in 4 bits (QLoRA), a quarter of the memory, slower"
    )


Tuning = Annotated[Full | Lora, Field(discriminator="kind")]


class Decay(Knobs):
    """After the warm-up down to 0 along a line or a cosine, or not at all."""

    kind: Literal["linear", "cosine", "constant"]


class Wsd(Knobs):
    """Warm up, stay at the peak, decay at the end: how long to train may be decided late."""

    kind: Literal["wsd"]
    decay_share: Share = Field(default=0.2, description="share of the steps, at the end, that decay")


Schedule = Annotated[Decay | Wsd, Field(discriminator="kind"), BeforeValidator(by_name)]


class Even(Knobs):
    """One learning rate for all weights."""

    kind: Literal["even"]


class LoraPlus(Knobs):
    """The second matrix of each adapter learns faster (Hayou et al. 2024, arXiv 2402.12354)."""

    kind: Literal["lora_plus"]
    ratio: float = Field(default=16.0, ge=1, le=1000, description="how many times faster")


class LayerWise(Knobs):
    """Each layer learns slower than the one above it (Howard & Ruder 2018, arXiv 1801.06146)."""

    kind: Literal["layer_wise"]
    decay: float = Field(default=0.9, gt=0, le=1, description="rate of a layer over that of the next")


Rates = Annotated[Even | LoraPlus | LayerWise, Field(discriminator="kind"), BeforeValidator(by_name)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Activations = Literal["auto", "keep", "recompute", "offload"]


class Train(Knobs):
    """One optimizer run."""

    epochs: float | None = Field(
        default=2.0, ge=1, le=100, description="passes over the rows, at least one; 1.5 draws half of them twice"
    )
    steps: int | None = Field(
        default=None, ge=1, le=1_000_000, description="optimizer steps, in place of epochs (default: as epochs say)"
    )
    batch_tokens: int = Field(default=8192, ge=8, description="tokens of one optimizer step")
    micro_batch_tokens: int = Field(default=2048, ge=8, description="tokens of a pack of rows, in memory at once")
    learning_rate: float = Field(default=2e-5, gt=0, lt=1, description="peak learning rate")
    schedule: Schedule = Field(default=Decay(kind="linear"), description="the rate after the warm-up")
    warmup_share: float = Field(default=0.05, ge=0, lt=1, description="share of the steps that warm up")
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="AdamW's decoupled weight decay")
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.99), strict=False, description="AdamW's first and second moment")
    optimizer: Literal["adamw", "adamw_8bit", "adamw_8bit_bf16"] = Field(
        default="adamw",
        description="how moments are kept; _bf16: weights too, rounded at random, where memory is short",
    )
    rates: Rates = Field(default=Even(kind="even"), description="how rates differ between weights")
    loss: Literal["nll", "dft", "eaft"] = Field(
        default="nll",
        description="cross-entropy; dft: times the token's probability; eaft: times how unsure the model is of it",
    )
    kl_to_base: float = Field(
        default=0.0, ge=0, description="pull towards the model before training: this times their KL; a third slower"
    )
    clip_norm: float = Field(default=1.0, gt=0, description="gradients are scaled down to this norm")
    activations: Activations = Field(
        default="auto",
        description="keep them for the backward pass, recompute (a third slower), offload to the host, or as memory allows",
    )
    compile: Literal["auto", "on", "off"] = Field(
        default="auto", description="compile the layers; auto: where it will save more time than it takes"
    )
    router_loss: float | None = Field(
        default=None, ge=0, le=10, description="of a mixture of experts: weight of the loss that balances its router"
    )
    checkpoint_every_steps: int = Field(default=500, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(default=2, ge=2, le=1000, description="checkpoints kept while training")
    keep_every_steps: int | None = Field(
        default=None, ge=1, description="checkpoints of every so many steps stay for good (default: none)"
    )
    measure_every_share: Share = Field(
        default=0.2,
        description="share of the steps between measurements of dev loss; sample prompts are answered then too",
    )
    score_rows: int = Field(
        default=32,
        ge=0,
        description="dev rows answered and graded at each measurement, where answers are right or wrong",
    )
    patience: int | None = Field(
        default=None, ge=1, description="end when so many measurements in a row brought no new low (default: never)"
    )
    deterministic: bool = Field(
        default=False, description="the same bits on every run on a GPU too, somewhat slower; a CPU gives them anyway"
    )
    keep_weights: Literal["last", "best"] = Field(
        default="last", description="the run's weights: those of the last step, or of the lowest dev loss measured"
    )
    log_to: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = Field(
        default=(), strict=False, description="where metrics go besides the run directory, through these clients"
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="everything random follows from it")

    @model_validator(mode="before")
    @classmethod
    def _one_length(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        epochs, steps = given.get("epochs"), given.get("steps")
        if epochs is not None and steps is not None:
            found = f"epochs ({epochs}) and steps ({steps}) each say how long the run is"
            raise Contradiction(found, "Leave one of them out.", ("steps",))
        if epochs is None and "epochs" in given and steps is None:
            raise Contradiction("neither epochs nor steps say how long the run is", "Give one of them.", ("epochs",))
        return given if steps is None else {**given, "epochs": None}


class PlainMetric(Knobs):
    """How an answer is graded against the expected one."""

    kind: Literal["exact", "json", "json_fields", "label", "pass_at_k", "rouge_l", "sql", "text", "tool_calls"] = Field(
        description="same text, equal JSON values, F1 of JSON's fields, same label, programs that pass the expected test, ROUGE-L, "
        "same SQL statement, free text (held-out loss decides), same tool calls"
    )


class CustomMetric(Knobs):
    """A function of yours, `(answer, expected, row)` to a number from 0 to 1 or to right or wrong. It runs as you."""

    kind: Literal["custom"]
    function: FunctionName = Field(description="module:function, the module beside the recipe, or file.py:function")


Metric = Annotated[PlainMetric | CustomMetric, Field(discriminator="kind"), BeforeValidator(by_name)]


class Evaluation(Knobs):
    """The before/after test."""

    metric: Metric = Field(default=PlainMetric(kind="text"), description="how answers are graded")
    max_new_tokens: int = Field(default=256, ge=1, le=100_000, description="an answer is cut here")
    few_shot: int = Field(
        default=5,
        ge=0,
        le=64,
        description="at most so many examples in the untouched model's best prompt; 0: none is tried",
    )
    max_rows: int = Field(default=1000, ge=1, description="at most this many test rows are answered")


# A run's peak rate with adapters, over that of all weights: LoRA Without Regret, thinkingmachines.ai/blog/lora.
LORA_RATE = 10.0

# Settings of the data and the run that mean nothing where no prompt is answered.
_OF_ANSWERS = ("system", "train_on", "prompt_weight", "reasoning_weight", "too_long")
_OF_STREAMS = ("replay", "loss_mean")
_OF_TOKENS = ("loss", "kl_to_base")


def with_rate(given: dict[str, Any], rate: float, adapters: float = LORA_RATE) -> dict[str, Any]:
    """A run or a stage as given, with its peak rate where it names none: `rate`, or `adapters` times as much where those are tuned."""
    tuning, train = given.get("tuning"), given.get("train", {})
    kind = tuning.get("kind") if isinstance(tuning, dict) else getattr(tuning, "kind", None)
    named = (
        train if isinstance(train, dict) else train.model_fields_set if isinstance(train, Train) else ("learning_rate",)
    )
    if "learning_rate" in named:
        return given
    added = {"learning_rate": rate * adapters if kind == "lora" else rate}
    return {**given, "train": {**train, **added} if isinstance(train, dict) else train.model_copy(update=added)}


class Recipe(Knobs):
    """A whole job: one model, one data set, one run directory. `objective` is said by a recipe of stages alone (see `stages`)."""

    name: Name = Field(description="name of the run")
    model: str = Field(min_length=1, description="a directory, a Hub id, an earlier run, or pypi:PACKAGE")
    runs: str = Field(default="runs", description="directory that holds the run directories")
    device: Literal["auto", "cuda", "mps", "cpu"] = Field(
        default="auto", description="auto: the fastest, by a timed matmul"
    )
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        default="auto", description="arithmetic; weights are kept in fp32"
    )
    template: Template = Field(default=OwnTemplate(kind="own"), description="the chat template")
    objective: Objective = Field(default=Sft(kind="sft"), description="what is learned")
    data: Data
    tuning: Tuning = Field(default=Full(kind="full"), description="what is trained")
    train: Train = Field(default=Train(), description="the optimizer run")
    evaluation: Evaluation = Field(default=Evaluation(), description="the before/after test")

    @model_validator(mode="before")
    @classmethod
    def _rate_of_its_tuning(cls, given: Any) -> Any:
        return with_rate(given, Train().learning_rate) if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _agree(self) -> Recipe:
        schedule = self.train.schedule
        if isinstance(schedule, Wsd) and self.train.warmup_share + schedule.decay_share > 1:
            found = (
                f"train.warmup_share ({self.train.warmup_share:g}) and train.schedule.decay_share "
                f"({schedule.decay_share:g}) exceed the whole run"
            )
            raise Contradiction(found, "Lower one of them.")
        if self.train.micro_batch_tokens > self.train.batch_tokens:
            found = (
                f"train.micro_batch_tokens ({self.train.micro_batch_tokens}) exceeds "
                f"train.batch_tokens ({self.train.batch_tokens})"
            )
            raise Contradiction(found, "Lower the one or raise the other.")
        if len(set(self.train.log_to)) < len(self.train.log_to):
            found = f"train.log_to names a client twice ({', '.join(self.train.log_to)})"
            raise Contradiction(found, "Name each once.", ("train", "log_to"))
        if isinstance(self.train.rates, LoraPlus) and not isinstance(self.tuning, Lora):
            fix = "Set tuning: {kind: lora}, or leave train.rates out."
            raise Contradiction("train.rates: lora_plus needs tuning.kind: lora", fix, ("train", "rates"))
        if self.data.max_tokens > self.train.micro_batch_tokens:
            found = (
                f"data.max_tokens ({self.data.max_tokens}) exceeds train.micro_batch_tokens "
                f"({self.train.micro_batch_tokens}): the longest row must fit a micro-batch"
            )
            raise Contradiction(found, "Lower the one or raise the other.")
        self._refuse_meaningless()
        return self

    def _refuse_meaningless(self) -> None:
        """A setting that this objective does not read."""
        kind = self.objective.kind
        if kind == "sft":
            return
        unread = {"pretrain": _OF_ANSWERS, "preference": _OF_ANSWERS[1:] + _OF_STREAMS}[kind]
        given = [("data", n) for n in unread if getattr(self.data, n) != Data.model_fields[n].default]
        if kind == "preference":
            given += [("train", n) for n in _OF_TOKENS if getattr(self.train, n) != Train.model_fields[n].default]
            if 2 * self.data.max_tokens > self.train.micro_batch_tokens:
                found = (
                    f"both answers of a pair are computed together: train.micro_batch_tokens ({self.train.micro_batch_tokens}) "
                    f"must hold two rows of data.max_tokens ({self.data.max_tokens})"
                )
                raise Contradiction(found, "Lower the second or raise the first.")
        if given:
            found = f"{'.'.join(given[0])} means nothing where the objective is {kind}"
            raise Contradiction(found, "Leave it out.", given[0])

    @property
    def learns_pairs(self) -> bool:
        """Whether a row is two answers, of which one is better."""
        return isinstance(self.objective, Preference)

    def run_path(self) -> Path:
        return Path(self.runs) / self.name
