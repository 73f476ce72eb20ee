"""General questions with short right answers, that nobody tuned for: what a model no longer answers, it has forgotten.

The package's own are 46 of nine kinds, written for this: sums, facts, common sense, languages, code, forms, reading, talk over several
turns, what is to be refused and what is not. A smoke alarm and no benchmark: a model of 135M parameters fails most of some kinds.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from educe.errors import Refusal
from educe.files.jsonl import parse_json
from educe.types import Message

MOST_NEW_TOKENS = 32
_REFUSING = re.compile(
    r"\b(?:cannot|can not|can't|can’t|could not|won't|won’t|will not|unable|not able|not (?:appropriate|okay|something i)"
    r"|against the law|illegal|sorry|refuse|don't|don’t|do not|must not|should not|shouldn't|shouldn’t)\b"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneralPrompt:
    """A question of a kind, and the checks that its answer must pass, all of them."""

    key: str
    kind: str
    messages: tuple[Message, ...]
    checks: Mapping[str, Any]


def own_prompts() -> list[GeneralPrompt]:
    """The package's own, in the order of their file."""
    text = (resources.files("educe.evaluate") / "general_prompts.jsonl").read_text(encoding="utf-8")
    return [_prompt(number, json.loads(line)) for number, line in enumerate(text.splitlines(), 1)]


def _prompt(number: int, row: dict[str, Any]) -> GeneralPrompt:
    kind = row.pop("kind")
    turns = row.pop("messages", None) or [["user", row.pop("ask")]]
    unknown = row.keys() - CHECKS.keys() - {"case"}
    if unknown or not row:
        raise ValueError(f"general_prompts.jsonl:{number} has no known check: {sorted(unknown)}")
    return GeneralPrompt(
        key=f"{kind}-{number}",
        kind=kind,
        messages=tuple(Message(role=role, content=content) for role, content in turns),
        checks=row,
    )


def is_right(prompt: GeneralPrompt, answer: str) -> bool:
    """Whether an answer passes every check; an empty one never does."""
    if not answer.strip():
        return False
    exact_case = bool(prompt.checks.get("case"))
    return all(CHECKS[name](answer, wanted, exact_case) for name, wanted in prompt.checks.items() if name != "case")


def _folded(text: str, case: bool) -> str:
    """Compatible characters as one (H₂O, H2O), white space as one space, and letter case away unless it counts."""
    plain = " ".join(unicodedata.normalize("NFKC", text).split())
    return plain if case else plain.casefold()


def _says(answer: str, wanted: list[str], case: bool) -> bool:
    """One of the texts, as whole words: 42 is not in 420 nor in 3.42."""
    said = _folded(answer, case)
    return any(re.search(rf"(?<![\w.])(?<!\d,){re.escape(_folded(w, case))}(?![\w]|[.,]\d)", said) for w in wanted)


def _not(answer: str, unwanted: list[str], case: bool) -> bool:
    return not _says(answer, unwanted, case)


def _is(answer: str, wanted: list[str], case: bool) -> bool:
    """One of the texts and nothing else; quotation marks around it and a full stop do not count."""
    said = _folded(answer, case).strip("\"'“”‘’*` ").rstrip(".!").strip("\"'“”‘’*` ")
    return said in {_folded(w, case) for w in wanted}


def _json(answer: str, wanted: Any, case: bool) -> bool:
    said = parse_json(answer.strip(), "answer")
    return not isinstance(said, Refusal) and json.dumps(said, sort_keys=True) == json.dumps(wanted, sort_keys=True)


def _lines(answer: str, wanted: int, case: bool) -> bool:
    """So many lines with text, and no more: none of them an introduction, which would end in a colon."""
    lines = [line for line in answer.splitlines() if line.strip()]
    return len(lines) == wanted and not lines[0].rstrip().endswith(":")


def _words(answer: str, wanted: int, case: bool) -> bool:
    return len(answer.split()) == wanted


def _refuses(answer: str, wanted: bool, case: bool) -> bool:
    """Whether its first sentences decline. Words alone: a smoke alarm, and no test of safety."""
    return (_REFUSING.search(_folded(answer, case)[:300]) is not None) == wanted


CHECKS: dict[str, Callable[[str, Any, bool], bool]] = {
    "says": _says,
    "not": _not,
    "is": _is,
    "json": _json,
    "lines": _lines,
    "words": _words,
    "refuses": _refuses,
}
