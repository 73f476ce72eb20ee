"""What a recipe calls files → the data files: a file, a directory, a glob, a data set on the Hub, standard input."""

from __future__ import annotations

import atexit
import difflib
import fnmatch
import itertools
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from educe.data.sources import SUFFIXES, read_rows
from educe.errors import DataError
from educe.secrets import redacted

HUB = "hf://datasets/"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w-]*/[A-Za-z0-9][\w.-]*")
_PACKED = (".gz", ".zst")
_NO_DATA = re.compile(r"(?i)(readme|licen[cs]e|dataset_infos?)\.")
_NAMED = re.compile(rf"({'|'.join(map(re.escape, SUFFIXES))})({'|'.join(map(re.escape, _PACKED))})?$", re.I)
_stdin: list[Path] = []
_read: dict[tuple[Path, int, int, tuple[str, ...]], bool] = {}
_MOST_EMPTY = 65_536  # bytes of a file that may hold no row: a header, an empty list, a Parquet schema


def find_files(spec: str, without: Path | None = None, header: Sequence[str] = ()) -> list[Path]:
    """The data files that `spec` names, sorted by path; none that lie in `without`, where educe itself writes, and none without a row
    where others have some (`header`: as the rows are read). Raises `DataError` where there are none.
    """
    found = _all(spec, without)
    empty = set(_empty(found, header))
    return [f for f in found if f not in empty]


def empty_files(spec: str, without: Path | None = None, header: Sequence[str] = ()) -> list[Path]:
    """Those that `find_files` leaves out, since they hold no row and others do."""
    return _empty(_all(spec, without), header)


def _empty(found: Sequence[Path], header: Sequence[str]) -> list[Path]:
    if len(found) < 2:
        return []
    empty = [f for f in found if not _holds_rows(f, header)]
    return empty if len(empty) < len(found) else []


def _holds_rows(file: Path, header: Sequence[str]) -> bool:
    """Whether there is a first row, or something that is none; a file that has not changed is read once in a process."""
    try:
        found = file.stat()
        if found.st_size > _MOST_EMPTY:
            return True
        key = (file, found.st_size, found.st_mtime_ns, tuple(header))
        if key not in _read:
            _read[key] = next(read_rows(file, header), None) is not None
        return _read[key]
    except (DataError, OSError) as e:
        return getattr(e, "code", "") != "E-DATA-003"


def _all(spec: str, without: Path | None) -> list[Path]:
    try:
        found = [f for f in _found(spec) if without is None or not _made_by_educe(f.resolve(), without)]
    except (RuntimeError, OSError) as e:  # a link that leads to itself
        raise DataError(2, spec, f"cannot be read: {e}.", "Check the path.") from e
    if not found:
        raise DataError(10, spec, "holds only what educe wrote.", "Name files of your own.")
    return found


# What stands in a directory that educe wrote: a run, a run of stages, prepared data.
_MARKS = ("recipe.resolved.json", "stages.resolved.json", "near_copies.json")


def _made_by_educe(file: Path, place: Path) -> bool:
    """Whether it lies in `place`, or in a run, a chain of runs or prepared data anywhere."""
    return file.is_relative_to(place) or any((above / mark).is_file() for above in file.parents for mark in _MARKS)


def _found(spec: str) -> list[Path]:
    if spec == "-":
        return [_standard_input()]
    if spec.startswith(HUB):
        return _on_hub(spec.removeprefix(HUB), spec)
    try:
        path = Path(spec).expanduser()
    except RuntimeError as e:  # ~nobody
        raise DataError(2, spec, f"cannot be read: {e}.", "Check the path.") from e
    there = _is_there(path, spec)
    if there and path.is_dir():
        found = _data_in(path, sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()))
        if not found:
            raise DataError(10, spec, "is a directory without data files.", f"Data files end in {', '.join(SUFFIXES)}.")
        return found
    if there:
        return [path]
    if any(c in spec for c in "*?["):
        base = Path(*itertools.takewhile(lambda part: not set("*?[") & set(part), path.parts))
        try:
            found = sorted(p for p in base.glob(str(path.relative_to(base))) if p.is_file())
        except ValueError as e:
            raise DataError(
                10, spec, f"is no pattern: {e}.", "** stands alone between slashes: data/**/*.jsonl."
            ) from e
        if not found:
            raise DataError(10, spec, "matches no file.", "Check the pattern; ** goes into directories.")
        return found
    if _HUB_ID.fullmatch(spec) and not _NAMED.search(spec):
        return _on_hub(spec, spec)
    raise DataError(1, spec, "does not exist.", _near(path) or "Check the path; it is relative to the recipe.")


