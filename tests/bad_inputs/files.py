"""Bad files, made by code: numbers are those of the list of bad inputs."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

from check_command import GOOD, ROWS

# What stands in rows.jsonl, the code it is refused with, words of the message.
BOMB = gzip.compress((b"{" + b" " * 10**6 + b"\n") * 10)  # a part of 10 MB

FILES: dict[str, tuple[str | bytes, str, str]] = {
    "3 empty": (b"", "E-DATA-003", "empty"),
    "3 only a byte order mark": (b"\xef\xbb\xbf", "E-DATA-003", "empty"),
    "3 an array of nothing": ("[]", "E-DATA-003", "no row"),
    "4 white space": (" \n\t\r\n ", "E-DATA-003", "empty"),
    "4 much white space": ("\n" * 100_000, "E-DATA-003", "empty"),
    "9 UTF-16": (ROWS.encode("utf-16"), "E-DATA-004", "iconv -f utf-16"),
    "9 UTF-16 without a mark": (ROWS.encode("utf-16-le"), "E-DATA-005", "rows.jsonl:1:"),
    "17 gzip in name only": (b"\x1f\x8b\x08" + bytes(50), "E-DATA-004", "gzip stops"),
    "17 zstd in name only": (b"\x28\xb5\x2f\xfd" + bytes(50), "E-DATA-004", "zstd stops"),
    "18 a bomb": (BOMB * 3, "E-DATA-009", "200 times"),
    "19 gzip cut short": (gzip.compress(ROWS.encode())[:-20], "E-DATA-004", "gzip stops"),
    "20 Git LFS pointer": ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "E-DATA-006", "git lfs pull"),
    "21 error page": ("<!DOCTYPE html>\n<html>Not found</html>", "E-DATA-006", "raw file"),
    "24 an array cut short": ("[" + ",\n\n".join(GOOD), "E-DATA-004", "rows.jsonl:15:"),
    "22 Parquet in name only": (b"PAR1" + bytes(100), "E-DATA-004", "Parquet"),
    "no row that fits": ('{"x": 1}\n' * 3, "E-DATA-005", "rows.jsonl:1"),
}

# Files that are read all the same, as the same rows.
HANDLED: dict[str, str | bytes] = {
    "as it should be": ROWS,
    "8 byte order mark": b"\xef\xbb\xbf" + ROWS.encode(),
    "12 CRLF": ROWS.replace("\n", "\r\n"),
    "12 CR": ROWS.replace("\n", "\r"),
    "13 no final newline": ROWS.rstrip("\n"),
    "15 blank lines": "\n\n" + ROWS.replace("\n", "\n\n  \n"),
    "24 array named jsonl": "[" + ",\n\n".join(GOOD) + "]",
    "24 array on one line": "[" + ",".join(GOOD) + "]",
}


def _huge(path: Path) -> None:
    """One line of more than 1 GB: a sparse file, so that it takes no room."""
    with path.open("wb") as f:
        f.write(b'{"prompt": "')
        f.truncate(1_100_000_000)


def _nowhere(path: Path) -> None:
    path.symlink_to(path.parent / "gone.jsonl")


# Files that are no plain bytes: how to make one at a path, the code, words of the message.
MADE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "2 a directory of nothing": (lambda p: p.mkdir(), "E-DATA-010", "without data files"),
    "7 a link to nothing": (_nowhere, "E-DATA-001", "does not exist"),
    "16 a line of more than 1 GB": (_huge, "E-DATA-009", "longer than"),
}

TABLE = 'prompt,completion\n"the cat\n0",mat 0\n' + "".join(f"the cat {i},mat {i}\n" for i in range(1, 8))
