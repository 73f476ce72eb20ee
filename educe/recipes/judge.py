"""`educe judge`: a run's answers before a judge, another model; its verdicts, and what they add up to, go to RUN/judged/."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from educe.errors import EvalError, UsageError
from educe.evaluate.judge.canaries import check_pairwise, check_single, spread
from educe.evaluate.judge.length import Array, Rows
from educe.evaluate.judge.mt_bench import (
    ANSWER_TOKENS,
    JUDGMENT_TOKENS,
    TEMPERATURES,
    MtQuestion,
    parse_rating,
    single_prompt,
)
from educe.evaluate.judge.pairwise import Duel, judge_duels, regraded
from educe.evaluate.judge.questions import SOURCES, read_difficulty, read_gamed, read_instructions, read_mt_questions
from educe.evaluate.judge.scores import reread, score_duels, score_ratings
from educe.files.atomic import make_private, told, write_json
from educe.files.hashes import hash_json
from educe.files.jsonl import write_jsonl
from educe.files.run_dir import RunDir
from educe.sample.sampler import Sampler
from educe.types import Message, Prompt, Sampling

BENCHES = ("rows", "alpaca-eval", "mt-bench")
LETTER = Sampling(max_new_tokens=8)
NUM_TRIED = 12  # answers of a model that the canaries may stand against; some may be empty
_BASELINES = ("untouched", "few_shot")

SamplerOf = Callable[[str], Sampler]
"""The model of a system, "untouched" or "tuned". It keeps its answers as they come, and is loaded only for those that are not kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is judged. `against`: "untouched", "few_shot" (rows alone) or a file of answers; the other files as their publishers write
    them. `most`: the first so many questions."""

    bench: str = "rows"
    against: str = "untouched"
    questions: Path | None = None
    references: Path | None = None
    difficulty: Path | None = None
    gamed: Path | None = None
    most: int | None = None
    max_new_tokens: int = ANSWER_TOKENS

    def __post_init__(self) -> None:
        if self.bench not in BENCHES:
            raise UsageError(101, "--bench", f"{self.bench!r} is not one.", f"One of {', '.join(BENCHES)}.")
        if self.against == "few_shot" and self.bench != "rows":
            raise UsageError(
                101, "--against", "few_shot answers the run's own rows alone.", "Take untouched, or a file."
            )

    def needed(self, what: str) -> Path:
        """The benchmark's `questions` or `references`: to judge they must be there, to grade again they are not read."""
        file: Path | None = getattr(self, what)
        if file is None:
            source = SOURCES[self.bench if what == "questions" else what]
            raise UsageError(101, f"--{what}", f"{self.bench} needs its {what}.", f"Give {source}.")
        return file

    @property
    def name(self) -> str:
        """Of its files. That of a baseline's file has a hash of its place: all of AlpacaEval's are called model_outputs.json."""
        if self.bench == "mt-bench":
            return self.bench
        if self.against in _BASELINES:
            return f"{self.bench}-{self.against}"
        place = Path(self.against).resolve()
        return f"{self.bench}-{place.stem}-{hash_json(str(place))[:6]}"

    @property
    def published(self) -> tuple[Array | None, Rows | None]:
        """Difficulties and gamed baselines, where their files are given."""
        hard = read_difficulty(self.difficulty) if self.difficulty is not None else None
        return hard, read_gamed(self.gamed) if self.gamed is not None else None


def judge(run: RunDir, wish: Wish, judge: Sampler, sampler_of: SamplerOf, say: Callable[[str], None]) -> dict[str, Any]:
    """Try the judge, answer what is not answered yet, ask the judge, write judged/NAME.jsonl and NAME.json; returns the scores."""
    if wish.bench == "mt-bench":
        found, lines = _rated(wish, judge, sampler_of, say)
    else:
        found, lines = _compared(run, wish, judge, sampler_of, say)
    scores = {"bench": wish.bench, "judge": judge.name, **found}
    _write(run, wish, scores, lines)
    return scores


def regrade(run: RunDir, wish: Wish) -> dict[str, Any]:
    """Stored verdicts read and counted again; no judge is asked."""
    stored = run.judged / f"{wish.name}.jsonl"
    before, lines = run.load(stored.with_suffix(".json")), run.load(stored)
    if wish.bench == "mt-bench":
        lines = reread(lines)
        scores = {**before, "systems": _by_system(lines)}
    else:
        lines = regraded(lines)
        scores = {**before, **score_duels(lines, *wish.published)}
    _write(run, wish, scores, lines)
    return scores


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


def _rated(
    wish: Wish, judge: Sampler, sampler_of: SamplerOf, say: Callable[[str], None]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
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
    return {"systems": _by_system(lines), "canaries": canaries}, lines


def _by_system(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        name: score_ratings([x for x in lines if x["system"] == name])
        for name in dict.fromkeys(x["system"] for x in lines)
    }


def _compared(
    run: RunDir, wish: Wish, judge: Sampler, sampler_of: SamplerOf, say: Callable[[str], None]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
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
    """The test rows' stored answers, tuned against another; and the same with the expected answers, for the canaries."""
    stored = run.answers / "tuned.jsonl"
    tuned = list(_by_row(run, stored).values())[: wish.most]
    file = run.answers / f"{wish.against}.jsonl" if wish.against in _BASELINES else Path(wish.against)
    others = _by_row(run, file)
    duels, real = [], []
    for x in tuned:
        name, other = x["row"], others.get(x["row"])
        if other is None:
            raise EvalError(2, str(file), f"holds no answer to {name}.", "Run `educe eval` again.")
        asked = _as_text(x["prompt"])
        duels.append(Duel(name=name, instruction=asked, own=x["answer"], other=other["answer"]))
        real.append(Duel(name=name, instruction=asked, own="", other=x["expected"]))
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
    before hours of answering: a few of a model's answers are enough for them."""
    asked = [instruction for instruction, _ in read_instructions(wish.needed("questions"))][: wish.most]
    numbers = list(range(len(asked)))
    few = spread(numbers, NUM_TRIED) if wish.against in _BASELINES else numbers
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
    if wish.against in _BASELINES:
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


def _write(run: RunDir, wish: Wish, scores: dict[str, Any], lines: list[dict[str, Any]]) -> None:
    with told(run.judged):
        make_private(run.judged)
        write_jsonl(run.judged / f"{wish.name}.jsonl", lines)
    write_json(run.judged / f"{wish.name}.json", scores)
