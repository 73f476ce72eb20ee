"""From the GGUF file that a package carries to a directory that transformers loads.

Weights come through transformers. Its tokenizers do not: it rebuilds them without some of what GGUF leaves to a name, so that the same
text becomes other ids than the model was trained on. Here each kind of tokenizer is a function.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from educe.errors import ModelError
from educe.files.atomic import directory
from educe.model.load import quiet
from educe.model.saving import save_network

_SPACE = "\u2581"


def convert(file: Path, target: Path, card: str, papers: Mapping[str, bytes]) -> None:
    """Dequantise, save as bf16 safetensors with the tokenizer that the model was trained with, its card and papers. Atomic."""
    fields = {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items() if name.startswith(_OF)}
    kind = (str(fields[f"{_OF}model"]), str(fields.get(f"{_OF}pre", "")))
    if kind not in TOKENIZERS:
        fix = "Give the model as a directory with its own tokenizer.json."
        raise ModelError(2, file.name, f"has a tokenizer of the kind {'/'.join(kind)}, not known here.", fix)
    with quiet():
        model = _dequantised(file)
        with directory(target, about={"stage": "model", "from": file.name}) as part:
            save_network(model, part)
            TOKENIZERS[kind](file, fields, part)
            for name, text in {"README.md": card.encode(), **papers}.items():
                (part / name).write_bytes(text)


def _dequantised(file: Path) -> Any:
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name, "local_files_only": True}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.bfloat16
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    return model.to(torch.bfloat16)


def _digits_first(file: Path, _fields: Mapping[str, Any], place: Path) -> None:
    """As transformers builds it, and before it the splitting of digits (`Digits(individual_digits=True)`), which it leaves out."""
    loaded = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    loaded.save_pretrained(place)
    tree = json.loads((place / "tokenizer.json").read_text(encoding="utf-8"))
    digits = {"type": "Digits", "individual_digits": True}
    tree["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, tree["pre_tokenizer"]]}
    _write(place / "tokenizer.json", tree)


def _sentencepiece(file: Path, fields: Mapping[str, Any], place: Path) -> None:
    """Made of the pieces, their scores and kinds alone. transformers gives merges another order (runs of more than 31 spaces come out
    otherwise) and loses added tokens."""
    if fields.get(f"{_OF}add_space_prefix", True):
        fix = "Give the model as a directory with its own tokenizer.json."
        raise ModelError(2, file.name, "has a tokenizer that puts a space before a text, not known here.", fix)
    tokens, scores, types = (fields[_OF + name] for name in ("tokens", "scores", "token_type"))
    special = {name: tokens[fields[f"{_OF}{key}_token_id"]] for name, key in _SPECIAL.items()}
    bos = special["bos_token"] if fields[f"{_OF}add_bos_token"] else None
    _write(place / "tokenizer.json", sentencepiece_tree(tokens, scores, types, special["unk_token"], bos))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    _write(place / "tokenizer_config.json", settings)


def sentencepiece_tree(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], unknown: str, bos: str | None
) -> dict[str, Any]:
    """tokenizer.json of a SentencePiece BPE that puts no space before a text, of GGUF's lists of tokens; `bos` is put before.

    SentencePiece joins whatever makes a piece, the piece of the highest score first. So merges are all ways to make each piece, in the
    order of scores and, for the same piece, in the order of transformers' own converter (`convert_slow_tokenizer.generate_merges`).
    Whatever is no ordinary piece counts as 0, above all of those.
    """
    kinds = [gguf.TokenType(t) for t in types]
    cut = {gguf.TokenType.CONTROL, gguf.TokenType.UNKNOWN, gguf.TokenType.USER_DEFINED}
    texts = [  # what is cut out of a text before anything is joined is written there with its spaces
        t.replace(" ", _SPACE) if k == gguf.TokenType.USER_DEFINED else t for t, k in zip(tokens, kinds, strict=True)
    ]
    ids = {text: i for i, text in enumerate(texts)}
    merges: list[tuple[float, str, str]] = []
    for text, score, kind in zip(texts, scores, kinds, strict=True):
        height = score if kind == gguf.TokenType.NORMAL else 0.0
        pairs = [(text[:k], text[k:]) for k in range(1, len(text)) if text[:k] in ids and text[k:] in ids]
        merges += [(height, a, b) for a, b in sorted(pairs, key=lambda p: (ids[p[0]], ids[p[1]]))]
    merges.sort(key=lambda m: (m[0], len(m[1]), len(m[2])), reverse=True)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": text, **flags, "special": kind != gguf.TokenType.USER_DEFINED}
            for i, (text, kind) in enumerate(zip(texts, kinds, strict=True))
            if kind in cut
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
        # As published; there is no space left to split at.
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": _before(bos, ids) if bos is not None else None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": [[a, b] for _, a, b in merges],
        },
    }


def _before(bos: str, ids: Mapping[str, int]) -> dict[str, Any]:
    begin = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    again = [{"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    tokens = {bos: {"id": bos, "ids": [ids[bos]], "tokens": [bos]}}
    return {"type": "TemplateProcessing", "single": begin, "pair": begin + again, "special_tokens": tokens}


def _write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


_OF = "tokenizer.ggml."
_SPECIAL = {
    f"{name}_token": key for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
}
# GGUF's names for what a tokenizer is and how it splits text → what writes its files.
TOKENIZERS: dict[tuple[str, str], Callable[[Path, Mapping[str, Any], Path], None]] = {
    ("gpt2", "smollm"): _digits_first,
    ("llama", "default"): _sentencepiece,
}
