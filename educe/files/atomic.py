"""Writing so that a reader sees the old state or the new one, never something between (Pillai et al., OSDI 2014)."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import psutil

from educe.errors import MachineError, UsageError
from educe.files.hashes import hash_bytes, hash_file, hash_json

MANIFEST = "manifest.json"
_SELF = "manifest_sha256"
MAX_MANIFEST_BYTES = 64 * 2**20
MAX_FILE_BYTES = 2**62


def sync(path: Path) -> None:
    """Flush a file or directory to the device. Directories cannot be opened for that on Windows: there it does nothing."""
    if path.is_dir() and os.name == "nt":
        return
    fd = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# Of a disk or a system at its limits, not of what lies there.
_MAY_PASS = frozenset(
    (
        errno.EIO,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.EACCES,
        errno.EPERM,
        getattr(errno, "ESTALE", errno.EIO),
    )
)


def make_directory(path: Path, *, mode: int = 0o777) -> None:
    """Make a directory and those above it, each flushed into the one that holds it: what is written there later is found after
    a power cut."""
    if path.is_dir():
        return
    make_directory(path.parent, mode=mode)
    path.mkdir(mode, exist_ok=True)
    sync(path.parent)


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """Turn what a file system refuses (full, read-only, forbidden) into one teaching message."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise _full(path) from e
        if e.errno is None:
            raise
        fix = "Choose a place you may write to."
        raise MachineError(4, str(path), f"cannot be written: {e.strerror}.", fix) from e
    except Exception as e:
        if "No space left" in str(e) or "Disk quota" in str(e):  # writers in Rust and C++ have errors of their own
            raise _full(path) from e
        raise


def _full(path: Path) -> MachineError:
    return MachineError(2, str(path), "the disk is full.", "Free some space and run the same command again.")


def make_private(path: Path) -> None:
    """Make a directory, and those above it, that only its owner may enter, whatever the umask; those that exist stay as they are. Each
    is flushed into the one that holds it: what is written there later is found after a power cut."""
    make_directory(path, mode=0o700)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place to write a file's new content to; it takes the file's name when the block ends well, flushed before and after."""
    with told(path):
        make_private(path.parent)
        _remove_left_over(path)
        part = _beside(path, "part")
        try:
            part.unlink(missing_ok=True)
            part.touch(exist_ok=False)  # never through a link that somebody laid there
            yield part
            sync(part)
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a file's content atomically."""
    with replacing(path) as part:
        part.write_bytes(text.encode("utf-8"))


def write_new(path: Path, text: str, *, over: str = "") -> None:
    """Write a file where a user said, never over something else: what stands there must be the same text, or begin with `over`.

    Raises `UsageError`.
    """
    if not path.name:
        raise UsageError(101, f"'{path}'", "is no name of a file.", "Give one.")
    with told(path):
        there, plain = path.is_symlink() or path.exists(), path.is_file() and not path.is_symlink()
        old = path.read_bytes() if plain and path.stat().st_size <= 10**9 else b""
    if there and not (plain and (old == text.encode() or (over and old.startswith(over.encode())))):
        raise UsageError(101, str(path), "exists, and is nothing that this command wrote.", "Give another name.")
    write_text(path, text)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically, indented for people."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def directory(
    path: Path, *, about: dict[str, Any], private: bool = True, alive: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """Build a directory in a temporary place beside `path`, then move it there whole, manifest last (`begin`, `finish`). On any
    error nothing is left and an older `path` stays as it was. `private`: only its owner may enter it."""
    part = begin(path, private=private)
    try:
        yield part
        finish(part, path, about, alive)
    except BaseException as e:
        abandon(part, path)
        with told(path):
            raise e


