"""`educe judge` on MT-Bench: both turns answered by both models, each answer rated, or the two compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from educe.evaluate.judge.canaries import check_single
from educe.evaluate.judge.mt_bench import JUDGMENT_TOKENS, TEMPERATURES, MtQuestion, parse_rating, single_prompt
from educe.evaluate.judge.mt_pairs import Game, check_games, few_of, judge_games, score_games
from educe.evaluate.judge.questions import read_mt_questions
from educe.evaluate.judge.scores import score_ratings
from educe.recipes.judging import SamplerOf, Wish
from educe.sample.sampler import Sampler
from educe.types import Message, Prompt, Sampling


def answer_turns(questions: Sequence[MtQuestion], sampler: Sampler, max_new_tokens: int) -> dict[str, list[str]]:
    """Both turns of each question, at its category's temperature; the second is asked after the first's answer."""
    talks: dict[str, list[Message]] = {q.name: [] for q in questions}
    answers: dict[str, list[str]] = {q.name: [] for q in questions}
    for turn in (1, 2):
        for temperature in sorted(set(TEMPERATURES.values())):
            mine = [q for q in questions if TEMPERATURES[q.category] == temperature]
            for q in mine:
                talks[q.name].append(Message(role="user", content=q.turns[turn - 1]))
            prompts = [Prompt(key=f"{q.name}/{turn}", messages=tuple(talks[q.name])) for q in mine]
            sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature)
            for q, answer in zip(mine, sampler.sample(prompts, sampling) if mine else [], strict=True):
                answers[q.name].append(answer.text)
                talks[q.name].append(Message(role="assistant", content=answer.text))
    return answers


def rated(
    wish: Wish, judge: Sampler, sampler_of: SamplerOf, say: Callable[[str], None]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Each answer alone, on a scale of 1 to 10."""
    questions = read_mt_questions(wish.needed("questions"), wish.needed("references"))
    canaries = check_single(judge, questions)
    questions = questions[: wish.most]
    lines: list[dict[str, Any]] = []
    for name in ("untouched", "tuned"):
        say(f"{name}: answers {len(questions)} questions of two turns")
        answers = answer_turns(questions, sampler_of(name), wish.max_new_tokens)
        asked = [(q, turn) for q in questions for turn in (1, 2)]
        prompts = [single_prompt(q, answers[q.name], turn, f"{name}/{q.name}/{turn}") for q, turn in asked]
        said = judge.sample(prompts, Sampling(max_new_tokens=JUDGMENT_TOKENS))
        for (q, turn), j in zip(asked, said, strict=True):
            line = {
                "system": name,
                "name": q.name,
                "category": q.category,
                "turn": turn,
                "answers": answers[q.name][:turn],
            }
            lines.append({**line, "judgment": j.text, "score": parse_rating(j.text)})
    return {"systems": by_system(lines), "canaries": canaries}, lines


def paired(
    wish: Wish, judge: Sampler, sampler_of: SamplerOf, say: Callable[[str], None]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The canaries stand against reference answers, and against a few of the untouched model's where there is none."""
    questions = read_mt_questions(wish.needed("questions"), wish.needed("references"))
    few = few_of(questions)
    own = answer_turns([q for q in few if q.reference is None], sampler_of("untouched"), wish.max_new_tokens)
    real = [Game(name=q.name, question=q, own=("", ""), other=q.reference or own[q.name]) for q in few]
    canaries, questions = check_games(judge, real), questions[: wish.most]
    answers = {}
    for name in ("untouched", "tuned"):
        say(f"{name}: answers {len(questions)} questions of two turns")
        answers[name] = answer_turns(questions, sampler_of(name), wish.max_new_tokens)
    others = answers["untouched"]
    lines = judge_games(
        [Game(name=q.name, question=q, own=answers["tuned"][q.name], other=others[q.name]) for q in questions], judge
    )
    return {"against": "untouched", **score_games(lines), "canaries": canaries}, lines


def by_system(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Scores of rated lines."""
    return {
        name: score_ratings([x for x in lines if x["system"] == name])
        for name in dict.fromkeys(x["system"] for x in lines)
    }
