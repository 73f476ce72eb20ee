"""Multiple choice by rank classification: the option that a model finds likeliest is its answer (Brown et al. 2020, section 2.4).

Nothing is generated. Each option stands behind its context as one text; options of all rows are packed and read once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from educe.chat.tokenizer_file import adds_bos
from educe.chat.tokens import ChatTokenizer
from educe.errors import EvalError, Refusal
from educe.evaluate.drift import pieces
from educe.files import jsonl
from educe.loss.kernels import softmax_facts
from educe.model.load import CausalLM
from educe.pack.batch import build_batch
from educe.pack.plan import plan_once
from educe.types import Example

# What options are ranked by: the sum of their log-probabilities, or that over their length, in tokens or in UTF-8 bytes.
BY = ("sum", "per_token", "per_byte")


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A question: for each option its context and the text that is scored behind it; the number of the right one."""

    row: str
    texts: tuple[tuple[str, str], ...]
    gold: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """An option's log-probability in nats, and its length."""

    log_p: float
    num_tokens: int
    num_bytes: int

    def by(self, what: str) -> float:
        return self.log_p / {"sum": 1, "per_token": self.num_tokens, "per_byte": self.num_bytes}[what]


def read_items(file: Path) -> list[Item]:
    """Rows {query, choices, gold}, or {context_options, continuation, gold} where options differ before what is scored (Winograd
    schemas). Raises `EvalError`."""
    try:
        with file.open("rb") as stream:
            items = [_item(line, f"{file.name}:{k}") for k, _, line in jsonl.lines_of(stream, file.name)]
    except OSError as e:
        raise EvalError(3, str(file), f"cannot be read: {e}.", "Give a JSONL file.") from e
    if len(items) < 2:
        raise EvalError(3, str(file), "holds fewer than two questions.", "Give a file with more.")
    return items


def _item(line: str | Refusal, place: str) -> Item:
    row = jsonl.parse_json(line, place) if isinstance(line, str) else line
    fix = "Give {query, choices: [...], gold: 0}, or {context_options: [...], continuation, gold: 0}."
    if isinstance(row, Refusal) or not isinstance(row, dict):
        raise EvalError(3, place, "is no JSON object.", fix)
    if "choices" in row:
        pairs = [(row.get("query"), c) for c in row["choices"]] if isinstance(row["choices"], list) else []
    else:
        given = row.get("context_options")
        pairs = [(c, row.get("continuation")) for c in given] if isinstance(given, list) else []
    texts = tuple((c, o) for c, o in pairs if isinstance(c, str) and isinstance(o, str) and o.strip())
    gold = row.get("gold")
    if len(texts) < 2 or len(texts) != len(pairs) or type(gold) is not int or not 0 <= gold < len(texts):
        raise EvalError(3, place, "is no question with two options or more and the number of the right one.", fix)
    return Item(row=place, texts=texts, gold=gold)


def option_of(context: str, option: str, tokenizer: ChatTokenizer) -> Example:
    """Both as one text, with one space between unless the context ends in white space; tokens of the context carry no weight.

    The option begins with the first token that is not the context's: a token over the joint belongs to it. The begin-of-sequence
    token stands first where the tokenizer puts it before texts; a context that is empty and has none lends its place to the
    end-of-sequence token, since something must come before what is predicted.
    """
    bos = tokenizer.template.special.get("bos_token")
    head = [tokenizer.control[bos]] if bos is not None and adds_bos(tokenizer.json, bos) else []
    stem = context.rstrip()
    joint = context[len(stem) :] or (" " if stem else "")
    before, whole = tokenizer.encode_plain(stem), tokenizer.encode_plain(stem + joint + option)
    same = next(
        (k for k, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), min(len(before), len(whole))
    )
    if not head and not same:
        head = [tokenizer.eos]
    ids = np.array([*head, *whole], np.int32)
    weights = np.zeros(ids.size, np.float32)
    weights[len(head) + min(same, len(whole) - 1) :] = 1
    return Example(ids_T=ids, weights_T=weights)


def score_options(
    model: CausalLM, items: Sequence[Item], tokenizer: ChatTokenizer, capacity_tokens: int
) -> list[list[Scored]]:
    """Every option of every question. The model reads packed rows; with a `capacity_tokens` of 1 each text is alone."""
    texts = [t for item in items for t in item.texts]
    examples = [option_of(context, option, tokenizer) for context, option in texts]
    nll_E = np.zeros(len(examples))
    for group in plan_once(np.array([e.ids_T.size for e in examples], np.int64), capacity_tokens=capacity_tokens):
        nll_N = _nll(model, [examples[k] for k in group])
        owners_N = np.repeat(np.arange(len(group)), [int(examples[k].weights_T.sum()) for k in group])
        nll_E[group] = np.bincount(owners_N, nll_N, len(group))
    scored = iter(
        Scored(log_p=-float(nll), num_tokens=int(e.weights_T.sum()), num_bytes=len(option.encode()))
        for nll, e, (_, option) in zip(nll_E, examples, texts, strict=True)
    )
    return [[next(scored) for _ in item.texts] for item in items]


def _nll(model: CausalLM, examples: Sequence[Example]) -> np.ndarray:
    """Of each scored token, in their order."""
    batch = build_batch(examples)
    with torch.no_grad():
        hidden_ND = model.hidden_states(batch)[model.tensor(batch.predict_N)]
        targets_N = model.tensor(batch.targets_N)
        found = [
            softmax_facts(model.head(hidden_ND[piece]), targets_N[piece]).nll_B.double().cpu()
            for piece in pieces(model, len(hidden_ND))
        ]
    nll_N: np.ndarray = torch.cat(found).numpy()
    return nll_N


def lines_of(items: Sequence[Item], scored: Sequence[Sequence[Scored]]) -> list[dict[str, Any]]:
    """One line a question: the numbers, and under each rule whether the likeliest option is the right one (of a tie the first)."""
    lines = []
    for item, options in zip(items, scored, strict=True):
        chosen = {by: max(range(len(options)), key=lambda k: options[k].by(by)) for by in BY}
        lines.append(
            {
                "row": item.row,
                "gold": item.gold,
                "log_p": [o.log_p for o in options],
                "chosen": chosen,
                "correct": {by: k == item.gold for by, k in chosen.items()},
            }
        )
    json.dumps(lines, allow_nan=False)
    return lines
