"""Rows of CSV, TSV and Parquet files."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from educe.errors import DataError, Refusal
from educe.files.jsonl import MAX_LINE_BYTES, how_to_mend

csv.field_size_limit(MAX_LINE_BYTES)
Found = tuple[int, dict[str, Any] | Refusal]  # (line or number of the row, the row)


def csv_rows(stream: BinaryIO, shown: str, delimiter: str, header: Sequence[str]) -> Iterator[Found]:
    """Rows by the line they begin on; all values stay text. `header` names the columns of a file that has no header line."""
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    quoting: Any = (
        csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    )  # text/tab-separated-values knows no quotes
    reader = csv.reader(_bounded(text, shown), delimiter=delimiter, strict=True, quoting=quoting)
    names = list(header)
    line = 1
    try:
        for row in reader:
            began, line = line, reader.line_num + 1
            if not row:  # a blank line
                continue
            if not names:
                names = _header(row, shown, began)
                continue
            yield began, _row(row, names, f"{shown}:{began}")
    except csv.Error as e:
        found = f"is not readable as a table here: {e}."
        raise DataError(4, f"{shown}:{line}", found, "Quote fields with line breaks or quotes in them.") from e
    finally:
        text.detach()


def _bounded(text: io.TextIOWrapper, shown: str) -> Iterator[str]:
    """The lines with their ends; the reader alone would take in all of one without an end. Raises `DataError`."""
    for number, line in enumerate(iter(partial(text.readline, MAX_LINE_BYTES), ""), 1):
        if len(line) == MAX_LINE_BYTES:
            found = f"is longer than {MAX_LINE_BYTES:,} characters."
            raise DataError(9, f"{shown}:{number}", found, "Write one row per line.")
        yield line


def _header(row: Sequence[str], shown: str, line: int) -> list[str]:
    names = [name.strip() for name in row]
    twice = next((name for name, number in Counter(names).items() if number > 1), None)
    if twice is not None:
        fix = "Rename one; if the file has no header line, name its columns: header: [...]."
        raise DataError(4, f"{shown}:{line}", f"has two columns named {twice!r}.", fix)
    return names


def _row(row: Sequence[str], names: Sequence[str], where: str) -> dict[str, Any] | Refusal:
    if len(row) != len(names):
        found = f"{len(row)} fields, and the table has {len(names)} columns."
        return Refusal(code="E-DATA-108", where=where, found=found, fix="Quote fields that hold the delimiter.")
    for text in row:
        if not text.isascii():
            odd = next((c for c in text if "\udc80" <= c <= "\udcff"), None)
            if odd is not None:
                found, fix = (
                    f"byte 0x{ord(odd) - 0xDC00:02x} is not UTF-8.",
                    how_to_mend(text.encode("utf-8", "surrogateescape")),
                )
                return Refusal(code="E-DATA-101", where=where, found=found, fix=fix)
        elif "\x00" in text:
            return Refusal(code="E-DATA-104", where=where, found="a NUL character.", fix="Remove it.")
    return dict(zip(names, row, strict=True))


def parquet_rows(path: Path, groups: tuple[int, int] | None, first: int) -> Iterator[Found]:
    """Rows of a Parquet file, or of some of its row groups, whose first row has the number `first`."""
    number = first - 1
    try:
        file = _parquet(path)
        chosen = list(range(*groups)) if groups is not None else None
        for batch in file.iter_batches(batch_size=1024, row_groups=chosen):
            for value in batch.to_pylist():
                number += 1
                yield number, value
    except Exception as e:
        if isinstance(e, DataError) or not _is_pyarrows(e):
            raise
        found = f"is not readable Parquet after row {number}: {e}."
        raise DataError(4, str(path), found, "Download or write it again.") from e


def parquet_groups(path: Path, about_bytes: int) -> list[tuple[int, int, int]]:
    """(first group, one past the last, number of the first row) of stretches of about so many bytes."""
    try:
        about = _parquet(path).metadata
        sizes = [(about.row_group(g).total_byte_size, about.row_group(g).num_rows) for g in range(about.num_row_groups)]
    except Exception as e:
        if isinstance(e, DataError) or not _is_pyarrows(e):
            raise
        raise DataError(4, str(path), f"is not readable Parquet: {e}.", "Download or write it again.") from e
    cuts: list[tuple[int, int, int]] = []
    first, size, row, before = 0, 0, 1, 1
    for g, (num_bytes, num_rows) in enumerate(sizes):
        size, row = size + num_bytes, row + num_rows
        if size >= about_bytes or g == len(sizes) - 1:
            cuts.append((first, g + 1, before))
            first, size, before = g + 1, 0, row
    return cuts


def _parquet(path: Path) -> Any:
    try:
        import pyarrow.parquet as pq
    except ImportError as e:
        fix = "pip install 'educe[parquet]'."
        raise DataError(7, str(path), "is Parquet, and pyarrow is not installed.", fix) from e
    return pq.ParquetFile(path)


def _is_pyarrows(e: Exception) -> bool:
    return type(e).__module__.startswith("pyarrow") or isinstance(
        e, (OSError, UnicodeDecodeError, ValueError, KeyError)
    )
