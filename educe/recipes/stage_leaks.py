"""Rows that one stage trains on and another is tested on: what no stage can see by itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import orjson

from educe.recipes.prepare import Prepared

Place = tuple[str, int, int | None]


def leaks_between(prepared: Mapping[str, Prepared]) -> list[str]:
    """A sentence for each two stages that read the same rows of a file and split them otherwise."""
    rows = {name: _by_status(p) for name, p in prepared.items()}
    said = []
    for one, mine in rows.items():
        for other, theirs in rows.items():
            shared = mine["train"] & theirs["test"] if one != other else set()
            if shared:
                file, line, _ = min(shared, key=lambda place: (place[0], place[1], place[2] or 0))
                said.append(
                    f"stage {one} trains on {len(shared):,} rows that stage {other} is tested on, {Path(file).name}:{line} the first: "
                    "give both the same shares and data.group, an expression that is the same for a row in both"
                )
    return said


def _by_status(prepared: Prepared) -> dict[str, set[Place]]:
    found: dict[str, set[Place]] = {"train": set(), "test": set()}
    with (prepared.path / "ledger.jsonl").open("rb") as ledger:
        for raw in ledger:
            line = orjson.loads(raw)
            if line["status"] in found:
                found[line["status"]].add((line["file"], line["line"], line["item"]))
    return found
