"""A tokenizer as GGUF says it: tokens, what each is, merges or scores, and the name of what splits text before.

Refused where llama.cpp would make other ids of the same text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gguf

from educe.chat.prompt import render_prompt
from educe.chat.tokens import ChatTokenizer
from educe.errors import ModelError
from educe.types import Message

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How a byte-level tokenizer splits text, and whether whole words skip the merges → the name under which llama.cpp does just that. Each
# was compared on hard strings (tests/test_gguf_llama.py).
_GPT2 = "gpt2's words"
_SPLITS: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    (("each digit", _GPT2), False): "smollm",
    ((_WORDS + r"\p{N}{1,3}" + _REST,), True): "llama-bpe",
    ((_WORDS + r"\p{N}" + _REST,), False): "qwen2",
}
# Texts of tokens at which llama.cpp ends an answer whatever the file says.
_ALWAYS_ENDS = frozenset(
    (
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<|end_of_text|>",
        "<eos>",
    )
)
_SPACE = "\u2581"


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The tokenizer's part of a GGUF file. `ids` are its special tokens by GGUF's name of each (`bos`, `eos`, `eot`, `eom`, `pad`,
    `unk`); `templates` by name; `ends` are ids at which an answer ends and that no field has room for; `notes` say what differs."""

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] | None
    merges: tuple[str, ...] | None
    adds_space: bool | None
    adds_bos: bool
    ids: Mapping[str, int]
    templates: Mapping[str, str]
    ends: tuple[int, ...]
    notes: tuple[str, ...]

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.types))
        if self.scores is not None:
            writer.add_token_scores(list(self.scores))
        if self.merges is not None:
            writer.add_token_merges(list(self.merges))
        if self.adds_space is not None:
            writer.add_add_space_prefix(self.adds_space)
        for name, number in self.ids.items():
            getattr(writer, f"add_{name}_token_id")(number)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(False)
        more = [{"name": n, "template": t} for n, t in self.templates.items()]
        writer.add_chat_template(more if len(more) > 1 else self.templates["default"])


