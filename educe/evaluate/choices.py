"""Multiple choice by rank classification: the option that a model finds likeliest is its answer (Brown et al. 2020, section 2.4).

Nothing is generated. Each option stands behind its context as one text; options of all rows are packed and read once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """The weighted tokens of a text: their log-probability in nats, their number, whether each is the likeliest in its place."""

    log_p: float
    num_tokens: int
    greedy: bool


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

    A context that is empty, where the tokenizer puts nothing before texts, lends its place to the end-of-sequence token, since
    something must come before what is predicted.
    """
    stem = context.rstrip()
    joint = context[len(stem) :] or (" " if stem else "")
    return behind(stem, joint + option, tokenizer, tokenizer.eos)


def behind(stem: str, text: str, tokenizer: ChatTokenizer, first: int) -> Example:
    """`text` right behind `stem`, with weight. It begins with the first token that is not the stem's: a token over the joint belongs
    to it. The begin-of-sequence token stands first where the tokenizer puts it before texts, else `first` before an empty stem."""
    head = head_of(tokenizer)
    before, whole = tokenizer.encode_plain(stem), tokenizer.encode_plain(stem + text)
    same = next(
        (k for k, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), min(len(before), len(whole))
    )
    if not head and not same:
        head = [first]
    return weighed([*head, *whole], len(head) + min(same, len(whole) - 1))


def head_of(tokenizer: ChatTokenizer) -> list[int]:
    """What the tokenizer itself puts before a text: the begin-of-sequence token, or nothing."""
    bos = tokenizer.template.special.get("bos_token")
    return [tokenizer.control[bos]] if bos is not None and adds_bos(tokenizer.json, bos) else []


def weighed(ids: Sequence[int], start: int) -> Example:
    """Tokens from `start` on carry weight."""
    weights = np.zeros(len(ids), np.float32)
    weights[start:] = 1
    return Example(ids_T=np.array(ids, np.int32), weights_T=weights)


def score_options(
    model: CausalLM, items: Sequence[Item], tokenizer: ChatTokenizer, capacity_tokens: int
) -> list[list[Scored]]:
    """Every option of every question. The model reads packed rows; with a `capacity_tokens` of 1 each text is alone."""
    texts = [t for item in items for t in item.texts]
    read = read_texts(model, [option_of(context, option, tokenizer) for context, option in texts], capacity_tokens)
    scored = iter(
        Scored(log_p=r.log_p, num_tokens=r.num_tokens, num_bytes=len(option.encode()))
        for r, (_, option) in zip(read, texts, strict=True)
    )
    return [[next(scored) for _ in item.texts] for item in items]


def read_texts(
    model: CausalLM,
    examples: Sequence[Example],
    capacity_tokens: int,
    on_read: Callable[[int], None] = lambda done: None,
) -> list[Read]:
    """What the model makes of the weighted tokens of each text; `on_read` gets how many are done, after each packed row."""
    nll_E, greedy_E = np.zeros(len(examples)), np.ones(len(examples), bool)
    sizes_E = np.array([int(e.weights_T.sum()) for e in examples], np.int64)
    lengths_E = np.array([e.ids_T.size for e in examples], np.int64)
    for group in plan_once(lengths_E, capacity_tokens=capacity_tokens):
        nll_N, likeliest_N = _read(model, [examples[k] for k in group])
        owners_N = np.repeat(np.arange(len(group)), sizes_E[group])
        nll_E[group] = np.bincount(owners_N, nll_N, len(group))
        greedy_E[group] = np.bincount(owners_N, ~likeliest_N, len(group)) == 0
        on_read(group[-1] + 1)
    facts = zip(nll_E.tolist(), sizes_E.tolist(), greedy_E.tolist(), strict=True)
    return [Read(log_p=-nll, num_tokens=size, greedy=greedy) for nll, size, greedy in facts]


def _read(model: CausalLM, examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
    """Of each scored token, in their order: its nll, and whether none is likelier."""
    batch = build_batch(examples)
    nll, likeliest = [], []
    with torch.no_grad():
        hidden_ND = model.hidden_states(batch)[model.tensor(batch.predict_N)]
        targets_N = model.tensor(batch.targets_N)
        for piece in pieces(model, len(hidden_ND)):
            logits_BV = model.head(hidden_ND[piece])
            nll.append(softmax_facts(logits_BV, targets_N[piece]).nll_B.double().cpu())
            likeliest.append((logits_BV.argmax(-1) == targets_N[piece]).cpu())
    return torch.cat(nll).numpy(), torch.cat(likeliest).numpy()


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
