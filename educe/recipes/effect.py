"""All that is asked of a run's two models, in an order that loads each no more often than it must."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from educe.chat.prompt import render_prompt
from educe.evaluate.drift import Texts
from educe.model.source import Say
from educe.recipes.answers import Asked, answers_in, drawn
from educe.recipes.both import Both
from educe.recipes.expected import after_prompts
from educe.recipes.forgetting import changed, remember
from educe.recipes.kept_answers import OnAnswers
from educe.recipes.prompting import Score, best_prompt
from educe.recipes.shifting import shift_of
from educe.seeds import derive, permute
from educe.types import Answer

LOSS_TOKENS = {"cpu": 6000}  # of prompts and expected answers, of each system
_ELSEWHERE = 262_144
BEST_PROMPT = "untouched, best prompt"  # `few_shot` in files, as it is called on screen


@dataclass(slots=True)
class Effect:
    """Answers, seconds and what else is known of each system; what was forgotten (`general`, and the answers to general questions);
    shift.json; `nll`, of free text, of the expected answers, row by row, and the tokens of each row."""

    answers: dict[str, list[Answer]] = field(default_factory=dict)
    seconds: dict[str, float | None] = field(default_factory=dict)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    general: dict[str, Any] = field(default_factory=dict)
    general_lines: list[dict[str, Any]] = field(default_factory=list)
    shift: dict[str, Any] = field(default_factory=dict)
    nll: dict[str, tuple[float, ...]] = field(default_factory=dict)
    tokens_R: tuple[float, ...] = ()


def effect_of(
    both: Both, asked: list[Asked], score: Score | None, general: Path | None, samples: int, say: Say,
    on_answers: OnAnswers,
) -> Effect:  # fmt: skip
    """`score` of answers to dev rows chooses the untouched model's prompt; None for free text. `general`: a text file in place of the
    package's own. `samples` answers to each test row, one after the other: drawn where they are several."""
    made, prepared, most = Effect(), both.prepared, both.recipe.evaluation.max_new_tokens
    prompts = {"untouched": [render_prompt(a.prompt, prepared.tokenizer, a.row.tools) for a in asked]}
    untouched = both.kept("untouched", say)
    prompted = best_prompt(both, untouched, asked, score, say, on_answers)
    if prompted is not None:
        prompts["few_shot"], made.about["few_shot"] = prompted.ids, prompted.about
        say(
            f"the untouched model's best prompt: {prompted.about['prompt']['label']} ({prompted.about['prompt']['how']})"
        )
    made.about["untouched"] = {"prompt_tokens": sum(map(len, prompts["untouched"])) / len(asked)}
    how, keys = drawn(asked, samples, most, both.recipe.train.seed)
    several = {name: [i for i in ids for _ in range(samples)] for name, ids in prompts.items()}
    given: dict[str, list[Answer]] = {}
    for name, ids in several.items():
        label = BEST_PROMPT if name == "few_shot" else name
        given[name], made.seconds[name] = untouched.answer(label, ids, how, on_answers, keys)
    texts = _expected(both, prompts, asked) if score is None else {}
    made.nll = {name: t.nll(both.untouched()) for name, t in texts.items()}
    known = remember(both, untouched, general, say, on_answers)
    tuned = both.kept("tuned", say)
    given["tuned"], made.seconds["tuned"] = tuned.answer("tuned", several["untouched"], how, on_answers, keys)
    if texts:
        made.nll["tuned"] = texts["untouched"].nll(both.tuned())
        made.tokens_R = tuple(texts["untouched"].weights_R)
    made.general, made.general_lines = changed(known, both, tuned, on_answers)
    made.shift = shift_of(both, prompts["untouched"], given["tuned"][::samples])
    both.drop()
    rows = [a for a in asked for _ in range(samples)]
    made.answers = {name: answers_in(a, rows, prepared) for name, a in given.items()}
    return made


def _expected(both: Both, prompts: dict[str, list[list[int]]], asked: Sequence[Asked]) -> dict[str, Texts]:
    """The expected answers of rows drawn by the seed behind each system's prompts: of as many rows as all systems have room for."""
    room = LOSS_TOKENS.get(both.device.kind, _ELSEWHERE)
    longest = [max(map(len, of)) for of in zip(*prompts.values(), strict=True)]
    some = rows_within(longest, room, both.recipe.train.seed)
    made = {
        name: after_prompts(both.prepared, [ids[i] for i in some], [asked[i] for i in some])
        for name, ids in prompts.items()
    }
    sizes = [max(e.ids_T.size for e in of) for of in zip(*(examples for examples, _ in made.values()), strict=True)]
    if len(sizes) < 2:
        return {}
    num = _num_within(sizes, room)  # answers take room too
    return {name: Texts(examples[:num], rows[:num], both.capacity_tokens) for name, (examples, rows) in made.items()}


def rows_within(sizes: Sequence[int], room: int, seed: int) -> list[int]:
    """Rows drawn by the seed, as many as fit; two at least, for an interval."""
    order: list[int] = permute(len(sizes), derive(seed, "expected")).tolist()
    return order[: _num_within([sizes[i] for i in order], room)]


def _num_within(sizes: Sequence[int], room: int) -> int:
    return max(2, sum(total <= room for total in itertools.accumulate(sizes)))