def vocabulary_of(tokenizer: ChatTokenizer, num_rows: int, templates: Mapping[str, str]) -> Vocabulary:
    """`tokenizer` for a model whose embedding has `num_rows`; ids without a token get a name that no text has. Raises `ModelError`."""
    tree = json.loads(tokenizer.json)
    model = tree["model"]
    if model.get("type") != "BPE":
        _refuse(f"a tokenizer of the type {model.get('type')}")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix") or model.get("dropout"):
        _refuse("a BPE with prefixes, suffixes or dropout")
    for word, (left, right) in tokenizer.eats.items():
        _refuse(f"the token {word!r}, which takes the white space {'before' if left else 'after' if right else ''} it")
    added = {int(t["id"]): t for t in tree["added_tokens"]}
    names = {i: piece for piece, i in model["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    if max(names) >= num_rows:
        found = f"has {max(names) + 1} tokens, and the model {num_rows} rows for them."
        raise ModelError(202, "tokenizer.json", found, "Use a tokenizer that fits the model.")
    ids, ends, notes = _special(tokenizer)
    if model.get("byte_fallback"):
        made: dict[str, Any] = _sentencepiece(tree, names, tokenizer)
    else:
        made = _byte_level(tree)
        notes += ["llama.cpp does not compose accents (NFC), as this tokenizer does"] if tree.get("normalizer") else []
    bos = ids.get("bos")
    talk = [Message(role="assistant" if i == 1 else "user", content="Hello") for i in range(3)]
    prompt = render_prompt(talk, tokenizer)
    return Vocabulary(
        tokens=tuple(_text(i, names, added, spaces=made["scores_of"] is not None) for i in range(num_rows)),
        types=tuple(_type(i, names, added, tree) for i in range(num_rows)),
        scores=tuple(made["scores_of"].get(names.get(i), 0.0) for i in range(num_rows))
        if made["scores_of"] is not None
        else None,
        model=made["model"],
        pre=made["pre"],
        merges=made["merges"],
        adds_space=made["adds_space"],
        adds_bos=prompt[:1] == [bos] and prompt.count(prompt[0]) == 1,  # where it begins every turn it is no BOS
        ids=ids,
        templates=templates,
        ends=ends,
        notes=tuple(notes),
    )


def _refuse(what: str) -> None:
    found = f"has {what}: llama.cpp would make other tokens of the same text than in training."
    raise ModelError(206, "tokenizer.json", found, "Use --as merged.")


def _special(tokenizer: ChatTokenizer) -> tuple[dict[str, int], tuple[int, ...], list[str]]:
    """Ids of special tokens by GGUF's names; stop tokens beyond the three it has room for; what is to be said about them."""
    ids = {}
    for name in ("bos", "pad", "unk"):
        word = tokenizer.template.special.get(f"{name}_token")
        number = tokenizer.stock.token_to_id(word) if word is not None else None
        if number is not None:
            ids[name] = number
    written = {tokenizer.control[w] for w in tokenizer.habits.ends if w in tokenizer.control}
    stops = sorted(tokenizer.stop, key=lambda i: (i != tokenizer.eos, i not in written, i))
    ids |= dict(zip(("eos", "eot", "eom"), stops[:1] + (stops[1:] or stops[:1]), strict=False))
    left = tuple(i for i in stops[3:] if tokenizer.decode([i]) not in _ALWAYS_ENDS)
    words = ", ".join(repr(tokenizer.decode([i])) for i in left)
    return (
        ids,
        left,
        [f"GGUF has no field for the stop tokens {words}: give them to the server as `stop`"] if left else [],
    )


def _text(i: int, names: Mapping[int, str], added: Mapping[int, Any], *, spaces: bool) -> str:
    """The token's text. llama.cpp looks for those that are cut out of a text in the text as it was written, spaces and all."""
    if i not in names:
        return f"[PAD{i}]"
    return names[i].replace(_SPACE, " ") if spaces and i in added and not added[i]["special"] else names[i]


def _type(i: int, names: Mapping[int, str], added: Mapping[int, Any], tree: Mapping[str, Any]) -> int:
    if i not in names:
        return int(gguf.TokenType.UNUSED)
    if tree["model"].get("byte_fallback"):
        if names[i] == tree["model"].get("unk_token"):
            return int(gguf.TokenType.UNKNOWN)
        if _is_byte(names[i]):
            return int(gguf.TokenType.BYTE)
    if i in added:
        return int(gguf.TokenType.CONTROL if added[i]["special"] else gguf.TokenType.USER_DEFINED)
    return int(gguf.TokenType.NORMAL)


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _pairs(tree: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [tuple(m.split(" ", 1) if isinstance(m, str) else m) for m in tree["model"]["merges"]]


def _byte_level(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer of bytes that are written as letters, by the name of how it splits text."""
    normalizer = tree.get("normalizer") or {}
    if normalizer.get("type") not in (None, "NFC") and normalizer != {"type": "Sequence", "normalizers": []}:
        _refuse(f"the normaliser {normalizer.get('type')}")
    before = tree.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    key = tuple(_split(step, last=step is steps[-1]) for step in steps), bool(tree["model"].get("ignore_merges"))
    pieces = tuple(p for p in key[0] if p)
    if (pieces, key[1]) not in _SPLITS:
        _refuse("a way of splitting text that has no known name there (" + ", ".join(pieces)[:120] + ")")
    merges = tuple(f"{a} {b}" for a, b in _pairs(tree))
    return {"model": "gpt2", "pre": _SPLITS[pieces, key[1]], "merges": merges, "scores_of": None, "adds_space": None}


def _split(step: Mapping[str, Any], *, last: bool) -> str:
    """One step of splitting in a form that can be compared."""
    kind = step.get("type")
    if kind == "ByteLevel" and last and not step.get("add_prefix_space"):
        return _GPT2 if step.get("use_regex", True) else ""
    if kind == "Digits" and step.get("individual_digits"):
        return "each digit"
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return str(step["pattern"].get("Regex", step["pattern"]))
    return f"{kind} {json.dumps({k: v for k, v in step.items() if k != 'type'}, sort_keys=True)}"


def _sentencepiece(tree: Mapping[str, Any], names: Mapping[int, str], tokenizer: ChatTokenizer) -> dict[str, Any]:
    """A SentencePiece model: pieces join in the order of their scores, which the order of the merges gives.

    That is the same only if all ways to join a piece stand together, and none is missing: SentencePiece joins whatever makes a piece.
    """
    space = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    normalizer = tree.get("normalizer") or {}
    steps = [s for s in normalizer.get("normalizers", [normalizer]) if s]
    before = tree.get("pre_tokenizer")
    unsplit = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    metaspace = before is not None and before.get("type") == "Metaspace" and before.get("split") is False
    if [s for s in steps if s not in (space, {"type": "Prepend", "prepend": _SPACE})]:
        _refuse(f"a normaliser that does more than write spaces as {_SPACE}")
    if not (space in steps and before in (None, unsplit)) and not (metaspace and not steps):
        _refuse(f"the pre-tokenizer {before.get('type') if before else None}")
    vocabulary = tree["model"]["vocab"]
    if any(f"<0x{b:02X}>" not in vocabulary and not (b < 128 and chr(b) in vocabulary) for b in range(256)):
        _refuse("no token for some bytes")
    pairs = _pairs(tree)
    runs = _runs(tree, tokenizer)
    rank: dict[str, int] = {}
    previous = None
    for a, b in pairs:
        piece = a + b
        if piece in runs:
            continue
        if piece != previous and piece in rank:
            _refuse("merges in an order that no scores of pieces give")
        rank.setdefault(piece, len(rank))
        previous = piece
    known = set(pairs)
    for piece in vocabulary.keys() - runs:
        for cut in range(1, len(piece)):
            if piece[:cut] in vocabulary and piece[cut:] in vocabulary and (piece[:cut], piece[cut:]) not in known:
                _refuse(f"no merge that makes {piece!r} of {piece[:cut]!r} and {piece[cut:]!r}")
    scores = {piece: -float(k) for piece, k in rank.items()}
    return {
        "model": "llama",
        "pre": "default",
        "merges": None,
        "scores_of": scores,
        "adds_space": _adds_space(tokenizer),
    }


def _runs(tree: Mapping[str, Any], tokenizer: ChatTokenizer) -> set[str]:
    """Added tokens that repeat one character (Gemma has some for spaces, tabs and ends of lines). llama.cpp cuts them out of a text
    before it joins anything, the longest first: so their merges say nothing, if all runs of the character come out so here too."""
    added = {t["content"] for t in tree["added_tokens"] if not t["special"]}
    runs = {word for word in added if len(word) > 1 and len(set(word)) == 1}
    for character in {word[0] for word in runs}:
        known = sorted((len(word) for word in runs if word[0] == character), reverse=True)
        single = 1 if character in tree["model"]["vocab"] else 0
        for size in range(2, 2 * known[0] + 3):
            left, lengths = size, []
            while left:
                lengths.append(next((n for n in known if n <= left), single or left))
                left -= lengths[-1]
            made = tokenizer.stock.encode(character.replace(_SPACE, " ") * size, add_special_tokens=False).tokens
            if made != [character * n for n in lengths]:
                _refuse(f"tokens for runs of {character!r}, which it does not make of the longest first")
    return runs


def _adds_space(tokenizer: ChatTokenizer) -> bool:
    """Whether text gets a space before it, behind control tokens too: llama.cpp does both or neither.

    One that does so at the very start only is written as one that never does: a prompt that begins with a control token is the same.
    """
    word = next(iter(tokenizer.control))
    alone, behind = (
        str(tokenizer.stock.encode(text, add_special_tokens=False).tokens[k]).startswith(_SPACE)
        for k, text in ((0, "Hello"), (1, f"{word}Hello"))
    )
    if alone != behind:
        begins = render_prompt((Message(role="user", content="Hello"),), tokenizer)[0]
        if behind or begins not in tokenizer.control_ids:
            _refuse("a space before some texts only, and prompts in which that matters")
    return behind


def texts_to_compare(tokenizer: ChatTokenizer, prompts: Sequence[str]) -> list[str]:
    """Texts on which llama.cpp's ids and those of training are compared: hard ones, each behind a control token too, and prompts."""
    hard = [
        "Hello world", " Hello", "  two  spaces ", "\n", "\n\n\n", "\t\tx", "\r\n a\r\n", "1234567890", "3.14 1,000 2024-05-06",
        "I'm you're WE'LL don'T", "naïve café Zürich", "你好，世界 123", "こんにちは", "Привет мир", "नमस्ते", "مرحبا", "🙂👩‍💻",
        "a_b-c/d\\e",
        "def f(x):\n    return x  # ok\n", "<b>bold</b>", "x" * 50, " ", "...!?!", "ﬁ ½ ²", "\u00a0nbsp\u2003em", "''\"\"``",
    ]  # fmt: skip
    word = next(iter(tokenizer.control), "")
    behind = [f"{word}{t}{word}" for t in hard] if word else []
    alone = [] if tokenizer.starts_with_space else hard  # see `_adds_space`: a prompt never begins with text there
    return [*alone, *behind, *prompts]
