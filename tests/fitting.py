"""Which real tokenizer fits which chat template: model directories (without weights) for tests of every template there is.

A template fits a real tokenizer that has, as added tokens, all control strings the template writes. A template that no real
tokenizer here fits gets GPT-2's and Qwen2.5's with its own control strings added.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.nodes import Const, TemplateData
from jinja2.sandbox import ImmutableSandboxedEnvironment

Json = dict[str, Any]

# --- templates -----------------------------------------------------------------------------------------------------------


def template_files(shared: Path) -> dict[str, str]:
    """Every template, by a name like "models/Qwen-Qwen3-0.6B"; those of the installed trl are "trl/…"."""
    files = {f"{p.parent.name}/{p.stem}": p for p in sorted((shared / "templates").rglob("*.jinja"))}
    found = importlib.util.find_spec("trl")  # not imported: that would import torch
    for place in (found.submodule_search_locations or []) if found else []:
        files |= {f"trl/{p.stem}": p for p in sorted((Path(place) / "chat_templates").glob("*.jinja"))}
    return {name: file.read_text(encoding="utf-8") for name, file in files.items()}


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


_ENVIRONMENT = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
_ENVIRONMENT.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, indent=how.get("indent"))
_ENVIRONMENT.globals.update(raise_exception=_raise, strftime_now=lambda form: "1 Jan 2025")

_TOOL: Json = {
    "name": "f",
    "description": "d",
    "parameters": {"type": "object", "properties": {"x": {"type": "string"}}},
}
_CALL: Json = {"id": "call12345", "type": "function", "function": {"name": "f", "arguments": {"x": "y"}}}
_ASKS, _TELLS = {"role": "user", "content": "ask"}, {"role": "assistant", "content": "tell"}
_CALLS = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_RESULT = {"role": "tool", "content": "z", "name": "f", "tool_call_id": "call12345"}
_PROBES: list[tuple[list[Json], list[Json] | None]] = [
    ([_ASKS, _TELLS], None),
    ([{"role": "system", "content": "rule"}, _ASKS, _TELLS, _ASKS, _TELLS], None),
    ([_ASKS, {**_TELLS, "reasoning_content": "think", "thinking": "think"}], None),
    ([_ASKS, _CALLS, _RESULT, _TELLS], [{"type": "function", "function": _TOOL}]),
]


def _rendered(source: str, special: dict[str, str]) -> Iterator[str]:
    """What the template writes for a few conversations; nothing for those it refuses."""
    template = _ENVIRONMENT.from_string(_without_generation(source))
    for messages, tools in _PROBES:
        for opens in (False, True):
            given = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": opens}
            try:
                yield template.render(**special, **given)
            except Exception:  # foreign code: whatever it raises, it refuses
                continue


def _without_generation(source: str) -> str:
    return re.sub(r"\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}", r"{#\1 \2#}", source)


# --- control strings -----------------------------------------------------------------------------------------------------

# Strings that are single tokens in the template's own family …
_HARD = re.compile(
    r"<[|｜][^<>\s'{}]{1,40}>|<[a-z_]{1,20}\|>"  # <|im_end|>, <｜User｜>, <|turn>, <turn|>
    r"|\[\|[a-z]+\|\]"  # [|user|]
    r"|\[/?[A-Z][A-Z_]{2,}\]|\[gMASK\]|<sop>"  # [INST]
    r"|</?s>|<(?:bos|eos|pad|unk)>|<(?:start|end)_of_(?:turn|image|utterance)>|<(?:image|audio)_soft_token>"
)
# … and those that are tokens in some families (Qwen3, GLM) and text in others (Qwen2.5).
_SOFT = re.compile(r"</?(?:think|tool_call|tool_response|arg_key|arg_value)>")
_MEDIA = re.compile(r"image|img|audio|video|vision|\bimg\b|fake_token", re.IGNORECASE)
_ENDS = re.compile(
    r"im_end|eot|eom|end_?of_?(?:turn|text|utterance)|endoftext|END_OF_TURN|<\|(?:end|return|call)\|>|</s>|<eos>|<turn\|>"
)


@functools.cache
def control_strings(source: str) -> tuple[frozenset[str], frozenset[str]]:
    """(hard, soft) control strings of a template: in its literals, and in what it writes by joining pieces ('<|' + role + '|>')."""
    tree = _ENVIRONMENT.parse(_without_generation(source))
    texts = [str(n.value) for n in tree.find_all(Const)] + [n.data for n in tree.find_all(TemplateData)]
    texts += _rendered(source, {"bos_token": "", "eos_token": "", "pad_token": "", "unk_token": ""})
    return tuple(frozenset(m for t in texts for m in kind.findall(t)) for kind in (_HARD, _SOFT))  # type: ignore[return-value]


# --- real tokenizers -----------------------------------------------------------------------------------------------------

# Turn ends and pads that the family's generation_config.json names: bos, pad, then all that end an answer.
_GENERATION: dict[str, tuple[str | None, str | None, tuple[str, ...]]] = {
    "smollm2": ("<|im_start|>", "<|im_end|>", ("<|im_end|>",)),
    "qwen2_5": ("<|endoftext|>", "<|endoftext|>", ("<|im_end|>", "<|endoftext|>")),
    "qwen3": ("<|endoftext|>", "<|endoftext|>", ("<|im_end|>", "<|endoftext|>")),
    "llama3_1": ("<|begin_of_text|>", None, ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")),
    "gemma2": ("<bos>", "<pad>", ("<eos>", "<end_of_turn>")),
    "deepseek_v3": ("<｜begin▁of▁sentence｜>", None, ("<｜end▁of▁sentence｜>",)),
    "mistral_v3_spm": ("<s>", None, ("</s>",)),
    "llama2_spm": ("<s>", "<unk>", ("</s>",)),
    "gpt2": ("<|endoftext|>", None, ("<|endoftext|>",)),
}
_PLAIN = ("llama2_spm", "gpt2")  # for templates that write no control string
# Templates whose own family reads what looks like a control string as text.
_AS_TEXT = {
    "community/llama-2-chat": ("llama2_spm",),
    "community/zephyr": ("llama2_spm",),
    "community/mistral-instruct": ("mistral_v3_spm", "llama2_spm"),
    "axolotl/mistral_v1": ("mistral_v3_spm", "llama2_spm"),
    "trl/llava_next": ("mistral_v3_spm", "llama2_spm"),
    "trl/llava_next_training": ("mistral_v3_spm", "llama2_spm"),
}


def sentencepiece_pieces(file: Path) -> list[tuple[str, float, int]]:
    """(text, score, type) of each piece of a SentencePiece model: field 1 of its protobuf, whose fields are these three."""
    data, at, pieces = file.read_bytes(), 0, []
    while at < len(data):
        field, at = _varint(data, at)
        size, at = _varint(data, at)  # every field of the outer message is length-delimited
        if field >> 3 == 1:
            pieces.append(_piece(data[at : at + size]))
        at += size
    return pieces


def _piece(data: bytes) -> tuple[str, float, int]:
    text, score, kind, at = "", 0.0, 1, 0
    while at < len(data):
        field, at = _varint(data, at)
        if field == 0x0A:
            size, at = _varint(data, at)
            text, at = data[at : at + size].decode(), at + size
        elif field == 0x15:
            score, at = struct.unpack_from("<f", data, at)[0], at + 4
        else:
            kind, at = _varint(data, at)
    return text, score, kind


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


def _converted(model: Path, file: Path) -> None:
    """tokenizer.json of a SentencePiece BPE, as transformers converts it (`legacy=False`): a space is put before the first
    stretch of text only, never after a control token. Control pieces become special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    pieces = sentencepiece_pieces(model)
    ids = {text: i for i, (text, _, _) in enumerate(pieces)}
    merges = []
    for text, score, kind in pieces:
        if kind == 1:
            pairs = [(text[:k], text[k:]) for k in range(1, len(text)) if text[:k] in ids and text[k:] in ids]
            merges += [(score, pair) for pair in sorted(pairs, key=lambda p: (ids[p[0]], ids[p[1]]))]
    merges.sort(key=lambda m: (m[0], len(m[1][0]), len(m[1][1])), reverse=True)
    tokenizer = Tokenizer(
        models.BPE(vocab=ids, merges=[m[1] for m in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", ids["<s>"])]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, _, k in pieces if k in (2, 3)])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, _, k in pieces if k == 4])
    _write(file, tokenizer.to_str())


def _write(file: Path, text: str) -> None:
    """Whole or not at all: another test process may be reading."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


@contextlib.contextmanager
def _made_once(file: Path) -> Iterator[bool]:
    """Whether it is still to be made; other processes that want it wait."""
    if file.is_file():
        yield False
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(f"{file.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not file.is_file()


def real_tokenizer(name: str, shared: Path, cache_dir: Path) -> tuple[Path, Json]:
    """(tokenizer.json, tokenizer_config.json without a template) of a real model family."""
    home, made = shared / "tokenizers" / name, cache_dir / "converted" / name / "tokenizer.json"
    if not (home / "tokenizer.json").is_file():
        special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        with _made_once(made) as missing:
            if missing:
                _converted(home / "tokenizer.model", made)
        return made, {**special, "legacy": False, "add_bos_token": True}
    config = json.loads((home / "tokenizer_config.json").read_text(encoding="utf-8"))
    file = _renamed(home / "tokenizer.json", made) if name == "llama3_1" else home / "tokenizer.json"
    return file, {k: v for k, v in config.items() if k not in ("chat_template", "added_tokens_decoder")}


# What lies under tokenizers/llama3_1 has Llama 3.0's names; 3.1 gave three of the reserved tokens a name, and changed nothing else.
_LLAMA_3_1 = {128004: "<|finetune_right_pad_id|>", 128008: "<|eom_id|>", 128010: "<|python_tag|>"}


def _renamed(base: Path, file: Path) -> Path:
    with _made_once(file) as missing:
        if missing:
            tree, _, model = _tree(base)
            named = [{**t, "content": _LLAMA_3_1.get(t["id"], t["content"])} for t in tree["added_tokens"]]
            _write(file, _joined({**tree, "added_tokens": named}, model))
    return file


@functools.cache
def _tree(file: Path) -> tuple[Json, dict[str, int], str]:
    """A tokenizer.json without its model, the model's vocabulary, and the model as text."""
    tree = json.loads(file.read_text(encoding="utf-8"))
    model = tree["model"]
    return {**tree, "model": None}, model["vocab"], json.dumps(model, ensure_ascii=False)


def _joined(tree: Json, model: str) -> str:
    return json.dumps(tree, ensure_ascii=False).replace('"model": null', f'"model": {model}', 1)


def added_tokens(file: Path) -> dict[str, int]:
    """Text and id of the added tokens of a tokenizer.json."""
    return {t["content"]: t["id"] for t in _tree(file)[0]["added_tokens"]}


# --- fitting -------------------------------------------------------------------------------------------------------------


def fitting_dirs(name: str, source: str, shared: Path, cache_dir: Path) -> dict[str, Path]:
    """One to three model directories for a template, by the tokenizer's name, the best fit first; written under `cache_dir`.

    "gpt2+marks" names the template's turn ends in its generation_config.json; "qwen2_5+marks" has none, so that they must be
    learned from the template. Which they are is written too: finding out takes seconds, and `cache_dir` serves many processes.
    """
    home = cache_dir / "fitting" / name.replace("/", "--") / hashlib.sha256(source.encode()).hexdigest()[:8]
    with _made_once(home / "fits.json") as missing:
        if missing:
            made = _fitting_dirs(name, source, shared, cache_dir, home)
            _write(home / "fits.json", json.dumps(list(made)))
    return {tokenizer: home / tokenizer for tokenizer in json.loads((home / "fits.json").read_text(encoding="utf-8"))}


def _fitting_dirs(name: str, source: str, shared: Path, cache_dir: Path, home: Path) -> dict[str, Path]:
    made = {}
    for tokenizer in _real_fits(name, source, shared, cache_dir):
        file, config = real_tokenizer(tokenizer, shared, cache_dir)
        bos, pad, ends = _GENERATION[tokenizer]
        made[tokenizer] = _model_dir(home / tokenizer, file, config, source, _generation(file, bos, pad, ends))
    if not made:
        hard, soft = control_strings(source)
        for base in ("gpt2", "qwen2_5"):
            file, config = real_tokenizer(base, shared, cache_dir)
            marks = set(hard)
            if config.get("bos_token") is None and re.search(r"\bbos_token\b", source):
                config["bos_token"] = "<s>"
                marks.add("<s>")
            file = _with_marks(file, sorted(marks), sorted(soft), cache_dir / "marked" / base)
            bos, pad, ends = _GENERATION[base]
            ends = (*ends, *_turn_ends(hard))
            named = _generation(file, bos, pad, ends) if base == "gpt2" else None
            made[f"{base}+marks"] = _model_dir(home / f"{base}+marks", file, config, source, named)
    return made


def _real_fits(name: str, source: str, shared: Path, cache_dir: Path) -> list[str]:
    """Real tokenizers that have every control string a template writes, but for those of images and sound."""
    if name in _AS_TEXT:
        return list(_AS_TEXT[name])
    hard, soft = control_strings(source)
    needed = {mark for mark in hard if not _MEDIA.search(mark)}
    fits = []
    for tokenizer in _GENERATION if needed else _PLAIN:
        file, config = real_tokenizer(tokenizer, shared, cache_dir)
        added, special = added_tokens(file), special_tokens(config)
        twice = special.get("bos_token") in hard and re.search(r"\bbos_token\b", source)  # SmolLM2's is <|im_start|>
        if needed <= added.keys() and not twice and any(_rendered(source, special)):
            fits.append((-len(soft & added.keys()), tokenizer))
    return [tokenizer for _, tokenizer in sorted(fits, key=lambda f: f[0])][:3]


def special_tokens(config: Json) -> dict[str, str]:
    """The special tokens of a tokenizer_config.json that a template may name."""
    texts = {k: v.get("content") if isinstance(v, dict) else v for k, v in config.items() if k.endswith("_token")}
    return {k: v for k, v in texts.items() if isinstance(v, str)}


def _turn_ends(hard: frozenset[str]) -> list[str]:
    """What the family's generation_config.json would name."""
    ends = {mark for mark in hard if _ENDS.search(mark)}
    if "<|observation|>" in hard:  # GLM: the next speaker ends a turn
        ends |= {"<|user|>", "<|observation|>"}
    return sorted(ends - {"<|end|>"} if "<|return|>" in hard else ends)  # gpt-oss: <|end|> ends a channel


def _generation(file: Path, bos: str | None, pad: str | None, ends: tuple[str, ...]) -> Json:
    ids = added_tokens(file)
    stop = [ids[e] for e in dict.fromkeys(ends)]
    made = {
        "bos_token_id": bos and ids[bos],
        "pad_token_id": pad and ids[pad],
        "eos_token_id": stop if stop[1:] else stop[0],
    }
    return {k: v for k, v in made.items() if v is not None}


def _with_marks(base: Path, special: list[str], ordinary: list[str], place: Path) -> Path:
    """A tokenizer.json that knows more added tokens; templates of one family share it."""
    tree, vocabulary, model = _tree(base)
    known = added_tokens(base)
    marks = [m for m in (*special, *ordinary) if m not in known]
    file = place / hashlib.sha256(json.dumps(marks).encode()).hexdigest()[:12] / "tokenizer.json"
    with _made_once(file) as missing:
        if missing:
            free = itertools.count(max(len(vocabulary), *(i + 1 for i in known.values())))
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            ids = {m: vocabulary[m] if m in vocabulary else next(free) for m in marks}  # <s> is a word of Qwen's
            more = [{"id": i, "content": m, **flags, "special": m in special} for m, i in ids.items()]
            _write(file, _joined({**tree, "added_tokens": [*tree["added_tokens"], *more]}, model))
    return file


def _model_dir(place: Path, tokenizer: Path, config: Json, source: str, generation: Json | None) -> Path:
    """A directory as a model's, without weights."""
    place.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):  # of one who was ended before `fits.json` was written
        (place / "tokenizer.json").symlink_to(tokenizer.resolve())
    _write(place / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=1))
    if generation is not None:
        _write(place / "generation_config.json", json.dumps(generation, indent=1))
    _write(place / "chat_template.jinja", source)
    return place
