"""What a run forgot, measured: general text, general questions, the task's dev rows, under the untouched model and the tuned one.

What the untouched model says is kept in the cache: it is the same every time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from educe.chat.prompt import answer_to, render_prompt
from educe.chat.tokens import ChatTokenizer
from educe.config import Recipe
from educe.errors import ChatError
from educe.evaluate.drift import Texts
from educe.evaluate.forgetting import Said, TaskChange, as_scores, prompt_change, text_change
from educe.evaluate.general import own_passages, passage_examples, read_passages
from educe.evaluate.general_prompts import MOST_NEW_TOKENS, GeneralPrompt, is_right, own_prompts
from educe.files.hashes import cache_dir, hash_json
from educe.model.describe import describe_model
from educe.model.source import Say
from educe.recipes.both import Both
from educe.recipes.kept_answers import KeptAnswers, OnAnswers
from educe.recipes.prepare import Prepared
from educe.seeds import derive, permute
from educe.types import Answer, Example, Sampling

QUESTIONS = Sampling(max_new_tokens=MOST_NEW_TOKENS)
TASK_TOKENS = 2048  # of dev rows: their KL is a mean, and needs no more


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What is measured, and what the untouched model says of it. `own`: its own answers to the general questions."""

    text: Texts
    bytes_R: tuple[float, ...]
    file: str | None
    prompts: list[GeneralPrompt]
    ids: list[list[int]]
    answers: list[Answer]
    own: Texts
    task: Texts | None
    seconds: float


def remember(both: Both, untouched: KeptAnswers, general: Path | None, say: Say, on_answers: OnAnswers) -> Known:
    """Ask the untouched model. `general`: a text file in place of the package's own."""
    began, prepared = time.perf_counter(), both.prepared
    text, bytes_R = general_texts(prepared, both.recipe, general, packs=both.packs)
    prompts, ids = general_questions(prepared.tokenizer, say)
    answers, _ = untouched.answer("untouched, general questions", ids, QUESTIONS, on_answers)
    own = Texts([_said(i, a.ids) for i, a in zip(ids, answers, strict=True)], range(len(ids)), both.capacity_tokens)
    task = _task(both)
    for texts in (text, own, *((task,) if task is not None else ())):
        file = cache_dir() / "general" / f"{hash_json([untouched.of, texts.key])[:24]}.safetensors"
        if not texts.read(file):
            texts.remember(both.untouched())
            texts.write(file)
    return Known(
        text=text,
        bytes_R=bytes_R,
        file=general.name if general is not None else None,
        prompts=prompts,
        ids=ids,
        answers=answers,
        own=own,
        task=task,
        seconds=time.perf_counter() - began,
    )


def changed(
    known: Known, both: Both, tuned: KeptAnswers, on_answers: OnAnswers
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ask the tuned model: `general` of scores.json, and the answers to the general questions before and after."""
    began = time.perf_counter()
    after, _ = tuned.answer("tuned, general questions", known.ids, QUESTIONS, on_answers)
    model = both.tuned()
    text, own = known.text.drift(model), known.own.drift(model)
    answers = [heard(known.prompts, given, both.prepared.tokenizer) for given in (known.answers, after)]
    before_said, after_said = ([_judged(p, a) for p, a in zip(known.prompts, of, strict=True)] for of in answers)
    task = known.task
    found = as_scores(
        text_change(known.text.base_nll_R, text.nll_R, text.kl_R, known.bytes_R, sum(known.text.weights_R), known.file),
        prompt_change([p.kind for p in known.prompts], before_said, after_said, _mean(own.kl_R, known.own)),
        _task_change(task, task.drift(model).kl_R) if task is not None else None,
        known.seconds + time.perf_counter() - began,
    )
    lines = [
        {
            "key": p.key,
            "prompt": [{"role": m.role, "content": m.content} for m in p.messages],
            "before": {"answer": b.text, "stopped": b.stopped, "correct": before_said[k].right},
            "after": {"answer": a.text, "stopped": a.stopped, "correct": after_said[k].right},
        }
        for k, (p, b, a) in enumerate(zip(known.prompts, *answers, strict=True))
    ]
    return found, lines


def general_texts(
    prepared: Prepared, recipe: Recipe, general: Path | None, *, packs: bool
) -> tuple[Texts, tuple[float, ...]]:
    """The passages of a file, or of the package, to be measured, and the bytes of each."""
    passages = read_passages(general) if general is not None else own_passages()
    room = min(recipe.train.micro_batch_tokens, describe_model(prepared.model_dir, recipe.model).max_positions)
    examples, rows = passage_examples(passages, prepared.tokenizer, room)
    made = Texts(examples, rows, recipe.train.micro_batch_tokens if packs else 1)
    return made, tuple(float(len(p.encode())) for p in passages)


def general_questions(tokenizer: ChatTokenizer, say: Say) -> tuple[list[GeneralPrompt], list[list[int]]]:
    """The general questions that the model's template takes, and their ids."""
    taken, ids = [], []
    for p in own_prompts():
        try:
            ids.append(render_prompt(p.messages, tokenizer))
            taken.append(p)
        except ChatError as e:
            say(f"general question {p.key} is left out: {e.found}")
    return taken, ids


def _said(prompt: Sequence[int], answer: Sequence[int]) -> Example:
    ids = np.array([*prompt, *answer], np.int32)
    weights = np.zeros(ids.size, np.float32)
    weights[len(prompt) :] = 1
    return Example(ids_T=ids, weights_T=weights)


def _task(both: Both) -> Texts | None:
    """Dev rows, drawn by the seed, of about so many tokens; None without any."""
    store = both.prepared.store("dev")
    if not len(store):
        return None
    rows, which = np.unique(store.rows, return_inverse=True)
    order = permute(rows.size, derive(both.recipe.train.seed, "forgetting"))
    ends = np.cumsum(np.bincount(which, store.lengths)[order])
    chosen = np.sort(rows[order[: max(1, int((ends <= TASK_TOKENS).sum()))]])
    examples = np.flatnonzero(np.isin(store.rows, chosen))
    numbers = np.searchsorted(chosen, store.rows[examples]).tolist()
    return Texts([store[int(i)] for i in examples], numbers, both.capacity_tokens)


def heard(prompts: Sequence[GeneralPrompt], answers: Sequence[Answer], tokenizer: ChatTokenizer) -> list[Answer]:
    """What is graded: without what the template makes each answer begin with."""
    return [replace(a, text=answer_to(a.text, p.messages, tokenizer)) for p, a in zip(prompts, answers, strict=True)]


def _judged(prompt: GeneralPrompt, a: Answer) -> Said:
    right = is_right(prompt, a.text)
    return Said(right=right, ended=a.stopped, empty=not a.text.strip(), num_tokens=a.num_tokens)


def _mean(sums_R: Sequence[float], texts: Texts) -> float:
    return math.fsum(sums_R) / math.fsum(texts.weights_R)


def _task_change(texts: Texts, kl_R: Sequence[float]) -> TaskChange:
    return TaskChange(rows=texts.num_rows, tokens=texts.num_predicted, kl=_mean(kl_R, texts))
