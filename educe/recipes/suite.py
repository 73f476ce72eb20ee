"""`educe eval --suite`: a public benchmark's prompts answered by the untouched and the tuned model, graded, compared."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from educe.chat.prompt import render_prompt
from educe.config import Recipe
from educe.data.finding import HUB, find_files
from educe.errors import DataError, EvalError, ModelError, UsageError
from educe.evaluate.ifeval.prompts import Task, read_tasks
from educe.evaluate.ifeval.scores import AFTER, BEFORE, line_of, regraded, score
from educe.evaluate.ifeval.words import need_packages
from educe.files.atomic import make_private, told, write_json
from educe.files.hashes import cache_dir, hash_file, hash_json
from educe.files.journal import Journal
from educe.files.jsonl import read_jsonl, write_jsonl
from educe.files.locks import one_at_a_time
from educe.files.run_dir import RunDir
from educe.model.describe import describe_model
from educe.model.device import CLOSE_OTHERS, told_of_memory
from educe.model.export import merged
from educe.model.load import CausalLM, load_model
from educe.model.source import Say
from educe.recipes.answers import OnAnswers
from educe.recipes.eval import answering_device, data_of, final_weights, recipe_of
from educe.recipes.prepare import Prepared
from educe.sample.local import LocalSampler
from educe.seeds import derive, permute
from educe.types import Answer, Message, Prompt, Sampling

SUITES = ("ifeval",)
HOME, LICENCE = "google/IFEval", "Apache-2.0"
MOST_TOKENS = 1280  # as lm-evaluation-harness answers these prompts
ABOUT = ("suite", "file", "sha256", "licence", "num_in_file", "max_new_tokens", "packages")
CHUNK = 32  # prompts between two writes to disk: what a killed process loses


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """Which suite; its prompts' file (None: fetched from the Hub), how many of them (None: all), where answers are cut."""

    suite: str
    file: Path | None = None
    rows: int | None = None
    max_new_tokens: int = MOST_TOKENS

    def __post_init__(self) -> None:
        if self.suite not in SUITES:
            raise UsageError(101, "--suite", f"{self.suite!r} is not a suite.", f"One of {', '.join(SUITES)}.")


def suite_scores(run: RunDir, wish: Wish, say: Say, on_answers: OnAnswers) -> dict[str, Any]:
    """Answer, grade, compare; writes suites/NAME/*.jsonl and suites/NAME.json and returns the scores."""
    need_packages()
    recipe = recipe_of(run)
    file = wish.file if wish.file is not None else _fetched(say)
    tasks = read_tasks(file)
    order = permute(len(tasks), derive(recipe.train.seed, "suite", wish.suite))
    chosen = [tasks[i] for i in sorted(order[: wish.rows].tolist())]
    if len(chosen) < 2:
        raise EvalError(101, str(file), "holds one prompt: nothing can be compared.", "Give a file with more.")
    answers, seconds, most = _answers(run, recipe, chosen, wish.max_new_tokens, say, on_answers)
    about = {
        "suite": wish.suite,
        "file": str(file),
        "sha256": hash_file(file),
        "licence": LICENCE if wish.file is None else None,
        "num_in_file": len(tasks),
        "max_new_tokens": most,
        "packages": {p: version(p) for p in ("langdetect", "nltk")},
    }
    lines = {n: [line_of(t, a) for t, a in zip(chosen, given, strict=True)] for n, given in answers.items()}
    return _written(run, wish.suite, about, lines, seconds)


def regrade_suite(run: RunDir, wish: Wish) -> dict[str, Any]:
    """Stored answers under the verifiers as they are now; no model is asked, no prompts' file is needed."""
    need_packages()
    place = run.suites / wish.suite
    stored = {n: run.load(place / f"{n}.jsonl") for n in (BEFORE, AFTER) if (place / f"{n}.jsonl").is_file()}
    keys = {n: [line.get("key") for line in lines] for n, lines in stored.items()}
    if AFTER not in stored or any(k != keys[AFTER] for k in keys.values()):
        fix = f"Run `educe eval --suite {wish.suite}` first."
        raise EvalError(2, str(place), "holds no answers of the tuned model, or answers to different prompts.", fix)
    lines = {n: [regraded(x, f"{place / n}.jsonl:{k}") for k, x in enumerate(s, 1)] for n, s in stored.items()}
    before = run.load(run.suites / f"{wish.suite}.json")
    about = {k: before[k] for k in ABOUT}
    return _written(run, wish.suite, about, lines, {n: before["systems"].get(n, {}).get("seconds") for n in lines})


def _written(
    run: RunDir, suite: str, about: dict[str, Any], lines: dict[str, list[dict[str, Any]]], seconds: dict[str, Any]
) -> dict[str, Any]:
    scores = {**about, **score(lines, seconds)}
    place = run.suites / suite
    with told(place):
        make_private(place)
        for name, mine in lines.items():
            write_jsonl(place / f"{name}.jsonl", mine)
    write_json(run.suites / f"{suite}.json", scores)
    return scores


