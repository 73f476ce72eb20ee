"""A judge of every row that educe proved or refused, which asks `oracle` alone: ids before a trained turn are a server's, what is
trained is what the template puts after the prompt, up to one stop token, and a refusal's reason is true.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from educe.chat.tokens import ChatTokenizer
from educe.chat.weights import weigh
from educe.errors import Refusal
from educe.types import Conversation, Rendered

from oracle import BLOCKS, END, Raised, Server, inline, longer, marked, missing, plain, texts_of

# --- one trained turn ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """Turn `i` of a row in a sequence: ids before it, its own, and their text."""

    i: int
    before: list[int]
    ids: list[int]
    text: str


def trained(sequence: Rendered, server: Server) -> list[Trained]:
    """The trained turns of a sequence; two that touch (no header stands between them) are told apart by their stop tokens."""
    ids, stop = sequence.ids_T.tolist(), server.tokenizer.stop
    turns = iter(sequence.rendering.turns)
    made = []
    for run in (r for r in sequence.runs if r.trained):
        num = len(dict.fromkeys(s.message for s in run.segments if s.message is not None))
        inside = [k + 1 for k in range(run.first, run.end - 1) if ids[k] in stop] if num > 1 else []
        edges = [run.first, *inside[: num - 1], run.end]
        for first, end in pairwise(edges):
            start, now = server.decode(ids[:first]), server.decode(ids[:end])
            text = now[len(start) :] if now.startswith(start) else server.decode(ids[first:end])
            made.append(Trained(next(turns), ids[:first], ids[first:end], text))
    return made


def _same(one: str, other: str) -> bool:
    return plain(one) == plain(other)


def judge_turn(row: Conversation, turn: Trained, server: Server) -> Iterator[str]:
    """What is wrong with a trained turn."""
    i, message, tokenizer = turn.i, row.messages[turn.i], server.tokenizer
    try:
        prompt = server.text(row, row.messages[:i], generation=True)
        full = server.text(row, row.messages[: i + 1], generation=False)
    except Raised:
        yield f"turn {i} is trained and the template refuses it"
        return
    if not server.words(texts_of(row)) and turn.before != server.encode(prompt):
        yield f"turn {i}: the ids before it are not those of its prompt"
    stops = [k for k, n in enumerate(turn.ids) if n in tokenizer.stop]
    if stops != [len(turn.ids) - 1]:
        yield f"turn {i}: stop tokens at {stops} of {len(turn.ids)} trained"
    if lost := missing(message, turn.text):
        yield f"turn {i}: not in what is trained: {lost[0][:40]!r}"
    if tokenizer.table is not None and not _same(server.decode(turn.before), prompt):
        yield f"turn {i}: what stands before it does not decode to its prompt"
    yield from _judge_text(row, turn, server, prompt, full)


def _judge_text(row: Conversation, turn: Trained, server: Server, prompt: str, full: str) -> Iterator[str]:
    """Whether the trained text is what the template puts after the prompt, up to and including the stop token."""
    i, text = turn.i, turn.text
    tail = _tail(row, i, server)
    stop = server.first_stop(tail) if tail is not None else None
    last = server.decode(turn.ids[-1:])
    if full.startswith(prompt):
        rest = full[len(prompt) :]
        if stop is not None:
            wanted = rest[: len(rest) - len(tail or "") + stop]
            if not _same(text, wanted):
                at = next(
                    (k for k, (a, b) in enumerate(zip(text, wanted, strict=False)) if a != b),
                    min(len(text), len(wanted)),
                )
                yield f"turn {i}: trained …{text[max(0, at - 20) :][:60]!r}, wanted …{wanted[max(0, at - 20) :][:60]!r}"
            return
        spoken = text.removesuffix(last)
        if _same(spoken.rstrip(), rest.rstrip()) and plain(rest).startswith(plain(spoken)):
            return  # the end-of-sequence token is appended, or the next message writes the stop
        if any(plain(t).startswith(plain(prompt + text)) for t in longer(row, i, server)):
            return
        yield f"turn {i}: trained {text!r}, and the template writes no stop token after {rest[-60:]!r}"
        return
    yield from _judge_bridge(row, i, server, text, prompt, full)


def _judge_bridge(row: Conversation, i: int, server: Server, text: str, prompt: str, full: str) -> Iterator[str]:
    """A turn that history shows otherwise than after its prompt."""
    message = row.messages[i]
    if plain(text) in plain(full):
        at = plain(full).rindex(plain(text))
        if full[:at].endswith(prompt[-12:]) or not text.strip():
            return  # what differs stands before the last message
    opened = next(((o, c) for o, c in BLOCKS if o.strip() in prompt[-80:]), None)
    if opened is None:
        yield f"turn {i} does not follow its prompt {prompt[-40:]!r}, which opens no reasoning"
        return
    opener, closer = (t.strip() for t in opened)
    block, own = prompt[prompt.rindex(opener) :] + text, message.content + (message.reasoning or "")
    own = own.removeprefix(opener) if (thought := inline(message.content)[0]) else own
    own = own.replace(closer, "", 1) if thought else own
    if any(block.count(tag) - own.count(tag) != 1 for tag in (opener, closer)):
        yield f"turn {i}: reasoning is opened and closed unevenly: {block[:30]!r} … {block[-60:]!r}"
    answer = inline(message.content)[1]
    behind = plain((text.rpartition(answer)[2] if answer else text.rpartition(closer)[2]).strip())
    if not any(behind in plain(t) for t in (full, *longer(row, i, server))):
        yield f"turn {i}: {behind!r} after the answer is not what history shows"


def _tail(row: Conversation, i: int, server: Server) -> str | None:
    """What the template writes behind the last thing that turn `i` says."""
    try:
        text = server.text(row, (*row.messages[:i], marked(row.messages[i])), generation=False)
    except Raised:
        return None
    return text.rpartition(END)[2] if END in text else None


# --- a whole row ---------------------------------------------------------------------------------------------------------


def wanted_turns(row: Conversation) -> list[int]:
    return [i for i, m in enumerate(row.messages) if m.role == "assistant" and i > 0 and m.weight != 0]


def judge_proved(row: Conversation, built: Sequence[Rendered], tokenizer: ChatTokenizer) -> list[str]:
    """What is wrong with a row's sequences."""
    server = Server(tokenizer)
    wrong = []
    turns = [t for s in built for t in trained(s, server)]
    if [t.i for t in turns] != wanted_turns(row):
        wrong.append(f"turns {[t.i for t in turns]} are trained")
    for t in turns:
        wrong += judge_turn(row, t, server)
    for s in built:
        weights_T = np.zeros(s.ids_T.size, np.float32)
        for t in trained(s, server):
            weights_T[len(t.before) : len(t.before) + len(t.ids)] = 1 if (w := row.messages[t.i].weight) is None else w
        if not np.array_equal(weights_T, weigh(s, row.messages, tokenizer)):
            wrong.append("the weights are not those of the trained turns")
        wrong += _judge_control(row, s, server)
    wrong += _judge_split(row, built, server)
    return wrong


