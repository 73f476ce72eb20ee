"""Directories of a chain's stages, where the recipe's stages are no longer those that they were made for."""

from __future__ import annotations

import re
from pathlib import Path

from educe.config import StagedRecipe
from educe.errors import EduceError, RunError
from educe.files.atomic import sized
from educe.files.run_dir import RunDir
from educe.model.source import Say

_STAGE = re.compile(r"\d+-(.+)", re.ASCII)


def renumber(staged: StagedRecipe, say: Say) -> None:
    """Where stages were put in or taken out, the others keep what they have: each has its number and its name. What belongs to no
    stage any more is told. Raises `RunError` where a process is in one of those that would move."""
    there = {p.name: m[1] for p in _in(staged.run_path()) if (m := _STAGE.fullmatch(p.name))}
    for k, name in enumerate(staged.names):
        path = staged.stage_path(k)
        others = [n for n, of in there.items() if of == name and n != path.name]
        if path.name in there or len(others) != 1:
            continue
        old = path.with_name(others[0])
        try:
            with RunDir(old).lock():
                pass
            old.rename(path)
        except (EduceError, OSError) as e:
            raise RunError(202, str(old), f"is to be {path.name}, and cannot be moved: {e}", "Wait, or move it.") from e
        del there[old.name]
        there[path.name] = name
        say(f"{old} is {path.name} now: stage {name} stands at another place of the recipe")
    mine = {staged.stage_path(k).name for k in range(len(staged.names))}
    for name in sorted(set(there) - mine):
        path = staged.run_path() / name
        size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
        say(
            f"warning: {path} ({sized(size)}) belongs to no stage of the recipe: nothing reads it, and it may be deleted"
        )


def _in(path: Path) -> list[Path]:
    """The runs in a directory."""
    return sorted(p for p in path.iterdir() if RunDir(p).resolved.is_file()) if path.is_dir() else []