def begin(path: Path, *, private: bool = True) -> Path:
    """An empty temporary place beside `path`, for what will be moved there."""
    with told(path):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        make_directory(path.parent, mode=0o700 if private else 0o777)
        _remove_left_over(path)
        part = _beside(path, "part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(mode=0o700 if private else 0o777)
        return part


def finish(part: Path, path: Path, about: dict[str, Any], alive: Callable[[], None] = lambda: None) -> None:
    """Give what lies in `part` its manifest and its name; `alive` is called at each piece of that.

    The manifest holds `about`, each file's size and SHA-256, and a hash of itself; every file and both directories are flushed
    before and after the rename. An older `path` is moved aside, and deleted only when the new one is in place.
    """
    if "files" in about:
        raise ValueError("the manifest has files of its own")
    with told(path):
        files = sorted(p for p in part.rglob("*") if p.is_file())
        listed = {
            p.relative_to(part).as_posix(): {"bytes": p.stat().st_size, "sha256": hash_file(p, alive)} for p in files
        }
        manifest = part / MANIFEST
        held = {**about, "files": listed}
        manifest.write_text(json.dumps({**held, _SELF: hash_json(held)}, indent=2) + "\n", encoding="utf-8")
        for p in [*files, manifest, *[d for d in part.rglob("*") if d.is_dir()], part]:
            sync(p)
            alive()
        old = _beside(path, "old")
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.replace(old)
        part.replace(path)
        sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)


def abandon(part: Path, path: Path) -> None:
    """Leave nothing of `part`; an older `path` that was moved aside gets its name back."""
    shutil.rmtree(part, ignore_errors=True)
    old = _beside(path, "old")
    if old.exists() and not path.exists():
        old.replace(path)


def remove(path: Path) -> None:
    """Delete a directory: it loses its name first, so that half of it never passes for the whole."""
    if path.is_symlink():
        path.unlink()
        return
    gone = _beside(path, "part")
    shutil.rmtree(gone, ignore_errors=True)
    path.replace(gone)
    sync(path.parent)
    shutil.rmtree(gone, ignore_errors=True)


def recover(place: Path) -> None:
    """What processes that were killed left in `place`, where no other may write now: unfinished files and directories are deleted,
    one that had been moved aside for a new one that never came gets its name back."""
    for left in sorted(place.glob(".*.*.*.old")):
        path = left.with_name(left.name[1:].rsplit(".", 3)[0])
        if path.exists():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.replace(path)
    for left in place.glob(".*.*.*.part"):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _beside(path: Path, end: str) -> Path:
    return path.with_name(f".{path.name}.{_here()}.{os.getpid()}.{end}")


def _here() -> str:
    """Names what process numbers count within: this machine, or this container on it."""
    space = Path("/proc/self/ns/pid")
    return hash_bytes(f"{platform.node()} {space.readlink() if space.is_symlink() else ''}".encode())[:8]


def _remove_left_over(path: Path) -> None:
    """Unfinished places of processes that were killed. Another machine may write to the same disk: what was not left here goes
    when nobody wrote there for an hour."""
    for left in path.parent.glob(f".{path.name}.*.part"):
        where, owner = left.name.split(".")[-3:-1]
        if not owner.isdigit() or psutil.pid_exists(int(owner)):
            continue
        with contextlib.suppress(FileNotFoundError):  # another process sweeps too
            newest = max((p.stat().st_mtime for p in (left, *left.rglob("*"))), default=0.0)
            if where == _here() or time.time() - newest > 3600:
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def verify(path: Path) -> dict[str, Any] | str:
    """The manifest of a directory made by `directory`, or a sentence saying what is wrong with it.

    Nothing but the manifest is parsed, no link is followed, and only regular files are opened: a pipe would be read forever. Raises
    `MachineError` where the disk refuses for a reason that may pass.
    """
    try:
        return _verified(path)
    except OSError as e:
        if e.errno not in _MAY_PASS:
            return f"it cannot be read: {e.strerror}."
        fix = "Look to the disk and run the same command again. Where it stays so, move that directory elsewhere."
        raise MachineError(4, str(path), f"cannot be read: {e.strerror}.", fix) from e


