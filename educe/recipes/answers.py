"""Rows as questions, and a model's answers to them; those of the untouched model are remembered."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from educe.chat.prompt import answer_in, expected_answer, render_prompt
from educe.config import Recipe
from educe.errors import EvalError
from educe.evaluate.metrics.question import Question
from educe.files.atomic import make_private
from educe.files.hashes import cache_dir, hash_json
from educe.files.jsonl import read_jsonl, write_jsonl
from educe.files.run_dir import RunDir
from educe.model.device import Device
from educe.model.load import CausalLM
from educe.model.source import Say
from educe.recipes.arithmetic import arithmetic_of
from educe.recipes.both import Both
from educe.recipes.naming import row_names
from educe.recipes.prepare import Prepared
from educe.sample.draw import Chooser, chooser_of, likeliest
from educe.sample.local import LocalSampler
from educe.seeds import derive, permute
from educe.types import Answer, Conversation, Message, Sampling

OnAnswers = Callable[[str, int, int], None]
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """How many answers to each row, and what names each of them for its draws."""

    samples: int
    keys: tuple[str, ...]
    seed: int


def questions_of(
    prepared: Prepared,
    recipe: Recipe,
    split: Literal["dev", "test"] = "test",
    most: int | None = None,
    among: Callable[[Conversation], bool] = lambda _: True,
) -> list[Asked]:
    """The rows of a split (those `among` which; at most `evaluation.max_rows` and `most`, drawn by the seed), each asked for its last
    answer."""
    rows = [c for c in prepared.conversations(split) if among(c)]
    if not rows:
        fix = f"Give data.{split} a file, or a larger share, and train again."
        raise EvalError(1, "data", f"has no {split} rows.", fix)
    asked, names = [], row_names([c.source for c in rows])
    num = recipe.evaluation.max_rows if most is None else min(most, recipe.evaluation.max_rows)
    for i in sorted(permute(len(rows), derive(recipe.train.seed, split))[:num].tolist()):
        c = rows[i]
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


def kept_answers(
    run: RunDir,
    both: Both,
    ids: list[list[int]],
    name: str,
    max_new_tokens: int,
    say: Say,
    on_answers: OnAnswers,
    drawn: Drawn | None = None,
) -> tuple[list[Answer], float]:
    """The untouched model's answers to prompts of ids, and the seconds they took: they are the same every time, and kept in the cache.
    It is loaded only where it is asked."""
    cache = _cache_file(run, both, ids, max_new_tokens, drawn)
    stored = read_jsonl(cache) if cache.is_file() else []
    if len(stored) == len(ids) * (drawn.samples if drawn is not None else 1) + 1:
        say(f"{name}: answered before on this machine; taken from the cache")
        return [Answer(**(line | {"ids": tuple(line.get("ids", ()))})) for line in stored[1:]], stored[0]["seconds"]
    answers, seconds = ask(both.untouched(), both.prepared, ids, max_new_tokens, name, on_answers, drawn)
    make_private(cache.parent)
    write_jsonl(cache, [{"seconds": seconds}, *map(asdict, answers)])
    return answers, seconds


def answered(
    model: CausalLM, prepared: Prepared, recipe: Recipe, asked: list[Asked], name: str, on_answers: OnAnswers
) -> list[Answer]:
    """One model's answers."""
    prompts = [render_prompt(a.prompt, prepared.tokenizer, a.row.tools) for a in asked]
    given, _ = ask(model, prepared, prompts, recipe.evaluation.max_new_tokens, name, on_answers)
    return answers_in(given, asked, prepared)


def ask(
    model: CausalLM,
    prepared: Prepared,
    ids: list[list[int]],
    max_new_tokens: int,
    name: str,
    on_answers: OnAnswers,
    drawn: Drawn | None = None,
) -> tuple[list[Answer], float]:
    """Answers to prompts of ids, and seconds: the likeliest, or several drawn to each, one after the other."""
    began = time.perf_counter()
    sampler = LocalSampler(model, prepared.tokenizer)
    choose: Chooser = likeliest
    if drawn is not None and drawn.samples > 1:
        ids = [prompt for prompt in ids for _ in range(drawn.samples)]
        how = Sampling(max_new_tokens=max_new_tokens, temperature=TEMPERATURE, top_p=TOP_P, seed=drawn.seed)
        choose = chooser_of(how, drawn.keys)
    answers = sampler.answer(ids, max_new_tokens, lambda n: on_answers(name, n, len(ids)), choose=choose)
    return answers, time.perf_counter() - began


def answers_in(answers: list[Answer], asked: list[Asked], prepared: Prepared) -> list[Answer]:
    """Without what the template makes each answer begin with."""
    return [replace(a, text=answer_in(a.text, q.row, prepared.tokenizer)) for a, q in zip(answers, asked, strict=True)]


def _cache_file(run: RunDir, both: Both, ids: list[list[int]], max_new_tokens: int, drawn: Drawn | None) -> Path:
    """Answers of the untouched model depend on its weights, the prompts, where and how answers end, how ids are read as text,
    how they are drawn and the arithmetic, on nothing else."""
    tokenizer = both.prepared.tokenizer
    ends = [sorted(tokenizer.stop), max_new_tokens, tokenizer.tokenizer_hash]
    if drawn is not None and drawn.samples > 1:
        ends += [drawn.samples, TEMPERATURE, TOP_P, drawn.seed]
    return cache_dir() / "answers" / f"{base_key(run, both.device, [ids, ends])}.jsonl"


def base_key(run: RunDir, device: Device, asked: Any) -> str:
    """Of what the run's untouched model says to `asked`, in the device's arithmetic."""
    provenance: dict[str, Any] = run.load(run.provenance)
    return hash_json([provenance["model"]["sha256"], *asked, *arithmetic_of(device)])[:24]
