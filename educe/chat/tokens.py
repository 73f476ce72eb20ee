"""A model's tokenizer, read from its files with the `tokenizers` library: ids, control tokens, stop tokens, template."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from tokenizers import Tokenizer

from educe.chat.bytes_of import ByteTable
from educe.chat.engine import Flat, encode_reference
from educe.chat.named import NAMED
from educe.chat.probe import Habits, find_forms, find_habits
from educe.chat.template import ChatTemplate, Forms, TemplateRefusal, compile_template
from educe.chat.tokenizer_file import Parsed, adds_bos, parse, read_raw, with_tokens
from educe.config.recipe import FileTemplate, NamedTemplate, OwnTemplate
from educe.errors import ChatError, ModelError, RecipeError
from educe.files.hashes import hash_bytes

_LONGEST = 16  # ids that may wait for the end of a character; real ones wait for at most 4
DEFAULT_NAME = "plain"
MORE_TEMPLATES = "additional_chat_templates"
MAX_TEMPLATE_BYTES = 2**20  # the longest known has 30 kB
OWN = OwnTemplate(kind="own")
# Variables of a template that a row or educe itself gives.
_GIVEN = frozenset({"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"})
_HABITS: dict[Any, tuple[Forms, Habits]] = {}  # what probing found, by all that it depends on


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ChatTokenizer:
    """The tokenizer as servers load it (`stock`), the same without its added tokens (`plain`), and what the model's files say.

    `control` maps the text of added tokens to their ids; `stop` is the set of ids that end a turn: the end-of-sequence ids of
    the model's files, those the recipe names (together `known_stop`), and those the template itself ends turns with (`habits`).
    `new_tokens` are control tokens that the model's own tokenizer did not have; `json` is tokenizer.json with them,
    `engine_json` what `stock` was made from. `template_name` says where the template is from. `table` has the bytes of each
    id, where ids are no more than bytes in a row. `tool_use` is the same with the template that the model has for rows with tools,
    where it has two (named `default` and `tool_use`). `eats` are control tokens that take white space before or after them.
    """

    stock: Tokenizer
    plain: Tokenizer
    json: str
    engine_json: str
    control: Mapping[str, int]
    stop: frozenset[int]
    eos: int
    template: ChatTemplate
    template_name: str
    habits: Habits
    new_tokens: Mapping[str, int]
    tokenizer_hash: str
    _table: Callable[[], ByteTable | None]
    starts_with_space: bool
    eats: Mapping[str, tuple[bool, bool]]
    known_stop: frozenset[int]
    control_ids: frozenset[int]
    is_control_V: Bool[np.ndarray, " v"]
    is_stop_V: Bool[np.ndarray, " v"]
    _starts: tuple[str, ...]
    _mark: re.Pattern[str]
    tool_use: ChatTokenizer | None = None

    def __repr__(self) -> str:
        return (
            f"ChatTokenizer({self.tokenizer_hash[:8]}, template={self.template_name!r}, settings={dict(self.settings)})"
        )

    @property
    def table(self) -> ByteTable | None:
        """The bytes of every id; None where ids are not bytes in a row."""
        return self._table()

    @property
    def settings(self) -> Mapping[str, bool | int | str]:
        """Variables that the template is given, in training and answering alike."""
        return self.template.settings

    @property
    def template_hash(self) -> str:
        both = (self, self.tool_use) if self.tool_use is not None else (self,)
        return hash_bytes("\x00".join(t.template.source for t in both).encode())

    def for_row(self, has_tools: bool) -> ChatTokenizer:
        """With the template that servers take for a row with or without tools."""
        return self.tool_use if has_tools and self.tool_use is not None else self

    def holds_control(self, text: str) -> bool:
        """Whether a text holds the text of a control token."""
        return any(start in text for start in self._starts) and self._mark.search(text) is not None

    def encode(self, text: str, *, inside: bool = False) -> list[int]:
        """Ids of text a server would send: added tokens are recognised, no BOS is put before (the template writes it).

        `inside`: the text stands behind another, so that a tokenizer that puts a space before the start of a text
        (SentencePiece) does not do so.
        """
        return self._ids(self.stock, text, inside=inside)

    def encode_many(self, texts: Sequence[str]) -> Flat:
        """Ids of several texts end to end, each as `encode` gives them, and where each starts."""
        return encode_reference(self.stock, texts)

    def encode_plain(self, text: str, *, inside: bool = False) -> list[int]:
        """Ids of text in which control strings are only text."""
        return self._ids(self.plain, text, inside=inside)

    def _ids(self, tokenizer: Tokenizer, text: str, *, inside: bool) -> list[int]:
        if inside and self.starts_with_space:
            for anchor in ("\n", "|", "."):  # encoded before the text and taken off again, where it stays what it is
                before, both = (
                    list(tokenizer.encode(t, add_special_tokens=False).ids) for t in (anchor, f"{anchor}{text}")
                )
                if both[: len(before)] == before:
                    return both[len(before) :]
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.stock.decode(list(ids), skip_special_tokens=False))

    def normalized(self, text: str) -> str:
        """Text after the tokenizer's own normaliser."""
        normalizer = self.stock.normalizer
        return text if normalizer is None else str(normalizer.normalize_str(text))

    def with_settings(self, settings: Mapping[str, bool | int | str]) -> ChatTokenizer:
        """The same with other variables for the template; what it does is found anew. Raises `ChatError`."""
        if dict(settings) == dict(self.settings):
            return self
        tools = self.tool_use.with_settings(settings) if self.tool_use is not None else None
        return _with_both(_probed(self, self.template.with_(settings=dict(settings))), tools)

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


