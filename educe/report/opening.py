"""Files of a run opened while it may still write them: line by line, and again only where they changed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import orjson

from educe.files.hashes import mark

Row = dict[str, Any]
T = TypeVar("T")
Kept = dict[Path, tuple[tuple[int, int, int], Any]]
"""What was read of a file, and what the file was then: its number, its size, when it was written."""


def opened(file: Path, read: Callable[[Any], T], kept: Kept) -> T:
    """What `read` makes of a file: of the rows of a .jsonl, else of its value. Raises `OSError`, `ValueError`, `RecursionError`."""
    now = mark(file)
    if file in kept and kept[file][0] == now:
        found: T = kept[file][1]
        return found
    made = read(_lines(file) if file.suffix == ".jsonl" else json.loads(file.read_text(encoding="utf-8")))
    kept[file] = now, made
    return made


def plain_json(file: Path) -> Any:
    """A file's value, without what JSON has no words for (NaN, numbers beyond floats: null); None where it is missing or damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"), parse_constant=lambda _: None, parse_float=_finite)
    except (OSError, ValueError, RecursionError):
        return None


def _finite(text: str) -> float | None:
    return value if math.isfinite(value := float(text)) else None


def _lines(file: Path) -> Iterator[Row]:
    """A last line that is torn, or not written to its end yet, is left out. Raises `ValueError` for any other bad one."""
    with file.open("rb") as f:
        for raw in f:
            try:
                row = orjson.loads(raw)
            except orjson.JSONDecodeError:
                if not raw.endswith(b"\n"):
                    return
                row = json.loads(raw.decode("utf-8")) if raw.strip() else None  # NaN, and integers beyond 64 bits
            if isinstance(row, dict):
                yield row
