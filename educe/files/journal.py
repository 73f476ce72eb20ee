"""Files that grow by a line at a time while something goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

from educe.files.atomic import sync, told, write_text


class Journal:
    """JSON lines, appended as they come. A disk that is full or refuses delays them: they are kept and written with the next ones, in
    their order, each once; `say` gets a word about the first time."""

    def __init__(
        self,
        file: Path,
        say: Callable[[str], None],
        also: Callable[[dict[str, Any]], None] = lambda _: None,
        lost: str = "the run's history has a gap there",
    ) -> None:
        """`also` gets each line that is appended; `lost`: what it means that a damaged one is left out."""
        self.file, self._say, self._also, self._lost = file, say, also, lost
        self._waiting: list[bytes] = []
        self._told = False

    def begin(self, keep: Callable[[dict[str, Any]], bool], *, keys: Set[str]) -> None:
        """Keep those lines that earlier processes wrote and that `keep` says yes to. Lines that a dying machine damaged, or without
        one of `keys`, are left out, and said. Where nothing is left out the file stays as it is."""
        lines, damaged, torn = _readable(self.file, keys)
        if damaged:
            what = "a damaged line is" if damaged == 1 else f"{damaged} damaged lines are"
            self._say(f"warning: {self.file.name}: {what} left out; {self._lost}")
        kept = [line for line in lines if keep(line)]
        if damaged or torn or len(kept) < len(lines) or not self.file.is_file():
            write_text(self.file, b"".join(map(_line, kept)).decode())

    def append(self, *lines: dict[str, Any]) -> None:
        """Where the process is killed meanwhile, a first part of `lines` may be there, and half a line, which is no damage. NaN is
        refused: a reader could not read it."""
        self._waiting += map(_line, lines)
        try:
            self._write()
        except OSError as e:
            self._tell(e)
        for line in lines:
            self._also(line)

    def settle(self, *, must: bool) -> None:
        """Flush to the device what is written. With `must` nothing waits any more; raises `MachineError` where that cannot be."""
        try:
            self._write()
            if self.file.exists():
                sync(self.file)
        except OSError as e:
            if must:
                with told(self.file):
                    raise
            self._tell(e)

    def _tell(self, e: OSError) -> None:
        if not self._told:
            self._say(f"warning: {self.file} cannot be written: {e.strerror}. Its lines are kept, to be written later.")
        self._told = True

    def _write(self) -> None:
        """All that waits, or nothing: half a line is taken back."""
        if not self._waiting:
            return
        with self.file.open("ab", buffering=0) as f:
            end, waiting = f.seek(0, os.SEEK_END), memoryview(b"".join(self._waiting))
            try:
                while waiting:
                    waiting = waiting[f.write(waiting) :]
            except OSError:
                f.truncate(end)
                raise
        self._waiting, self._told = [], False


def _line(line: dict[str, Any]) -> bytes:
    return (json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _readable(file: Path, keys: Set[str]) -> tuple[list[dict[str, Any]], int, bool]:
    """The lines of a file, how many are none, and whether the last one is torn: its process was killed, and that is no damage."""
    lines: list[dict[str, Any]] = []
    *whole, torn = file.read_bytes().split(b"\n") if file.is_file() else [b""]
    for raw in whole:
        try:
            line = json.loads(raw.decode("utf-8"))
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and keys <= line.keys():
            lines.append(line)
    return lines, len(whole) - len(lines), bool(torn)
