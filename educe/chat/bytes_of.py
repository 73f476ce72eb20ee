"""Ids as bytes: where a tokenizer's decoder only puts the bytes of its tokens in a row, a table decodes, and proves, at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64, UInt8
from tokenizers import Tokenizer

_SAMPLES = ("Hello, world!\n\n  x=1\t", "naïve café 日本語 😀👩\u200d👧", " leading", "a<b> c\r\n", "ﬁ ½ é e\u0301 ü")


@dataclass(frozen=True, slots=True, eq=False)
class ByteTable:
    """`flat` has the bytes of all V ids in a row: those of id i are `lengths_V[i]` from `starts_V[i]` on.

    `normal_form`: text is compared after NFC.
    """

    lengths_V: Int64[np.ndarray, " v"]
    normal_form: bool
    flat: UInt8[np.ndarray, " n"]
    starts_V: Int64[np.ndarray, " v"]

    def decode(self, ids_B: Int32[np.ndarray, " b"]) -> tuple[UInt8[np.ndarray, " n"], Int64[np.ndarray, " b+1"]]:
        """The bytes of all ids in a row, and where each id's begin (and the last one's end)."""
        lengths = self.lengths_V[ids_B]
        ends = np.concatenate([[0], np.cumsum(lengths)])
        where = np.repeat(self.starts_V[ids_B] - ends[:-1], lengths)
        where += np.arange(int(ends[-1]))
        return self.flat[where], ends


def table_of(
    vocabulary: Mapping[str, int], stock: Tokenizer, tree: Mapping[str, Any], control: Mapping[str, int]
) -> ByteTable | None:
    """The table, or None where decoding or encoding is more than that: prefix spaces, tokens that eat white space."""
    normalizer = tree.get("normalizer")
    kind = _decoder_kind(tree.get("decoder"))
    if kind is None or not _normalizer_is(normalizer, kind) or _adds_prefix(tree.get("pre_tokenizer")):
        return None
    flags = ("lstrip", "rstrip", "single_word")
    own = [t for t in tree.get("added_tokens", []) if t["content"] in control]
    if any(t[f] for t in own for f in flags) or (normalizer is not None and any(t["normalized"] for t in own)):
        return None  # else encoding a text is encoding the stretches between control tokens
    table = [b"\x00"] * (max(vocabulary.values()) + 1)
    added = {int(t["id"]) for t in tree.get("added_tokens", [])}
    for token, number in vocabulary.items():
        table[number] = token.encode() if number in added and kind == "bytes" else _bytes_of(token, kind)
    lengths = np.array([len(b) for b in table], np.int64)
    flat = np.frombuffer(b"".join(table), np.uint8)
    made = ByteTable(lengths, kind == "bytes" and normalizer is not None, flat, np.cumsum(lengths) - lengths)
    for text in _SAMPLES:
        ids = stock.encode(text, add_special_tokens=False).ids
        expected = stock.normalizer.normalize_str(text) if made.normal_form and stock.normalizer else text
        if b"".join(table[i] for i in ids) != expected.encode():
            return None
    return made


def _decoder_kind(decoder: Any) -> str | None:
    """`bytes` (GPT-2's byte alphabet), `pieces` (SentencePiece's ▁ and byte tokens, no stripping), or neither."""
    if not isinstance(decoder, dict):
        return None
    if decoder["type"] == "ByteLevel":
        return "bytes"
    if decoder["type"] != "Sequence":
        return None
    kinds = [d["type"] for d in decoder["decoders"]]
    if kinds == ["Replace", "ByteFallback", "Fuse"] and decoder["decoders"][0].get("content") == " ":
        return "pieces"
    return "bytes" if kinds == ["ByteLevel"] else None


def _normalizer_is(normalizer: Any, kind: str) -> bool:
    if kind == "bytes":
        return (
            normalizer is None or normalizer["type"] == "NFC" or normalizer == {"type": "Sequence", "normalizers": []}
        )
    return normalizer is None or (normalizer["type"] == "Replace" and normalizer.get("content") == "▁")


def _adds_prefix(pre: Any) -> bool:
    if not isinstance(pre, dict):
        return False
    if pre["type"] == "Sequence":
        return any(map(_adds_prefix, pre["pretokenizers"]))
    return bool(pre.get("add_prefix_space")) or pre["type"] == "Metaspace"


def _bytes_of(token: str, kind: str) -> bytes:
    if kind == "bytes":
        return bytes(_ALPHABET[c] for c in token) if all(c in _ALPHABET for c in token) else token.encode()
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def _alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable Latin-1 as it is, the others from U+0100 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + k): b for k, b in enumerate(others)}


_ALPHABET = _alphabet()
