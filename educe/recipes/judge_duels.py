"""`educe judge` on the run's rows and on AlpacaEval's instructions: answers by pairs, in both orders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from educe.errors import EvalError
from educe.evaluate.judge.canaries import check_pairwise, spread
from educe.evaluate.judge.pairwise import Duel, judge_duels
from educe.evaluate.judge.questions import read_instructions
from educe.evaluate.judge.scores import score_duels
from educe.files.run_dir import RunDir
from educe.recipes.judging import BASELINES, SamplerOf, Wish
from educe.sample.sampler import Sampler
from educe.types import Message, Prompt, Sampling

LETTER = Sampling(max_new_tokens=8)
NUM_TRIED = 12  # answers of a model that the canaries may stand against; some may be empty


def compared(
    run: RunDir, wish: Wish, judge: Sampler, sampler_of: SamplerOf, say: Callable[[str], None]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Tried, asked, scored: the scores and the verdicts' lines."""
    published = wish.published  # files first: a judge costs money
    if wish.bench == "rows":
        duels, real = _rows(run, wish)
        canaries = check_pairwise(judge, real, LETTER)
    else:
        duels, canaries = _instructions(wish, judge, sampler_of, say)
    say(f"judge: {len(duels)} questions, each in both orders (AlpacaEval itself draws one by lot)")
    if published[0] is None:
        say("length-controlled: without instruction difficulties (--difficulty), so not the leaderboard's own figure")
    lines = [{**x, "number": i // 2} for i, x in enumerate(judge_duels(duels, judge, LETTER))]
    return {"against": wish.against, **score_duels(lines, *published), "canaries": canaries}, lines


def _rows(run: RunDir, wish: Wish) -> tuple[list[Duel], list[Duel]]:
    """The test rows' stored answers, tuned against another; and all rows with the expected answers, for the canaries: how many are
    judged does not make them fewer."""
    stored = run.answers / "tuned.jsonl"
    if not stored.is_file():
        fix = f"Run `educe eval {run.path}` first, or judge other questions: --bench alpaca-eval, mt-bench."
        raise EvalError(2, str(stored), "is not there yet.", fix)
    tuned = list(_by_row(run, stored).values())
    file = run.answers / f"{wish.against}.jsonl" if wish.against in BASELINES else Path(wish.against)
    if not file.is_file():
        fix = "Take --against untouched, or a file of answers that is there. "
        fix += "few_shot answers where the recipe's evaluation.few_shot is above 0."
        raise EvalError(2, str(file), "is not there.", fix)
    others = _by_row(run, file)
    real = [Duel(name=x["row"], instruction=_as_text(x["prompt"]), own="", other=x["expected"]) for x in tuned]
    duels = []
    for x in tuned[: wish.most]:
        name, other = x["row"], others.get(x["row"])
        if other is None:
            raise EvalError(2, str(file), f"holds no answer to {name}.", "Run `educe eval` again.")
        asked = _as_text(x["prompt"])
        expected = str(x.get("expected") or "")
        duels.append(Duel(name=name, instruction=asked, own=x["answer"], other=other["answer"], expected=expected))
    return duels, real


def _by_row(run: RunDir, file: Path) -> dict[str, dict[str, Any]]:
    """Lines of answers by their rows. Raises `EvalError` where two are of one row: which answers which question?"""
    found: dict[str, dict[str, Any]] = {}
    lines = run.load(file)
    for number, line in enumerate(lines if isinstance(lines, list) else [lines], 1):
        match line:
            case {"row": str(row), "answer": str()} if row not in found:
                found[row] = line
            case {"row": str(row), "answer": str()}:
                why = f"{row} is answered twice: which answer is to which question is not known."
                raise EvalError(2, f"{file}:{number}", why, "Run `educe eval` again.")
            case _:
                fix = "Give a file like those in the run's answers/."
                raise EvalError(2, f"{file}:{number}", "holds no 'row' with its 'answer'.", fix)
    return found


def _instructions(
    wish: Wish, judge: Sampler, sampler_of: SamplerOf, say: Callable[[str], None]
) -> tuple[list[Duel], dict[str, Any]]:
    """The instructions answered by the tuned model and the other one. The canaries stand against the other's answers, and come
    before hours of answering: a few of a model's answers are enough for them, whatever number is judged."""
    asked = [instruction for instruction, _ in read_instructions(wish.needed("questions"))]
    numbers = list(range(len(asked)))[: wish.most]
    if wish.against in BASELINES:
        few = spread(range(len(asked)), NUM_TRIED)
    else:
        there = dict(read_instructions(Path(wish.against)))
        few = [i for i, text in enumerate(asked) if i < len(numbers) or there.get(text)]
    others = _others(asked, few, wish, sampler_of, say)
    canaries = check_pairwise(judge, [_duel(i, asked[i], "", others[i]) for i in few], LETTER)
    others |= _others(asked, [i for i in numbers if i not in others], wish, sampler_of, say)
    own = _answers(asked, numbers, "tuned", wish, sampler_of, say)
    return [_duel(i, asked[i], own[i], others[i]) for i in numbers], canaries


def _duel(number: int, instruction: str, own: str, other: str) -> Duel:
    return Duel(name=f"instruction {number}", instruction=instruction, own=own, other=other)


def _others(
    asked: Sequence[str], numbers: Sequence[int], wish: Wish, sampler_of: SamplerOf, say: Callable[[str], None]
) -> dict[int, str]:
    if wish.against in BASELINES:
        return _answers(asked, numbers, wish.against, wish, sampler_of, say)
    by_text = dict(read_instructions(Path(wish.against)))
    if missing := next((asked[i] for i in numbers if not by_text.get(asked[i])), None):
        raise EvalError(3, wish.against, f"holds no output for {missing[:60]!r}.", "Give answers to these questions.")
    return {i: by_text[asked[i]] for i in numbers}


def _answers(
    asked: Sequence[str],
    numbers: Sequence[int],
    name: str,
    wish: Wish,
    sampler_of: SamplerOf,
    say: Callable[[str], None],
) -> dict[int, str]:
    if not numbers:
        return {}
    say(f"{name}: answers {len(numbers)} instructions")
    prompts = [Prompt(key=str(i), messages=(Message(role="user", content=asked[i]),)) for i in numbers]
    given = sampler_of(name).sample(prompts, Sampling(max_new_tokens=wish.max_new_tokens))
    return {i: a.text for i, a in zip(numbers, given, strict=True)}


def _as_text(prompt: Sequence[dict[str, str]]) -> str:
    """A conversation up to its answer; a single question as it is."""
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"[{m['role']}]\n{m['content']}" for m in prompt)
