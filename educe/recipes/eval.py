"""`educe eval`: the test rows answered before and after, graded, compared. Stored answers can be graded again."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from educe.chat.render import render_prompt
from educe.chat.tokens import ChatTokenizer
from educe.config import Recipe
from educe.errors import EvalError, MachineError, RunError
from educe.evaluate.compare import SYSTEMS, Question, grade, regrade, score
from educe.evaluate.few_shot import choose_examples, with_examples
from educe.files.atomic import told, write_json
from educe.files.hashes import cache_dir, hash_json
from educe.files.jsonl import read_jsonl, write_jsonl
from educe.files.run_dir import RunDir
from educe.model.device import Device
from educe.model.export import merged
from educe.model.load import CausalLM, load_model
from educe.model.source import Say
from educe.recipes.machine import device_of, device_of_run
from educe.recipes.prepare import Prepared, prepare
from educe.sample.local import LocalSampler
from educe.seeds import derive, permute
from educe.training.checkpoint import WEIGHTS, newest_checkpoint
from educe.types import Answer

OnAnswers = Callable[[str, int, int], None]


def recipe_of(run: RunDir) -> Recipe:
    """The resolved recipe of a run."""
    return Recipe.model_validate(run.load(run.resolved)["recipe"])


def final_weights(run: RunDir, say: Say) -> Path:
    """The finished run's weights file. Raises `RunError` for a run that is not at its end."""
    found = newest_checkpoint(run.checkpoints, say)
    if found is None or not found[1]["finished"]:
        raise RunError(
            2, str(run.path), "is not trained to its end.", f"Run `educe train {run.recipe}` again: it goes on."
        )
    return found[0] / WEIGHTS


def answering_device(recipe: Recipe, run: RunDir, say: Say) -> Device:
    """The run's own device and arithmetic; another one, said, where this machine lacks it."""
    try:
        return device_of_run(recipe, run)
    except MachineError as e:
        device = device_of(recipe)
        say(
            f"{e.found} Answering on {device.kind}, {device.dtype}: answers may differ from those of the training machine"
        )
        return device


def evaluate(run: RunDir, say: Say, on_answers: OnAnswers, *, regrade_only: bool = False) -> dict[str, Any]:
    """Answer, grade, compare; writes answers/ and scores.json and returns the scores."""
    recipe = recipe_of(run)
    metric = recipe.evaluation.metric.kind
    if regrade_only:
        graded = {n: regrade(_stored(run, n), metric) for n in SYSTEMS if (run.answers / f"{n}.jsonl").is_file()}
        if "tuned" not in graded:
            raise EvalError(2, str(run.answers), "holds no answers of the tuned model.", "Run `educe eval` first.")
        old = run.load(run.scores)["systems"] if run.scores.is_file() else {}
        seconds = {n: old.get(n, {}).get("seconds") for n in graded}
    else:
        graded, seconds = _answered(run, recipe, metric, say, on_answers)
    dev = [line["loss"] for line in run.load(run.metrics) if line["kind"] == "dev"]
    scores = score(graded, metric, seconds, dev_loss=(dev[0], dev[-1]) if len(dev) > 1 else None)
    with told(run.answers):
        run.answers.mkdir(exist_ok=True)
        for name, lines in graded.items():
            write_jsonl(run.answers / f"{name}.jsonl", lines)
    write_json(run.scores, scores)
    return scores


def _stored(run: RunDir, name: str) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = run.load(run.answers / f"{name}.jsonl")
    return lines


def _answered(
    run: RunDir, recipe: Recipe, metric: str, say: Say, on_answers: OnAnswers
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, float | None]]:
    weights = final_weights(run, say)
    prepared = prepare(recipe, say)
    if prepared.key != run.load(run.provenance)["prepared"]:
        raise EvalError(
            2, str(run.path), "was trained on other data than the files hold now.", "Restore the data files."
        )
    rows = prepared.conversations("test")
    if not rows:
        raise EvalError(
            1, recipe.data.train, "has no test rows.", "Give data.test a file, or a larger share, and train again."
        )
    chosen = permute(len(rows), derive(recipe.train.seed, "test"))[: recipe.evaluation.max_rows]
    turns = [
        (c, max(k for k, m in enumerate(c.messages) if m.role == "assistant"))
        for c in (rows[i] for i in sorted(chosen))
    ]
    questions = [
        Question(
            row=f"{Path(c.source.file).name}:{c.source.line}",
            prompt=tuple({"role": m.role, "content": m.content} for m in c.messages[:k]),
            expected=c.messages[k].content,
        )
        for c, k in turns
    ]
    asked = {"untouched": [c.messages[:k] for c, k in turns]}
    if recipe.evaluation.few_shot:
        shots = choose_examples(prepared.conversations("shots"), recipe.evaluation.few_shot, recipe.train.seed)
        asked["few_shot"] = [with_examples(p, shots) for p in asked["untouched"]]
    device = answering_device(recipe, run, say)
    answers: dict[str, list[Answer]] = {}
    seconds: dict[str, float | None] = {}
    base: CausalLM | None = None
    for name, prompts in asked.items():
        ids = [render_prompt(p, prepared.tokenizer) for p in prompts]
        cache = _cache_file(run.load(run.provenance), prepared.tokenizer, ids, recipe, device.dtype)
        if cache.is_file():
            say(f"{name}: answered before on this machine; taken from the cache")
            stored = read_jsonl(cache)
            answers[name] = [Answer(**line) for line in stored[1:]]
            seconds[name] = stored[0]["seconds"]
            continue
        if base is None:
            base = load_model(prepared.model_dir, device)
        answers[name], seconds[name] = _ask(base, prepared, ids, recipe, name, on_answers)
        with told(cache):
            cache.parent.mkdir(parents=True, exist_ok=True)
            plain = [{"text": a.text, "num_tokens": a.num_tokens, "stopped": a.stopped} for a in answers[name]]
            write_jsonl(cache, [{"seconds": seconds[name]}, *plain])
    del base
    tuned = merged(prepared.model_dir, weights, recipe.tuning, device)
    ids = [render_prompt(p, prepared.tokenizer) for p in asked["untouched"]]
    answers["tuned"], seconds["tuned"] = _ask(tuned, prepared, ids, recipe, "tuned", on_answers)
    return {n: grade(questions, a, metric) for n, a in answers.items()}, seconds


def _ask(
    model: CausalLM, prepared: Prepared, ids: list[list[int]], recipe: Recipe, name: str, on_answers: OnAnswers
) -> tuple[list[Answer], float]:
    began = time.perf_counter()
    sampler = LocalSampler(model, prepared.tokenizer)
    total = len(ids)
    answers = sampler.answer(ids, recipe.evaluation.max_new_tokens, lambda n: on_answers(name, n, total))
    return answers, time.perf_counter() - began


def _cache_file(
    provenance: dict[str, Any], tokenizer: ChatTokenizer, ids: list[list[int]], recipe: Recipe, dtype: str
) -> Path:
    """Answers of the untouched model depend on its weights, the prompts, where and how answers end, how ids are read as text
    and the arithmetic, on nothing else."""
    ends = [sorted(tokenizer.stop), recipe.evaluation.max_new_tokens, tokenizer.tokenizer_hash]
    key = hash_json([provenance["model"]["sha256"], ids, ends, dtype, provenance["packages"]])
    return cache_dir() / "answers" / f"{key[:24]}.jsonl"
