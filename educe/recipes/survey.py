"""`educe data`: what data files are and what is wrong with them, without a model: format, rows, roles, lengths, problems, oddities."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from educe.config import Recipe
from educe.data.finding import empty_files, find_files
from educe.data.formats import FORMATS
from educe.data.oddities import Oddities, Oddity
from educe.data.opening import compression_of
from educe.data.reading import PLAIN, Item, Reading, read_row, reading_for
from educe.data.sources import Container, container_of, read_rows
from educe.data.split import prompt_key, row_key
from educe.data.trees import joined
from educe.errors import Refusal
from educe.recipes.build import Input
from educe.recipes.part import DROPPED
from educe.recipes.prepare import inputs_of, without_rows
from educe.recipes.which import recipe_or_stages, stage_of
from educe.stats import percentile
from educe.types import Conversation, Document, Pair

FIRST = 5
# Rows of each task that are looked at for oddities before a run; `educe data` looks at all.
NUM_LOOKED_AT, MOST_TOLD = 5000, 4


@dataclass(slots=True, kw_only=True)
class Problem:
    """Rows that are not read, by code: how many, and the first of them."""

    rows: int = 0
    first: list[Refusal] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Of some texts, in characters."""

    median: int
    p95: int
    longest: int


@dataclass(slots=True, kw_only=True)
class FileSurvey:
    """What one file is. `format` is None where no row says it; `evidence` are the keys it was told by. `rows` were read, `kinds`
    counts what they hold (conversation, text, preference pair); `copies` are rows equal to one before, `repeated` rows whose
    prompt was asked before with another answer."""

    file: str
    container: Container
    compression: str
    format: str | None
    evidence: tuple[str, ...]
    rows: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    roles: Counter[str] = field(default_factory=Counter)
    with_tools: int = 0
    with_reasoning: int = 0
    with_weights: int = 0
    copies: int = 0
    repeated: int = 0
    prompts: Lengths | None = None
    answers: Lengths | None = None
    unread_keys: Counter[str] = field(default_factory=Counter)
    problems: dict[str, Problem] = field(default_factory=dict)
    answer_form: str = ""
    oddities: list[Oddity] = field(default_factory=list)

    @property
    def num_refused(self) -> int:
        return sum(p.rows for code, p in self.problems.items() if code not in DROPPED)

    def as_json(self) -> dict[str, Any]:
        counts = {name: dict(getattr(self, name)) for name in ("kinds", "roles", "unread_keys")}
        plain = replace(self, kinds=Counter(), roles=Counter(), unread_keys=Counter())
        return {**asdict(plain), **counts, "refused": self.num_refused}


def survey(specs: Sequence[str]) -> Iterator[FileSurvey]:
    """Each file in turn. A recipe (`.yaml`, or FILE#STAGE) stands for its training files, read as it says; anything else is what
    `data.train` may be. Raises `DataError` for what cannot be read at all."""
    for spec in specs:
        name = spec.partition("#")[0] if "#" in spec and not Path(spec).exists() else spec
        if name.endswith((".yaml", ".yml")):
            for recipe in _recipes(Path(spec)):
                for i in inputs_of(recipe)[0]:
                    yield from _of_input(i)
                yield from map(_nothing, without_rows(recipe))
        else:
            for file in find_files(spec):
                yield _survey(file, PLAIN, ())
            yield from map(_nothing, empty_files(spec))


def _recipes(path: Path) -> list[Recipe]:
    """Of one run, or of every stage where none is named."""
    found = recipe_or_stages(path)
    return [found] if isinstance(found, Recipe) else [stage_of(found, k) for k in range(len(found.names))]


def _of_input(i: Input) -> Iterator[FileSurvey]:
    for file in i.files:
        yield _survey(file, i.reading, i.header)


def _nothing(file: Path) -> FileSurvey:
    return FileSurvey(file=str(file), container="lines", compression="", format=None, evidence=())


