"""A model's tokenizer, read from its files with the `tokenizers` library: ids, offsets, control tokens, stop tokens, template."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from educe.chat.template import CHATML, ChatTemplate
from educe.errors import ChatError, ModelError
from educe.files.hashes import hash_bytes

_LONGEST = 16  # ids that may wait for the end of a character; real ones wait for at most 4


@dataclass(frozen=True, slots=True)
class ChatTokenizer:
    """The tokenizer as servers load it (`stock`), the same without its added tokens (`plain`), and what the model's files say.

    `control` maps the text of added tokens to their ids, `stop` is the set of ids that end a turn: the end-of-sequence ids of
    generation_config.json, config.json and tokenizer_config.json. `template_is_default` says that the model has none and
    ChatML was taken.
    """

    stock: Tokenizer
    plain: Tokenizer
    control: dict[str, int]
    stop: frozenset[int]
    eos: int
    template: ChatTemplate
    template_is_default: bool
    tokenizer_hash: str
    template_hash: str

    def encode(self, text: str) -> list[int]:
        """Ids of text a server would send: added tokens are recognised, no BOS is put before (the template writes it)."""
        return list(self.stock.encode(text, add_special_tokens=False).ids)

    def encode_plain(self, text: str) -> list[int]:
        """Ids of text in which control strings are only text."""
        return list(self.plain.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        return str(self.stock.decode(ids, skip_special_tokens=False))

    def pieces(self, ids: list[int]) -> list[str]:
        """The text each id adds to what stands before it; a byte of an unfinished character adds none, the last one adds it.

        Ids since the last finished character are decoded behind those of the step before it, so that a decoder that treats
        the start of a text differently (SentencePiece's leading space) does not do so here.
        """
        texts = []
        control = set(self.control.values())
        context = done = 0
        for k in range(len(ids)):
            before, now = self.decode(ids[context:done]), self.decode(ids[context : k + 1])
            added = now[len(before) :]
            last = k + 1 == len(ids) or ids[k + 1] in control or k - done >= _LONGEST
            if not last and (not added or added.endswith("\ufffd")):
                texts.append("")
                continue
            texts.append(added)
            context, done = done, k + 1
        return texts


def load_tokenizer(model_dir: Path) -> ChatTokenizer:
    """Read tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json. Raises `ModelError`, `ChatError`."""
    file = model_dir / "tokenizer.json"
    try:
        raw = file.read_text(encoding="utf-8")
        tree = json.loads(raw)
        tree["truncation"] = tree["padding"] = tree["post_processor"] = None  # some files were saved with truncation on
        stock = Tokenizer.from_str(json.dumps(tree))
        plain = Tokenizer.from_str(json.dumps({**tree, "added_tokens": []}))
    except FileNotFoundError as e:
        raise ModelError(1, str(file), "does not exist.", "The model needs a fast tokenizer (tokenizer.json).") from e
    except Exception as e:  # tokenizers raises plain Exception for a file it cannot use
        raise ModelError(2, str(file), f"is not a usable tokenizer: {e}.", "Download the model again.") from e
    settings = _json(model_dir / "tokenizer_config.json")
    special = {k: text for k, v in settings.items() if k.endswith("_token") and (text := _token_text(v)) is not None}
    eos = stock.token_to_id(special["eos_token"]) if "eos_token" in special else None
    stop = {eos} if eos is not None else set()
    for name in ("generation_config.json", "config.json"):
        stop |= _ids(_json(model_dir / name).get("eos_token_id"))
    if not stop:
        raise ModelError(
            202, str(model_dir), "names no end-of-sequence token.", "Set eos_token in tokenizer_config.json."
        )
    control = _separate(tree.get("added_tokens", []), plain, stop)
    source = _template_source(model_dir, settings)
    text = source if source is not None else CHATML
    return ChatTokenizer(
        stock=stock,
        plain=plain,
        control=control,
        stop=frozenset(stop),
        eos=eos if eos is not None else min(stop),
        template=ChatTemplate(text, special),
        template_is_default=source is None,
        tokenizer_hash=hash_bytes(raw.encode()),
        template_hash=hash_bytes(text.encode()),
    )


def _separate(added: list[dict[str, Any]], plain: Tokenizer, stop: set[int]) -> dict[str, int]:
    """The added tokens that mean something, by text. Those that text gives anyway (Gemma's newlines) go back into `plain`."""
    free = [t for t in added if not t.get("special") and t["id"] not in stop]
    ordinary = [t for t in free if plain.encode(t["content"], add_special_tokens=False).ids == [t["id"]]]
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    plain.add_tokens([AddedToken(t["content"], **{k: t[k] for k in flags}) for t in ordinary])
    return {str(t["content"]): int(t["id"]) for t in added if t not in ordinary}


def _template_source(model_dir: Path, settings: dict[str, Any]) -> str | None:
    file = model_dir / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise ChatError(1, str(file), f"cannot be read: {e}.", "Save it as UTF-8, readable to you.") from e
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        if not isinstance(named.get("default"), str):
            raise ChatError(
                1, str(model_dir), f"has templates named {list(named)}, none 'default'.", "Name one 'default'."
            )
        return str(named["default"])
    return found if isinstance(found, str) else None


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as e:
        raise ModelError(2, str(path), f"is not JSON: {e}.", "Download the model again.") from e
    return value if isinstance(value, dict) else {}


def _token_text(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _ids(value: Any) -> set[int]:
    values = value if isinstance(value, list) else [value]
    return {v for v in values if isinstance(v, int) and not isinstance(v, bool)}
