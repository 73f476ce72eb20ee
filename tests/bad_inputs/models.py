"""Bad model directories, made by code: numbers are those of the list of bad inputs."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Break = Callable[[Path], object]


def _index(weight_map: Any) -> Break:
    def broken(d: Path) -> None:
        (d / "model.safetensors").rename(d / "model-1.safetensors")  # which would be read, and the index not
        (d / "model.safetensors.index.json").write_text(json.dumps(weight_map))

    return broken


def _weights(change: Callable[[bytes], bytes]) -> Break:
    return lambda d: (d / "model.safetensors").write_bytes(change((d / "model.safetensors").read_bytes()))


def _header(change: Callable[[dict[str, Any]], Any]) -> Break:
    def changed(data: bytes) -> bytes:
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        text = json.dumps(change(header)).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]

    return _weights(changed)


def _first(**values: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A header whose first tensor is told otherwise."""

    def change(header: dict[str, Any]) -> dict[str, Any]:
        name = min(n for n in header if n != "__metadata__")
        return {**header, name: {**header[name], **values}}

    return change


def _twice(header: dict[str, Any]) -> dict[str, Any]:
    """Two tensors of one shape in the same bytes."""
    tensors = sorted(
        (n for n in header if n.endswith("input_layernorm.weight")), key=lambda n: header[n]["data_offsets"]
    )
    return {**header, tensors[0]: header[tensors[1]]}


def _config(**values: Any) -> Break:
    return lambda d: (d / "config.json").write_text(
        json.dumps({**json.loads((d / "config.json").read_text()), **values})
    )


def _file(name: str, data: bytes) -> Break:
    return lambda d: (d / name).write_bytes(data)


def _added(number: int) -> Break:
    """tokenizer.json whose first added token has another id."""

    def spoil(directory: Path) -> None:
        tree = json.loads((directory / "tokenizer.json").read_text())
        tree["added_tokens"][-1]["id"] = number
        (directory / "tokenizer.json").write_text(json.dumps(tree))

    return spoil


def _tensors(change: Callable[[dict[str, Any]], object]) -> Break:
    """model.safetensors with some tensors changed."""

    def spoil(directory: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})

    return spoil


def _nan(tensors: dict[str, Any]) -> None:
    tensors["model.layers.0.self_attn.q_proj.weight"][1, 2] = float("nan")


def _head_of_its_own(tensors: dict[str, Any]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


# What only loading the model can tell: how to spoil it, words of the message.
LOADED: dict[str, tuple[Break, str]] = {
    "86 NaN": (_tensors(_nan), "q_proj.weight holds NaN"),
    "87 tied, and a head of its own": (_tensors(_head_of_its_own), "holds lm_head.weight of its own"),
    "87 not tied, and no head": (_config(tie_word_embeddings=False), "lack lm_head.weight"),
    "87 a weight is missing": (
        _tensors(lambda t: t.pop("model.layers.0.self_attn.q_proj.weight")),
        "would be random numbers",
    ),
}


MODELS: dict[str, tuple[Break, str, str]] = {
    "81 upwards": (_index({"weight_map": {"a": "../x.safetensors"}}), "E-MODEL-002", "outside the directory"),
    "81 absolute": (_index({"weight_map": {"a": "/etc/passwd"}}), "E-MODEL-002", "outside the directory"),
    "81 missing shard": (_index({"weight_map": {"a": "model-2.safetensors"}}), "E-MODEL-002", "model-2.safetensors"),
    "81 no map": (_index({}), "E-MODEL-002", "index"),
    "81 a list": (_index([]), "E-MODEL-002", "index"),
    "82 cut off": (_weights(lambda b: b[:-100]), "E-MODEL-002", "cut off"),
    "82 cut in the header": (_weights(lambda b: b[:50]), "E-MODEL-002", "damaged header"),
    "82 empty": (_weights(lambda b: b""), "E-MODEL-002", "not a safetensors file"),
    "82 huge header": (_weights(lambda b: struct.pack("<Q", 2 * 10**8) + b[8:]), "E-MODEL-002", "not a safetensors"),
    "82 overlap": (_header(_twice), "E-MODEL-002", "overlaps"),
    "82 wrong shape": (_header(_first(shape=[3])), "E-MODEL-002", "wrong size"),
    "82 three offsets": (_header(_first(data_offsets=[0, 1, 2])), "E-MODEL-002", "damaged header"),
    "82 header a number": (_header(lambda h: 12), "E-MODEL-002", "damaged header"),
    "83 only a pickle": (lambda d: (d / "model.safetensors").rename(d / "model.bin"), "E-MODEL-101", "Convert it once"),
    "83 no weights": (lambda d: (d / "model.safetensors").unlink(), "E-MODEL-101", "no weights"),
    "84 code to run": (_config(auto_map={"AutoModel": "x.Y"}), "E-MODEL-102", "its own code"),
    "config not JSON": (_file("config.json", b"{"), "E-MODEL-002", "config.json"),
    "config too deep": (_file("config.json", b"[" * 100_000), "E-MODEL-002", "config.json"),
    "config of other types": (_config(vocab_size="many"), "E-MODEL-002", "config.json"),
    "85 an added token beyond the vocabulary": (_added(5000), "E-MODEL-002", "the id 5000 among added tokens"),
    "85 an added token in another's place": (_added(3), "E-MODEL-002", "and 2 in its vocabulary"),
    "79 smaller vocabulary": (_config(vocab_size=100), "E-MODEL-202", "knows 100 ids"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "E-MODEL-001", "tokenizer.json"),
    "tokenizer of nothing": (_file("tokenizer.json", b"{}"), "E-MODEL-002", "not a usable tokenizer"),
    "tokenizer_config not JSON": (_file("tokenizer_config.json", b"\xff"), "E-MODEL-002", "tokenizer_config.json"),
    "template does not parse": (_file("chat_template.jinja", b"{% for"), "E-CHAT-101", "does not parse"),
    "template not UTF-8": (_file("chat_template.jinja", b"\xff\xfe"), "E-CHAT-001", "chat_template.jinja"),
    "template runs code": (_file("chat_template.jinja", b"{{ ''.__class__.mro() }}"), "E-DATA-005", "E-CHAT-102"),
    "template never ends": (_file("chat_template.jinja", b"{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
                            "E-DATA-005", "E-CHAT-102"),
    "no such directory": (shutil.rmtree, "E-MODEL-001", "neither a directory nor a Hub id"),
}  # fmt: skip
