"""What `educe judge` is asked for, and who answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from educe.errors import UsageError
from educe.evaluate.judge.length import Array, Rows
from educe.evaluate.judge.mt_bench import ANSWER_TOKENS
from educe.evaluate.judge.questions import SOURCES, read_difficulty, read_gamed
from educe.files.hashes import hash_json
from educe.sample.sampler import Sampler

BENCHES = ("rows", "alpaca-eval", "mt-bench")
BASELINES = ("untouched", "few_shot")

SamplerOf = Callable[[str], Sampler]
"""The model of a system, "untouched" or "tuned". It keeps its answers as they come, and is loaded only for those that are not kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is judged. `against`: "untouched", "few_shot" (rows alone) or a file of answers; the other files as their publishers write
    them. `most`: the first so many questions. `pairwise`: MT-Bench's answers are compared in both orders, not rated."""

    bench: str = "rows"
    against: str = "untouched"
    questions: Path | None = None
    references: Path | None = None
    difficulty: Path | None = None
    gamed: Path | None = None
    most: int | None = None
    pairwise: bool = False
    max_new_tokens: int = ANSWER_TOKENS

    def __post_init__(self) -> None:
        if self.bench not in BENCHES:
            raise UsageError(101, "--bench", f"{self.bench!r} is not one.", f"One of {', '.join(BENCHES)}.")
        if self.pairwise and self.bench != "mt-bench":
            raise UsageError(101, "--pairwise", f"{self.bench} is compared by pairs anyway.", "Leave it out.")
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
            return f"{self.bench}-pairwise" if self.pairwise else self.bench
        if self.against in BASELINES:
            return f"{self.bench}-{self.against}"
        place = Path(self.against).resolve()
        return f"{self.bench}-{place.stem}-{hash_json(str(place))[:6]}"

    @property
    def published(self) -> tuple[Array | None, Rows | None]:
        """Difficulties and gamed baselines, where their files are given."""
        hard = read_difficulty(self.difficulty) if self.difficulty is not None else None
        return hard, read_gamed(self.gamed) if self.gamed is not None else None
