"""A data file as rows, each with its place; what poses as data is refused by name."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from educe.errors import DataError, Refusal
from educe.files.jsonl import parse_json, read_lines
from educe.types import Source

Row = tuple[Source, dict[str, Any] | Refusal]


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a JSONL file, a JSON array or a Parquet file, in order. Bad rows come as `Refusal`, bad files raise `DataError`."""
    head = _checked_head(path)
    if path.suffix == ".parquet" or head.startswith(b"PAR1"):
        rows = _parquet_rows(path)
    elif _is_array(head):
        rows = _array_rows(path)
    else:
        rows = _json_lines(path)
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise DataError(3, str(path), "holds no row.", "Give a file with at least one row.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A stretch of a data file: whole (`end` None), or the lines that begin in some bytes of it, the first numbered `first`."""

    path: Path
    start: int = 0
    end: int | None = None
    first: int = 1


def spans_of(path: Path, number: int) -> list[Span]:
    """The file in about so many stretches of lines; in one where it is not lines. Raises `DataError` for what is no data file."""
    head = _checked_head(path)
    lines = path.suffix != ".parquet" and not head.startswith(b"PAR1") and not _is_array(head)
    if number < 2 or not lines:
        return [Span(path=path)]
    size = path.stat().st_size
    cuts = [(0, 1)]  # where a stretch begins, and the number of its first line
    with path.open("rb") as f:
        at, line = 0, 1
        for k in range(1, number):
            wanted = size * k // number
            if wanted <= at:
                continue
            while block := f.read(min(1 << 20, wanted - at)):
                at += len(block)
                line += block.count(b"\n")
            at += len(f.readline())
            line += 1
            if at < size:
                cuts.append((at, line))
    ends = [*(start for start, _ in cuts[1:]), size]
    return [Span(path=path, start=start, end=end, first=line) for (start, line), end in zip(cuts, ends, strict=True)]


def read_span(span: Span) -> Iterator[Row]:
    """The rows of a stretch, as `read_rows` gives them."""
    return read_rows(span.path) if span.end is None else _json_lines(span.path, span)


def _is_array(head: bytes) -> bool:
    return head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _checked_head(path: Path) -> bytes:
    shown = str(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as e:
        raise DataError(1, shown, "does not exist.", "Check the path; it is relative to the recipe.") from e
    except OSError as e:
        raise DataError(2, shown, f"cannot be read: {e.strerror}.", "Check the path and its permissions.") from e
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
        raise DataError(2, shown, f"is {kind}.", "Give a .jsonl, .json or .parquet file.")
    try:
        with path.open("rb") as f:
            head = f.read(4096)
    except OSError as e:
        raise DataError(2, shown, f"cannot be read: {e.strerror}.", "Check its permissions.") from e
    if not head.strip():
        raise DataError(3, shown, "is empty.", "Give a file with at least one row.")
    _refuse_impostor(head, shown)
    return head


def _refuse_impostor(head: bytes, shown: str) -> None:
    if head.startswith(b"version https://git-lfs"):
        raise DataError(6, shown, "is a Git LFS pointer, not the data.", "Fetch it: git lfs pull.")
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(4, shown, "is UTF-16.", "Convert it: iconv -f utf-16 -t utf-8.")
    if head.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd")):
        raise DataError(4, shown, "is compressed.", "Decompress it first (gunzip, unzstd).")
    if head.lstrip()[:15].lower().startswith((b"<!doctype", b"<html")):
        raise DataError(6, shown, "is an HTML page, not the data.", "Download the raw file.")


def _json_lines(path: Path, span: Span | None = None) -> Iterator[Row]:
    where = (span.start, span.end, span.first) if span is not None else ()
    for number, line in read_lines(path, str(path), *where):
        source = Source(file=str(path), line=number)
        value = line if isinstance(line, Refusal) else parse_json(line, str(source))
        yield source, _as_row(value, source)


def _array_rows(path: Path) -> Iterator[Row]:
    texts: list[str] = []
    for number, line in read_lines(path, str(path)):
        if isinstance(line, Refusal):
            raise DataError(4, line.where, line.found, line.fix)
        texts += [""] * (number - 1 - len(texts))  # blank lines count
        texts.append(line)
    whole = parse_json("\n".join(texts), str(path), whole=True)
    if isinstance(whole, Refusal) and not isinstance(parse_json(next(filter(None, texts)), ""), Refusal):
        yield from _json_lines(path)
        return
    if isinstance(whole, Refusal) or not isinstance(whole, list):
        found = whole.found if isinstance(whole, Refusal) else "starts like a JSON array and is none."
        raise DataError(
            4, whole.where if isinstance(whole, Refusal) else str(path), found, "Write one JSON object per line."
        )
    for number, value in enumerate(whole, 1):
        source = Source(file=str(path), line=number)
        yield source, _as_row(value, source)


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as e:
        raise DataError(
            7, str(path), "is Parquet, and pyarrow is not installed.", "pip install 'educe[parquet]'."
        ) from e
    number = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                number += 1
                source = Source(file=str(path), line=number)
                yield source, _as_row(value, source)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        found = f"is not readable Parquet after row {number}: {e}."
        raise DataError(4, str(path), found, "Download or write it again.") from e


def _as_row(value: Any, source: Source) -> dict[str, Any] | Refusal:
    if isinstance(value, (Refusal, dict)):
        return value
    found = f"a {type(value).__name__}, not an object."
    return Refusal(code="E-DATA-105", where=str(source), found=found, fix="Write one JSON object per line.")
