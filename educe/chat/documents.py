"""Raw text → examples for pre-training: every token is trained, and an end-of-sequence token closes the document."""

from __future__ import annotations

import numpy as np

from educe.chat.examples import Made
from educe.chat.tokenizer_file import adds_bos
from educe.chat.tokens import ChatTokenizer
from educe.types import Example


def document_made(text: str, tokenizer: ChatTokenizer, max_tokens: int) -> Made:
    """A document in pieces of at most `max_tokens` tokens, each with a weight of 1 on all tokens but its first.

    Control strings in the text are text. The begin-of-sequence token stands before every piece where the tokenizer itself puts
    it before texts; a last piece of one token, which nothing predicts, goes without.
    """
    bos = tokenizer.template.special.get("bos_token")
    head = [tokenizer.control[bos]] if bos is not None and adds_bos(tokenizer.json, bos) else []
    ids = [*tokenizer.encode_plain(text), tokenizer.eos]
    room = max_tokens - len(head)
    pieces = [np.array(head + ids[i : i + room], np.int32) for i in range(0, len(ids), room)]
    pieces = [p for p in pieces if p.size > 1]
    weights = [np.r_[np.float32(0), np.ones(p.size - 1, np.float32)] for p in pieces]
    made = [Example(ids_T=p, weights_T=w) for p, w in zip(pieces, weights, strict=True)]
    return Made(examples=made, num_trained=[p.size - 1 for p in pieces], stops=[], num_trimmed=0)
