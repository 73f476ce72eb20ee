"""`educe judge`: a run's answers before a judge, another model; its verdicts, and what they add up to, go to RUN/judged/."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from educe.errors import EvalError, UsageError
from educe.evaluate.judge.canaries import check_pairwise, check_single
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
from educe.files.jsonl import write_jsonl
from educe.files.run_dir import RunDir
from educe.sample.sampler import Sampler
from educe.types import Message, Prompt, Sampling

BENCHES = ("rows", "alpaca-eval", "mt-bench")
LETTER = Sampling(max_new_tokens=8)
_BASELINES = ("untouched", "few_shot")

SamplerOf = Callable[[str], Sampler]
"""The model of a system, "untouched" or "tuned"; called only where its answers are not stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is judged. `against`: "untouched", "few_shot" (rows alone) or a file of answers; the other files as their publishers write
    them. `most`: the first so many questions."""

    bench: str
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
        if self.bench != "rows" and self.questions is None:
            raise UsageError(101, "--questions", f"{self.bench} needs its questions.", f"Give {SOURCES[self.bench]}.")
        if self.bench == "mt-bench" and self.references is None:
            raise UsageError(101, "--references", "mt-bench needs reference answers.", f"Give {SOURCES['references']}.")
        if self.against == "few_shot" and self.bench != "rows":
            raise UsageError(
                101, "--against", "few_shot answers the run's own rows alone.", "Take untouched, or a file."
            )

    @property
    def name(self) -> str:
        """Of its files."""
        if self.bench == "mt-bench":
            return self.bench
        return f"{self.bench}-{self.against if self.against in _BASELINES else Path(self.against).stem}"

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
    questions = read_mt_questions(_given(wish.questions), wish.references)
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
    else:
        duels, real = _instructions(wish, sampler_of, say)
    canaries = check_pairwise(judge, real, LETTER)
    say(f"judge: {len(duels)} questions, each in both orders (AlpacaEval itself draws one by lot)")
    if published[0] is None:
        say("length-controlled: without instruction difficulties (--difficulty), so not the leaderboard's own figure")
    lines = [{**x, "number": i // 2} for i, x in enumerate(judge_duels(duels, judge, LETTER))]
    return {"against": wish.against, **score_duels(lines, *published), "canaries": canaries}, lines


def _rows(run: RunDir, wish: Wish) -> tuple[list[Duel], list[Duel]]:
    """The test rows' stored answers, tuned against another; and the same with the expected answers, for the canaries."""
    tuned = run.load(run.answers / "tuned.jsonl")[: wish.most]
    if wish.against in _BASELINES:
        others = {x["row"]: x["answer"] for x in run.load(run.answers / f"{wish.against}.jsonl")}
    else:
        others = {x["row"]: x["answer"] for x in run.load(Path(wish.against))}
    if missing := next((x["row"] for x in tuned if x["row"] not in others), None):
        raise EvalError(2, wish.against, f"holds no answer to {missing}.", "Run `educe eval` again.")
    duels, real = [], []
    for x in tuned:
        asked = _as_text(x["prompt"])
        duels.append(Duel(name=x["row"], instruction=asked, own=x["answer"], other=others[x["row"]]))
        real.append(Duel(name=x["row"], instruction=asked, own="", other=x["expected"]))
    return duels, real


def _instructions(wish: Wish, sampler_of: SamplerOf, say: Callable[[str], None]) -> tuple[list[Duel], list[Duel]]:
    """The instructions answered by the tuned model and the other one. The canaries stand against the other's answers."""
    asked = [instruction for instruction, _ in read_instructions(_given(wish.questions))][: wish.most]
    if wish.against in _BASELINES:
        others = _answers(asked, wish.against, wish, sampler_of, say)
    else:
        by_text = dict(read_instructions(Path(wish.against)))
        if missing := next((a for a in asked if not by_text.get(a)), None):
            raise EvalError(
                3, wish.against, f"holds no output for {missing[:60]!r}.", "Give answers to these questions."
            )
        others = [by_text[a] for a in asked]
    own = _answers(asked, "tuned", wish, sampler_of, say)
    triples = zip(asked, own, others, strict=True)
    duels = [Duel(name=f"instruction {i}", instruction=a, own=x, other=y) for i, (a, x, y) in enumerate(triples)]
    return duels, duels


def _answers(
    asked: Sequence[str], name: str, wish: Wish, sampler_of: SamplerOf, say: Callable[[str], None]
) -> list[str]:
    say(f"{name}: answers {len(asked)} instructions")
    prompts = [Prompt(key=str(i), messages=(Message(role="user", content=a),)) for i, a in enumerate(asked)]
    return [a.text for a in sampler_of(name).sample(prompts, Sampling(max_new_tokens=wish.max_new_tokens))]


def _as_text(prompt: Sequence[dict[str, str]]) -> str:
    """A conversation up to its answer; a single question as it is."""
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"[{m['role']}]\n{m['content']}" for m in prompt)


def _given(file: Path | None) -> Path:
    if file is None:
        raise UsageError(101, "--questions", "is missing.", "Give the file.")
    return file


def _write(run: RunDir, wish: Wish, scores: dict[str, Any], lines: list[dict[str, Any]]) -> None:
    with told(run.judged):
        make_private(run.judged)
        write_jsonl(run.judged / f"{wish.name}.jsonl", lines)
    write_json(run.judged / f"{wish.name}.json", scores)
