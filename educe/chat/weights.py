"""Loss weight per token. A policy for turns is one function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32

from educe.chat.render import trainable_turns
from educe.chat.tokens import ChatTokenizer
from educe.types import Message, Rendered, Segment

# Which assistant turns are trained, and with what weight: (messages, turns that can be) → {turn: weight}.
Policy = Callable[[Sequence[Message], Sequence[int]], dict[int, float]]


def all_turns(messages: Sequence[Message], turns: Sequence[int]) -> dict[int, float]:
    """Every turn, by the row's own weight where it gives one."""
    return {i: 1.0 if (w := messages[i].weight) is None else w for i in turns}


def last_turn(messages: Sequence[Message], turns: Sequence[int]) -> dict[int, float]:
    """The last turn alone."""
    return all_turns(messages, turns[-1:])


def flagged_turns(messages: Sequence[Message], turns: Sequence[int]) -> dict[int, float]:
    """The turns to which the row gives a weight."""
    return all_turns(messages, [i for i in turns if messages[i].weight is not None])


def answered_turn(messages: Sequence[Message], turns: Sequence[int]) -> dict[int, float]:
    """The last turn, whatever its weight: what a test asks for."""
    return dict.fromkeys(turns[-1:], 1.0)


POLICIES: dict[str, Policy] = {"all": all_turns, "last": last_turn, "flagged": flagged_turns}


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighing:
    """What of a row carries loss: a policy for turns, weights for what is said to the model and for reasoning inside turns."""

    policy: Policy = all_turns
    prompt_weight: float = 0.0
    reasoning_weight: float = 1.0

    @property
    def is_even_inside(self) -> bool:
        """Whether all tokens of a completion weigh the same, and everything else nothing."""
        return self.prompt_weight == 0 and self.reasoning_weight == 1

    def turns(self, messages: Sequence[Message]) -> dict[int, float]:
        """Weights of the turns that are trained at all."""
        return {i: w for i, w in self.policy(messages, trainable_turns(messages)).items() if w > 0}


EVEN = Weighing()


def weigh(
    rendered: Rendered, messages: Sequence[Message], tokenizer: ChatTokenizer, weighing: Weighing = EVEN
) -> Float32[np.ndarray, " t"]:
    """The weight of each token as a target: its turn's for a completion, stop token included; 0 for the template's own text.

    `prompt_weight` goes to tokens that hold nothing but system's, user's or tool's text, in the first sequence that shows it.
    """
    weights_T = np.zeros(rendered.ids_T.size, np.float32)
    given = weighing.turns(messages)
    for run in rendered.runs:
        if run.trained:
            turn = run.segments[0].message
            assert turn is not None
            weights_T[run.first : run.end] = given[turn]
    if weighing.prompt_weight or weighing.reasoning_weight != 1:
        _weigh_parts(rendered, weights_T, messages, tokenizer, weighing)
    weights_T[0] = 0  # nothing predicts the first token
    return weights_T


def _weigh_parts(
    rendered: Rendered,
    weights_T: Float32[np.ndarray, " t"],
    messages: Sequence[Message],
    tokenizer: ChatTokenizer,
    weighing: Weighing,
) -> None:
    owner_T, pure_T = owners(rendered, tokenizer)
    segments = rendered.rendering.segments
    first = min(rendered.rendering.turns)
    earlier = max((t for t in weighing.turns(messages) if t < first), default=-1)
    for k, s in enumerate(segments):
        mine = owner_T == k
        if s.trained and s.part == "reasoning":
            weights_T[mine] *= weighing.reasoning_weight
        elif not s.trained and _is_new_prompt(s, messages, earlier):
            weights_T[mine & pure_T] = weighing.prompt_weight


def _is_new_prompt(s: Segment, messages: Sequence[Message], earlier: int) -> bool:
    """Text said to the model that no earlier sequence of the row has shown."""
    if s.message is None or not s.from_data:
        return False
    return s.message > earlier and messages[s.message].role != "assistant"


def owners(rendered: Rendered, tokenizer: ChatTokenizer) -> tuple[Int32[np.ndarray, " t"], np.ndarray]:
    """For each token the segment that holds the first character it adds, and whether that segment holds all of them."""
    owner_T = np.zeros(rendered.ids_T.size, np.int32)
    pure_T = np.ones(rendered.ids_T.size, bool)
    texts = tokenizer.pieces(rendered.ids_T.tolist())
    start = 0
    for run in rendered.runs:
        ends = np.cumsum([len(s.text) for s in run.segments])
        written, pending = 0, run.first
        for k in range(run.first, run.end):
            inside = min(int(np.searchsorted(ends, written, side="right")), len(run.segments) - 1)
            owner_T[k] = start + inside
            written += len(texts[k])
            if texts[k]:
                pure_T[pending : k + 1] = written <= ends[inside]
                pending = k + 1
        start += len(run.segments)
    return owner_T, pure_T
