"""The values that flow through the house, each frozen and valid by construction.

Shape legend: T tokens of one example, P tokens of one packed row, D documents in a packed row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64

Role = Literal["system", "developer", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "developer", "user", "assistant", "tool")

# What a stretch of rendered text is: written by the template, or one of the row's own texts. `eos` is the end-of-sequence
# token that is appended where a template writes no stop token; its text is empty.
Part = Literal["template", "content", "reasoning", "tool_calls", "tools", "eos"]

# Why a sequence does not go on in the row's sequence before it: its prompt has another text, other ids, or the end-of-sequence
# token that was appended there does not stand in history. "" for the first.
Apart = Literal["", "text", "ids", "eos"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a row came from: `line` counts from 1 (an element's number in a JSON array or a Parquet file), `item` from 0 where one
    line holds many rows, `offset` bytes from the start of the file (of what it unpacks to) where it is known."""

    file: str
    line: int
    item: int | None = None
    offset: int | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.item is None else f"{self.file}:{self.line}[{self.item}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call that an assistant's turn makes. `arguments` is a JSON object."""

    name: str
    arguments: Mapping[str, Any]
    id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn. `content` is "" where a turn only calls tools.

    `reasoning` is what an assistant thought before `content`, where the row gives it apart. `weight` is the row's own loss
    weight for the turn (≥ 0); None leaves it to the policy. `name` and `call_id` belong to a tool's result.
    """

    role: Role
    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    call_id: str | None = None
    weight: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A non-empty list of messages, the tools (JSON schemas) that may be called in it, and where it was read."""

    messages: tuple[Message, ...]
    source: Source
    tools: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if not self.messages:
            raise ValueError("a conversation has at least one message")


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """Raw text, all of it to be learned, and where it was read."""

    text: str
    source: Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two answers to one prompt, the first preferred: each a whole conversation."""

    chosen: Conversation
    rejected: Conversation

    @property
    def source(self) -> Source:
        return self.chosen.source


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A stretch of rendered text and who wrote it.

    `message` is the index of the message it belongs to (None: the template around the messages). `part` says which of the
    row's texts it is, or that the template wrote it. `trained` is True for what the model must emit.
    """

    text: str
    message: int | None
    part: Part
    trained: bool

    @property
    def from_data(self) -> bool:
        return self.part not in ("template", "eos")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """One training sequence as text: its segments joined are the text the model sees. `turns` are trained message indices.

    `apart` says why it does not go on in the sequence before it.
    """

    segments: tuple[Segment, ...]
    turns: tuple[int, ...]
    apart: Apart = ""

    @property
    def text(self) -> str:
        return "".join(s.text for s in self.segments)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Tokens first … end of a sequence: context, or one turn's completion; they came from these segments."""

    first: int
    end: int
    segments: tuple[Segment, ...]

    @property
    def trained(self) -> bool:
        return self.segments[0].trained


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A rendering as token ids, proved, in runs that cover it."""

    ids_T: Int32[np.ndarray, " t"]
    runs: tuple[Run, ...]
    rendering: Rendering


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """What is stored: ids and the loss weight of each token as a *target* (0: context only).

    `prefix_of` is the number of leading ids it shares with the example stored before it (0 unless both come from one row):
    what a packer may compute once for both. `task` is its task's number in the mixture. `reference`: of an answer of a preference
    pair, the log-probability in nats of its trained tokens under the model that training starts from.
    """

    ids_T: Int32[np.ndarray, " t"]
    weights_T: Float32[np.ndarray, " t"]
    prefix_of: int = 0
    task: int = 0
    reference: float | None = None

    def __post_init__(self) -> None:
        if self.ids_T.shape != self.weights_T.shape or self.ids_T.ndim != 1:
            raise ValueError(f"ids {self.ids_T.shape} and weights {self.weights_T.shape} must be equal vectors")
        if not self.weights_T.any():
            raise ValueError("an example has at least one trained token")
        if self.weights_T[0] != 0:
            raise ValueError("the first token has no prediction and cannot be trained")


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One micro-batch: documents packed in one row, blind to each other.

    ids_P         token ids
    positions_P   position of each token in its own document, from 0
    lengths_D     tokens of each document; their sum is P
    predict_N     indices into P whose *next* token is trained (a document's last token never is)
    targets_N     the id to be predicted there
    weights_N     its weight, > 0 (0 in a micro-batch that only keeps ranks in step)
    tasks_N       the task it belongs to
    scales_N      what its task multiplies the loss with (λ_k); never in a denominator
    reference_D   of preference pairs alone: documents 2k and 2k + 1 are the chosen and the rejected answer of pair k, each with the
                  log-probability in nats of its trained tokens under the reference
    """

    ids_P: Int64[np.ndarray, " p"]
    positions_P: Int64[np.ndarray, " p"]
    lengths_D: Int64[np.ndarray, " d"]
    predict_N: Int64[np.ndarray, " n"]
    targets_N: Int64[np.ndarray, " n"]
    weights_N: Float32[np.ndarray, " n"]
    tasks_N: Int64[np.ndarray, " n"]
    scales_N: Float32[np.ndarray, " n"]
    reference_D: Float64[np.ndarray, " d"] | None = None

    @property
    def num_tokens(self) -> int:
        return int(self.ids_P.size)

    @property
    def starts(self) -> Int64[np.ndarray, " d"]:
        """Where the trained positions of each document begin among all of them."""
        starts_D: np.ndarray = np.searchsorted(self.predict_N, np.cumsum(self.lengths_D) - self.lengths_D)
        return starts_D

    @property
    def total_weight(self) -> float:
        return float(self.weights_N.astype(np.float64).sum())

    @property
    def denominator(self) -> float:
        """What it adds to the number that its step's loss is divided by: its pairs, or the weight of its tokens."""
        return self.total_weight if self.reference_D is None else float(self.reference_D.size // 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What a model is asked: the messages before its answer, and the tools it may call. `key` names it in records, unique in a set."""

    key: str
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How an answer is drawn. A `temperature` of 0 is greedy; `seed` decides every draw, together with the prompt's key."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or not self.temperature >= 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"need max_new_tokens > 0, temperature >= 0 and 0 < top_p <= 1: {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a model said to one prompt. `stopped`: it ended by itself, with a stop token. `ids`: as they were made, that one included,
    where the model was in this process."""

    text: str
    num_tokens: int
    stopped: bool
    ids: tuple[int, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Graded answer: right or wrong, how good from 0 to 1, and why in a few words.

    `weight` is what the row counts for in the mean score (its fields, say); `parts` are shares of a row, (of it, out of), that are
    told beside the score, each as one ratio of sums over all rows.
    """

    correct: bool
    reason: str
    score: float
    weight: float = 1.0
    parts: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.score <= 1 or not self.weight > 0:
            raise ValueError(f"need a score from 0 to 1 and some weight, got {self.score} and {self.weight}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate with its confidence interval, all as fractions."""

    value: float
    low: float
    high: float
