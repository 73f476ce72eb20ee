"""How answers are, whatever they say: long, empty, endless, varied, repetitive. Pure numbers from stored answers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST_WORDS = 2000  # shares of distinct words fall with the number of words: all systems are measured on as many
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """Of a system's answers: mean words, share `empty`, share `endless` (cut off, not ended), `distinct_1` and `distinct_2` (different
    words, and pairs of them, over all; Li et al. 2016, arXiv 1510.03055) among the first `counted` words, `repeated` (share of runs of
    four words that stood in the same answer before; Welleck et al. 2019, arXiv 1908.04319). None: too few words to say."""

    words: float
    empty: float
    endless: float
    distinct_1: float | None
    distinct_2: float | None
    counted: int
    repeated: float | None


def manners(graded: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Manner]:
    """Of each system's stored answers, over as many words of each."""
    said = {name: [_WORD.findall(str(line["answer"]).casefold()) for line in lines] for name, lines in graded.items()}
    counted = min([MOST_WORDS, *(sum(map(len, answers)) for answers in said.values() if any(answers))])
    return {name: _manner(said[name], lines, counted) for name, lines in graded.items()}


def _manner(answers: list[list[str]], lines: Sequence[Mapping[str, Any]], counted: int) -> Manner:
    ones, twos, seen = set(), set(), 0
    pairs = 0
    for words in answers:
        taken = words[: counted - seen]
        seen += len(taken)
        ones |= set(taken)
        twos |= set(_runs(taken, 2))
        pairs += max(0, len(taken) - 1)
    fours = [list(_runs(words, 4)) for words in answers]
    runs = sum(map(len, fours))
    again = sum(len(f) - len(set(f)) for f in fours)
    return Manner(
        words=sum(map(len, answers)) / len(lines),
        empty=sum(not str(line["answer"]).strip() for line in lines) / len(lines),
        endless=sum(not line["stopped"] for line in lines) / len(lines),
        distinct_1=len(ones) / seen if seen else None,
        distinct_2=len(twos) / pairs if pairs else None,
        counted=seen,
        repeated=again / runs if runs else None,
    )


def _runs(words: Sequence[str], length: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[k:] for k in range(length)), strict=False)
