"""`educe init` for raw text and for preference pairs: a recipe of one stage, to which others can be added."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from educe.chat.tokens import ChatTokenizer
from educe.model.describe import ModelFacts
from educe.recipes.rates import advise_rate
from educe.stats import percentile
from educe.types import Conversation, Document, Pair

_PACK_TOKENS = 2048
_PAIRS_A_STEP = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """Rows that were looked at, all texts or all pairs, of `rows` in the data."""

    kind: str
    rows: int
    lengths: Sequence[int]


def seen(rows: int, sample: Sequence[Document | Pair], tokenizer: ChatTokenizer) -> Seen:
    """Lengths in tokens: of texts, or of the longer of two answers behind their prompt (the template's own text aside)."""
    if isinstance(sample[0], Document):
        lengths = [len(tokenizer.encode_plain(d.text)) for d in sample if isinstance(d, Document)]
        return Seen(kind="pretrain", rows=rows, lengths=lengths)
    pairs = [p for p in sample if isinstance(p, Pair)]
    lengths = [max(_tokens(c, tokenizer) for c in (p.chosen, p.rejected)) for p in pairs]
    return Seen(kind="preference", rows=rows, lengths=lengths)


def _tokens(c: Conversation, tokenizer: ChatTokenizer) -> int:
    """With some room for what a template writes around each turn."""
    return sum(len(tokenizer.encode_plain(m.content)) + 8 for m in c.messages)


def stage_text(found: Seen, facts: ModelFacts, *, name: str, model: tuple[str, str], train: str) -> str:
    """The recipe as YAML with a reason behind each choice."""
    pairs = found.kind == "preference"
    p95, longest = percentile(found.lengths, 0.95), max(found.lengths)
    wanted = 64 * math.ceil(p95 / 64) if pairs else 1024
    most = max(64, min(wanted, facts.max_positions))
    micro = max(_PACK_TOKENS, 2 * most) if pairs else _PACK_TOKENS
    mean = sum(found.lengths) / len(found.lengths)
    batch = micro * max(1, round(_PAIRS_A_STEP * 2 * mean / micro)) if pairs else 4 * micro
    steps = max(1, round(found.rows * mean * (2 if pairs else 1) / batch))
    rate = advise_rate(facts, lora=False, rows_per_step=batch / mean, num_steps=steps, pairs=pairs)
    length = (
        f"95 % of the rows have at most {p95} tokens, the longest {longest}; longer pairs are left out"
        if pairs
        else f"longer texts are split there, and no text is lost; the longest has {longest} tokens"
    )
    loss = "    loss: {kind: dpo, beta: 0.1}  # or ipo, simpo, orpo: docs/stages.md\n" if pairs else ""
    replay = (
        ""
        if pairs
        else "      # replay: {files: general.txt, share: 0.05}  # general text against forgetting; 1 % is the least that helps\n"
    )
    return f"""\
# Written by `educe init`: one stage, for {"preference pairs" if pairs else "raw text"}. Stages before and after it: docs/stages.md.
name: {name}
model: {json.dumps(model[0], ensure_ascii=False)}  # {model[1]}

stages:
  - kind: {found.kind}
{loss}    data:
      train: {json.dumps(train, ensure_ascii=False)}
{replay}      test: {{kind: share, share: {0.1 if found.rows >= 500 else 0.2}}}
      max_tokens: {most}  # {length}
    train:
      epochs: 1  # one pass is usual
      batch_tokens: {batch}  # {f"about {_PAIRS_A_STEP} pairs a step" if pairs else "a step"}
      micro_batch_tokens: {micro}  # {"both answers of a pair are computed together" if pairs else "what is in memory at once"}
      learning_rate: {rate.value:.1e}  # {rate.why}; {rate.span} is worth a try
"""
