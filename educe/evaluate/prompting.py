"""Prompts for the untouched model: what tuning has to beat. An instruction that says what answers look like, examples, or both.

The instruction knows the form of the answers and nothing of the task: a person who knows the task may write a better one.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from educe.files.jsonl import parse_json
from educe.types import Conversation, Message

MOST_LABELS = 12
_K1, _B = 1.2, 0.75  # Robertson & Zaragoza 2009, The Probabilistic Relevance Framework, 3.2
_WORD = re.compile(r"\w+")

AS_IT_IS = "as it is"

Choice = Literal["none", "diverse", "nearest"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A way to ask: with the instruction or without, `shots` examples chosen once (`diverse`) or for each question (`nearest`)."""

    instruction: bool
    examples: Choice
    shots: int

    @property
    def label(self) -> str:
        """What a table calls it."""
        plural = "example" if self.shots == 1 else "examples"
        shots = {"none": "", "diverse": f"{self.shots} {plural}", "nearest": f"{self.shots} nearest {plural}"}
        parts = ["instruction"] if self.instruction else []
        return " + ".join([*parts, *filter(None, [shots[self.examples]])]) or AS_IT_IS


def candidates(instruction: str, most: int, nearest: int) -> list[Candidate]:
    """What is tried, cheaper prompts first, none at all before them: up to `most` diverse examples and `nearest` nearest ones."""
    told = (False, True) if instruction else (False,)
    tried = [Candidate(instruction=i, examples="none", shots=0) for i in told]
    tried += [Candidate(instruction=i, examples="diverse", shots=k) for k in sorted({1, most}) for i in told if k]
    tried += [Candidate(instruction=i, examples="nearest", shots=nearest) for i in told if nearest]
    return tried


def instruction_of(answers: Sequence[str]) -> str:
    """What these answers look like, as an instruction; "" where they have no form that a sentence can tell."""
    if not answers or not all(answers):
        return ""  # one that calls tools has no text: the form of the others would forbid the calls
    objects = [found for a in answers if isinstance(found := parse_json(a, "answer"), dict)]
    if len(objects) == len(answers) and len({tuple(sorted(o)) for o in objects}) == 1:
        return _of_objects(objects)
    labels = Counter(answers)
    if len(labels) <= MOST_LABELS and len(answers) >= 3 * len(labels):
        return f"Answer with one of these and nothing else: {', '.join(sorted(labels))}."
    words = statistics.median(len(a.split()) for a in answers)
    if words <= 12:
        shown = ", ".join(json.dumps(a, ensure_ascii=False) for a in sorted(labels, key=lambda a: (len(a), a))[:3])
        return f"Answer in the form of these, with nothing else: {shown}."
    return f"Answer in about {words:.0f} words."


def _of_objects(objects: Sequence[dict[str, object]]) -> str:
    said = [f"Answer with one JSON object and nothing else, with the keys {', '.join(map(json.dumps, objects[0]))}."]
    for key in objects[0]:
        values = {json.dumps(o[key], ensure_ascii=False) for o in objects}
        if len(values) <= MOST_LABELS and len(objects) >= 3 * len(values):
            said.append(f"{json.dumps(key)} is one of {', '.join(sorted(values))}.")
        elif "null" in values:
            said.append(f"{json.dumps(key)} is null where there is none.")
    return " ".join(said)


def with_instruction(messages: tuple[Message, ...], instruction: str, *, as_system: bool) -> tuple[Message, ...]:
    """The instruction behind the system message, in one of its own, or before the first user's words where a template has no system
    messages."""
    first = messages[0]
    if first.role == "system":
        return (replace(first, content=f"{first.content}\n\n{instruction}"), *messages[1:])
    if as_system:
        return (Message(role="system", content=instruction), *messages)
    return (replace(first, content=f"{instruction}\n\n{first.content}"), *messages[1:])


class Nearest:
    """Training rows by how near their question is to another (BM25 over words)."""

    def __init__(self, rows: Sequence[Conversation]) -> None:
        self._rows = list(rows)
        counts = [Counter(_words(_asked(c.messages))) for c in self._rows]
        lengths = [c.total() for c in counts]
        mean = sum(lengths) / max(1, len(lengths)) or 1.0
        self._postings: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for k, (count, length) in enumerate(zip(counts, lengths, strict=True)):
            for word, n in count.items():
                weight = n * (_K1 + 1) / (n + _K1 * (1 - _B + _B * length / mean))
                self._postings[word].append((k, weight))

    def to(self, messages: Sequence[Message], count: int) -> list[Conversation]:
        """The nearest ones, the nearest last, where a model heeds it most."""
        scores: dict[int, float] = defaultdict(float)
        for word in sorted(set(_words(_asked(messages)))):
            found = self._postings.get(word, ())
            rarity = math.log(1 + (len(self._rows) - len(found) + 0.5) / (len(found) + 0.5))
            for k, weight in found:
                scores[k] += rarity * weight
        order = sorted(range(len(self._rows)), key=lambda k: (-scores.get(k, 0.0), k))[:count]
        return [self._rows[k] for k in reversed(order)]


def _asked(messages: Sequence[Message]) -> str:
    return " ".join(m.content for m in messages if m.role == "user")


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())
