"""The untouched model's best prompt, chosen on dev rows: what tuning has to beat. Test rows have no say in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from educe.chat.prompt import render_prompt
from educe.errors import ChatError
from educe.evaluate.drift import Texts
from educe.evaluate.few_shot import choose_examples, with_examples
from educe.evaluate.prompting import AS_IT_IS, Candidate, Nearest, candidates, instruction_of, with_instruction
from educe.model.describe import describe_model
from educe.model.source import Say
from educe.recipes.answers import Asked, answers_in, questions_of
from educe.recipes.both import Both
from educe.recipes.expected import after_prompts
from educe.recipes.kept_answers import KeptAnswers, OnAnswers
from educe.types import Answer, Conversation, Message, Sampling

MOST_DEV = {"cpu": 24}  # rows that each candidate answers
_MOST_DEV_ELSEWHERE = 100
NEAREST_TOKENS = {
    "cpu": 24_000
}  # of the test rows' prompts with examples of their own: nothing of them is computed once
_ELSEWHERE = 2_000_000

Score = Callable[[Sequence[Asked], Sequence[Answer]], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompted:
    """The prompts of the test rows, and for scores.json how they were chosen."""

    ids: list[list[int]]
    about: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tried:
    """`good` is what decides, more is better; `tokens` of its mean prompt."""

    candidate: Candidate
    good: float
    tokens: float


class Prompter:
    """Makes the prompts of a candidate: the instruction and examples of a sample of the training rows."""

    def __init__(self, both: Both) -> None:
        prepared, recipe = both.prepared, both.recipe
        self._both, self._rows = both, prepared.conversations("shots")
        single = [c for c in self._rows if sum(m.role == "assistant" for m in c.messages) == 1]
        self.pool = single or self._rows[:1]
        self.instruction = instruction_of([c.messages[-1].content for c in single])
        self._diverse = choose_examples(self._rows, recipe.evaluation.few_shot, recipe.train.seed)
        self._nearest = Nearest(self.pool)
        self._as_system = self._takes_system()

    def _takes_system(self) -> bool:
        asks = (Message(role="system", content="s"), Message(role="user", content="u"))
        try:
            render_prompt(asks, self._both.prepared.tokenizer)
        except ChatError:
            return False
        return True

    def messages(self, c: Candidate, prompt: tuple[Message, ...]) -> tuple[Message, ...]:
        shots: Sequence[Conversation] = ()
        if c.examples != "none":
            near = c.examples == "nearest"
            shots = self._nearest.to(prompt, c.shots) if near else self._diverse[: c.shots]
        made = with_examples(prompt, shots) if shots else prompt
        return with_instruction(made, self.instruction, as_system=self._as_system) if c.instruction else made

    def ids(self, c: Candidate, asked: Sequence[Asked]) -> list[list[int]]:
        tokenizer = self._both.prepared.tokenizer
        return [render_prompt(self.messages(c, a.prompt), tokenizer, a.row.tools) for a in asked]

    def nearest_within(self, asked: Sequence[Asked], most: int) -> int:
        """So many nearest examples that the test rows' prompts are read in good time on this device."""
        tokenizer = self._both.prepared.tokenizer
        some = self.pool[:20]
        mean = sum(len(render_prompt(c.messages, tokenizer, c.tools)) for c in some) / len(some)
        room = NEAREST_TOKENS.get(self._both.device.kind, _ELSEWHERE) / len(asked)
        return max(0, min(most, len(self.pool), int(room / mean) - 1))  # the question itself is one more


def best_prompt(
    both: Both, untouched: KeptAnswers, asked: list[Asked], score: Score | None, say: Say, on_answers: OnAnswers
) -> Prompted | None:
    """Chosen by `score` of the answers to dev rows, by the loss of the expected ones without. None where the recipe wants none, or
    where nothing fits the model's positions."""
    most = both.recipe.evaluation.few_shot
    if not most:
        return None
    prompter = Prompter(both)
    nearest, untried = prompter.nearest_within(asked, most), ""
    if not nearest:
        untried = (
            "nearest examples were not tried: reading them anew for each question would take minutes on this device"
        )
        say(f"best prompt: {untried}")
    wanted = candidates(prompter.instruction, min(most, len(prompter.pool)), nearest)
    fitting = {c: ids for c in wanted if (ids := _fits(both, prompter.ids(c, asked)))}
    for c in wanted:
        if c not in fitting:
            say(f"best prompt: {c.label} does not fit the model's positions; left out")
    if not fitting:
        return None
    most_dev = MOST_DEV.get(both.device.kind, _MOST_DEV_ELSEWHERE)
    dev = questions_of(both.prepared, both.recipe, "dev", most_dev) if both.prepared.has_conversations("dev") else []
    if dev:
        tried = [_try(both, untouched, prompter, c, dev, score, on_answers) for c in fitting]
    else:
        say("best prompt: there are no dev rows to choose on; the one with the most diverse examples is taken unseen")
        some = [c for c in fitting if c.label != AS_IT_IS] or list(fitting)
        tried = [_Tried(candidate=max(some, key=lambda c: (c.examples == "diverse", c.shots)), good=0, tokens=0)]
    best = max(tried, key=lambda t: (t.good, -t.tokens))
    ids = fitting[best.candidate]
    return Prompted(ids=ids, about=_about(prompter, best, tried, len(dev), score, ids, untried))


def _fits(both: Both, ids: list[list[int]]) -> list[list[int]]:
    positions = describe_model(both.prepared.model_dir, both.recipe.model).max_positions
    return ids if max(map(len, ids)) + both.recipe.evaluation.max_new_tokens <= positions else []


def _try(
    both: Both,
    untouched: KeptAnswers,
    prompter: Prompter,
    c: Candidate,
    dev: list[Asked],
    score: Score | None,
    on_answers: OnAnswers,
) -> _Tried:
    ids = prompter.ids(c, dev)
    tokens = sum(map(len, ids)) / len(ids)
    if score is None:
        examples, rows = after_prompts(both.prepared, ids, dev)
        texts = Texts(examples, rows, both.capacity_tokens)
        nll_R = texts.nll(both.untouched())
        return _Tried(candidate=c, good=-math.fsum(nll_R) / math.fsum(texts.weights_R), tokens=tokens)
    how = Sampling(max_new_tokens=both.recipe.evaluation.max_new_tokens)
    given, _ = untouched.answer(f"dev, {c.label}", ids, how, on_answers)
    return _Tried(candidate=c, good=score(dev, answers_in(given, dev, both.prepared)), tokens=tokens)


def _about(
    prompter: Prompter,
    best: _Tried,
    tried: Sequence[_Tried],
    num_dev: int,
    score: Score | None,
    ids: list[list[int]],
    untried: str,
) -> dict[str, Any]:
    by = "mean score of the answers" if score is not None else "loss of the expected answers"
    how = f"the best of {len(tried)} on {num_dev} dev rows, by the {by}" if num_dev else "taken unseen: no dev rows"
    if num_dev and (ties := sum(t.good == best.good for t in tried)) > 1:
        how += f"; {ties} do equally well there, and the shortest is taken"
    return {
        "prompt_tokens": float(np.mean([len(i) for i in ids])),
        "prompt": {
            "label": best.candidate.label,
            "how": how,
            "instruction": prompter.instruction if best.candidate.instruction else None,
            "dev_rows": num_dev,
            "untried": untried,
            "by": "score" if score is not None else "loss",
            "tried": [
                {
                    "label": t.candidate.label,
                    "value": abs(t.good) if score is None else t.good,
                    "prompt_tokens": t.tokens,
                }
                for t in tried
                if num_dev
            ],
        },
    }