def load_tokenizer(model_dir: Path, choice: OwnTemplate | NamedTemplate | FileTemplate = OWN) -> ChatTokenizer:
    """Read tokenizer.json, tokenizer_config.json, generation_config.json and the chat template that `choice` names.

    Raises `ModelError` for files that cannot be used and `ChatError` for a template that cannot.
    """
    file = model_dir / "tokenizer.json"
    raw = read_raw(file)
    settings = _json(model_dir / "tokenizer_config.json")
    special = {k: text for k, v in settings.items() if k.endswith("_token") and (text := _token_text(v)) is not None}
    source, name = _source(model_dir, settings, choice)
    words = NAMED[name].control if name in NAMED else ()
    try:
        parsed = parse(raw, words)
    except Exception as e:  # tokenizers raises plain Exception for a file it cannot use
        raise ModelError(2, str(file), f"is not a usable tokenizer: {e}.", "Download the model again.") from e
    stock, new = parsed.stock, parsed.new
    if two := next((w for w, i in parsed.control.items() if stock.token_to_id(w) != i), None):
        found = f"gives {two!r} the id {parsed.control[two]} among added tokens, and {stock.token_to_id(two)} in its vocabulary."
        raise ModelError(2, str(file), found, "Download the model again.")
    if name in NAMED and adds_bos(raw, special.get("bos_token")):
        source = "{{- bos_token }}" + source
    known = _known_stop(model_dir, stock, special, choice.stop)
    control = {**parsed.control, **{str(w): i for w, i in parsed.added.items() if i in known}}
    eos = stock.token_to_id(special["eos_token"]) if "eos_token" in special else None
    where = choice.file if isinstance(choice, FileTemplate) else "chat template"
    template = compile_template(source, special, where).with_(settings=dict(choice.settings or {}))
    whole = with_tokens(raw, words)
    made = ChatTokenizer(
        stock=stock,
        plain=parsed.plain,
        json=whole,
        engine_json=parsed.text,
        control=control,
        stop=frozenset(known),
        known_stop=frozenset(known),
        control_ids=frozenset(control.values()),
        is_control_V=_flags(control.values(), parsed.size),
        is_stop_V=_flags(known, parsed.size),
        _starts=tuple({w[:3] for w in control}),
        eos=eos if eos is not None else min(known, default=0),
        template=template,
        template_name=name,
        habits=Habits(),
        new_tokens=new,
        tokenizer_hash=hash_bytes(whole.encode()),  # the same where an earlier stage has added the words and saved it
        _table=parsed.table,
        starts_with_space=_starts_with_space(parsed, control),
        eats=parsed.eats,
        _mark=_any_of(control),
    )
    made = _probed(made, template)
    if isinstance(choice, OwnTemplate) and (tool_source := _named_sources(model_dir, settings).get("tool_use")):
        other = compile_template(tool_source, special, "chat template tool_use").with_(settings=template.settings)
        made = _with_both(made, _probed(made, other))
    _refuse_unknown_settings(made)
    if not made.stop:
        found = "names no end-of-sequence token, and the template ends turns with none."
        raise ModelError(202, str(model_dir), found, "Set eos_token in tokenizer_config.json.")
    return made


def _probed(tokenizer: ChatTokenizer, template: ChatTemplate) -> ChatTokenizer:
    names = {v: k for k, v in tokenizer.control.items()}
    known = tuple(sorted(names[i] for i in tokenizer.known_stop if i in names))
    key = (template.key, *map(_items, (template.special, template.settings, tokenizer.control)), known)
    try:
        if key not in _HABITS:
            forms = find_forms(template)
            bos = template.special.get("bos_token")
            _HABITS[key] = forms, find_habits(template.with_(forms=forms), tokenizer.control, known, bos)
        template, habits = template.with_(forms=_HABITS[key][0]), _HABITS[key][1]
    except TemplateRefusal as e:
        raise ChatError(103, "chat template", f"{e.args[1]}.", "Give another template.") from e
    ends = {tokenizer.control[w] for w in habits.ends}
    stop = tokenizer.known_stop | ends
    is_stop_V = _flags(stop, tokenizer.is_stop_V.size)
    return replace(tokenizer, template=template, habits=habits, stop=stop, is_stop_V=is_stop_V)


