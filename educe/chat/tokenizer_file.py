"""tokenizer.json: read it, add control tokens to it, build the two tokenizers that are needed of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from educe.chat.bytes_of import ByteTable, table_of
from educe.errors import ModelError


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a tokenizer.json gives, whatever the template: see `ChatTokenizer`. `added` are all its added tokens; `table()` is made
    when it is first asked for: whoever only opens what was prepared has no use for it."""

    stock: Tokenizer
    plain: Tokenizer
    text: str
    added: Mapping[str, int]
    control: Mapping[str, int]
    new: Mapping[str, int]
    table: Callable[[], ByteTable | None]
    eats: Mapping[str, tuple[bool, bool]]
    size: int


class _Once:
    """A value made when it is first asked for; what it was made of is then let go."""

    def __init__(self, make: Callable[[], ByteTable | None]) -> None:
        self._make: Callable[[], ByteTable | None] | None = make
        self._made: ByteTable | None = None

    def __call__(self) -> ByteTable | None:
        if self._make is not None:
            self._made, self._make = self._make(), None
        return self._made


@lru_cache(maxsize=8)
def parse(raw: str, words: tuple[str, ...]) -> Parsed:
    """Parse a tokenizer.json and add control tokens to it. Raises whatever is wrong with it."""
    tree = json.loads(raw)
    new = _add_tokens(tree, words)
    tree["truncation"] = tree["padding"] = tree["post_processor"] = None  # some files were saved with truncation on
    text = json.dumps(tree, ensure_ascii=False)
    stock = Tokenizer.from_str(text)
    plain = Tokenizer.from_str(json.dumps({**tree, "added_tokens": []}, ensure_ascii=False))
    control = _separate(tree["added_tokens"], plain)
    vocabulary = stock.get_vocab()
    return Parsed(
        stock=stock,
        plain=plain,
        text=text,
        added={str(t["content"]): int(t["id"]) for t in tree["added_tokens"]},
        control=control,
        new=new,
        table=_Once(partial(table_of, vocabulary, stock, tree, control)),
        eats={t["content"]: (t["lstrip"], t["rstrip"]) for t in tree["added_tokens"] if t["lstrip"] or t["rstrip"]},
        size=max(vocabulary.values()) + 1,
    )


def read_raw(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as e:
        fix = "The model needs a fast tokenizer: load it once with transformers' AutoTokenizer and save_pretrained."
        raise ModelError(1, str(file), "does not exist.", fix) from e
    except (OSError, ValueError) as e:
        raise ModelError(2, str(file), f"cannot be read: {e}.", "Download the model again.") from e


def _add_tokens(tree: dict[str, Any], words: Sequence[str]) -> dict[str, int]:
    """Put control tokens into a tokenizer's tree. Returns those it did not have at all, with the ids they get."""
    added = tree.setdefault("added_tokens", [])
    have = {t["content"] for t in added}
    vocabulary = _vocabulary(tree)
    free = max([*vocabulary.values(), *(t["id"] for t in added)], default=-1) + 1
    new: dict[str, int] = {}
    for word in words:
        if word in have:
            continue
        number = vocabulary.get(word)
        if number is None:
            number = new[word] = free + len(new)
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added.append({"id": number, "content": word, **flags, "special": True})
    return new


def _vocabulary(tree: dict[str, Any]) -> dict[str, int]:
    vocabulary = tree.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):  # Unigram: [[piece, score], ...]
        return {piece: i for i, (piece, _) in enumerate(vocabulary)}
    return dict(vocabulary)


def with_tokens(raw: str, words: tuple[str, ...]) -> str:
    """tokenizer.json as it is to be saved: the model's own, with the control tokens that were added."""
    tree = json.loads(raw) if words else {}
    have = len(tree.get("added_tokens", []))
    _add_tokens(tree, words)
    return raw if not words or len(tree["added_tokens"]) == have else json.dumps(tree, ensure_ascii=False)


@lru_cache(maxsize=8)  # asked for every document, and reading a tokenizer takes a tenth of a second
def adds_bos(raw: str, bos: str | None) -> bool:
    """Whether the tokenizer itself puts BOS before a text: then the model has always seen it there."""
    if bos is None:
        return False
    whole = Tokenizer.from_str(raw)
    return bool((ids := whole.encode("a").ids) and ids[0] == whole.token_to_id(bos))


def _separate(added: list[dict[str, Any]], plain: Tokenizer) -> dict[str, int]:
    """The added tokens that mean something, by text. Those that text gives anyway (Gemma's newlines) go back into `plain`."""
    free = [t for t in added if not t.get("special")]
    ordinary = [t for t in free if plain.encode(t["content"], add_special_tokens=False).ids == [t["id"]]]
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    plain.add_tokens([AddedToken(t["content"], **{k: t[k] for k in flags}) for t in ordinary])
    known = {t["id"] for t in ordinary}
    return {str(t["content"]): int(t["id"]) for t in added if t["id"] not in known}