def _judge_control(row: Conversation, sequence: Rendered, server: Server) -> Iterator[str]:
    """Control strings that the row says are text: it has the control tokens of a row that says others in their place."""
    tokenizer, last = server.tokenizer, sequence.rendering.turns[-1]
    words = server.words(texts_of(row))
    if not words:
        return
    order = sorted(words, key=len, reverse=True)

    def tame(value: Any) -> Any:
        if isinstance(value, str):
            for w in order:
                value = value.replace(w, "".join(c for c in w if c.isalnum()))
            return value
        if isinstance(value, dict):
            return {k: tame(v) for k, v in value.items()}
        return [tame(v) for v in value] if isinstance(value, list) else value

    messages = tuple(
        replace(
            m,
            content=tame(m.content),
            reasoning=tame(m.reasoning) if m.reasoning else None,
            tool_calls=tuple(replace(c, arguments=tame(dict(c.arguments))) for c in m.tool_calls),
        )
        for m in row.messages
    )
    ids = sequence.ids_T.tolist()
    run = [r for r in sequence.runs if r.trained][-1]
    try:
        prompt = server.encode(server.text(row, messages[:last], generation=True))
        full = server.encode(server.text(row, messages[: last + 1], generation=False))
    except Raised:
        yield "the row is refused with other texts in place of control strings"
        return
    known = set(tokenizer.control.values())
    sent, shown = ([n for n in some if n in known] for some in (prompt, full))
    if [n for n in ids[: run.first] if n in known] != sent:
        yield "control tokens in the prompt are not those the template writes"
    mine = [n for n in ids[: run.end] if n in known]
    if shown[: len(sent)] == sent and mine != shown[: len(mine)] and mine[:-1] != shown[: len(mine) - 1]:
        yield "control tokens in the answer are not those the template writes"


