"""Which variables a template is given, chosen once for a task: the defaults, as serving sends them, unless its turns then do not
follow their prompts and do so under a setting that the template's own source tests (`enable_thinking`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from educe.chat.probe import settings_to_try
from educe.chat.template import TemplateRefusal
from educe.chat.tokens import ChatTokenizer
from educe.chat.turns import Row, Unproved, find_turn
from educe.chat.weights import EVEN, Weighing
from educe.types import Conversation

NUM_TRIED = 24

Settings = Mapping[str, bool | int | str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """The tokenizer with its settings, and why they are not the defaults ("" where they are)."""

    tokenizer: ChatTokenizer
    why: str


def settle(tokenizer: ChatTokenizer, rows: Sequence[Conversation], weighing: Weighing = EVEN) -> Settled:
    """Try the defaults on a sample of the rows, and other settings only where that fails.

    Best first: all turns follow their prompts; all are proved, some by closing a reasoning block that the prompt opens; most are.
    """
    step = max(1, len(rows) // NUM_TRIED)
    sample = rows[::step][:NUM_TRIED]
    tried: list[tuple[tuple[int, int], ChatTokenizer]] = []
    for settings in settings_to_try(tokenizer.template):
        candidate = tokenizer.with_settings(settings)
        proved, direct = _proved(candidate, sample, weighing)
        if direct == len(sample):
            tried = [((proved, direct), candidate)]
            break
        tried.append(((proved, proved == len(sample)), candidate))
    best = max(tried, key=lambda t: t[0])[1] if tried else tokenizer  # the first of equals: the defaults
    if not best.settings or best.settings == tokenizer.settings:
        return Settled(tokenizer=best, why="")
    shown = json.dumps(dict(best.settings))
    why = f"template settings {shown}: under the template's defaults its answers do not follow the prompts that serving sends"
    return Settled(tokenizer=best, why=why)


def _proved(tokenizer: ChatTokenizer, rows: Sequence[Conversation], weighing: Weighing) -> tuple[int, int]:
    """Of the rows, how many are proved, and how many without closing a block that the prompt opens."""
    proved = direct = 0
    for c in rows:
        row = Row(c, tokenizer)
        try:
            turns = [find_turn(row, i) for i in weighing.turns(c.messages)]
        except (TemplateRefusal, Unproved):
            continue
        proved += 1
        direct += not any(t.bridged for t in turns)
    return proved, direct
