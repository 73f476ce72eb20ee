"""Short conversations, a tokenizer under another template, and the rule that every trained turn must obey."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from educe.chat.examples import build_rendered
from educe.chat.render import Renderer
from educe.chat.template import compile_template
from educe.chat.tokens import ChatTokenizer, _probed
from educe.chat.weights import EVEN, Weighing, last_turn, weigh
from educe.errors import Refusal
from educe.types import Conversation, Message, Rendered, Source

START, STOP = "<|im_start|>", "<|im_end|>"
LAST = Weighing(policy=last_turn)


def talk(*said: str) -> tuple[Message, ...]:
    """Messages from `s:…`, `u:…` and `a:…`."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return tuple(Message(role=roles[s[0]], content=s[2:]) for s in said)  # type: ignore[arg-type]


def row_of(*messages: Message) -> Conversation:
    return Conversation(messages=messages, source=Source(file="f", line=1))


def build(messages: Sequence[Message], chat: ChatTokenizer, weighing: Weighing = EVEN) -> list[Rendered] | Refusal:
    return build_rendered([row_of(*messages)], Renderer(chat), weighing)[0]


def weights_of(sequence: Rendered, messages: Sequence[Message], chat: ChatTokenizer) -> list[float]:
    weights: list[float] = weigh(sequence, messages, chat).tolist()
    return weights


def prove(messages: tuple[Message, ...], chat: ChatTokenizer, built: list[Rendered]) -> None:
    """Each trained run follows what a server computes for its prompt, says the answer and ends in its first stop token.

    Only for contents without control strings: there a server's ids are those of the rendered text.
    """
    seen: list[int] = []
    for sequence in built:
        ids, weights = sequence.ids_T.tolist(), weights_of(sequence, messages, chat)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], weights, [0]]))).tolist()
        runs = list(zip(edges[::2], edges[1::2], strict=True))
        assert len(runs) == len(sequence.rendering.turns)
        for (first, end), turn in zip(runs, sequence.rendering.turns, strict=True):
            sent = chat.template.render(messages[:turn], generation=True).text
            assert ids[:first] == chat.stock.encode(sent, add_special_tokens=False).ids
            emitted = chat.stock.decode(ids[first:end], skip_special_tokens=False)
            assert messages[turn].content.strip() in emitted
            assert ids[end - 1] in chat.stop
            assert not chat.stop & set(ids[first : end - 1])
        seen += sequence.rendering.turns
    assert seen == [i for i, m in enumerate(messages) if m.role == "assistant" and i]


def with_template(chat: ChatTokenizer, source: str, special: dict[str, str] | None = None) -> ChatTokenizer:
    known = {"bos_token": "<|im_start|>", "eos_token": STOP, "pad_token": STOP, "unk_token": "<|endoftext|>"}
    template = compile_template(source, known if special is None else special)
    return _probed(replace(chat, stop=chat.known_stop, tool_use=None), template)