def _verified(path: Path) -> dict[str, Any] | str:
    if path.is_symlink():
        return "it is a link to another place."
    if not _is_plain(path / MANIFEST):
        return "its manifest is missing or no regular file."
    try:
        if (path / MANIFEST).stat().st_size > MAX_MANIFEST_BYTES:
            return f"its manifest is larger than {MAX_MANIFEST_BYTES // 2**20} MB."
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        listed = {name: (int(f["bytes"]), str(f["sha256"])) for name, f in manifest["files"].items()}
        if manifest.pop(_SELF, None) != hash_json(manifest):
            return "its manifest differs from its own SHA-256."
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as e:
        return f"its manifest cannot be read ({type(e).__name__})."
    odd = next((n for n, (size, _) in listed.items() if not _stays_inside(n) or size > MAX_FILE_BYTES), None)
    if odd is not None:
        return f"its manifest names {odd[:100]!r} of {min(listed[odd][0], MAX_FILE_BYTES):,} bytes, which cannot be inside."
    faults = (wrong for name, found in listed.items() if (wrong := _fault(path, name, *found)))
    return next(faults, "") or _unlisted(path, listed) or manifest


def _fault(path: Path, name: str, size: int, digest: str) -> str:
    """What is wrong with a listed file."""
    file = path / name
    if any(place.is_symlink() for place in (file, *file.parents[: name.count("/")])):
        return f"{name} is a link to another place."
    if not _is_plain(file):
        return f"{name} is no regular file." if file.exists() else f"{name} is missing."
    if file.stat().st_size != size:
        return f"{name} has {file.stat().st_size} bytes, expected {size}."
    return f"{name} differs from its SHA-256." if hash_file(file) != digest else ""


def _unlisted(path: Path, listed: Collection[str]) -> str:
    """What lies there besides; systems leave hidden files of their own."""
    there = (p for p in path.rglob("*") if (p.is_symlink() or not p.is_dir()) and not p.name.startswith("."))
    more = sorted({p.relative_to(path).as_posix() for p in there} - {*listed, MANIFEST})
    return f"it holds {more[0]}, which its manifest does not name." if more else ""


def _is_plain(file: Path) -> bool:
    """A regular file itself, no link to one."""
    try:
        return stat.S_ISREG(file.lstat().st_mode)
    except (OSError, ValueError):  # ValueError: a NUL in its name
        return False


def _stays_inside(name: str) -> bool:
    """A name as `directory` writes it: relative, with forward slashes, going down only."""
    pieces = name.split("/")
    odd = {"", ".", ".."} & set(pieces) or "\\" in name or ":" in pieces[0] or "\0" in name
    return not odd and len(name) <= 1000 and max(map(len, pieces)) <= 200


def existing(path: Path) -> Path:
    """The path, or the nearest above it that is there."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def need_space(path: Path, needed_bytes: int, what: str, fix: str = "") -> None:
    """Refuse before the work, not in the middle of it, when `path`'s disk has too little room. `fix`: in place of the usual advice."""
    free = shutil.disk_usage(existing(path)).free
    if free < needed_bytes:
        found = f"{what} needs {sized(needed_bytes)}, {sized(free)} are free."
        usual = "Free some space or choose another place with `runs:` in the recipe."
        raise MachineError(2, str(path), found, fix or usual)


def size_of(place: Path) -> int:
    """Bytes of all files in a directory; a link is none."""
    return sum(p.stat().st_size for p in place.rglob("*") if p.is_file() and not p.is_symlink())


def sized(num_bytes: float) -> str:
    """Bytes in the unit that leaves a few digits."""
    unit, name = next(((u, n) for u, n in ((1e9, "GB"), (1e6, "MB")) if num_bytes >= u / 10), (1e3, "kB"))
    return f"{num_bytes / unit:.1f} {name}"
