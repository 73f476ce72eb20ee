"""The quickstart's data: what its README claims, checked."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from importlib.resources import files
from typing import Any

import pytest
from educe.data.reading import to_conversation
from educe.types import Conversation, Source

SPLITS = ("train", "dev", "test")
INTENTS = {"refund", "exchange", "cancel", "track", "address"}
# Jaccard similarity of word trigrams, numbers folded. Measured: the closest pair over the splits has 0.27.
NEAR_COPY = 0.35


def rows(split: str) -> list[dict[str, Any]]:
    text = (files("educe.quickstart") / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def message_and_ticket(row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return row["messages"][-2]["content"], json.loads(row["messages"][-1]["content"])


@pytest.mark.parametrize("split, least", [("train", 600), ("dev", 60), ("test", 200)])
def test_enough_rows_in_the_messages_format(split: str, least: int) -> None:
    found = rows(split)
    assert len(found) >= least
    for n, row in enumerate(found, 1):
        assert isinstance(to_conversation(row, Source(file=split, line=n)), Conversation)


@pytest.mark.parametrize("split", SPLITS)
def test_tickets_follow_from_their_messages(split: str) -> None:
    for row in rows(split):
        message, ticket = message_and_ticket(row)
        assert list(ticket) == ["intent", "order", "item"]
        assert ticket["intent"] in INTENTS
        if ticket["order"] is not None:
            assert re.fullmatch(r"\d{4}", ticket["order"])
            assert re.search(rf"(?<!\d){ticket['order']}(?!\d)", message), message
        if ticket["item"] is not None:
            assert ticket["item"] in message.lower(), message


def test_intents_are_balanced_and_nulls_occur() -> None:
    for split in SPLITS:
        tickets = [message_and_ticket(r)[1] for r in rows(split)]
        counts = Counter(t["intent"] for t in tickets)
        assert min(counts.values()) > 0.1 * len(tickets)
        for field in ("order", "item"):
            assert 0.05 < sum(t[field] is None for t in tickets) / len(tickets) < 0.3


def test_every_row_has_the_same_system_prompt() -> None:
    assert len({r["messages"][0]["content"] for s in SPLITS for r in rows(s)}) == 1


def trigrams(message: str) -> frozenset[tuple[str, ...]]:
    words = re.sub(r"\d+", "0", re.sub(r"[^\w\s]", " ", message.lower())).split()
    return frozenset(tuple(words[i : i + 3]) for i in range(len(words) - 2)) or frozenset({tuple(words)})


def closest(held: list[str], train: list[str]) -> tuple[float, str, str]:
    """The held-out message most like a training message."""
    index: dict[tuple[str, ...], set[int]] = defaultdict(set)
    grams = [trigrams(m) for m in train]
    for i, g in enumerate(grams):
        for t in g:
            index[t].add(i)
    best = (0.0, "", "")
    for message in held:
        mine = trigrams(message)
        for i in {i for t in mine for i in index[t]}:
            best = max(best, (len(mine & grams[i]) / len(mine | grams[i]), message, train[i]))
    return best


@pytest.mark.parametrize("split", ["dev", "test"])
def test_no_held_out_message_is_a_near_copy_of_a_training_message(split: str) -> None:
    train = [message_and_ticket(r)[0] for r in rows("train")]
    similarity, held, near = closest([message_and_ticket(r)[0] for r in rows(split)], train)
    assert similarity < NEAR_COPY, f"{similarity:.2f}: {held!r} and {near!r}"


def test_the_measure_finds_a_near_copy() -> None:
    message = message_and_ticket(rows("train")[0])[0]
    assert closest([re.sub(r"\d", "7", message) + " thanks"], [message])[0] > NEAR_COPY


def test_rows_are_short(smollm2_tokenizer_dir: Any) -> None:
    from educe.chat.examples import build_examples
    from educe.chat.render import Renderer
    from educe.chat.tokens import load_tokenizer

    renderer = Renderer(load_tokenizer(smollm2_tokenizer_dir))
    sizes, answers = [], []
    for split in SPLITS:
        for n, row in enumerate(rows(split), 1):
            made = to_conversation(row, Source(file=split, line=n))
            assert isinstance(made, Conversation)
            built = build_examples([made], renderer, max_tokens=100)[0]
            assert isinstance(built, list)
            sizes.append(built[0].ids_T.size)
            answers.append(int((built[0].weights_T > 0).sum()))
    assert sum(sizes) / len(sizes) < 80
    assert max(sizes) <= 90
    assert max(answers) <= 30
