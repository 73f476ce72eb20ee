"""Strict, line-accurate JSON: what the standard parser lets pass silently is refused here, with line and column."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from educe.errors import DataError, Refusal, RunError
from educe.files.atomic import replacing

MAX_DEPTH = 100
MAX_LINE_BYTES = 2**28  # parsing takes five times as much memory
_SPACED = re.compile(r'"\s+:')  # keys are counted by what stands behind them
_UNFIT = re.compile("[\x00\ud800-\udfff]")


class _Duplicate(ValueError):
    pass


class _NotJson(ValueError):
    pass


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise _Duplicate(key)
        made[key] = value
    return made


def _constant(name: str) -> Any:
    raise _NotJson(f"{name} is not a JSON value")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise _NotJson(f"the number {text[:20]} is too large for a float")
    return value


def _integer(text: str) -> int:
    if len(text) > 300:
        raise _NotJson(f"an integer of {len(text)} digits")
    return int(text)


def _too_deep(text: str) -> bool:
    """Depth of nesting, counted before parsing: the C parser would exhaust the stack. Brackets in strings do not count."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return False
    depth = 0
    for char in re.sub(r'"(?:[^"\\]|\\.)*"', "", text):
        depth += (char in "[{") - (char in "]}")
        if depth > MAX_DEPTH:
            return True
    return False


def _quick(text: str) -> Any | None:
    """The value of an ordinary text, by a parser that is less strict than this module: None where strictness could matter.

    It keeps the last of two equal keys (so keys are counted), turns large integers into floats (so floats are not taken), and
    takes NUL and deeper nesting (so escapes and many brackets are not taken).
    """
    if _SPACED.search(text) or "\\u" in text or '\\\\"' in text or text.count("[") + text.count("{") > MAX_DEPTH:
        return None
    try:
        value = orjson.loads(text)
    except (orjson.JSONDecodeError, TypeError):
        return None
    keys = _num_keys(value)
    return value if keys is not None and keys == text.count('":') - text.count('\\":') else None


def _num_keys(value: Any) -> int | None:
    """Keys of all objects in a value; None if it holds a float."""
    if isinstance(value, str):
        return 0
    if isinstance(value, (dict, list)):
        number = len(value) if isinstance(value, dict) else 0
        for inner in value.values() if isinstance(value, dict) else value:
            if not isinstance(inner, str):
                more = _num_keys(inner)
                if more is None:
                    return None
                number += more
        return number
    return None if isinstance(value, float) else 0


def parse_json(text: str, place: str, *, at: tuple[int, int] | None = None) -> Any | Refusal:
    """`text` as JSON, or why not. `place` is `file:line`; the column is added where it is known.

    With `at`, `place` is a file's name and the text begins there in it (line, column): both are added.
    """
    quick = _quick(text)
    if quick is not None:
        return quick
    file, place = place, place if at is None else f"{place}:{at[0]}"
    if _too_deep(text):
        return Refusal(
            code="E-DATA-102", where=place, found=f"JSON nested deeper than {MAX_DEPTH}.", fix="Flatten the row."
        )
    try:
        value = json.loads(
            text, object_pairs_hook=_pairs, parse_constant=_constant, parse_float=_finite, parse_int=_integer
        )
    except _Duplicate as e:
        return Refusal(code="E-DATA-103", where=place, found=f"key {str(e)!r} appears twice.", fix="Keep one of them.")
    except _NotJson as e:
        return Refusal(code="E-DATA-104", where=place, found=f"{e}.", fix="Use null or a string instead.")
    except json.JSONDecodeError as e:
        fix = "Write one JSON object per line, without comments or trailing commas."
        where = f"{place}:{e.colno}"
        if at is not None:
            where = f"{file}:{at[0] + e.lineno - 1}:{e.colno + (at[1] - 1 if e.lineno == 1 else 0)}"
        return Refusal(code="E-DATA-102", where=where, found=f"not JSON: {e.msg}.", fix=fix)
    unfit = _UNFIT.search(text) or ("\\u" in text and _unfit(value))
    if unfit and unfit[0] == "\x00":
        return Refusal(code="E-DATA-104", where=place, found="a NUL character.", fix="Remove it.")
    if unfit:
        found = "a lone surrogate (half of a character)."
        return Refusal(code="E-DATA-104", where=place, found=found, fix="Write the text out again as UTF-8.")
    return value