def _fetched(say: Say) -> Path:
    say(f"IFEval's prompts: {HOME} on the Hub, {LICENCE}")
    try:
        (file,) = find_files(f"{HUB}{HOME}/ifeval_input_data.jsonl")
    except DataError as e:
        fix = "Go online once, or give --suite-file: input_data.jsonl of google-research/instruction_following_eval."
        raise EvalError(3, HOME, e.found, fix) from e
    return file


def _answers(
    run: RunDir, recipe: Recipe, tasks: list[Task], most: int, say: Say, on_answers: OnAnswers
) -> tuple[dict[str, list[Answer]], dict[str, float | None], int]:
    """Answers and seconds of both models, and where answers were cut."""
    weights = final_weights(run, say)
    prepared = data_of(run, recipe, say)
    device = answering_device(recipe, run, say)
    prompts = [Prompt(key=t.key, messages=(Message(role="user", content=t.prompt),)) for t in tasks]
    most, ids = room_for(prepared, recipe, prompts, most, say)
    provenance = run.load(run.provenance)
    ends = [sorted(prepared.tokenizer.stop), most, CHUNK, prepared.tokenizer.tokenizer_hash]
    key = [provenance["model"]["sha256"], ids, ends, device.dtype, provenance["packages"]]
    added = prepared.tokenizer.new_tokens.values()
    loads: dict[str, tuple[list[Any], Callable[[], CausalLM]]] = {
        BEFORE: (key, lambda: load_model(prepared.model_dir, device, new_ids=added)),
        AFTER: (
            [*key, hash_file(weights), recipe.tuning.model_dump()],
            lambda: merged(prepared.model_dir, weights, recipe.tuning, device, new_ids=added),
        ),
    }
    answers: dict[str, list[Answer]] = {}
    seconds: dict[str, float | None] = {}
    with told_of_memory("evaluating", CLOSE_OTHERS):
        for name, (of, load) in loads.items():
            kept = cache_dir() / "answers" / f"{hash_json(of)[:24]}.jsonl"
            answers[name], seconds[name] = _asked(kept, load, prepared, prompts, most, name, say, on_answers)
    return answers, seconds, most


def room_for(
    prepared: Prepared, recipe: Recipe, prompts: list[Prompt], most: int, say: Say
) -> tuple[int, list[list[int]]]:
    """How long answers may be, so that the longest prompt leaves room for them, and the prompts' ids."""
    ids = [render_prompt(p.messages, prepared.tokenizer) for p in prompts]
    positions = describe_model(prepared.model_dir, recipe.model).max_positions
    room = positions - max(map(len, ids))
    if room < 1:
        found = f"has {positions} positions, and a prompt fills them."
        raise ModelError(201, recipe.model, found, "Take a model with more, or shorter prompts.")
    if room < most:
        say(f"answers are cut after {room} tokens, not {most}: the model has {positions} positions")
    return min(room, most), ids


def _asked(
    kept: Path,
    load: Callable[[], CausalLM],
    prepared: Prepared,
    prompts: list[Prompt],
    most: int,
    name: str,
    say: Say,
    on_answers: OnAnswers,
) -> tuple[list[Answer], float]:
    """One model's answers, kept in the cache as they come: a process that is killed goes on where it was, and another one that asks
    the same waits and takes them."""

    def waits() -> None:
        say(f"{name}: another process asks the same; waiting for that to end")

    with one_at_a_time(kept.with_suffix(".lock"), waits):
        return _asked_alone(kept, load, prepared, prompts, most, name, say, on_answers)


def _asked_alone(
    kept: Path,
    load: Callable[[], CausalLM],
    prepared: Prepared,
    prompts: list[Prompt],
    most: int,
    name: str,
    say: Say,
    on_answers: OnAnswers,
) -> tuple[list[Answer], float]:
    fields = {"key", "seconds", "answer"}
    journal = Journal(kept, say)
    journal.begin(lambda line: True, keys=fields)
    stored = {line["key"]: line for line in read_jsonl(kept)}
    chunks = [prompts[k : k + CHUNK] for k in range(0, len(prompts), CHUNK)]
    todo = [chunk for chunk in chunks if any(p.key not in stored for p in chunk)]
    done = len(prompts) - sum(map(len, todo))
    if done:
        say(f"{name}: {done} of {len(prompts)} answered before on this machine; taken from the cache")
    sampler = LocalSampler(load(), prepared.tokenizer, name) if todo else None
    for chunk in todo:
        assert sampler is not None
        began = time.perf_counter()
        given = sampler.sample(chunk, Sampling(max_new_tokens=most), _after(done, name, len(prompts), on_answers))
        took = (time.perf_counter() - began) / len(chunk)
        for p, a in zip(chunk, given, strict=True):
            stored[p.key] = {"key": p.key, "seconds": took, "answer": asdict(a)}
            journal.append(stored[p.key])
        done += len(chunk)
    journal.settle(must=False)
    return [Answer(**stored[p.key]["answer"]) for p in prompts], sum(stored[p.key]["seconds"] for p in prompts)


def _after(done: int, name: str, total: int, on_answers: OnAnswers) -> Callable[[int], None]:
    return lambda num: on_answers(name, done + num, total)
