"""Data files as rows, each with its place: JSONL, JSON arrays, one JSON object, Parquet, CSV, TSV, text; plain, gzip or zstd.

Rows stream: a file is never held in memory. What a file is is told by its first bytes; the name decides only between tables,
text and lines of JSON.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from educe.data.json_array import elements
from educe.data.opening import compression_of, head_of, open_data
from educe.data.tables import csv_rows, parquet_groups, parquet_rows
from educe.data.tools import a_kind
from educe.errors import DataError, Refusal
from educe.files.jsonl import how_to_mend, lines_of, parse_json
from educe.types import Source

Row = tuple[Source, dict[str, Any] | Refusal]
Container = Literal["lines", "array", "object", "parquet", "csv", "tsv", "text", "document"]
SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet", ".csv", ".tsv", ".txt")
MOST_OBJECT_BYTES = 10**9
# What parts texts in a .txt file: this mark, or else blank lines; of a "document", read whole, the mark alone.
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A stretch of a data file: whole (`end` None), or the lines that begin in some bytes of it, or some row groups of a Parquet
    file; its first row has the number `first`. `header` names the columns of a table that has no header line."""

    path: Path
    container: Container
    start: int = 0
    end: int | None = None
    first: int = 1
    header: tuple[str, ...] = ()


def read_rows(path: Path, header: Sequence[str] = ()) -> Iterator[Row]:
    """All rows of a file in order. Bad rows come as `Refusal`, bad files raise `DataError`."""
    for span in spans_of(path, None, header):
        yield from read_span(span)