def _judge_split(row: Conversation, built: Sequence[Rendered], server: Server) -> Iterator[str]:
    """A row is split only where a later prompt does not go on from what came before. (Where the ids of one turn do not, all
    turns are apart.)"""
    if server.words(texts_of(row)):
        return
    needless = []
    for before, now in pairwise(built):
        ids = server.encode(server.text(row, row.messages[: now.rendering.turns[0]], generation=True))
        goes_on = before.ids_T.tolist() == ids[: before.ids_T.size] and before.rendering.segments[-1].part != "eos"
        needless += [now.rendering.turns[0]] if goes_on else []
        if not goes_on and now.rendering.apart == "ids":
            return
    if needless:
        yield f"turn {needless[0]} is apart, though its prompt goes on from the turn before"


# --- refusals ------------------------------------------------------------------------------------------------------------


def judge_refused(row: Conversation, refusal: Refusal, tokenizer: ChatTokenizer) -> list[str]:
    """Why a refusal is not true."""
    server = Server(tokenizer)
    numbers = re.search(r"turn (\d+)", refusal.found)
    i = int(numbers[1]) if numbers else None
    refused = [j for j in wanted_turns(row) if _refused(row, j, server)]
    if refusal.code == "E-CHAT-102":
        return [] if refused else ["the template does not refuse it"]
    if refusal.code == "E-CHAT-310":
        return [f"turns {wanted_turns(row)} could be trained"] if wanted_turns(row) else []
    if i is None:
        named = re.search(r"the tool (\w+)", refusal.found)
        i = wanted_turns(row)[0] if named else None
        if i is not None and named:
            hidden = named[1] not in server.text(row, row.messages[:i], generation=True)
            return [] if hidden else [f"the prompt of turn {i} names {named[1]}"]
        return [f"unjudged: {refusal.found}"]
    if i in refused:
        return ["the template refuses it"]
    return list(_judge_reason(row, refusal, i, server))


def _refused(row: Conversation, i: int, server: Server) -> bool:
    try:
        server.text(row, row.messages[:i], generation=True)
        server.text(row, row.messages[: i + 1], generation=False)
    except Raised:
        return True
    return False


def _judge_reason(row: Conversation, refusal: Refusal, i: int, server: Server) -> Iterator[str]:
    message = row.messages[i]
    prompt = server.text(row, row.messages[:i], generation=True)
    full = server.text(row, row.messages[: i + 1], generation=False)
    rest = full[len(prompt) :] if full.startswith(prompt) else full
    if refusal.code == "E-CHAT-301":
        if full.startswith(prompt):
            yield f"turn {i} follows its prompt"
    elif refusal.code == "E-CHAT-302":
        if message.content.strip() in rest and full.startswith(prompt):
            yield f"the template shows the text of turn {i} unchanged"
    elif refusal.code == "E-CHAT-304" and "goes on behind" in refusal.found:
        word = refusal.found.split("goes on behind ", 1)[1].split(", which", 1)[0]
        if len(rest.split(word)) < 2 or not rest.split(word, 1)[1].strip():
            yield f"turn {i} does not go on behind {word!r}"
    elif refusal.code == "E-CHAT-304":
        if (tail := _tail(row, i, server)) is not None and server.first_stop(tail) is not None:
            yield f"turn {i} has a stop token in {tail!r}"
    elif refusal.code == "E-CHAT-308":
        thoughts = [t for t in ((message.reasoning or "").strip(), inline(message.content)[0]) if t]
        closed = any(c.strip() in prompt[-60:] for _, c in BLOCKS)
        answer = message.content.strip()
        if message.reasoning and message.reasoning.strip() in answer:  # the answer's own letters are not the reasoning
            rest = rest.replace(answer, "", 1)
        if all(t in rest for t in thoughts) and not closed:
            yield f"the template shows the reasoning of turn {i}"
    elif refusal.code == "E-CHAT-309":
        left_out = re.search(r"leaves out message (\d+)", refusal.found)
        if left_out and row.messages[int(left_out[1])].content.strip() in prompt:
            yield f"message {left_out[1]} is in the prompt of turn {i}"
        if not left_out and not missing(replace(message, reasoning=None), rest):
            yield f"the template shows the call of turn {i}"
    else:
        yield f"unjudged: {refusal.code} {refusal.found}"
