"""Rows longer than the sequence length: split between turns, or cut at the end, with what that loses."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from educe.chat.examples import Made
from educe.types import Conversation, Example


def halves(c: Conversation) -> tuple[Conversation, Conversation] | None:
    """Two conversations that begin with what the user says, the system prompt before both, cut as near the middle of the text
    as can be; None where there is one exchange only. No turn is lost, and the second half does not see the first.
    """
    head = tuple(m for m in c.messages[:1] if m.role in ("system", "developer"))
    turns = c.messages[len(head) :]
    ends = np.cumsum([len(m.content) + len(m.reasoning or "") for m in turns])
    cuts = [i for i in range(1, len(turns)) if turns[i].role == "user" and turns[i - 1].role != "user"]
    answered = [i for i in cuts if all(any(m.role == "assistant" for m in part) for part in (turns[:i], turns[i:]))]
    if not answered:
        return None
    at = min(answered, key=lambda i: abs(2 * int(ends[i - 1]) - int(ends[-1])))
    return replace(c, messages=head + turns[:at]), replace(c, messages=head + turns[at:])


@dataclass(frozen=True, slots=True)
class Cut:
    """A row cut to the sequence length: what is left, trained tokens that are lost, answers that lost their stop token."""

    made: Made
    num_lost: int
    num_unfinished: int


def cut(made: Made, max_tokens: int) -> Cut | None:
    """The first `max_tokens` tokens of each example of a row; None where no trained token is left."""
    examples: list[Example] = []
    stops: list[int] = []
    lost = unfinished = 0
    for e in made.examples:
        trained_T = e.weights_T > 0
        ends = np.flatnonzero(trained_T & ~np.append(trained_T[1:], False))
        lost += int(trained_T[max_tokens:].sum())
        unfinished += int((ends >= max_tokens).sum())
        stops += e.ids_T[ends[ends < max_tokens]].tolist()
        if trained_T[:max_tokens].any():
            prefix = min(e.prefix_of, max_tokens) if len(examples) else 0
            examples.append(
                replace(e, ids_T=e.ids_T[:max_tokens], weights_T=e.weights_T[:max_tokens], prefix_of=prefix)
            )
    if not examples:
        return None
    num_trained = [int((e.weights_T > 0).sum()) for e in examples]
    return Cut(Made(examples, num_trained, stops, made.num_trimmed), lost, unfinished)
