"""`educe eval RUN --suite ifeval` of a run of stages: how well every stage's model follows instructions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from educe.config.stages import BASE
from educe.evaluate.ifeval.scores import line_of
from educe.evaluate.stages import Rows
from educe.files.atomic import directory, verify, write_json
from educe.files.jsonl import read_jsonl, write_jsonl
from educe.files.run_dir import RunDir
from educe.model.device import release_free_memory
from educe.model.load import CausalLM
from educe.model.source import Say
from educe.recipes.kept_answers import OnAnswers
from educe.recipes.kept_samplers import KeptSampler
from educe.recipes.stage_rows import Scale
from educe.recipes.suite import Wish, about, prompts_of, tasks_of
from educe.types import Sampling

_ABOUT = "about.json"


def measure_suite(
    path: Path,
    wish: Wish,
    weights: Mapping[str, str],
    load: Callable[[str], CausalLM],
    scale: Scale,
    say: Say,
    on_answers: OnAnswers,
) -> None:
    """Answer and grade under each model; writes suites/NAME/, whole: a file of answers for each, and what was asked. `weights`: the
    hash of each model's, by name. Answers are kept as they come. Raises what `suite_scores` raises."""
    file, num_in_file, tasks = tasks_of(wish, scale.recipe.train.seed, say)
    prompts, most = prompts_of(tasks), wish.max_new_tokens
    lines: dict[str, list[dict[str, Any]]] = {}
    for name, digest in weights.items():
        kept = scale.kept(partial(load, name), weights[BASE], digest, say)
        sampler = KeptSampler(name, kept, scale.asking, scale.recipe, say)
        most = sampler.room(prompts, most)
        tell = partial(_tell, on_answers, f"{name}, {wish.suite}", len(prompts))
        answers = sampler.sample(prompts, Sampling(max_new_tokens=most), tell)
        release_free_memory()
        lines[name] = [line_of(t, a) for t, a in zip(tasks, answers, strict=True)]
    held = about(wish, file, num_in_file, most) | {"num_prompts": len(tasks), "weights": dict(weights)}
    with directory(RunDir(path).suites / wish.suite, about={"stage": "suite"}) as part:
        for name, mine in lines.items():
            write_jsonl(part / f"{name}.jsonl", mine)
        write_json(part / _ABOUT, held)


def followed(path: Path, weights: Mapping[str, str], say: Say) -> tuple[dict[str, Any] | None, dict[str, Rows]]:
    """What was measured: about it, and for each model which prompts' instructions were all followed. Nothing where none was, or not of
    all these weights, which is said."""
    place = RunDir(path).suites / "ifeval"
    if not place.exists():
        return None, {}
    again = "and are left out; --suite ifeval measures them"
    if isinstance(fault := verify(place), str):
        say(f"warning: instructions (IFEval) cannot be read ({fault.rstrip('.')}) {again}")
        return None, {}
    held = json.loads((place / _ABOUT).read_text(encoding="utf-8"))
    if missing := [name for name, digest in weights.items() if held["weights"].get(name) != digest]:
        say(f"instructions (IFEval) were not measured of {', '.join(missing)} as they are now {again}")
        return None, {}
    stored = {name: read_jsonl(place / f"{name}.jsonl") for name in weights}
    return held, {name: Rows(of=[float(all(x["strict"])) for x in mine]) for name, mine in stored.items()}


def _tell(on_answers: OnAnswers, name: str, total: int, done: int) -> None:
    on_answers(name, done, total)
