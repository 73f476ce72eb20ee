"""Disks that are full, broken or read-only at any write: the run goes on or says why not, and the same command ends it later."""

from __future__ import annotations

import errno
from itertools import cycle, product
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from crash_cases import Base, clear, finish, make_base, tell, train_in  # noqa: E402
from educe.files.atomic import verify  # noqa: E402

ERRORS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "EROFS": errno.EROFS, "EDQUOT": errno.EDQUOT}
FAULTS = tuple(product(ERRORS, (1, 5)))


@pytest.fixture(scope="module")
def last(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Base:
    return make_base(tmp_path_factory.mktemp("faults"), tiny_model, "last")


def failed(base: Base, place: Path, **job: object) -> list[str]:
    """What is wrong with how a run takes what the job does to it, and with what the same command makes of it afterwards."""
    code, said = train_in(place, **job)
    problems: list[str] = []
    if code not in (0, 2):
        problems.append(f"ended with {code}: {said[-700:]}")
    elif code == 2 and not ("E-" in said and "→" in said):
        problems.append(f"does not say what to do: {said[-300:]}")
    if "Traceback" in said and not problems:
        problems.append(f"shows a traceback: {said[-700:]}")
    kept = [verify(p) for p in (place / "runs" / "run" / "checkpoints").glob("step-*")]
    if kept and all(isinstance(m, str) for m in kept):
        problems.append(f"no checkpoint is whole: {kept}")
    problems += finish(place, base.end)
    if not problems:
        clear(place)
    return problems


def at_writes(base: Base, points: list[int], start: str) -> dict[str, list[str]]:
    wrong: dict[str, list[str]] = {}
    for k, (name, times) in zip(points, cycle(FAULTS), strict=False):
        if problems := failed(base, base.case(f"{start}-{k}", start), fail=[k, times, ERRORS[name]]):
            wrong[f"{name} at {times} writes from {k} of {start}"] = problems
    return wrong


def num_able(base: Base) -> int:
    return sum(e[0] not in ("os.remove", "os.rmdir") for e in base.trace)


@pytest.mark.crash
def test_every_write_fails(last: Base) -> None:
    points = list(range(1, num_able(last) + 1))
    tell(
        "failing writes", len(points), at_writes(last, points, "bare"), "gone on or stopped cleanly, then the same bits"
    )


@pytest.mark.crash
def test_files_may_not_grow(last: Base) -> None:
    """RLIMIT_FSIZE: every file that would be larger cannot be written to its end. What the run says is in a file too: 1 kB of it."""
    sizes = [1000, 1500, 2000, 5000, 10_000, 50_000, 100_000, 200_000, 300_000]
    found = {n: failed(last, last.case(f"size-{n}", "prepared"), file_bytes=n) for n in sizes}
    wrong = {f"files of at most {n} bytes": w for n, w in found.items() if w}
    tell("limits on file sizes", len(found), wrong, "gone on or stopped cleanly, then the same bits")
