"""What a model directory says about itself, read without loading it and without torch."""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from educe.errors import ModelError
from educe.model.foreign import refuse_foreign

_MAX_HEADER_BYTES = 100 * 2**20
_AGAIN = "Download the model again."
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # as configs call it
_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Sizes of a causal language model. `num_parameters` counts each stored tensor once (a tied head is not stored);
    `active_intermediate` is the width between the two halves of a feed-forward block that one token passes, over all its experts.
    `num_expert_layers` have `num_experts` of `expert_intermediate` each, and no feed-forward block of `intermediate_size`.
    `files` hold the weights; `unread` are safetensors files beside those that are no part of the model."""

    name: str
    directory: Path
    model_type: str
    architecture: str
    num_parameters: int
    num_embedding_parameters: int
    hidden_size: int
    intermediate_size: int
    active_intermediate: int
    num_expert_layers: int
    num_experts: int
    expert_intermediate: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    normalises_queries: bool
    vocab_size: int
    max_positions: int
    licence: str
    files: tuple[Path, ...]
    unread: tuple[str, ...]


def describe_model(directory: Path, name: str) -> ModelFacts:
    """Read config.json and the headers of the safetensors files. Refuses code, pickles and damaged files.

    `name` is what the recipe calls the model: a directory (its last part is shown) or a Hub id.
    """
    refuse_unsafe(directory)
    config = _read_config(directory)
    files = weight_files(directory)
    tensors: dict[str, list[int]] = {}
    for file in files:
        tensors |= _header(file)
    try:
        return _facts(directory, name, config, files, tensors)
    except (ValueError, TypeError, AttributeError) as e:
        raise ModelError(2, str(directory / "config.json"), f"has a value of the wrong type: {e}.", _AGAIN) from e


def _facts(
    directory: Path, name: str, config: dict[str, Any], files: tuple[Path, ...], tensors: dict[str, list[int]]
) -> ModelFacts:
    text = config.get("text_config") or config
    embedding = max((math.prod(s) for n, s in tensors.items() if "embed" in n), default=0)
    hidden = int(text.get("hidden_size", text.get("n_embd", text.get("d_model", 0))))
    if not hidden or not tensors:
        raise ModelError(
            2, str(directory / "config.json"), "describes no language model.", "Give a causal language model."
        )
    layers = int(text.get("num_hidden_layers", text.get("n_layer", 1)))
    if layers > len(tensors):  # each would be built before the first is found to have no weights
        found = f"names {layers} layers, and there are {len(tensors)} tensors."
        raise ModelError(203, str(directory / "config.json"), found, _AGAIN)
    inner = int(text.get("intermediate_size") or 4 * hidden)
    active = int(text.get("num_experts_per_tok") or text.get("top_k_experts") or 0)
    experts = next((int(text[n]) for n in NUM_EXPERTS if text.get(n)), 0)
    expert_inner = int(text.get("moe_intermediate_size") or inner)
    heads = int(text.get("num_attention_heads", text.get("n_head", 1)))
    return ModelFacts(
        name=Path(name).name,
        directory=directory,
        model_type=str(config.get("model_type", "unknown")),
        architecture=str((config.get("architectures") or ["unknown"])[0]),
        num_parameters=sum(math.prod(s) for s in tensors.values()),
        num_embedding_parameters=embedding,
        hidden_size=hidden,
        intermediate_size=inner,
        active_intermediate=active * expert_inner if active else inner,
        num_expert_layers=_num_expert_layers(tensors) if experts else 0,
        num_experts=experts,
        expert_intermediate=expert_inner,
        num_heads=heads,
        num_key_value_heads=int(text.get("num_key_value_heads") or heads),
        head_dim=int(text.get("head_dim") or hidden // heads),
        normalises_queries=any("q_norm" in n for n in tensors),
        num_layers=layers,
        vocab_size=int(text.get("vocab_size", 0)),
        max_positions=int(text.get("max_position_embeddings", text.get("n_positions", 2**31))),
        licence=_licence(directory),
        files=files,
        unread=tuple(sorted({p.name for p in directory.glob("*.safetensors")} - {p.name for p in files})),
    )


def _num_expert_layers(tensors: dict[str, list[int]]) -> int:
    """Layers whose experts are stored, fused or one by one; experts that all tokens pass ("shared_experts") are none."""
    found = (re.search(r"\.(\d+)\..*\bexperts\b", name) for name in tensors)
    return len({match[1] for match in found if match})


def refuse_unsafe(directory: Path) -> None:
    """Only safetensors and JSON are loaded: a directory with code to run, or with pickles, is refused."""
    if not directory.is_dir():
        raise ModelError(
            1, str(directory), "is not a directory.", "Give a model directory or a Hub id such as ORG/NAME."
        )
    if not (directory / "config.json").exists():
        _read_config(directory)
    refuse_foreign(directory)
    _read_config(directory)
    if not any(directory.glob("*.safetensors")):
        pickles = [p.name for p in directory.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".gguf")]
        found = f"has no safetensors, only {', '.join(sorted(pickles)[:3])}." if pickles else "has no weights."
        raise ModelError(
            101, str(directory), found, "Convert it once with transformers' save_pretrained, or use another copy."
        )


def _read_config(directory: Path) -> dict[str, Any]:
    file = directory / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise ModelError(1, str(file), "does not exist.", "Give the directory that holds config.json.") from e
    except (ValueError, OSError, RecursionError) as e:
        raise ModelError(2, str(file), f"cannot be read: {e}.", _AGAIN) from e
    if not isinstance(config, dict):
        raise ModelError(2, str(file), "is not an object.", _AGAIN)
    return config


def weight_files(directory: Path) -> tuple[Path, ...]:
    """The files that hold the model, as transformers chooses them: model.safetensors, else what the index names, else all.

    Raises `ModelError` for an index that is none, or that names what is not there.
    """
    alone, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if alone.is_file():
        return (alone,)
    if not index.is_file():
        return tuple(sorted(directory.glob("*.safetensors")))
    try:
        named = {
            str(tensor): str(file)
            for tensor, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ModelError(2, str(index), "is not an index of weights.", _AGAIN) from e
    names = sorted(set(named.values()))
    for name in names:
        if Path(name).name != name:
            raise ModelError(2, str(index), f"points outside the directory: {name!r}.", "Do not use this model.")
    if missing := [n for n in names if not (directory / n).is_file()]:
        lost = [tensor for tensor, file in named.items() if file == missing[0]]
        found = f"is missing; {index.name} says that it holds {len(lost)} tensors, {lost[0]} the first."
        more = f" {len(missing) - 1} more of its {len(names)} files are missing." if len(missing) > 1 else ""
        raise ModelError(2, str(directory / missing[0]), found + more, _AGAIN)
    return tuple(directory / n for n in names)


def _header(file: Path) -> dict[str, list[int]]:
    """Tensor shapes of one safetensors file, its size checked against its header."""
    with file.open("rb") as f:
        start = f.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= _MAX_HEADER_BYTES:
            raise ModelError(2, str(file), "is not a safetensors file.", _AGAIN)
        try:
            header = json.loads(f.read(length))
            header.pop("__metadata__", None)
            shapes = {n: [int(x) for x in t["shape"]] for n, t in header.items()}
            spans = sorted(
                (int(low), int(high), str(t["dtype"]), n)
                for n, t in header.items()
                for low, high in [t["data_offsets"]]
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise ModelError(2, str(file), "has a damaged header.", _AGAIN) from e
    end = max((high for _, high, _, _ in spans), default=0)
    if file.stat().st_size != 8 + length + end:
        found = f"has {file.stat().st_size} bytes, its header says {8 + length + end}: it is cut off or damaged."
        raise ModelError(2, str(file), found, _AGAIN)
    done = 0
    for low, high, dtype, name in spans:
        if low < done:
            raise ModelError(2, str(file), f"tensor {name} overlaps another.", _AGAIN)
        if dtype in _DTYPE_BYTES and high - low != math.prod(shapes[name]) * _DTYPE_BYTES[dtype]:
            raise ModelError(2, str(file), f"tensor {name} has the wrong size.", _AGAIN)
        done = high
    return shapes


def _licence(directory: Path) -> str:
    """The licence the model card's front matter names, or 'unknown'."""
    card = directory / "README.md"
    if card.is_file():
        for line in card.read_text(encoding="utf-8", errors="replace").split("\n")[:60]:
            if line.startswith("license:"):
                return line.removeprefix("license:").strip()
    return "unknown"
