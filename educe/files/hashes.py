"""Hashes: SHA-256 of files and of canonical JSON, and the cache directory they key."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Between blocks a thread waits for the interpreter, 5 ms and more beside one that computes in Python.
_BLOCK = 64 * 2**20
_SEEN: dict[tuple[Path, int, int], str] = {}


def hash_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def hash_json(value: Any) -> str:
    """SHA-256 of the value as canonical JSON: equal values, equal hash."""
    return hash_bytes(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())


def hash_file(path: Path, alive: Callable[[], None] = lambda: None) -> str:
    """SHA-256; `alive` is called at each block."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as f:
        block = memoryview(bytearray(min(_BLOCK, os.fstat(f.fileno()).st_size + 1)))
        while size := f.readinto(block):
            digest.update(block[:size])
            alive()
    return digest.hexdigest()


def hash_file_once(path: Path, alive: Callable[[], None] = lambda: None) -> str:
    """The same, computed once in a process for a file that keeps its size and time."""
    found = path.stat()
    key = (path.resolve(), found.st_size, found.st_mtime_ns)
    if key not in _SEEN:
        _SEEN[key] = hash_file(path, alive)
    return _SEEN[key]


def mark(file: Path) -> tuple[int, int, int]:
    """Differs where a file has changed. Raises `OSError`."""
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def cache_dir() -> Path:
    """Where fetched models and measurements live: $EDUCE_CACHE, or the platform's cache directory."""
    if chosen := os.environ.get("EDUCE_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "educe"
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA", str(Path.home()))) / "educe" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))) / "educe"
