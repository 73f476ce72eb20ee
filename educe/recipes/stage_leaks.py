"""Rows that one stage trains on and another is tested on: what no stage can see by itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import orjson

from educe.recipes.prepare import Prepared

Place = tuple[str, int, int | None]


def leaks_between(prepared: Mapping[str, Prepared]) -> list[str]:
    """A sentence for each two stages of which one trains on what the other is tested on: the same row of a file, or the same prompt
    (text, group) in another one."""
    said = []
    for one, mine in prepared.items():
        for other, theirs in prepared.items():
            if one == other:
                continue
            rows = _with_status(mine, "train") & _with_status(theirs, "test") if _same_file(mine, theirs) else set()
            if shared := np.intersect1d(mine.keys("train"), theirs.keys("test")).size or len(rows):
                said.append(_told(one, other, shared, rows))
    return said


def _same_file(one: Prepared, other: Prepared) -> bool:
    """Whether both read a file of the same bytes; ledgers are long."""
    files = [{x for _role, *of in p.made_of or () for x in of} for p in (one, other)]
    return bool(files[0] & files[1])


def _told(one: str, other: str, shared: int, rows: set[Place]) -> str:
    mend = "give both the same shares and data.group, an expression that is the same for a row in both; where the test rows have a "
    mend += "file of their own, take what is in it out of the training rows"
    if rows:
        file, line, _ = min(rows, key=lambda place: (place[0], place[1], place[2] or 0))
        first = f"{len(rows):,} rows that stage {other} is tested on, {Path(file).name}:{line} the first"
        return f"stage {one} trains on {first}: {mend}"
    prompts = "a prompt" if shared == 1 else f"{shared:,} prompts"
    return f"stage {one} trains on {prompts} that stage {other} is tested on, in another file: {mend}"


def _with_status(prepared: Prepared, status: str) -> set[Place]:
    found = set()
    with (prepared.path / "ledger.jsonl").open("rb") as ledger:
        for raw in ledger:
            line = orjson.loads(raw)
            if line["status"] == status:
                found.add((line["file"], line["line"], line["item"]))
    return found
