"""Rows named for people and for files of answers: short, and no two alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import PurePath

from educe.types import Source


def row_names(sources: Sequence[Source]) -> list[str]:
    """FILE:LINE or FILE:LINE[ITEM] of each. FILE is as much of the path's end as tells the files apart; a row that is there again,
    since its file is read more than once, gets its number: "test.jsonl:3 (2)"."""
    short = _ends(s.file for s in sources)
    seen = Counter[str]()
    names = []
    for source in sources:
        name = str(replace(source, file=short[source.file]))
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return names


def _ends(files: Iterable[str]) -> dict[str, str]:
    parts = {file: PurePath(file).parts for file in files}
    ends: dict[str, str] = {}
    depth = 1
    while len(ends) < len(parts):
        shared = Counter(p[-depth:] for p in parts.values())
        for file, p in parts.items():
            if file not in ends and (shared[p[-depth:]] == 1 or depth > len(p)):
                ends[file] = str(PurePath(*p[-depth:]))
        depth += 1
    return ends
