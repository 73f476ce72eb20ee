"""Preference pair → two examples: the chosen answer and the rejected one behind the same prompt."""

from __future__ import annotations

import numpy as np

from educe.chat.examples import Made
from educe.chat.weights import Weighing, answered_turn
from educe.errors import Refusal
from educe.types import Pair

# Of either answer: the last turn, every token of it alike.
ANSWER = Weighing(policy=answered_turn)


def pair_made(pair: Pair, chosen: Made | Refusal, rejected: Made | Refusal) -> Made | Refusal:
    """The two answers of a row, each rendered with `ANSWER`, as one. Refused where either is, where both answers are the same, and
    where the model would not see the same ids before them."""
    for got in (chosen, rejected):
        if isinstance(got, Refusal):
            return got
    assert isinstance(chosen, Made)
    assert isinstance(rejected, Made)
    where = str(pair.source)
    one, other = chosen.examples[0], rejected.examples[0]
    starts = [int(np.argmax(e.weights_T > 0)) for e in (one, other)]
    if not np.array_equal(one.ids_T[: starts[0]], other.ids_T[: starts[1]]):
        found = "the two answers do not answer the same prompt: what stands before the last turn differs."
        fix = "Give conversations that are the same up to their last message."
        return Refusal(code="E-DATA-153", where=where, found=found, fix=fix)
    if np.array_equal(one.ids_T, other.ids_T):
        found = "the chosen and the rejected answer are the same."
        return Refusal(code="E-DATA-154", where=where, found=found, fix="Remove the row.")
    return Made(
        [one, other],
        chosen.num_trained + rejected.num_trained,
        chosen.stops + rejected.stops,
        chosen.num_trimmed + rejected.num_trimmed,
    )
