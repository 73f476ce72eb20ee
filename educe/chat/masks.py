"""What other ways of masking would train on the same row, so that the difference can be seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from educe.chat.template import Piece, TemplateRefusal
from educe.chat.tokens import ChatTokenizer
from educe.types import Conversation, Message, Rendered

# TRL 1.16, SFTConfig.max_length: longer sequences are cut there.
TRL_MAX_TOKENS = 1024
# Formats whose rows TRL reads; it ends with an error on others.
_TRL_READS = ("messages", "sharegpt", "prompt/completion")


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherMask:
    """Another mask's one sequence: `ids`, the text of each, which of them it trains and which of them we train.

    The first token is never trained: nothing predicts it. `missed` counts tokens that we train and it does not, `extra` those
    it trains and we do not, which `extra_of` tells by what they are. `says` tells what it does.
    """

    name: str
    says: str
    ids: list[int]
    texts: list[str]
    trained: list[bool]
    ours: list[bool]
    missed: int
    extra: int
    extra_of: dict[str, int]

    def in_words(self) -> list[str]:
        """The difference as sentences, for people."""
        if not self.ids:
            return [self.says]
        who = {"trl": "TRL's default", "whole": "Training on the whole conversation"}[self.name]
        said = []
        if self.extra:
            listed = ", ".join(f"{n:,} of {what}" for what, n in self.extra_of.items())
            said.append(f"{who} trains {_tokens(self.extra)} that the model never has to say: {listed}.")
        if self.missed:
            said.append(f"{who} leaves out {_tokens(self.missed)} that inference asks of the model.")
        return said or [f"{who} trains the same tokens of this row."]


def _tokens(count: int) -> str:
    return f"{count:,} token{'s' * (count != 1)}"


def whole(c: Conversation, row: Mapping[str, Any], ours: Sequence[Rendered], tokenizer: ChatTokenizer) -> OtherMask:
    """Loss on the whole conversation."""
    try:
        pieces = tokenizer.template.render(c.messages, tools=c.tools, generation=False).pieces
    except TemplateRefusal as e:
        return _nothing("whole", f"the template refuses the conversation as one text: {e.args[1]}", ours)
    ids = tokenizer.encode("".join(p.text for p in pieces))
    says = "trains every token of the conversation"
    return _compared("whole", says, c, pieces, ids, [True] * len(ids), ours, tokenizer)


def trl(c: Conversation, row: Mapping[str, Any], ours: Sequence[Rendered], tokenizer: ChatTokenizer) -> OtherMask:
    """TRL 1.16 as it comes (SFTTrainer, no option set): `_prepare_dataset`, from `tokenize_fn` to `truncate`.

    `messages`: every token. `prompt` + `completion` (`completion_only_loss` is then on): what follows the ids that the prompt,
    rendered for generation, shares with the whole. Texts instead of messages get no template. `conversations`: as `messages`,
    and their roles are not translated. All without template settings.
    """
    stock = tokenizer.with_settings({})
    form = next((f for f in _TRL_READS if _keys(f) <= row.keys()), None)
    note = "" if form else "TRL does not read this format; if the row were given as messages, its default "
    if form == "prompt/completion" and isinstance(row["prompt"], str):
        return _bare(c, row, ours, stock)
    messages = _untranslated(c, row) if form == "sharegpt" else c.messages
    try:
        pieces = stock.template.render(messages, tools=c.tools, generation=False).pieces
        ids = stock.encode("".join(p.text for p in pieces))
        trained, says = [True] * len(ids), "trains every token, prompts and template text included"
        if form == "sharegpt":
            says += f"; the template is given the row's own role names ({', '.join(dict.fromkeys(m.role for m in messages))})"
        if form == "prompt/completion":
            given = c.messages[: len(c.messages) - len(row["completion"])]
            sent = stock.encode(stock.template.render(given, tools=c.tools, generation=True).text)
            trained = [k >= _shared(sent, ids) for k in range(len(ids))]
            says = "trains all that follows the prompt, what stands after the stop token included"
    except TemplateRefusal as e:
        return _nothing("trl", f"{note or 'TRL '}ends with an error: the template refuses: {e.args[1]}", ours)
    if not ids:
        return _nothing("trl", "TRL drops this row: the template writes nothing for its role names", ours)
    if len(ids) > TRL_MAX_TOKENS:
        trained = [t and k < TRL_MAX_TOKENS for k, t in enumerate(trained)]
        says += f"; the sequence is cut after {TRL_MAX_TOKENS:,} tokens"
    return _compared("trl", f"{note or 'TRL as it comes '}{says}", c, pieces, ids, trained, ours, tokenizer)


def _keys(form: str) -> set[str]:
    return {"sharegpt": {"conversations"}}.get(form, set(form.split("/")))


def _untranslated(c: Conversation, row: Mapping[str, Any]) -> tuple[Message, ...]:
    """The row's turns under its own role names, behind what is not a turn of it (a system prompt)."""
    turns = row["conversations"]
    before = len(c.messages) - len(turns)
    own = [str(turn.get("from", m.role)) for turn, m in zip(turns, c.messages[before:], strict=True)]
    roles = [*(m.role for m in c.messages[:before]), *own]
    return tuple(replace(m, role=role) for m, role in zip(c.messages, roles, strict=True))  # type: ignore[arg-type]


