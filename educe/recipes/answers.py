"""Rows as questions, and a model's answers to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from educe.chat.prompt import answer_in, expected_answer, render_prompt
from educe.config import Recipe
from educe.errors import EvalError
from educe.evaluate.metrics.question import Question
from educe.model.load import CausalLM
from educe.recipes.kept_answers import OnAnswers
from educe.recipes.naming import row_names
from educe.recipes.prepare import Prepared
from educe.sample.local import LocalSampler
from educe.seeds import derive, permute
from educe.types import Answer, Conversation, Message, Sampling, Source

# Several answers to a row must differ, and pass@k wants them to: Chen et al. 2021, figure 5 (k up to 100), nucleus as there.
TEMPERATURE, TOP_P = 0.8, 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A question, and the row it is from up to the answer that is expected."""

    question: Question
    row: Conversation

    @property
    def prompt(self) -> tuple[Message, ...]:
        return self.row.messages[:-1]


def drawn(asked: Sequence[Asked], samples: int, max_new_tokens: int, seed: int) -> tuple[Sampling, list[str]]:
    """How `samples` answers to each question are drawn, and what names each for its draws; one is the likeliest."""
    keys = [f"{a.question.row}#{i}" for a in asked for i in range(samples)]
    if samples == 1:
        return Sampling(max_new_tokens=max_new_tokens), keys
    return Sampling(max_new_tokens=max_new_tokens, temperature=TEMPERATURE, top_p=TOP_P, seed=seed), keys


def questions_of(
    prepared: Prepared,
    recipe: Recipe,
    split: Literal["dev", "test"] = "test",
    most: int | None = None,
    among: Callable[[Source], bool] = lambda _: True,
) -> list[Asked]:
    """The rows of a split (`among` whose places they are; at most `evaluation.max_rows` and `most`, drawn by the seed), each asked
    for its last answer."""
    sources = prepared.sources(split)
    kept = [k for k, source in enumerate(sources) if among(source)]
    if not kept:
        fix = f"Give data.{split} a file, or a larger share, and train again."
        raise EvalError(1, "data", f"has no {split} rows.", fix)
    asked, names = [], row_names([sources[k] for k in kept])
    num = recipe.evaluation.max_rows if most is None else min(most, recipe.evaluation.max_rows)
    chosen = sorted(permute(len(kept), derive(recipe.train.seed, split))[:num].tolist())
    rows = prepared.conversations(split, {kept[i] for i in chosen})
    for i, c in zip(chosen, rows, strict=True):
        k = max(j for j, m in enumerate(c.messages) if m.role == "assistant")
        row = replace(c, messages=c.messages[: k + 1])
        question = Question(
            row=names[i],
            prompt=tuple({"role": m.role, "content": m.content} for m in c.messages[:k]),
            expected=expected_answer(row, prepared.tokenizer),
            calls=row.messages[-1].tool_calls,
        )
        asked.append(Asked(question=question, row=row))
    return asked


def answered(
    model: CausalLM, prepared: Prepared, recipe: Recipe, asked: list[Asked], name: str, on_answers: OnAnswers
) -> list[Answer]:
    """The answers of a model that is asked once, which are not kept."""
    prompts = [render_prompt(a.prompt, prepared.tokenizer, a.row.tools) for a in asked]
    given = LocalSampler(model, prepared.tokenizer).answer(
        prompts, recipe.evaluation.max_new_tokens, lambda n: on_answers(name, n, len(prompts))
    )
    return answers_in(given, asked, prepared)


def answers_in(answers: list[Answer], asked: list[Asked], prepared: Prepared) -> list[Answer]:
    """Without what the template makes each answer begin with."""
    return [replace(a, text=answer_in(a.text, q.row, prepared.tokenizer)) for a, q in zip(answers, asked, strict=True)]
