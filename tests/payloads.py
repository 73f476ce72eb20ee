"""Model directories that would run code, follow a link or never end: what is done to a good one, and its refusal's code.

A payload that runs creates its sentinel, a file that must never appear.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

Plant = Callable[[Path, Path], object]  # (the model's directory, the sentinel)


class Bomb:
    """Unpickled, it creates a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = str(sentinel)

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (self.sentinel, "w")


def bomb(sentinel: Path) -> bytes:
    return pickle.dumps(Bomb(sentinel))


def module(sentinel: Path) -> str:
    """A module that creates the file when it is imported, and has the classes that a config may name."""
    return (
        f"open({str(sentinel)!r}, 'w').close()\n"
        "from transformers import LlamaConfig as X, LlamaForCausalLM as Y, PreTrainedTokenizerFast as Z\n"
    )


def _pickle(name: str, *, instead: bool = False) -> Plant:
    def plant(directory: Path, sentinel: Path) -> None:
        (directory / name).write_bytes(bomb(sentinel))
        if instead and name != "model.safetensors":
            (directory / "model.safetensors").unlink()

    return plant


def _settings(file: str, *, code: bool = True, **values: Any) -> Plant:
    """Settings added to a file, and the module that they name."""

    def plant(directory: Path, sentinel: Path) -> None:
        old = json.loads((directory / file).read_text()) if (directory / file).is_file() else {}
        (directory / file).write_text(json.dumps({**old, **values}))
        if code:  # in a directory of its own the module is not refused for itself
            (directory / "modeling_x").mkdir()
            (directory / "modeling_x" / "__init__.py").write_text(module(sentinel))

    return plant


def _adapters(directory: Path, sentinel: Path) -> None:
    """A model that only names another one, where the pickle lies."""
    other = directory.parent / "other"
    other.mkdir()
    (other / "config.json").write_bytes((directory / "config.json").read_bytes())
    (other / "pytorch_model.bin").write_bytes(bomb(sentinel))
    told = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(other), "r": 1}
    (directory / "adapter_config.json").write_text(json.dumps(told))
    (directory / "adapter_model.bin").write_bytes(bomb(sentinel))


def _pipe(name: str) -> Plant:
    def plant(directory: Path, sentinel: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        os.mkfifo(directory / name)

    return plant


def _link(name: str, target: str) -> Plant:
    def plant(directory: Path, sentinel: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to(target)

    return plant


def _sparse(name: str, size: int) -> Plant:
    def plant(directory: Path, sentinel: Path) -> None:
        with (directory / name).open("wb") as f:
            f.truncate(size)

    return plant


def _text(name: str, text: str) -> Plant:
    return lambda directory, sentinel: (directory / name).write_text(text)


def _index(text: str) -> Plant:
    def plant(directory: Path, sentinel: Path) -> None:
        (directory / "model.safetensors").rename(directory / "model-1.safetensors")  # else the index is not read
        (directory / "model.safetensors.index.json").write_text(text)

    return plant


_DEEP = "[" * 100_000 + "]" * 100_000
_MAP = {"AutoConfig": "modeling_x.X", "AutoModelForCausalLM": "modeling_x.Y", "AutoTokenizer": ["modeling_x.Z", None]}

PAYLOADS: dict[str, tuple[Plant, str]] = {
    "a pickle instead of weights": (_pickle("pytorch_model.bin", instead=True), "E-MODEL-101"),
    "a .pt instead of weights": (_pickle("consolidated.pt", instead=True), "E-MODEL-101"),
    "a .pkl instead of weights": (_pickle("model.pkl", instead=True), "E-MODEL-101"),
    "a pickle named safetensors": (_pickle("model.safetensors", instead=True), "E-MODEL-002"),
    "a .bin beside weights": (_pickle("pytorch_model.bin"), "E-MODEL-101"),
    "a .pt beside weights": (_pickle("consolidated.pt"), "E-MODEL-101"),
    "a .pth beside weights": (_pickle("weights.00.pth"), "E-MODEL-101"),
    "a .PKL beside weights": (_pickle("MODEL.PKL"), "E-MODEL-101"),
    "a .ckpt beside weights": (_pickle("last.ckpt"), "E-MODEL-101"),
    "code beside weights": (lambda d, s: (d / "modeling_x.py").write_text(module(s)), "E-MODEL-102"),
    "compiled code beside weights": (_pickle("kernels.so"), "E-MODEL-102"),
    "auto_map of the config": (_settings("config.json", auto_map=_MAP, model_type="x"), "E-MODEL-102"),
    "auto_map of a part": (_settings("config.json", text_config={"auto_map": _MAP}), "E-MODEL-102"),
    "auto_map of the tokenizer": (_settings("tokenizer_config.json", auto_map=_MAP), "E-MODEL-102"),
    "auto_map of the processor": (_settings("processor_config.json", auto_map=_MAP), "E-MODEL-102"),
    "auto_map of images": (_settings("preprocessor_config.json", auto_map=_MAP), "E-MODEL-102"),
    "trust_remote_code": (_settings("config.json", trust_remote_code=True), "E-MODEL-102"),
    "trust_remote_code of the tokenizer": (_settings("tokenizer_config.json", trust_remote_code=True), "E-MODEL-102"),
    "a way to generate": (_settings("generation_config.json", custom_generate="modeling_x"), "E-MODEL-102"),
    "a kernel from the Hub": (_settings("config.json", code=False, _attn_implementation="a/kernel"), "E-MODEL-102"),
    "a kernel of a part": (
        _settings("config.json", code=False, text_config={"attn_implementation": {"": "a/kernel:f"}}),
        "E-MODEL-102",
    ),
    "kernels": (_settings("config.json", code=False, use_kernels=True), "E-MODEL-102"),
    "adapters to another model": (_adapters, "E-MODEL-102"),
    "a class that is none": (
        _settings("config.json", code=False, architectures=["os"], model_type="os"),
        "E-MODEL-002",
    ),
    "quantized by a module": (
        _settings("config.json", quantization_config={"quant_method": "modeling_x.Y"}),
        "E-MODEL-204",
    ),
    "a million layers": (_settings("config.json", code=False, num_hidden_layers=10**6), "E-MODEL-203"),
    "config is a pipe": (_pipe("config.json"), "E-MODEL-002"),
    "weights are a pipe": (_pipe("model.safetensors"), "E-MODEL-002"),
    "tokenizer is a pipe": (_pipe("tokenizer.json"), "E-MODEL-002"),
    "template is a pipe": (_pipe("chat_template.jinja"), "E-MODEL-002"),
    "an endless config": (_link("config.json", "/dev/zero"), "E-MODEL-002"),
    "endless weights": (_link("model.safetensors", "/dev/zero"), "E-MODEL-002"),
    "an endless tokenizer": (_link("tokenizer.json", "/dev/zero"), "E-MODEL-002"),
    "a huge config": (_sparse("config.json", 10**10), "E-MODEL-002"),
    "a huge tokenizer": (_sparse("tokenizer.json", 10**10), "E-MODEL-002"),
    "a huge template": (_sparse("chat_template.jinja", 10**8), "E-CHAT-001"),
    "a deep config": (_text("config.json", _DEEP), "E-MODEL-002"),
    "a deep index": (_index(_DEEP), "E-MODEL-002"),
    "a deep tokenizer": (_text("tokenizer.json", _DEEP), "E-MODEL-002"),
    "deep settings of the tokenizer": (_text("tokenizer_config.json", _DEEP), "E-MODEL-002"),
}
# What only loading the model tells: `check` without it passes.
LOADED = ("quantized by a module", "a class that is none")