def spans_of(path: Path, about_bytes: int | None, header: Sequence[str] = (), *, documents: bool = False) -> list[Span]:
    """The file in stretches of about so many bytes where it is plain lines or Parquet, else (and with None) in one. `documents`: a
    text file is one text."""
    container = container_of(path)
    if documents and container == "text":
        container = "document"
    whole = Span(path=path, container=container, header=tuple(header))
    if about_bytes is None:
        return [whole]
    if container == "parquet":
        cuts = parquet_groups(path, about_bytes)
        return [Span(path=path, container=container, start=a, end=b, first=n) for a, b, n in cuts] or [whole]
    if container != "lines" or compression_of(path) or path.stat().st_size <= about_bytes:
        return [whole]
    size = path.stat().st_size
    begins = [(0, 1)]  # where a stretch begins, and the number of its first line
    with path.open("rb") as f:
        at, line = 0, 1
        for k in range(1, -(-size // about_bytes)):
            wanted = size * k // -(-size // about_bytes)
            if wanted <= at:
                continue
            while block := f.read(min(1 << 20, wanted - at)):
                at += len(block)
                line += block.count(b"\n")
            at += len(f.readline())
            line += 1
            if at < size:
                begins.append((at, line))
    ends = [*(start for start, _ in begins[1:]), size]
    return [
        Span(path=path, container=container, start=start, end=end, first=line)
        for (start, line), end in zip(begins, ends, strict=True)
    ]


def read_span(span: Span) -> Iterator[Row]:
    """The rows of a stretch."""
    empty = True
    for row in _rows_of(span):
        empty = False
        yield row
    if empty and span.start == 0:
        raise DataError(3, str(span.path), "holds no row.", "Give a file with at least one row.")


def _rows_of(span: Span) -> Iterator[Row]:
    if span.container == "parquet":
        groups = (span.start, span.end) if span.end is not None else None
        for number, value in parquet_rows(span.path, groups, span.first):
            yield _placed(str(span.path), number, value)
        return
    with open_data(span.path) as stream:
        yield from _READERS[span.container](stream, span)


def sample_rows(paths: Sequence[Path], number: int, header: Sequence[str] = ()) -> list[Row]:
    """About `number` rows spread over the files, the same ones every time, without reading plain lines through; the line
    numbers of those are not known (0). Of other files the first rows."""
    rows: list[Row] = []
    each = -(-number // max(1, len(paths)))
    for path in paths[:: max(1, len(paths) // number)]:
        if container_of(path) != "lines" or compression_of(path):
            rows += [row for row, _ in zip(read_rows(path, header), range(each), strict=False)]
            continue
        size, shown, seen = path.stat().st_size, str(path), -1
        with path.open("rb") as f:
            for k in range(each):
                f.seek(max(0, size * k // each - 1))
                if k:
                    f.readline()
                at = f.tell()
                found = next(iter(lines_of(f, shown, 0)), None) if at > seen else None
                if found is not None:
                    seen = at
                    value = found[2] if isinstance(found[2], Refusal) else parse_json(found[2], shown)
                    rows.append(_placed(shown, 0, value))
    return rows


def container_of(path: Path) -> Container:
    """What kind of file it is. Raises `DataError` for what is no data file."""
    head = head_of(path)
    if head.startswith(b"PAR1"):
        return "parquet"
    suffix = next((s for s in reversed(path.suffixes) if s.lower() in SUFFIXES), "").lower()
    if suffix == ".parquet":
        raise DataError(4, str(path), "is named Parquet and is none.", "Download or write it again.")
    if suffix in (".csv", ".tsv", ".txt"):
        return {".csv": "csv", ".tsv": "tsv", ".txt": "text"}[suffix]  # type: ignore[return-value]
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if start.startswith(b"["):
        first, _, rest = start.partition(b"\n")
        lines = bool(rest.strip()) and _parses(first)
        return "lines" if lines else "array"
    return "object" if re.match(rb"\{[ \t\r]*\n", start) else "lines"


def _parses(line: bytes) -> bool:
    try:
        return not isinstance(parse_json(line.decode(), ""), Refusal)
    except UnicodeDecodeError:
        return False


# --- readers: one for each container ------------------------------------------------------------------------------------


def _lines(stream: BinaryIO, span: Span) -> Iterator[Row]:
    shown = str(span.path)
    if span.start:
        stream.seek(span.start)
    num_bytes = span.end - span.start if span.end is not None else None
    for number, at, line in lines_of(stream, shown, span.first, num_bytes):
        source = Source(file=shown, line=number, offset=span.start + at)
        value = line if isinstance(line, Refusal) else parse_json(line, f"{shown}:{number}")
        yield source, value if isinstance(value, (dict, Refusal)) else _no_object(value, source)


def _array(stream: BinaryIO, span: Span) -> Iterator[Row]:
    shown = str(span.path)
    for number, (line, column, text) in enumerate(elements(stream, shown), 1):
        yield _placed(shown, number, parse_json(text, shown, at=(line, column)))


def _object(stream: BinaryIO, span: Span) -> Iterator[Row]:
    shown = str(span.path)
    raw = stream.read(MOST_OBJECT_BYTES + 1)
    if len(raw) > MOST_OBJECT_BYTES:
        raise DataError(9, shown, "is one JSON object of more than 1 GB.", "Write one row per line.")
    try:
        value = parse_json(raw.decode("utf-8-sig"), shown, at=(1, 1))
    except UnicodeDecodeError as e:
        found = f"byte 0x{raw[e.start]:02x} is not UTF-8."
        raise DataError(4, f"{shown}:{raw[: e.start].count(10) + 1}", found, how_to_mend(raw)) from e
    if isinstance(value, Refusal):
        raise DataError(4, value.where, f"starts like one JSON object and is none: {value.found}", value.fix)
    yield _placed(shown, 1, value)


def _table(stream: BinaryIO, span: Span) -> Iterator[Row]:
    shown = str(span.path)
    for line, value in csv_rows(stream, shown, "," if span.container == "csv" else "\t", span.header):
        yield Source(file=shown, line=line), value


def _texts(stream: BinaryIO, span: Span) -> Iterator[Row]:
    """Texts by the line they begin on."""
    shown = str(span.path)
    marked, parted = _holds(span.path, END_OF_TEXT.encode()), span.container == "text"
    begun, parts, spoilt = 0, list[str](), None  # of the text being read; what is wrong with it
    for number, _, line in lines_of(stream, shown, 1, blank=True):
        begun = begun or number
        if isinstance(line, Refusal):
            spoilt = spoilt or line
            continue
        pieces = line.split(END_OF_TEXT) if marked else [line]
        for k, piece in enumerate(pieces):
            parts.append(piece)
            begun = begun or number
            if k < len(pieces) - 1 if marked else parted and not piece.strip():
                yield from _text(shown, begun, parts, spoilt)
                begun, parts, spoilt = 0, [], None
    yield from _text(shown, begun, parts, spoilt)


def _text(shown: str, begun: int, parts: Sequence[str], spoilt: Refusal | None) -> Iterator[Row]:
    """A text and where it begins, nothing for blank lines; refused whole if one of its lines is."""
    text = "\n".join(parts).strip("\n")
    if text.strip() or spoilt is not None:
        yield Source(file=shown, line=begun), spoilt if spoilt is not None else {"text": text}


def _holds(path: Path, mark: bytes) -> bool:
    with open_data(path) as f:
        before = b""
        while block := f.read(1 << 20):
            if mark in before + block:
                return True
            before = block[-len(mark) :]
    return False


def _placed(shown: str, number: int, value: Any) -> Row:
    source = Source(file=shown, line=number)
    return source, value if isinstance(value, (dict, Refusal)) else _no_object(value, source)


def _no_object(value: Any, source: Source) -> Refusal:
    found = f"{a_kind(value)}, not an object."
    return Refusal(code="E-DATA-105", where=str(source), found=found, fix="Write one JSON object per line.")


_READERS: dict[str, Any] = {
    "lines": _lines,
    "array": _array,
    "object": _object,
    "csv": _table,
    "tsv": _table,
    "text": _texts,
    "document": _texts,
}
