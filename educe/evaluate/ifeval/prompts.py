"""IFEval's prompts: the official file, read strictly, and the values made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from educe.errors import EvalError, Refusal
from educe.evaluate.ifeval.verifiers import VERIFIERS, faults_of
from educe.files.jsonl import lines_of, parse_json

FIELDS = ("key", "prompt", "instruction_id_list", "kwargs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """Something an answer can be verified for. Raises `ValueError` for an unknown type or other arguments than its."""

    kind: str
    arguments: Mapping[str, Any]

    def __post_init__(self) -> None:
        if fault := faults_of(self.kind, self.arguments):
            raise ValueError(fault)

    def followed_by(self, answer: str) -> bool:
        """An empty answer follows nothing."""
        return bool(answer.strip()) and VERIFIERS[self.kind](answer, **self.arguments)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A prompt and what it asks of the answer."""

    key: str
    prompt: str
    instructions: tuple[Instruction, ...]

    def as_json(self) -> dict[str, Any]:
        """As a line of the official file."""
        return {
            "key": self.key,
            "prompt": self.prompt,
            "instruction_id_list": [i.kind for i in self.instructions],
            "kwargs": [dict(i.arguments) for i in self.instructions],
        }


def read_tasks(path: Path) -> list[Task]:
    """The prompts of a file in the official format (`input_data.jsonl`). Raises `EvalError` at the first line that is not right."""
    tasks: dict[str, Task] = {}
    try:
        with path.open("rb") as stream:
            for number, _, line in lines_of(stream, str(path)):
                place = f"{path}:{number}"
                row = line if isinstance(line, Refusal) else parse_json(line, place)
                if isinstance(row, Refusal):
                    raise _wrong(row.where, row.found)
                task = task_of(row, place)
                if task.key in tasks:
                    raise _wrong(place, f"key {task.key} is there twice.")
                tasks[task.key] = task
    except OSError as e:
        raise EvalError(3, str(path), f"cannot be read: {e.strerror}.", "Give the prompts' file.") from e
    if not tasks:
        raise _wrong(str(path), "holds no prompts.")
    return list(tasks.values())


def task_of(row: Any, place: str) -> Task:
    """One line of the official file. Arguments that are null are not there (data sets with fixed columns fill them in)."""
    if not isinstance(row, dict) or any(f not in row for f in FIELDS):
        raise _wrong(place, "is no prompt of IFEval.")
    kinds, arguments = row["instruction_id_list"], row["kwargs"]
    lists = isinstance(kinds, list) and isinstance(arguments, list) and len(kinds) == len(arguments) > 0
    if not lists or not all(isinstance(a, dict) for a in arguments):
        raise _wrong(place, "instruction_id_list and kwargs are not lists of the same length.")
    if not isinstance(row["prompt"], str) or not row["prompt"].strip() or type(row["key"]) not in (int, str):
        raise _wrong(place, "prompt or key is not text.")
    try:
        instructions = [
            Instruction(kind=str(k), arguments={n: v for n, v in a.items() if v is not None})
            for k, a in zip(kinds, arguments, strict=True)
        ]
    except ValueError as e:
        raise _wrong(place, f"{e}.") from e
    return Task(key=str(row["key"]), prompt=row["prompt"], instructions=tuple(instructions))


def _wrong(place: str, found: str) -> EvalError:
    fix = f"Give IFEval's own file: one JSON object a line with {', '.join(FIELDS)}."
    return EvalError(101, place, found, fix)
