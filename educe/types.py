"""The values that flow through the house, each frozen and valid by construction.

Shape legend: T tokens of one example, P tokens of one packed row, D documents in a packed row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float32, Int32, Int64

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a row came from: `line` counts from 1 (an element's number in a JSON array or a Parquet file)."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A non-empty list of messages and where it was read."""

    messages: tuple[Message, ...]
    source: Source

    def __post_init__(self) -> None:
        if not self.messages:
            raise ValueError("a conversation has at least one message")


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A stretch of rendered text and who wrote it.

    `message` is the index of the message it belongs to (None: the template around the messages).
    `from_data` is True for the row's own text, False for what the template wrote.
    `trained` is True for what the model must emit.
    """

    text: str
    message: int | None
    from_data: bool
    trained: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """One training sequence as text: its segments joined are the text the model sees. `turns` are trained message indices."""

    segments: tuple[Segment, ...]
    turns: tuple[int, ...]

    @property
    def text(self) -> str:
        return "".join(s.text for s in self.segments)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A rendering as token ids, with the segment each token belongs to."""

    ids_T: Int32[np.ndarray, " t"]
    segment_T: Int32[np.ndarray, " t"]
    rendering: Rendering


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """What is stored: ids and the loss weight of each token as a *target* (0: context only)."""

    ids_T: Int32[np.ndarray, " t"]
    weights_T: Float32[np.ndarray, " t"]

    def __post_init__(self) -> None:
        if self.ids_T.shape != self.weights_T.shape or self.ids_T.ndim != 1:
            raise ValueError(f"ids {self.ids_T.shape} and weights {self.weights_T.shape} must be equal vectors")
        if not (self.weights_T > 0).any():
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
    weights_N     its weight, > 0
    """

    ids_P: Int64[np.ndarray, " p"]
    positions_P: Int64[np.ndarray, " p"]
    lengths_D: Int64[np.ndarray, " d"]
    predict_N: Int64[np.ndarray, " n"]
    targets_N: Int64[np.ndarray, " n"]
    weights_N: Float32[np.ndarray, " n"]

    @property
    def num_tokens(self) -> int:
        return int(self.ids_P.size)

    @property
    def total_weight(self) -> float:
        return float(self.weights_N.astype(np.float64).sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a model said to one prompt. `stopped`: it ended by itself, with a stop token."""

    text: str
    num_tokens: int
    stopped: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Graded answer: right or wrong, and why in a few words."""

    correct: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate with its confidence interval, all as fractions."""

    value: float
    low: float
    high: float