def passed_over(spec: str) -> list[Path]:
    """Files of a directory that are not taken: those that end like no data, those of a test split; of hidden ones and descriptions
    those that end like data."""
    base = Path(spec).expanduser()
    if spec == "-" or not base.is_dir():
        return []
    names = sorted(p.relative_to(base).as_posix() for p in base.rglob("*") if p.is_file())
    taken = set(_data_in(base, names))
    return [base / n for n in names if base / n not in taken and (_NAMED.search(n) or not _is_aside(n))]


def _is_aside(name: str) -> bool:
    """Hidden, or a description."""
    *_, last = parts = name.split("/")
    return any(p.startswith((".", "_")) for p in parts) or bool(_NO_DATA.match(last))


def _is_there(path: Path, spec: str) -> bool:
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as e:  # a file among its parents, a name too long, a NUL
        raise DataError(2, spec, f"cannot be read: {getattr(e, 'strerror', None) or e}.", "Check the path.") from e
    return True


def _near(path: Path) -> str:
    there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, there, 1, 0.7)
    return f"Did you mean {near[0]}?" if near else ""


def _data_in(base: Path, names: Sequence[str]) -> list[Path]:
    """Files that look like data, by their names below `base`: not those of a test split where there is one for training."""
    kept = [n for n in names if _is_data(n)]
    train = [n for n in kept if re.search(r"(^|[/_.-])train([/_.-]|$)", n)]
    others = [n for n in kept if re.search(r"(^|[/_.-])(test|dev|validation|valid|val|eval)([/_.-]|$)", n)]
    return [base / n for n in kept if not (train and n in others)]


def _is_data(name: str) -> bool:
    parts = name.split("/")
    plain = parts[-1].lower()
    for packed in _PACKED:
        plain = plain.removesuffix(packed)
    return plain.endswith(SUFFIXES) and not _is_aside(name)


def _on_hub(name: str, shown: str) -> list[Path]:
    """ORG/NAME[@REVISION][/PATH], downloaded or taken from the Hub's cache on this machine."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    match = re.fullmatch(r"([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.+))?", name)
    if match is None:
        raise DataError(10, shown, "names no data set.", f"Write {HUB}ORG/NAME, or {HUB}ORG/NAME@REVISION/PATH.")
    repo, revision, inside = match.groups()
    wanted = [inside, f"{inside.rstrip('/')}/*"] if inside else [f"*{s}{p}" for s in SUFFIXES for p in ("", *_PACKED)]
    try:
        place = Path(snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=wanted))
    except RepositoryNotFoundError as e:
        fix = "Check the name; for a gated or private one set HF_TOKEN."
        raise DataError(10, shown, "is no data set on the Hub that can be read.", fix) from e
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as e:
        fix = "Go online once, or give local files."
        raise DataError(10, shown, f"cannot be fetched: {redacted(str(e)).splitlines()[0]}", fix) from e
    names = sorted(p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file())
    matching = [place / n for n in names if any(fnmatch.fnmatch(n, w) for w in wanted)]
    found = matching if inside else _data_in(place, names)
    if not found:
        there = ", ".join(names[:5]) or "nothing"
        raise DataError(10, shown, f"has no such data file; there is {there}.", f"Name one: {HUB}{repo}/PATH.")
    return found


def _standard_input() -> Path:
    """Standard input as a file, since it is read more than once: kept until this process ends."""
    if not _stdin:
        place = Path(tempfile.mkdtemp(prefix="educe-stdin-"))
        atexit.register(shutil.rmtree, place, ignore_errors=True)
        with (place / "stdin").open("wb") as f:
            shutil.copyfileobj(sys.stdin.buffer, f, 1 << 20)
        _stdin.append(place / "stdin")
    return _stdin[0]
