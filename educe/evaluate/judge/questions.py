"""Files of the benchmarks, as their publishers write them: questions, reference answers, answers of a model, difficulties."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

from educe.errors import EvalError
from educe.evaluate.judge.length import Array, Rows, gamed_rows
from educe.evaluate.judge.mt_bench import MtQuestion

# What is asked for, where it comes from, under which licence.
SOURCES = {
    "mt-bench": "question.jsonl of FastChat (github.com/lm-sys/FastChat, fastchat/llm_judge/data/mt_bench; Apache-2.0)",
    "references": "reference_answer/gpt-4.jsonl of the same directory (Apache-2.0)",
    "alpaca-eval": "alpaca_eval.json of the Hub's data set tatsu-lab/alpaca_eval (CC BY-NC 4.0: not for commercial use)",
}


def read_mt_questions(questions: Path, references: Path | None) -> list[MtQuestion]:
    """MT-Bench's questions in their order, with the reference answers by `question_id`. Raises `EvalError`."""
    found: dict[Any, tuple[str, str]] = {}
    for line in _records(references) if references is not None else []:
        found[line.get("question_id")] = _reference(line, references)
    made = []
    for line in _records(questions):
        name, turns = _field(line, "question_id", questions), _field(line, "turns", questions)
        try:
            made.append(
                MtQuestion(
                    name=str(name),
                    category=_field(line, "category", questions),
                    turns=(turns[0], turns[1]),
                    reference=found.get(name),
                )
            )
        except (ValueError, IndexError, TypeError) as e:
            fix = f"Give --references: {SOURCES['references']}."
            raise EvalError(3, str(questions), f"question {name}: {e}.", fix) from e
    return made


def _reference(line: dict[str, Any], file: Path | None) -> tuple[str, str]:
    match _field(line, "choices", file):
        case [{"turns": [str(one), str(two), *_]}, *_]:
            return one, two
    found = f"question {line.get('question_id')}: no answer to two turns under 'choices'."
    raise EvalError(3, str(file), found, f"Give {SOURCES['references']}.")


def read_instructions(file: Path) -> list[tuple[str, str]]:
    """(instruction, output) of each; "" where the file has instructions alone. Raises `EvalError`."""
    made = []
    for line in _values(file):
        instruction = line if isinstance(line, str) else _field(line, "instruction", file)
        output = "" if isinstance(line, str) else line.get("output", "")
        made.append((str(instruction), str(output)))
    return made


def read_difficulty(file: Path) -> Array:
    """instruction_difficulty.csv: the difficulty of each instruction by its number. Raises `EvalError`."""
    try:
        with file.open(encoding="utf-8", newline="") as f:
            rows = [(int(row[0]), float(row[1])) for row in list(csv.reader(f))[1:]]
        difficulty = np.full(max(i for i, _ in rows) + 1, np.nan)
        for i, value in rows:
            difficulty[i] = value
    except (OSError, ValueError, IndexError) as e:
        raise EvalError(
            3, str(file), f"holds no table of (instruction, difficulty): {e}.", "Give the publisher's file."
        ) from e
    if np.isnan(difficulty).any():
        raise EvalError(3, str(file), "leaves instructions out.", "Give the publisher's file.")
    return difficulty


def read_gamed(file: Path) -> Rows:
    """df_gamed.csv: the rows of the gamed baselines, their difference of lengths in standard deviations. Raises `EvalError`."""
    try:
        with file.open(encoding="utf-8", newline="") as f:
            rows = list(csv.DictReader(f))
        apart, hard, liked = (
            np.array([float(r[name]) for r in rows])
            for name in ("std_delta_len", "instruction_difficulty", "preference")
        )
    except (OSError, ValueError, KeyError) as e:
        raise EvalError(3, str(file), f"is not the table of gamed baselines: {e}.", "Give the publisher's file.") from e
    return gamed_rows(np.tanh(apart), hard, liked)


def _values(file: Path) -> list[Any]:
    """A JSON array, or JSON lines (ended by \\n alone: answers hold other line ends)."""
    try:
        text = file.read_text(encoding="utf-8")
        whole = text.lstrip().startswith("[")
        values = json.loads(text) if whole else [json.loads(x) for x in text.split("\n") if x.strip()]
    except (OSError, ValueError, RecursionError) as e:
        raise EvalError(3, str(file), f"cannot be read: {e}.", "Give a JSON array, or JSON lines.") from e
    if not values:
        raise EvalError(3, str(file), "holds nothing.", "Give a JSON array, or JSON lines.")
    return list(values)


def _records(file: Path) -> list[dict[str, Any]]:
    values = _values(file)
    if not all(isinstance(v, dict) for v in values):
        raise EvalError(3, str(file), "holds other things than objects.", "Give the publisher's file.")
    return values


def _field(line: Any, name: str, file: Path | None) -> Any:
    if not isinstance(line, dict) or name not in line:
        raise EvalError(3, str(file), f"a line without {name!r}.", "Give the publisher's file.")
    return line[name]
