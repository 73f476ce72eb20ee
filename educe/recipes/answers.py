"""The test rows as questions, and the answers of each system to them: the untouched model, the same with examples, the tuned one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from educe.chat.prompt import answer_in, expected_answer, render_prompt
from educe.config import Recipe
from educe.errors import EvalError
from educe.evaluate.few_shot import choose_examples, with_examples
from educe.evaluate.metrics.question import Question
from educe.files.atomic import make_private
from educe.files.hashes import cache_dir, hash_json
from educe.files.jsonl import read_jsonl, write_jsonl
from educe.files.run_dir import RunDir
from educe.model.describe import describe_model
from educe.model.device import Device
from educe.model.export import merged
from educe.model.load import CausalLM, load_model
from educe.model.source import Say
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


def questions_of(
    prepared: Prepared, recipe: Recipe, split: Literal["dev", "test"] = "test", most: int | None = None
) -> list[Asked]:
    """The rows of a split (at most `evaluation.max_rows` and `most`, drawn by the seed), each asked for its last answer."""
    rows = prepared.conversations(split)
    if not rows:
        fix = f"Give data.{split} a file, or a larger share, and train again."
        raise EvalError(1, "data", f"has no {split} rows.", fix)
    asked = []
    num = recipe.evaluation.max_rows if most is None else min(most, recipe.evaluation.max_rows)
    for i in sorted(permute(len(rows), derive(recipe.train.seed, split))[:num].tolist()):
        c = rows[i]
        k = max(j for j, m in enumerate(c.messages) if m.role == "assistant")
        row = replace(c, messages=c.messages[: k + 1])
        question = Question(
            row=f"{Path(c.source.file).name}:{c.source.line}",
            prompt=tuple({"role": m.role, "content": m.content} for m in c.messages[:k]),
            expected=expected_answer(row, prepared.tokenizer),
            calls=row.messages[-1].tool_calls,
        )
        asked.append(Asked(question=question, row=row))
    return asked


def answers_of(
    run: RunDir,
    recipe: Recipe,
    prepared: Prepared,
    weights: Path,
    device: Device,
    asked: list[Asked],
    say: Say,
    on_answers: OnAnswers,
    samples: int = 1,
) -> tuple[dict[str, list[Answer]], dict[str, float | None]]:
    """Answers and seconds of each system, `samples` answers to each row one after the other: drawn where they are several.

    Answers of the untouched model are kept in the cache: they are the same every time.
    """
    drawn = Drawn(samples=samples, keys=tuple(f"{a.question.row}#{i}" for a in asked for i in range(samples)))
    prompts = {"untouched": [render_prompt(a.prompt, prepared.tokenizer, a.row.tools) for a in asked]}
    shots = _few_shot_prompts(prepared, recipe, asked, say)
    if shots:
        prompts["few_shot"] = shots
    answers: dict[str, list[Answer]] = {}
    seconds: dict[str, float | None] = {}
    base: CausalLM | None = None
    added = prepared.tokenizer.new_tokens.values()
    for name, ids in prompts.items():
        cache = _cache_file(run, prepared, ids, recipe, device.dtype, samples)
        stored = read_jsonl(cache) if cache.is_file() else []
        if len(stored) == samples * len(ids) + 1:
            say(f"{name}: answered before on this machine; taken from the cache")
            answers[name], seconds[name] = [Answer(**line) for line in stored[1:]], stored[0]["seconds"]
            continue
        base = base if base is not None else load_model(prepared.model_dir, device, new_ids=added)
        answers[name], seconds[name] = _ask(base, prepared, ids, recipe, name, on_answers, drawn)
        make_private(cache.parent)
        write_jsonl(cache, [{"seconds": seconds[name]}, *map(asdict, answers[name])])
    del base
    tuned = merged(prepared.model_dir, weights, recipe.tuning, device, new_ids=added)
    answers["tuned"], seconds["tuned"] = _ask(tuned, prepared, prompts["untouched"], recipe, "tuned", on_answers, drawn)
    rows = [a for a in asked for _ in range(samples)]
    return {name: _answers_in(given, rows, prepared) for name, given in answers.items()}, seconds


def answered(
    model: CausalLM, prepared: Prepared, recipe: Recipe, asked: list[Asked], name: str, on_answers: OnAnswers
) -> list[Answer]:
    """One model's answers."""
    prompts = [render_prompt(a.prompt, prepared.tokenizer, a.row.tools) for a in asked]
    return _answers_in(_ask(model, prepared, prompts, recipe, name, on_answers)[0], asked, prepared)


def _few_shot_prompts(prepared: Prepared, recipe: Recipe, asked: list[Asked], say: Say) -> list[list[int]]:
    """Prompts with as many examples as fit the model's positions; none where not even one fits."""
    examples = choose_examples(prepared.conversations("shots"), recipe.evaluation.few_shot, recipe.train.seed)
    positions = describe_model(prepared.model_dir, recipe.model).max_positions
    for count in range(min(recipe.evaluation.few_shot, len(examples)), 0, -1):
        ids = [render_prompt(with_examples(a.prompt, examples[:count]), prepared.tokenizer, a.row.tools) for a in asked]
        if max(map(len, ids)) + recipe.evaluation.max_new_tokens <= positions:
            if count < recipe.evaluation.few_shot:
                say(f"few_shot: {count} examples fit the model's {positions} positions")
            return ids
    if recipe.evaluation.few_shot:
        say("few_shot: no example fits the model's positions; left out")
    return []


def _ask(
    model: CausalLM,
    prepared: Prepared,
    ids: list[list[int]],
    recipe: Recipe,
    name: str,
    on_answers: OnAnswers,
    drawn: Drawn | None = None,
) -> tuple[list[Answer], float]:
    began = time.perf_counter()
    sampler, most = LocalSampler(model, prepared.tokenizer), recipe.evaluation.max_new_tokens
    choose: Chooser = likeliest
    if drawn is not None and drawn.samples > 1:
        ids = [prompt for prompt in ids for _ in range(drawn.samples)]
        how = Sampling(max_new_tokens=most, temperature=TEMPERATURE, top_p=TOP_P, seed=recipe.train.seed)
        choose = chooser_of(how, drawn.keys)
    answers = sampler.answer(ids, most, lambda n: on_answers(name, n, len(ids)), choose=choose)
    return answers, time.perf_counter() - began


def _answers_in(answers: list[Answer], asked: list[Asked], prepared: Prepared) -> list[Answer]:
    return [replace(a, text=answer_in(a.text, q.row, prepared.tokenizer)) for a, q in zip(answers, asked, strict=True)]


def _cache_file(
    run: RunDir, prepared: Prepared, ids: list[list[int]], recipe: Recipe, dtype: str, samples: int
) -> Path:
    """Answers of the untouched model depend on its weights, the prompts, where and how answers end, how ids are read as text
    and the arithmetic, on nothing else."""
    provenance: dict[str, Any] = run.load(run.provenance)
    ends = [sorted(prepared.tokenizer.stop), recipe.evaluation.max_new_tokens, prepared.tokenizer.tokenizer_hash]
    if samples > 1:
        ends += [samples, TEMPERATURE, TOP_P, recipe.train.seed]
    key = hash_json([provenance["model"]["sha256"], ids, ends, dtype, provenance["packages"]])
    return cache_dir() / "answers" / f"{key[:24]}.jsonl"
