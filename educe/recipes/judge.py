"""`educe judge`: a run's answers before a judge, another model; its verdicts, and what they add up to, go to RUN/judged/."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from educe.evaluate.judge.mt_pairs import reread_games, score_games
from educe.evaluate.judge.pairwise import regraded
from educe.evaluate.judge.scores import reread, score_duels
from educe.files.atomic import make_private, told, write_json
from educe.files.jsonl import write_jsonl
from educe.files.run_dir import RunDir
from educe.recipes.judge_duels import compared
from educe.recipes.judge_mt import by_system, paired, rated
from educe.recipes.judging import SamplerOf, Wish
from educe.sample.sampler import Sampler


def judge(run: RunDir, wish: Wish, judge: Sampler, sampler_of: SamplerOf, say: Callable[[str], None]) -> dict[str, Any]:
    """Try the judge, answer what is not answered yet, ask the judge, write judged/NAME.jsonl and NAME.json; returns the scores."""
    if wish.bench == "mt-bench":
        found, lines = (paired if wish.pairwise else rated)(wish, judge, sampler_of, say)
    else:
        found, lines = compared(run, wish, judge, sampler_of, say)
    scores = {"bench": wish.bench, "judge": judge.name, **found}
    _write(run, wish, scores, lines)
    return scores


def regrade(run: RunDir, wish: Wish) -> dict[str, Any]:
    """Stored verdicts read and counted again; no judge is asked."""
    stored = run.judged / f"{wish.name}.jsonl"
    before, lines = run.load(stored.with_suffix(".json")), run.load(stored)
    if wish.pairwise:
        lines = reread_games(lines)
        scores = {**before, **score_games(lines)}
    elif wish.bench == "mt-bench":
        lines = reread(lines)
        scores = {**before, "systems": by_system(lines)}
    else:
        lines = regraded(lines)
        scores = {**before, **score_duels(lines, *wish.published)}
    _write(run, wish, scores, lines)
    return scores


def _write(run: RunDir, wish: Wish, scores: dict[str, Any], lines: list[dict[str, Any]]) -> None:
    with told(run.judged):
        make_private(run.judged)
        write_jsonl(run.judged / f"{wish.name}.jsonl", lines)
    write_json(run.judged / f"{wish.name}.json", scores)