def _survey(file: Path, reading: Reading, header: Sequence[str]) -> FileSurvey:
    container = container_of(file)
    reading = reading_for(reading, file, header)
    told = reading.format or reading.of_file
    found = FileSurvey(
        file=str(file),
        container=container,
        compression=compression_of(file),
        format=told,
        evidence=tuple(sorted(FORMATS[told].keys)) if told in FORMATS else (),
    )
    look = _Look(found)
    for source, value in joined(read_rows(file, header), messages=reading.of_messages):
        found.rows += 1
        items: Sequence[Item] = (
            [value] if isinstance(value, Refusal) else read_row(value, source, reading, found.unread_keys)
        )
        for item in items:
            look.at(item)
    look.end()
    return found


def odd_rows(inputs: Sequence[Input], names: Sequence[str]) -> list[str]:
    """What looks odd in the first rows of each task, in sentences, the most frequent first."""
    found: list[tuple[int, str]] = []
    for i in inputs:
        if i.role != "train" or not i.held_out:
            continue
        oddities = Oddities()
        rows = chain.from_iterable(_read(file, reading_for(i.reading, file, i.header), i.header) for file in i.files)
        for item in islice(rows, NUM_LOOKED_AT):
            if isinstance(item, Conversation):
                oddities.add(item)
        task = f"{names[i.task]}: " if len(names) > 1 else ""
        found += [
            (o.count, f"{task}{o.count:,} of {o.of:,} {o.what}, first {Path(o.places[0]).name}. {o.advice}")
            for o in oddities.found()
        ]
    found.sort(key=lambda f: -f[0])
    return [said for _, said in found[:MOST_TOLD]]


def _read(file: Path, reading: Reading, header: Sequence[str]) -> Iterator[Item]:
    for source, value in joined(read_rows(file, header), messages=reading.of_messages):
        yield from [value] if isinstance(value, Refusal) else read_row(value, source, reading)


class _Look:
    """Looks at what a file's rows hold, one after the other."""

    def __init__(self, found: FileSurvey) -> None:
        self._found = found
        self._oddities = Oddities()
        self._prompts, self._answers = array("Q"), array("Q")
        self._seen: set[int] = set()
        self._asked: set[int] = set()

    def at(self, item: Item) -> None:
        found = self._found
        if isinstance(item, Refusal):
            problem = found.problems.setdefault(item.code, Problem())
            problem.rows += 1
            if len(problem.first) < FIRST:
                problem.first.append(item)
        elif isinstance(item, Document):
            found.kinds["text"] += 1
            self._answers.append(len(item.text))
        elif isinstance(item, Pair):
            found.kinds["preference pair"] += 1
            self._of(item.chosen)
        else:
            found.kinds["conversation"] += 1
            self._of(item)

    def _of(self, c: Conversation) -> None:
        found = self._found
        found.roles.update(m.role for m in c.messages)
        found.with_tools += bool(c.tools) or any(m.tool_calls for m in c.messages)
        found.with_reasoning += any(m.reasoning for m in c.messages)
        found.with_weights += any(m.weight is not None for m in c.messages)
        last = max(i for i, m in enumerate(c.messages) if m.role == "assistant")
        self._answers.append(len(c.messages[last].content))
        self._prompts.append(sum(len(m.content) for m in c.messages[:last]))
        row, prompt = hash(repr(row_key(c))), int(prompt_key(c)[:16], 16)
        if row in self._seen:
            found.copies += 1
        elif prompt in self._asked:
            found.repeated += 1
        self._seen.add(row)
        self._asked.add(prompt)
        self._oddities.add(c)

    def end(self) -> None:
        found = self._found
        found.prompts, found.answers = _lengths(self._prompts), _lengths(self._answers)
        found.answer_form, found.oddities = self._oddities.form, self._oddities.found()
        found.problems = dict(sorted(found.problems.items(), key=lambda kv: -kv[1].rows))


def _lengths(values: array[int]) -> Lengths | None:
    if not values:
        return None
    numbers = values.tolist()
    return Lengths(median=percentile(numbers, 0.5), p95=percentile(numbers, 0.95), longest=max(numbers))
