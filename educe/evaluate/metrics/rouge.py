"""ROUGE-L: the longest common subsequence of words (Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries, 3.1)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from educe.evaluate.metrics.question import Question
from educe.types import Verdict

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # scripts without spaces: a character is a word
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")


def grade_rouge_l(answer: str, question: Question) -> Verdict:
    """F of precision and recall alike (β = 1), sentence level: line ends are no borders. Right only where the words are the same.

    Words are runs of letters and digits of any script, case folded, Chinese and Japanese by character; nothing is stemmed. On ASCII
    text that is what the rouge-score package does without its stemmer. Where neither text has a word, they must be equal.
    """
    said, right = words(answer), words(question.expected)
    if not said and not right:
        score = float(answer.strip() == question.expected.strip())
    else:
        score = 2 * common(said, right) / (len(said) + len(right))
    return Verdict(correct=score == 1, reason=f"ROUGE-L {score:.3f}", score=score)


def words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence: a bit a word, a row of the table in four operations (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for word in b:
        match = row & places.get(word, 0)
        row = (row + match | row - match) & full
    return len(a) - row.bit_count()
