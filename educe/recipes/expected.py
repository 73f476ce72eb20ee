"""How likely a model finds the expected answers behind some prompt: what free text, without a grader, is compared by."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from educe.chat.examples import build_examples
from educe.chat.render import Renderer
from educe.errors import Refusal
from educe.recipes.answers import Asked
from educe.recipes.prepare import Prepared
from educe.types import Example


def after_prompts(
    prepared: Prepared, ids: Sequence[Sequence[int]], asked: Sequence[Asked]
) -> tuple[list[Example], list[int]]:
    """Each prompt and behind it the row's expected answer, which alone carries weight; and the number of each. Rows whose answer
    cannot be told apart are left out: training refused them too."""
    built = build_examples([a.row for a in asked], Renderer(prepared.tokenizer), max_tokens=2**31 - 1)
    made: list[Example] = []
    for prompt, found in zip(ids, built, strict=True):
        if isinstance(found, Refusal):
            continue
        answer = _last_answer(found[-1])
        all_ids = np.r_[np.array(prompt, np.int32), answer]
        weights = np.r_[np.zeros(len(prompt), np.float32), np.ones(answer.size, np.float32)]
        made.append(Example(ids_T=all_ids, weights_T=weights))
    return made, list(range(len(made)))


def _last_answer(e: Example) -> np.ndarray:
    """The last run of tokens that carry weight."""
    trained = np.flatnonzero(e.weights_T > 0)
    first = trained[np.flatnonzero(np.diff(trained) > 1)[-1] + 1] if np.any(np.diff(trained) > 1) else trained[0]
    return e.ids_T[first : trained[-1] + 1]
