"""MT-Bench by pairs, as published: which of two answers is better, in both orders; where the orders disagree it is a tie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from educe.errors import EvalError
from educe.evaluate.judge.canaries import CANARIES, NUM_RATED, lint_answers, refuse_where_fooled, spread
from educe.evaluate.judge.mt_bench import JUDGMENT_TOKENS, REFERENCED, MtQuestion, averages, pair_prompt, parse_choice
from educe.evaluate.judge.pairwise import ORDERS
from educe.evaluate.judge.verdicts import verdict_of
from educe.sample.sampler import Sampler
from educe.stats import bounded_mean, sums_by_cluster
from educe.types import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Game:
    """Two answers to both turns of a question: the model's `own`, and the `other` ones. `name` is unique in a set."""

    name: str
    question: MtQuestion
    own: Sequence[str]
    other: Sequence[str]


def judge_games(games: Sequence[Game], judge: Sampler) -> list[dict[str, Any]]:
    """Asks about both turns of every game in both orders. One line a verdict, with all that is needed to grade it again."""
    asked = [(g, turn, order) for g in games for turn in (1, 2) for order in ORDERS]
    prompts = []
    for g, turn, order in asked:
        first, second = (g.own, g.other) if order == ORDERS[0] else (g.other, g.own)
        prompts.append(pair_prompt(g.question, first, second, turn, f"{g.name}/{turn}#{order}"))
    said = judge.sample(prompts, Sampling(max_new_tokens=JUDGMENT_TOKENS))
    lines = []
    for (g, turn, order), answer in zip(asked, said, strict=True):
        line = {"name": g.name, "category": g.question.category, "turn": turn, "order": order, "judgment": answer.text}
        lines.append(line | {"own": list(g.own[:turn]), "other": list(g.other[:turn])})
    return reread_games(lines)


def reread_games(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Verdicts read from what the judge said; `preference` is 1 for the model's own answer, 0 for the other one, 0.5 for a tie."""
    made = []
    for line in lines:
        choice = parse_choice(line["judgment"])
        swapped = choice is not None and line["order"] == ORDERS[1]
        made.append({**line, "preference": 1 - choice if choice is not None and swapped else choice})
    return made


def settle(first: float | None, swapped: float | None) -> float | None:
    """The two games of a pair, each as the preference for the same side: what both say, and a tie where they disagree."""
    if first is None or swapped is None:
        return None
    return first if first == swapped else 0.5


def score_games(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Win rate of `own` over `other`, ties a half; both turns of a question are one cluster of the interval."""
    by_game: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for line in lines:
        by_game.setdefault((line["name"], line["turn"]), {})[line["order"]] = line
    rows = []
    for both in by_game.values():
        one, two = (both[order]["preference"] if order in both else None for order in ORDERS)
        rows.append({**next(iter(both.values())), "score": settle(one, two), "apart": one != two})
    judged = [r for r in rows if r["score"] is not None]
    sums, sizes = sums_by_cluster([r["score"] for r in judged], [r["name"] for r in judged])
    if len(sizes) < 2:
        found = f"gave a readable verdict in both orders to {len(sizes)} questions."
        raise EvalError(301, "judge", found, "Take a judge that ends in [[A]], [[B]] or [[C]].")
    interval = bounded_mean(sums, sizes)
    means = averages(rows)
    return {
        "win_rate": asdict(interval),
        "by_turn": {str(turn): mean for turn, mean in means["by_turn"].items()},
        "by_category": means["by_category"],
        "counts": {
            "questions": len(rows),  # a turn each
            "judged": len(judged),
            "unparsed": sum(line["preference"] is None for line in lines),
            "split": sum(r["apart"] for r in judged),
        },
        "mean_length": {who: sum(len(r[who][-1]) for r in rows) / len(rows) for who in ("own", "other")},
        "lint": lint_answers([r["own"][-1] for r in rows]),
        "verdict": verdict_of(interval, np.array(sums) / np.array(sizes)),
    }


def few_of(questions: Sequence[MtQuestion]) -> list[MtQuestion]:
    """Questions that the canaries are tried on: some judged beside a reference, some without."""
    kinds = ([q for q in questions if (q.category in REFERENCED) == kind] for kind in (True, False))
    return [q for kind in kinds for q in spread(kind, NUM_RATED)]


def check_games(judge: Sampler, real: Sequence[Game]) -> dict[str, list[float | None]]:
    """The preference for each canary over the `other` answers of some games, in both turns and orders. Raises `EvalError` where one is
    not beaten every time."""
    asked = [g for g in real if all(a.strip() and a.strip() not in CANARIES.values() for a in g.other)]
    if not asked:
        raise EvalError(
            301, "judge", "cannot be tried: no real answer to set the canaries against.", "Take other questions."
        )
    trials = [
        Game(name=f"canary {name} {g.name}", question=g.question, own=(said, said), other=g.other)
        for name, said in CANARIES.items()
        for g in asked
    ]
    preferences = [line["preference"] for line in judge_games(trials, judge)]
    each = len(preferences) // len(CANARIES)
    found = {name: preferences[k * each : (k + 1) * each] for k, name in enumerate(CANARIES)}
    refuse_where_fooled(judge, found, "[[A]], [[B]] or [[C]]")
    return found
