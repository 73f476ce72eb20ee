"""Loss weight per token, and conversation → examples: the whole way from a row to what is stored."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32

from educe.chat.render import Unproved, Unshared, assemble, render
from educe.chat.tokens import ChatTokenizer
from educe.errors import Refusal
from educe.types import Conversation, Example, Rendered, Rendering


def weigh(rendered: Rendered) -> Float32[np.ndarray, " t"]:
    """1 for the tokens of a completion, stop token included, 0 for everything else."""
    trained = np.array([s.trained for s in rendered.rendering.segments], dtype=np.float32)
    weights_T: Float32[np.ndarray, " t"] = trained[rendered.segment_T]
    return weights_T


def build_rendered(conversation: Conversation, tokenizer: ChatTokenizer, only_last: bool) -> list[Rendered] | Refusal:
    """All sequences of a row, proved; one that cannot be proved refuses the row."""
    try:
        try:
            return _assembled(render(conversation, tokenizer, only_last=only_last), tokenizer)
        except Unshared:
            return _assembled(render(conversation, tokenizer, only_last=only_last, apart=True), tokenizer)
    except Unproved as e:
        code, found, fix = e.args
        return Refusal(code=code, where=str(conversation.source), found=found, fix=fix)


def _assembled(renderings: list[Rendering] | Refusal, tokenizer: ChatTokenizer) -> list[Rendered] | Refusal:
    return renderings if isinstance(renderings, Refusal) else [assemble(r, tokenizer) for r in renderings]


def build_examples(
    conversation: Conversation, tokenizer: ChatTokenizer, *, only_last: bool, max_tokens: int
) -> list[Example] | Refusal:
    """A row as examples of at most `max_tokens` tokens. A longer one refuses the row: an answer is never cut."""
    built = build_rendered(conversation, tokenizer, only_last)
    if isinstance(built, Refusal):
        return built
    longest = max(r.ids_T.size for r in built)
    if longest > max_tokens:
        found = f"{longest} tokens, more than data.max_tokens ({max_tokens})."
        fix = "Raise data.max_tokens or shorten the row."
        return Refusal(code="E-DATA-201", where=str(conversation.source), found=found, fix=fix)
    return [Example(ids_T=r.ids_T, weights_T=weigh(r)) for r in built]
