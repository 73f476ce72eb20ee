"""RUN/shift.json: the tuned model's answers to the test rows, read again by the untouched model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from educe.evaluate.shift import Asked, base_ranks, shift_record
from educe.recipes.both import Both
from educe.types import Answer

MOST_TOKENS = {"cpu": 8192}  # of prompts and answers, so that it takes seconds
_ELSEWHERE = 262_144


def shift_of(both: Both, prompts: Sequence[Sequence[int]], answers: Sequence[Answer]) -> dict[str, Any]:
    """Of the first answers in so many tokens; at least one."""
    began, tokens = time.perf_counter(), 0
    asked: list[Asked] = []
    for ids, answer in zip(prompts, answers, strict=True):
        tokens += len(ids) + len(answer.ids)
        if asked and tokens > MOST_TOKENS.get(both.device.kind, _ELSEWHERE):
            break
        asked.append(Asked(prompt=tuple(ids), answer=answer.ids))
    places = base_ranks(both.untouched(), asked, both.capacity_tokens)
    tokenizer = both.prepared.tokenizer
    names = {number: word for word, number in tokenizer.control.items()}

    def text_of(token: int) -> str:
        return names.get(token) or tokenizer.decode([token])

    found = shift_record(asked, places, text_of, frozenset(tokenizer.stop))
    return found | {"of_answers": len(answers), "seconds": round(time.perf_counter() - began, 3)}
