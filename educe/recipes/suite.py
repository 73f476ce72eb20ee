"""`educe eval --suite`: a public benchmark's prompts answered by the untouched and the tuned model, graded, compared."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from educe.data.finding import HUB, find_files
from educe.errors import DataError, EvalError, UsageError
from educe.evaluate.ifeval.prompts import Task, read_tasks
from educe.evaluate.ifeval.scores import AFTER, BEFORE, line_of, regraded, score
from educe.evaluate.ifeval.words import need_packages
from educe.files.atomic import make_private, told, write_json
from educe.files.hashes import hash_file
from educe.files.jsonl import write_jsonl
from educe.files.run_dir import RunDir
from educe.model.device import CLOSE_OTHERS, told_of_memory
from educe.model.source import Say
from educe.recipes.eval import recipe_of
from educe.recipes.kept_answers import OnAnswers
from educe.recipes.kept_samplers import samplers_of
from educe.seeds import derive, permute
from educe.types import Answer, Message, Prompt, Sampling

SUITES = ("ifeval",)
HOME, LICENCE = "google/IFEval", "Apache-2.0"
MOST_TOKENS = 1280  # as lm-evaluation-harness answers these prompts
ABOUT = ("suite", "file", "sha256", "licence", "num_in_file", "max_new_tokens", "packages")


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


def wish_of(suite: str, file: str | Path | None, rows: int | None, max_new_tokens: int | None) -> Wish:
    """As a user gives it: what is None is the default."""
    place = Path(file) if file is not None else None
    return Wish(suite=suite, file=place, rows=rows, max_new_tokens=max_new_tokens or MOST_TOKENS)


def suite_scores(run: RunDir, wish: Wish, say: Say, on_answers: OnAnswers) -> dict[str, Any]:
    """Answer, grade, compare; writes suites/NAME/*.jsonl and suites/NAME.json and returns the scores."""
    recipe = recipe_of(run)
    file, num_in_file, chosen = tasks_of(wish, recipe.train.seed, say)
    answers, seconds, most = _answers(run, chosen, wish.max_new_tokens, say, on_answers)
    lines = {n: [line_of(t, a) for t, a in zip(chosen, given, strict=True)] for n, given in answers.items()}
    return _written(run, wish.suite, about(wish, file, num_in_file, most), lines, seconds)


def tasks_of(wish: Wish, seed: int, say: Say) -> tuple[Path, int, list[Task]]:
    """The prompts' file, how many it holds, and those that are asked, drawn by the seed. Raises `EvalError`."""
    need_packages()
    file = wish.file if wish.file is not None else _fetched(say)
    tasks = read_tasks(file)
    order = permute(len(tasks), derive(seed, "suite", wish.suite))
    chosen = [tasks[i] for i in sorted(order[: wish.rows].tolist())]
    if len(chosen) < 2:
        raise EvalError(101, str(file), "holds one prompt: nothing can be compared.", "Give a file with more.")
    return file, len(tasks), chosen


def prompts_of(tasks: list[Task]) -> list[Prompt]:
    return [Prompt(key=t.key, messages=(Message(role="user", content=t.prompt),)) for t in tasks]


def about(wish: Wish, file: Path, num_in_file: int, most: int) -> dict[str, Any]:
    """What was asked, of scores that are kept. `most`: where answers were cut."""
    return {
        "suite": wish.suite,
        "file": str(file),
        "sha256": hash_file(file),
        "licence": LICENCE if wish.file is None else None,
        "num_in_file": num_in_file,
        "max_new_tokens": most,
        "packages": {p: version(p) for p in ("langdetect", "nltk")},
    }


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
    known = {k: before[k] for k in ABOUT}
    return _written(run, wish.suite, known, lines, {n: before["systems"].get(n, {}).get("seconds") for n in lines})


def _written(
    run: RunDir, suite: str, known: dict[str, Any], lines: dict[str, list[dict[str, Any]]], seconds: dict[str, Any]
) -> dict[str, Any]:
    scores = {**known, **score(lines, seconds)}
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
    run: RunDir, tasks: list[Task], most: int, say: Say, on_answers: OnAnswers
) -> tuple[dict[str, list[Answer]], dict[str, float | None], int]:
    """Answers and seconds of both models, and where answers were cut."""
    prompts = prompts_of(tasks)
    answers: dict[str, list[Answer]] = {}
    seconds: dict[str, float | None] = {}
    with told_of_memory("evaluating", CLOSE_OTHERS):
        samplers = samplers_of(run, say)
        for name in (BEFORE, AFTER):
            sampler = samplers(name)
            most = sampler.room(prompts, most)
            tell = partial(_tell, on_answers, name, len(prompts))
            answers[name] = sampler.sample(prompts, Sampling(max_new_tokens=most), tell)
            seconds[name] = sampler.seconds
    return answers, seconds, most


def _tell(on_answers: OnAnswers, name: str, total: int, done: int) -> None:
    on_answers(name, done, total)
