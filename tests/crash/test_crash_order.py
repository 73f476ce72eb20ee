"""What a power cut may lose: nothing is renamed before all of it is flushed, nor relied on before its place is.

SIGKILL keeps what the system has not written yet, so that killing shows nothing of this: the order of a run's calls is read
instead (Pillai et al., "All file systems are not created equal", OSDI 2014).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def unsafe(trace: list[list[Any]]) -> list[str]:
    """What is wrong with the order of a trace's events: what a rename moves is flushed before, its place after, and so is
    every directory that is made and stays."""
    dirty: dict[str, str] = {}  # files and directories, and what changed them since they were flushed
    wrong: list[str] = []

    def forget(path: str) -> None:
        for p in [p for p in dirty if p == path or p.startswith(path + "/")]:
            del dirty[p]

    for n, (kind, *paths, changes) in enumerate(trace, 1):
        path = paths[0]
        above = str(Path(path).parent)
        if kind == "fsync":
            dirty.pop(path, None)
        elif kind == "write" or (kind == "open" and changes):
            dirty[path] = f"{kind} ({n})"
            if kind == "open" and "renamed" not in dirty.get(above, ""):
                dirty[above] = f"{path} made ({n})"
        elif kind == "os.mkdir":
            dirty[above] = f"{path} made ({n})"
            dirty.setdefault(path, "made")
        elif kind in ("os.remove", "os.rmdir"):
            forget(path)
        elif kind == "os.rename":
            for p in [p for p in dirty if p == path or p.startswith(path + "/")]:
                if dirty[p] != "made":
                    wrong.append(f"{n}: {path} is renamed, {p} is not flushed after {dirty[p]}")
                del dirty[p]
            dirty[str(Path(paths[1]).parent)] = f"{paths[1]} renamed ({n})"
    wrong += [f"{p} is never flushed after {why}" for p, why in dirty.items() if "renamed" in why]
    return wrong


def late(trace: list[list[Any]]) -> list[str]:
    """Renames whose place, or a directory above it that the run made, is not flushed when the next event comes."""
    wrong: list[str] = []
    entries: dict[str, set[str]] = {}  # directory: what was made in it since it was flushed
    for n, (kind, *paths, _) in enumerate(trace, 1):
        if kind == "os.mkdir":
            entries.setdefault(str(Path(paths[0]).parent), set()).add(paths[0])
        elif kind == "fsync":
            entries.pop(paths[0], None)
        elif kind in ("os.remove", "os.rmdir"):
            entries.get(str(Path(paths[0]).parent), set()).discard(paths[0])
        elif kind == "os.rename":
            target = Path(paths[1])
            if trace[n : n + 1] == [] or trace[n][:2] != ["fsync", str(target.parent)]:
                wrong.append(f"{n}: {target} is renamed, {target.parent} is not flushed at once")
            lost = [a for a in target.parents if str(a) in entries.get(str(a.parent), set())]
            wrong += [f"{n}: {target} is renamed, and {a} may be lost" for a in lost]
    return wrong


def test_what_is_out_of_order_is_found() -> None:
    good = [
        ["open", "/r/.a.1.part", True], ["write", "/r/.a.1.part", True], ["fsync", "/r/.a.1.part", True],
        ["os.rename", "/r/.a.1.part", "/r/a", True], ["fsync", "/r", True],
    ]  # fmt: skip
    assert unsafe(good) == []
    assert late(good) == []
    for leave_out in (2, 4):
        bad = [e for n, e in enumerate(good) if n != leave_out]
        assert unsafe(bad), leave_out
    assert late(good[:-1])
    inside = [["os.mkdir", "/r/.d.1.part", True], ["open", "/r/.d.1.part/x", True], ["fsync", "/r/.d.1.part/x", True]]
    end = [["os.rename", "/r/.d.1.part", "/r/d", True], ["fsync", "/r", True]]
    assert any(".part is not flushed" in w for w in unsafe(inside + end))
    assert unsafe([*inside, ["fsync", "/r/.d.1.part", True], *end]) == []
    assert late([["os.mkdir", "/r", True], *good]) == ["5: /r/a is renamed, and /r may be lost"]