def _bare(c: Conversation, row: Mapping[str, Any], ours: Sequence[Rendered], tokenizer: ChatTokenizer) -> OtherMask:
    """Prompt and completion given as texts: joined as they are, with the end-of-sequence token at the end."""
    eos = tokenizer.template.special.get("eos_token", "")
    prompt, answer = str(row["prompt"]), str(row["completion"])
    answer = answer if answer.endswith(eos) else f"{answer}{eos}"
    ids = tokenizer.encode(prompt + answer)
    start = _shared(tokenizer.encode(prompt), ids)
    pieces = (Piece(prompt, len(c.messages) - 2, "content"), Piece(answer, len(c.messages) - 1, "content"))
    says = "TRL as it comes puts no chat template around prompt and completion given as texts: it trains the bare completion"
    says += " behind the bare prompt, which is not what a chat server sends"
    trained = [start <= k < TRL_MAX_TOKENS for k in range(len(ids))]
    return _compared("trl", says, c, pieces, ids, trained, ours, tokenizer)


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    return next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _nothing(name: str, says: str, ours: Sequence[Rendered]) -> OtherMask:
    missed = sum(run.end - run.first for r in ours for run in r.runs if run.trained)
    return OtherMask(name=name, says=says, ids=[], texts=[], trained=[], ours=[], missed=missed, extra=0, extra_of={})


def _compared(
    name: str,
    says: str,
    c: Conversation,
    pieces: Sequence[Piece],
    ids: list[int],
    trained: list[bool],
    ours: Sequence[Rendered],
    tokenizer: ChatTokenizer,
) -> OtherMask:
    """Count on the other's sequence: each of our completions is looked up in it, in the turn it belongs to."""
    texts = tokenizer.pieces(ids)
    owners = _owners(pieces, texts)
    trained = [t and k > 0 for k, t in enumerate(trained)]
    mine = [False] * len(ids)
    missed = 0
    for sequence, run in ((s, run) for s in ours for run in s.runs if run.trained):
        wanted = sequence.ids_T[run.first : run.end].tolist()
        turn = run.segments[0].message
        before = max((k for k, p in enumerate(owners) if p.message is not None and p.message < (turn or 0)), default=0)
        spots = range(before, len(ids) - len(wanted) + 1)
        start = next((k for k in spots if ids[k] == wanted[0] and ids[k : k + len(wanted)] == wanted), None)
        if start is None:
            missed += len(wanted)
            continue
        mine[start : start + len(wanted)] = [True] * len(wanted)
        missed += sum(not t for t in trained[start : start + len(wanted)])
    extra = [k for k, (t, m) in enumerate(zip(trained, mine, strict=True)) if t and not m]
    counted = Counter(_what(owners[k], c) for k in extra)
    return OtherMask(
        name=name,
        says=says,
        ids=ids,
        texts=texts,
        trained=trained,
        ours=mine,
        missed=missed,
        extra=len(extra),
        extra_of=dict(counted.most_common()),
    )


def _owners(pieces: Sequence[Piece], texts: Sequence[str]) -> list[Piece]:
    """For each token the piece that holds its first character."""
    shown = [p for p in pieces if p.text] or [Piece("")]
    ends = np.cumsum([len(p.text) for p in shown])
    starts = np.cumsum([0, *map(len, texts)])[:-1]
    places = np.minimum(np.searchsorted(ends, starts, side="right"), len(shown) - 1).tolist()
    return [shown[k] for k in places]


def _what(piece: Piece, c: Conversation) -> str:
    if not piece.from_data or piece.message is None:
        return "the template's own text"
    role = c.messages[piece.message].role
    if role == "assistant":
        return "the assistant's text that is not asked for here"
    return {"system": "the system prompt", "user": "the user's text", "tool": "tool results"}.get(
        role, f"the {role}'s text"
    )


Mask = Callable[[Conversation, Mapping[str, Any], Sequence[Rendered], ChatTokenizer], OtherMask]
MASKS: dict[str, Mask] = {"whole": whole, "trl": trl}
