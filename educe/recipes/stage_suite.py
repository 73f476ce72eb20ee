"""`educe eval RUN --suite ifeval` of a run of stages: how well every stage's model follows instructions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from educe.evaluate.ifeval.scores import line_of
from educe.evaluate.stages import Rows
from educe.files.atomic import make_private, told, write_json
from educe.files.jsonl import write_jsonl
from educe.files.run_dir import RunDir
from educe.model.load import CausalLM
from educe.model.source import Say
from educe.recipes.answers import OnAnswers
from educe.recipes.kept_samplers import KeptSampler, answers_depend_on
from educe.recipes.stage_rows import Scale
from educe.recipes.suite import Wish, about, prompts_of, tasks_of
from educe.types import Sampling


def measure_suite(
    path: Path,
    wish: Wish,
    weights: Mapping[str, str],
    load: Callable[[str], CausalLM],
    scale: Scale,
    say: Say,
    on_answers: OnAnswers,
) -> None:
    """Answer and grade under each model; writes suites/NAME/*.jsonl and suites/NAME.json. `weights`: the hash of each model's, by
    name. Answers are kept as they come. Raises what `suite_scores` raises."""
    file, num_in_file, tasks = tasks_of(wish, scale.recipe.train.seed, say)
    prompts, most = prompts_of(tasks), wish.max_new_tokens
    lines: dict[str, list[dict[str, Any]]] = {}
    for name, digest in weights.items():
        of = ["stages", weights["base"], digest, *answers_depend_on(scale.asking.tokenizer, scale.device)]
        sampler = KeptSampler(name, partial(load, name), of, scale.asking, scale.recipe, say)
        most = sampler.room(prompts, most)
        tell = partial(_tell, on_answers, f"{name}, {wish.suite}", len(prompts))
        answers = sampler.sample(prompts, Sampling(max_new_tokens=most), tell)
        lines[name] = [line_of(t, a) for t, a in zip(tasks, answers, strict=True)]
    run = RunDir(path)
    with told(run.suites / wish.suite):
        make_private(run.suites / wish.suite)
        for name, mine in lines.items():
            write_jsonl(run.suites / wish.suite / f"{name}.jsonl", mine)
    held = about(wish, file, num_in_file, most) | {"num_prompts": len(tasks), "weights": dict(weights)}
    write_json(run.suites / f"{wish.suite}.json", held)


def followed(path: Path, weights: Mapping[str, str], say: Say) -> tuple[dict[str, Any] | None, dict[str, Rows]]:
    """What was measured: about it, and for each model which prompts' instructions were all followed. Nothing where none was, or of
    other weights, which is said."""
    run = RunDir(path)
    file = run.suites / "ifeval.json"
    if not file.is_file():
        return None, {}
    held = run.load(file)
    if held["weights"] != dict(weights):
        say("instructions (IFEval) were measured of other weights and are left out; --suite ifeval measures them again")
        return None, {}
    stored = {name: run.load(run.suites / "ifeval" / f"{name}.jsonl") for name in weights}
    return held, {name: Rows(of=[float(all(x["strict"])) for x in mine]) for name, mine in stored.items()}


def _tell(on_answers: OnAnswers, name: str, total: int, done: int) -> None:
    on_answers(name, done, total)
