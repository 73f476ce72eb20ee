"""What the files of a run say, as frozen values. None or an empty tuple: the run has not measured it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from educe.report.ledger import Ledger
from educe.types import Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """A name and its value, for a table."""

    key: str
    value: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The recipe. `rows` is every knob under its dotted name. `objective`: sft, pretrain or preference; `pair_loss`: of preference."""

    name: str
    objective: str
    pair_loss: str
    model: str
    tuning: str
    metric: str
    few_shot: int | None
    rows: tuple[Field, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where the run happened and what exactly it used. `hashes` and `packages` are tables; the weights kept are those of
    `weights_step`."""

    device: str
    device_why: str
    dtype: str
    model: str
    architecture: str
    parameters: int | None
    trainable: int | None
    licence: str
    directory: str
    planned_steps: int | None
    weights_step: int | None
    started: str
    finished: str
    training_s: float | None
    evaluation_s: float | None
    peak_memory_bytes: float | None
    packed: bool | None
    versions: tuple[Field, ...]
    hashes: tuple[Field, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One optimizer step. `loss` is None where it was not a finite number."""

    step: int
    loss: float | None
    learning_rate: float | None
    grad_norm: float | None
    tokens: int
    trained_tokens: int
    tokens_per_s: float | None
    elapsed_s: float | None
    peak_memory_bytes: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A loss at a step."""

    step: int
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DevPairs:
    """Dev pairs at a step: the share that the model ranks right, by log-probability per token; that whose margin is above 0; the mean
    margin that the loss compares, mean log-ratios of both answers to the start in nats per token; `kl` from the start on chosen
    answers, in nats per token, where it was measured."""

    step: int
    ranked: float
    accuracy: float | None
    margin: float | None
    chosen: float | None
    rejected: float | None
    kl: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Graded:
    """Dev rows answered and graded during training by the weights of a step: `right` of `rows`, and the metric's value, which is their
    share or a mean of scores between, with its interval."""

    step: int
    metric: str
    value: float
    low: float
    high: float
    right: int
    rows: int
    seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One answer to a sample prompt during training. `asked` is the last user message."""

    step: int
    row: str
    asked: str
    expected: str
    answer: str
    stopped: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskRun:
    """Neighbouring tokens of one kind."""

    text: str
    kind: str
    control: bool
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskRow:
    row: str
    runs: tuple[MaskRun, ...]

    @property
    def num_tokens(self) -> int:
        return sum(r.tokens for r in self.runs)

    @property
    def num_trained(self) -> int:
        return sum(r.tokens for r in self.runs if r.kind == "trained")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A stored, graded answer to a test row. `score` is 0 or 1 where it is right or wrong; rows count by their `weight`."""

    row: str
    asked: str
    expected: str
    answer: str
    stopped: bool
    correct: bool
    reason: str
    score: float
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """How one system scored: untouched, few_shot, tuned, or another model, which has a `label`; `cost` in USD where it is known,
    `prompt` how a chosen prompt was chosen."""

    name: str
    label: str
    prompt: str
    cost: float | None
    correct: int
    score: Interval
    seconds: float | None
    stopped: float | None
    mean_tokens: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A paired comparison of two systems on the same rows."""

    before: str
    after: str
    won: int
    lost: int
    p: float
    difference: Interval
    p_holm: float | None = None

    @property
    def way(self) -> str:
        """Where the test shows a difference, which way it goes."""
        if (self.p if self.p_holm is None else self.p_holm) >= 0.05 or self.difference.value == 0:
            return "open"
        return "up" if self.difference.value > 0 else "down"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    metric: str
    measure: str
    num_rows: int
    verdict: str
    systems: tuple[System, ...]
    comparisons: tuple[Comparison, ...]

    @property
    def graded(self) -> bool:
        """Free text is shown, not graded right or wrong, and so are answers that no grader has seen yet."""
        return self.metric not in ("none", "text")

    @property
    def mean(self) -> bool:
        """Answers have scores between right and wrong: what a system got is a mean, and no share of right answers."""
        return self.measure == "mean"

    @property
    def priced(self) -> bool:
        return any(s.cost is not None for s in self.systems)

    def system(self, name: str) -> System | None:
        return next((s for s in self.systems if s.name == name), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskLoss:
    """Held-out loss of one task of a mixture, at the first and the last measurement; None where it was not finite."""

    name: str
    first: float | None
    last: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What one check found. `when`: before training, after it, or at the export; `verdict` is pass, warn, fail, skip or unchecked."""

    id: str
    name: str
    when: str
    verdict: str
    number: str
    evidence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFiles:
    """All that a run directory holds for the page. `unreadable` names files that are there but are not JSON; `goes_on` is
    the command that trains the run on."""

    settings: Settings | None
    provenance: Provenance | None
    ledger: Ledger | None
    steps: tuple[Step, ...]
    dev: tuple[Point, ...]
    graded: tuple[Graded, ...]
    pairs: tuple[DevPairs, ...]
    tasks: tuple[TaskLoss, ...]
    samples: tuple[Sample, ...]
    masks: tuple[MaskRow, ...]
    answers: Mapping[str, tuple[Answered, ...]]
    scores: Scores | None
    checks: tuple[Checked, ...]
    unreadable: tuple[str, ...]
    goes_on: str

    @property
    def finished(self) -> bool:
        return self.provenance is not None and bool(self.provenance.finished)

    @property
    def objective(self) -> str:
        """What the run learns from: answers (sft) where nothing else is said."""
        return self.settings.objective if self.settings else "sft"