def _unfit(value: Any) -> re.Match[str] | None:
    """The first character, in a key or a string, that text cannot hold."""
    if isinstance(value, str):
        return _UNFIT.search(value)
    if isinstance(value, dict):
        return next(filter(None, (_unfit(k) or _unfit(v) for k, v in value.items())), None)
    return next(filter(None, map(_unfit, value)), None) if isinstance(value, list) else None


def lines_of(
    stream: BinaryIO, shown: str, first: int = 1, num_bytes: int | None = None, *, blank: bool = False
) -> Iterator[tuple[int, int, str | Refusal]]:
    """(number from `first`, offset in bytes from here, text) of the lines of UTF-8 text; blank ones are skipped unless `blank`.

    Lines end in \\n, \\r\\n or \\r (U+2028 inside a string is text); a byte order mark is tolerated. `shown` is the file's name in
    messages. Only the lines that begin in the next `num_bytes` are read. Raises `DataError` for a line of more than
    `MAX_LINE_BYTES`, without reading all of it.
    """
    for number, (at, raw) in enumerate(_raw_lines(stream, shown, first, num_bytes), first):
        line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
        if not blank and not line.strip():
            continue
        try:
            yield number, at, line.decode("utf-8")
        except UnicodeDecodeError as e:
            column = len(line[: e.start].decode("utf-8", "replace")) + 1
            found = f"byte 0x{line[e.start]:02x} is not UTF-8."
            fix = how_to_mend(line)
            yield number, at, Refusal(code="E-DATA-101", where=f"{shown}:{number}:{column}", found=found, fix=fix)


def how_to_mend(raw: bytes) -> str:
    """What to do with bytes that are not UTF-8, by what stands around them."""
    raw = raw[: 1 << 16]
    if sum(b < 32 and b not in b"\t\n\r\x0c\x1b" for b in raw) > len(raw) // 50:
        return "That is no text: leave the file out."
    if any(b >= 0x80 for b in raw.decode("utf-8", "ignore").encode()):
        return "The rest of it is UTF-8: mend that place, or drop such bytes: iconv -c -f utf-8 -t utf-8."
    return "Convert the file from what it is in, such as iconv -f latin1 -t utf-8."


def _raw_lines(stream: BinaryIO, shown: str, first: int, num_bytes: int | None) -> Iterator[tuple[int, bytes]]:
    """Lines without their ends, each with the offset of its first byte."""
    at = 0
    for number, raw in enumerate(iter(partial(stream.readline, MAX_LINE_BYTES), b""), first):
        if num_bytes is not None and at >= num_bytes:
            return
        if len(raw) == MAX_LINE_BYTES:
            found = f"is longer than {MAX_LINE_BYTES:,} bytes."
            raise DataError(9, f"{shown}:{number}", found, "Write one row per line.")
        line = raw.rstrip(b"\r\n")
        if b"\r" not in line:
            yield at, line
        else:
            begun = at
            for piece in line.split(b"\r"):
                yield begun, piece
                begun += len(piece) + 1
        at += len(raw)


def write_jsonl(path: Path, rows: Iterator[dict[str, Any]] | list[dict[str, Any]]) -> None:
    """One compact object per line, in place of what was there, at once; NaN is refused (a reader could not read it)."""
    with replacing(path) as part, part.open("w", encoding="utf-8", newline="\n") as f:
        for row in rows:
            f.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a file that educe wrote. A torn last line (a run that was killed while writing) is left out.

    Raises `RunError` for any other line that is no object.
    """
    rows: list[dict[str, Any]] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines):
        if not line:
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except ValueError:  # not JSON, or cut inside a character
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif number != len(lines) - 1:
            fix = "Delete that line, or the file, and run the same command again."
            raise RunError(2, f"{path}:{number + 1}", "is damaged: not a JSON object.", fix)
    return rows
