"""A good few-shot prompt for the untouched model: what tuning has to beat."""

from __future__ import annotations

from collections.abc import Sequence

from educe.seeds import derive, permute
from educe.types import Conversation, Message

_CANDIDATES = 200


def choose_examples(train: Sequence[Conversation], count: int, seed: int) -> list[Conversation]:
    """`count` training rows whose answers differ most from each other (greedy farthest-first on the answers' words)."""
    order = permute(len(train), derive(seed, "few-shot"))[:_CANDIDATES].tolist()
    pool = [train[i] for i in order if sum(m.role == "assistant" for m in train[i].messages) == 1] or [train[order[0]]]
    words = [set(c.messages[-1].content.split()) for c in pool]
    chosen = [0]
    while len(chosen) < min(count, len(pool)):
        rest = [i for i in range(len(pool)) if i not in chosen]
        chosen.append(min(rest, key=lambda i: (max(_overlap(words[i], words[j]) for j in chosen), i)))
    return [pool[i] for i in chosen]


def with_examples(prompt: tuple[Message, ...], examples: Sequence[Conversation]) -> tuple[Message, ...]:
    """The prompt with the examples as earlier turns, behind its own system message."""
    system = tuple(m for m in prompt[:1] if m.role == "system")
    shots = tuple(m for c in examples for m in c.messages if m.role != "system")
    return (*system, *shots, *prompt[len(system) :])


def _overlap(a: set[str], b: set[str]) -> float:
    return len(a & b) / max(1, len(a | b))