def _with_both(tokenizer: ChatTokenizer, tool_use: ChatTokenizer | None) -> ChatTokenizer:
    """One tokenizer of two templates: what ends a turn in either is a stop token in both."""
    if tool_use is None:
        return replace(tokenizer, tool_use=None)
    stop = tokenizer.stop | tool_use.stop
    flags = _flags(stop, tokenizer.is_stop_V.size)
    other = replace(tool_use, tool_use=None, stop=stop, is_stop_V=flags)
    return replace(tokenizer, tool_use=other, stop=stop, is_stop_V=flags)


def _known_stop(model_dir: Path, stock: Tokenizer, special: Mapping[str, str], more: Sequence[str]) -> set[int]:
    known = set()
    if "eos_token" in special and (eos := stock.token_to_id(special["eos_token"])) is not None:
        known.add(eos)
    for name in ("generation_config.json", "config.json"):
        known |= _ids(_json(model_dir / name).get("eos_token_id"))
    for word in more:
        found = stock.token_to_id(word)
        if found is None:
            raise ChatError(
                201, "template.stop", f"{word!r} is no token of this tokenizer.", "Name one of its added tokens."
            )
        known.add(found)
    return known


def _items(mapping: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(mapping.items())


def _flags(ids: Collection[int], size: int) -> Bool[np.ndarray, " v"]:
    flags = np.zeros(size, bool)
    flags[[i for i in ids if i < size]] = True
    return flags


def _refuse_unknown_settings(tokenizer: ChatTokenizer) -> None:
    both = [t.template for t in (tokenizer, tokenizer.tool_use) if t is not None]
    reads = sorted({v for t in both for v in t.variables} - _GIVEN)
    for name in tokenizer.settings:
        if name not in reads:
            near = difflib.get_close_matches(name, reads, 1, 0.6)
            fix = f"Did you mean {near[0]!r}?" if near else f"It reads {', '.join(reads) or 'none'}."
            raise RecipeError(103, "template.settings", f"{name!r} is no variable of the chat template.", fix)


def _starts_with_space(parsed: Parsed, control: Mapping[str, int]) -> bool:
    """Whether text alone gets other ids than the same text behind a control token."""
    word = next(iter(control), None)
    if word is None:
        return False
    alone, behind = (parsed.stock.encode(t, add_special_tokens=False).ids for t in ("Hello", f"{word}Hello"))
    return alone != behind[1:]


def _any_of(control: Mapping[str, int]) -> re.Pattern[str]:
    """Finds the text of a control token. Hundreds of reserved tokens are first told by how they start."""
    words = sorted(control, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, words)) if words else r"(?!)")


def _source(
    model_dir: Path, settings: dict[str, Any], choice: OwnTemplate | NamedTemplate | FileTemplate
) -> tuple[str, str]:
    """The template's text and where it is from: the model, a file, or one of ours by name."""
    if isinstance(choice, NamedTemplate):
        return NAMED[choice.kind].source, choice.kind
    if isinstance(choice, FileTemplate):
        return read_template(Path(choice.file)), choice.file
    own = _own_source(model_dir, settings)
    return (own, "the model's own") if own is not None else (NAMED[DEFAULT_NAME].source, DEFAULT_NAME)


def read_template(file: Path) -> str:
    """A template file's text. Raises `ChatError`."""
    try:
        if file.exists() and not file.is_file():
            raise ChatError(1, str(file), "is no regular file.", "Give a file that holds a Jinja template.")
        if file.stat().st_size > MAX_TEMPLATE_BYTES:
            found = f"is larger than {MAX_TEMPLATE_BYTES // 2**20} MB."
            raise ChatError(1, str(file), found, "Give a file that holds a Jinja template.")
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ChatError(1, str(file), f"cannot be read: {e}.", "Save it as UTF-8, readable to you.") from e


def _own_source(model_dir: Path, settings: dict[str, Any]) -> str | None:
    file = model_dir / "chat_template.jinja"
    if file.is_file():
        return read_template(file)
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = _named_sources(model_dir, settings)
        if "default" not in named:
            raise ChatError(
                1, str(model_dir), f"has templates named {list(named)}, none 'default'.", "Name one 'default'."
            )
        return named["default"]
    return found if isinstance(found, str) else None


def _named_sources(model_dir: Path, settings: dict[str, Any]) -> dict[str, str]:
    """A model's templates by name, where it has more than one: in tokenizer_config.json or in files of their own."""
    found = settings.get("chat_template")
    listed = [t for t in found if isinstance(t, dict)] if isinstance(found, list) else []
    named = {str(t.get("name")): t["template"] for t in listed if isinstance(t.get("template"), str)}
    return named | {f.stem: read_template(f) for f in sorted((model_dir / MORE_TEMPLATES).glob("*.jinja"))}


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
