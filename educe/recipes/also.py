"""Another model, behind a server, as one more row of the evaluation: asked the same test rows, graded the same way, with its price."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from educe.files.hashes import hash_json
from educe.model.source import Say
from educe.recipes.answers import Asked
from educe.recipes.kept_answers import OnAnswers
from educe.sample.server import Server, ServerSampler
from educe.sample.spending import Caps
from educe.types import Answer, Prompt, Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Also:
    """Who is asked, and what it may cost."""

    server: Server
    caps: Caps = Caps()  # noqa: RUF009  (frozen)

    @property
    def name(self) -> str:
        """Of its files and its row: readable, and another one for the same model elsewhere."""
        readable = re.sub(r"[^A-Za-z0-9._]+", "-", self.server.model).strip("-.")[-60:]
        return f"{readable or 'other'}-{hash_json([self.server.endpoint, self.server.model])[:6]}"


def ask_also(
    also: Also, asked: Sequence[Asked], max_new_tokens: int, say: Say, on_answers: OnAnswers
) -> tuple[list[Answer], float, dict[str, Any]]:
    """Greedy answers to the rows' own messages, seconds, and what scores.json says of who gave them and for how much."""
    prompts = [Prompt(key=a.question.row, messages=a.prompt, tools=a.row.tools) for a in asked]
    sampler, began = ServerSampler(also.server, also.caps, say), time.perf_counter()

    def told(done: int) -> None:
        on_answers(also.server.model, done, len(prompts))

    answers = sampler.sample(prompts, Sampling(max_new_tokens=max_new_tokens), told)
    spent, caps = sampler.spent, also.caps
    about = {
        "label": also.server.model,
        "server": also.server.endpoint,
        "price_in": caps.price_in,
        "price_out": caps.price_out,
        "cost": spent.cost if spent is not None else None,
        "tokens_in": spent.tokens_in if spent is not None else 0,
    }
    return answers, time.perf_counter() - began, about
