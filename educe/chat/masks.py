"""What other ways of masking would train on the same row, so that the difference can be seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from educe.chat.template import TemplateRefusal
from educe.chat.tokens import ChatTokenizer
from educe.types import Conversation, Rendered


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherMask:
    """Another mask's one sequence: `ids`, which of them it trains, and the text of each.

    `missed` counts tokens that we train and it does not, `extra` those it trains and we do not. `says` tells what it does.
    """

    name: str
    says: str
    ids: list[int]
    trained: list[bool]
    texts: list[str]
    missed: int
    extra: int


def whole(c: Conversation, form: str, ours: Sequence[Rendered], tokenizer: ChatTokenizer) -> OtherMask:
    """Loss on the whole conversation."""
    ids = _full(c, tokenizer)
    return _compared("whole", "trains every token of the conversation", ids, [True] * len(ids), ours, tokenizer)


def trl(c: Conversation, form: str, ours: Sequence[Rendered], tokenizer: ChatTokenizer) -> OtherMask:
    """TRL's default (SFTTrainer, `assistant_only_loss=False`): every token of `messages` rows; of prompt/completion rows what
    follows the rendered prompt, whatever the template writes there."""
    ids = _full(c, tokenizer)
    if not form.startswith("prompt/"):
        says = "TRL's default for this format: trains every token, prompts and template text included"
        return _compared("trl", says, ids, [True] * len(ids), ours, tokenizer)
    prompt = tokenizer.encode(tokenizer.template.render(c.messages[:-1], tools=c.tools, generation=True).text)
    trained = [k >= len(prompt) for k in range(len(ids))]
    says = (
        "TRL's default for this format: trains all that follows the prompt, what stands after the stop token included"
    )
    return _compared("trl", says, ids, trained, ours, tokenizer)


def _full(c: Conversation, tokenizer: ChatTokenizer) -> list[int]:
    """The conversation as one text, encoded as other tools do: control strings typed in it become control tokens."""
    try:
        return tokenizer.encode(tokenizer.template.render(c.messages, tools=c.tools, generation=False).text)
    except TemplateRefusal:
        return []


def _compared(
    name: str, says: str, ids: list[int], trained: list[bool], ours: Sequence[Rendered], tokenizer: ChatTokenizer
) -> OtherMask:
    """Count by turn of the other's sequence: our completions are looked up in it in order."""
    mine = [False] * len(ids)
    missed = at = 0
    for r in ours:
        for run in r.runs:
            if not run.trained:
                continue
            wanted = r.ids_T[run.first : run.end].tolist()
            start = next((k for k in range(at, len(ids) - len(wanted) + 1) if ids[k : k + len(wanted)] == wanted), None)
            if start is None:
                missed += len(wanted)
                continue
            at = start + len(wanted)
            mine[start:at] = [True] * len(wanted)
            missed += sum(not t for t in trained[start:at])
    extra = sum(t and not m for t, m in zip(trained, mine, strict=True))
    texts = tokenizer.pieces(ids)
    return OtherMask(name=name, says=says, ids=ids, trained=trained, texts=texts, missed=missed, extra=extra)


MASKS: dict[str, Callable[[Conversation, str, Sequence[Rendered], ChatTokenizer], OtherMask]] = {
    "whole": whole,
    "trl": trl,
}
