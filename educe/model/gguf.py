"""A model as a GGUF file, for llama.cpp and what is built on it: named architectures only, each tensor written, read and compared.

What llama.cpp computes is fixed by the architecture's name and a few numbers, so a config that asks for anything else is refused: the
file would load and answer a little worse, without a word.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from educe.errors import ModelError
from educe.model.gguf_vocabulary import Vocabulary

# How numbers are stored, by the name they are asked for with: GGUF's type and the number of the whole file's kind.
STORED = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
_SMALLEST = 2.0**-126  # below it 1 / x is no fp32 number
_BLOCK = 32  # numbers of q8_0 that share a scale


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What llama.cpp does under a name. `interleaves`: it turns neighbouring numbers of queries and keys, where transformers turns the
    two halves of a head, so their rows change places. `adds_one`: norms hold 1 + what transformers holds. `window_every`: every so
    many layers one sees all, the others `sliding_window`; 0: windows are not known. `biases`: linear layers that may have one."""

    name: str
    activation: str = "silu"
    interleaves: bool = False
    adds_one: bool = False
    window_every: int = 0
    always_tied: bool = False
    biases: tuple[str, ...] = ()


_QKV = ("q_proj", "k_proj", "v_proj")
_GEMMA: dict[str, Any] = {"activation": "gelu_pytorch_tanh", "adds_one": True}
_LLAMA = Architecture(
    name="llama", interleaves=True, biases=(*_QKV, "o_proj", "gate_proj", "up_proj", "down_proj")
)  # Mistral too
ARCHITECTURES = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": Architecture(name="qwen2", biases=_QKV),
    "Qwen3ForCausalLM": Architecture(name="qwen3"),
    "GemmaForCausalLM": Architecture(name="gemma", always_tied=True, **_GEMMA),
    "Gemma2ForCausalLM": Architecture(name="gemma2", always_tied=True, window_every=2, **_GEMMA),
    "Gemma3ForCausalLM": Architecture(name="gemma3", window_every=6, **_GEMMA),
}
# Which logits an architecture may cap; others cap none.
_CAPS = {
    "gemma2": ({"attn": True, "final": True},),
    "gemma3": ({"attn": False, "final": False}, {"attn": False, "final": True}),
}
# Layers of the models for which llama.cpp scales queries by hidden size over heads and not by the size of a head.
_BY_HIDDEN_SIZE = {"gemma2": 46, "gemma3": 62}


def architecture_of(network: Any) -> Architecture:
    """How llama.cpp computes `network`. Raises `ModelError` for one that it, or this file, does not compute the same."""
    named = type(network).__name__
    towers = [n for n in ("vision_config", "audio_config") if getattr(network.config, n, None) is not None]
    if towers:
        what = "images" if towers[0].startswith("vision") else "sound"
        found = f"takes {what} too: llama.cpp wants a second file for that part, which educe does not write."
        fix = "Use --as merged, from which llama.cpp's own converter makes both."
        raise ModelError(206, named, found, fix)
    if named not in ARCHITECTURES:
        known = ", ".join(sorted(n.removesuffix("ForCausalLM") for n in ARCHITECTURES))
        found = f"is no architecture whose GGUF file was compared with it; those are {known}."
        raise ModelError(206, named, found, "Use --as merged.")
    made = ARCHITECTURES[named]
    for found in _unlike(made, network):
        raise ModelError(206, named, f"{found}, which llama.cpp's {made.name} does not compute.", "Use --as merged.")
    return made


def _unlike(made: Architecture, network: Any) -> Iterator[str]:
    """What of the config llama.cpp would compute otherwise."""
    config = network.config
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "")
    if activation != made.activation:
        yield f"has the activation {activation}"
    for kind, rope in _ropes(config).items():
        allowed = {"default", "linear"} if made.name == "gemma3" else {"default", "linear", "yarn", "llama3"}
        if kind == "sliding_attention":
            allowed = {"default"}
        if (scaling := rope.get("rope_type", "default")) not in allowed:
            yield f"scales its positions by {scaling}"
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            yield "turns a part of each head only"
    if made.always_tied and not is_tied(network):
        yield "has a head that is not its embedding"
    if made.window_every:
        plan = [
            "full_attention" if (i + 1) % made.window_every == 0 else "sliding_attention"
            for i in range(_layers(config))
        ]
        if list(config.layer_types) != plan:
            yield f"has windows in other layers than all but each {made.window_every}th"
        scale = config.hidden_size // config.num_attention_heads
        size = scale if _layers(config) == _BY_HIDDEN_SIZE.get(made.name) else config.head_dim
        if config.query_pre_attn_scalar != size:
            yield f"scales queries by {config.query_pre_attn_scalar}"
        if getattr(config, "use_bidirectional_attention", False):
            yield "looks ahead"
    caps = {which: getattr(config, f"{which}_logit_softcapping", None) is not None for which in ("attn", "final")}
    if made.name not in _CAPS or caps not in _CAPS[made.name]:
        capped = " and ".join(k for k, there in caps.items() if there) or "no"
        if made.name in _CAPS or any(caps.values()):
            yield f"caps {capped} logits"
    for name, _ in network.named_parameters():
        if name.endswith(".bias") and name.split(".")[-2] not in made.biases:
            yield f"has a bias in {name}"


def is_tied(network: Any) -> bool:
    return network.get_output_embeddings().weight is network.get_input_embeddings().weight


def _layers(config: Any) -> int:
    return int(config.num_hidden_layers)


def _ropes(config: Any) -> dict[str, dict[str, Any]]:
    """How positions turn, by the kind of layer."""
    rope = dict(config.rope_parameters)
    return {"full_attention": rope} if "rope_type" in rope else rope


def context_of(network: Any) -> int:
    """Positions at which llama.cpp computes what transformers does: it knows no windows in most architectures."""
    config, made = network.config, architecture_of(network)
    positions = int(config.max_position_embeddings)
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or made.window_every or (kinds is not None and "sliding_attention" not in kinds):
        return positions
    return min(positions, window)


def write_gguf(
    network: Any, vocabulary: Vocabulary, file: Path, kind: str, *, name: str, about: dict[str, str]
) -> None:
    """Write `network` and its tokenizer; `kind` is a key of `STORED`, `about` goes into `general.*`. One tensor at a time is packed.

    Raises `ModelError` where the file would not be the model.
    """
    made = architecture_of(network)
    stored, file_type = STORED[kind]
    writer = gguf.GGUFWriter(file, made.name)
    writer.add_name(name)
    for key, value in about.items():
        writer.add_string(f"general.{key}", value)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_numbers(writer, network, made)
    vocabulary.add_to(writer)
    planned = list(_tensors(network, made))
    for tensor_name, t in planned:
        writer.add_tensor_info(tensor_name, *_form(t, stored))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor_name, t in planned:
        writer.write_tensor_data(
            _packed(_changed(tensor_name, t, made, network.config), _type_of(t, stored), tensor_name)
        )
    writer.close()


def _add_numbers(writer: gguf.GGUFWriter, network: Any, made: Architecture) -> None:
    config = network.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_vocab_size(int(network.get_input_embeddings().weight.shape[0]))
    writer.add_context_length(context_of(network))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(_layers(config))
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if made.window_every:
        writer.add_sliding_window(config.sliding_window)
    if (cap := getattr(config, "attn_logit_softcapping", None)) is not None:
        writer.add_attn_logit_softcapping(cap)
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        writer.add_final_logit_softcapping(cap)
    ropes = _ropes(config)
    rope = ropes["full_attention"]
    writer.add_rope_freq_base(rope["rope_theta"])
    if "sliding_attention" in ropes:
        writer.add_rope_freq_base_swa(ropes["sliding_attention"]["rope_theta"])
    if rope.get("rope_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("rope_type") == "yarn":
        before = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(before)
        if (factor := rope.get("attention_factor")) is not None:
            writer.add_rope_scaling_yarn_attn_factor(factor)
        if (fast := rope.get("beta_fast")) is not None:
            writer.add_rope_scaling_yarn_beta_fast(fast)
        if (slow := rope.get("beta_slow")) is not None:
            writer.add_rope_scaling_yarn_beta_slow(slow)


def _tensors(network: Any, made: Architecture) -> Iterator[tuple[str, Tensor]]:
    """GGUF's names and the model's tensors; a tied head once, as the embedding. Raises `ModelError` for one without a name there."""
    number = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == made.name)
    names = gguf.get_tensor_name_map(number, _layers(network.config))
    for name, t in network.named_parameters():
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ModelError(206, name, f"is a tensor that llama.cpp's {made.name} has not.", "Use --as merged.")
        yield found, t.detach()
    rope = _ropes(network.config)["full_attention"]
    if rope.get("rope_type") == "llama3":
        yield "rope_freqs.weight", _llama3_factors(network.config, rope)


def _llama3_factors(config: Any, rope: dict[str, Any]) -> Tensor:
    """By what each frequency is divided, shape (head / 2,). Source: Llama 3.1's `apply_scaling` (Meta, llama-models, model.py)."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequencies = rope["rope_theta"] ** (-torch.arange(0, head, 2, dtype=torch.float64) / head)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    kept = ((turns - low) / (high - low)).clamp(
        0, 1
    )  # 1: turns often, and stays; 0: turns rarely, and is slowed by the factor
    return (1 / ((1 - kept) / factor + kept)).float()


def _changed(name: str, t: Tensor, made: Architecture, config: Any) -> Tensor:
    """The tensor in fp32 as llama.cpp wants it."""
    exact = t.float().cpu()
    if made.adds_one and name.endswith("norm.weight"):
        return exact + 1
    if made.interleaves and (".attn_q." in name or ".attn_k." in name):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        return exact.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(exact.shape)
    return exact


def _type_of(t: Tensor, stored: gguf.GGMLQuantizationType) -> gguf.GGMLQuantizationType:
    """Vectors stay in fp32; rows that are no whole number of blocks in f16."""
    if t.ndim == 1:
        return gguf.GGMLQuantizationType.F32
    if stored == gguf.GGMLQuantizationType.Q8_0 and t.shape[-1] % _BLOCK:
        return gguf.GGMLQuantizationType.F16
    return stored


def _form(t: Tensor, stored: gguf.GGMLQuantizationType) -> tuple[Any, ...]:
    """Arguments of `add_tensor_info` after the name: shape, dtype, bytes, type."""
    kind = _type_of(t, stored)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    num_bytes = t.numel() // block * size
    if kind == gguf.GGMLQuantizationType.F32:
        return tuple(t.shape), np.dtype(np.float32), num_bytes, kind
    if kind == gguf.GGMLQuantizationType.F16:
        return tuple(t.shape), np.dtype(np.float16), num_bytes, kind
    return (*t.shape[:-1], t.shape[-1] // block * size), np.dtype(np.uint8), num_bytes, kind


def _packed(exact: Tensor, kind: gguf.GGMLQuantizationType, name: str) -> np.ndarray[Any, Any]:
    """Bytes of a tensor. Raises `ModelError` for a number that the type cannot hold."""
    if kind == gguf.GGMLQuantizationType.F32:
        return _numpy(exact)
    if kind == gguf.GGMLQuantizationType.BF16:
        return _numpy(exact.bfloat16().view(torch.uint8))
    largest = (
        exact.abs().max() if kind == gguf.GGMLQuantizationType.F16 else exact.abs().max() / 127
    )  # the largest scale
    if not bool(torch.isfinite(largest.half())):
        found = f"holds {float(exact.abs().max()):.3g}, which {kind.name.lower()} cannot hold (f16 ends at 65504)."
        raise ModelError(206, name, found, "Use --as gguf-bf16 or --as merged.")
    return _numpy(exact.half()) if kind == gguf.GGMLQuantizationType.F16 else _q8_0(exact)


def _numpy(t: Tensor) -> np.ndarray[Any, Any]:
    made: np.ndarray[Any, Any] = t.numpy()
    return made


def _q8_0(exact: Tensor) -> np.ndarray[Any, Any]:
    """Blocks of 32 numbers: a scale in f16, then each number as an int8 of it, halves rounded away from zero (ggml-quants.c,
    `quantize_row_q8_0_ref`)."""
    blocks = exact.reshape(-1, _BLOCK)
    scales = blocks.abs().amax(1, keepdim=True) / 127
    whole = torch.where(scales < _SMALLEST, 0, 1 / scales) * blocks
    whole = torch.copysign((whole.abs() + 0.5).floor(), whole).to(torch.int8)
    packed = torch.cat([scales.half().view(torch.uint8), whole.view(torch.uint8)], 1)
    return _numpy(packed.reshape(*exact.shape[:-1], -1))


def check_gguf(file: Path, network: Any, kind: str) -> str:
    """Read the file back and compare every tensor with the model's; says how far the furthest number is off. Raises `ModelError`.

    f32, f16 and bf16 must be the number rounded once; of q8_0 a number may be off by half its block's scale, whose rounding to f16
    counts too.
    """
    made, stored = architecture_of(network), STORED[kind][0]
    read = {t.name: t for t in gguf.GGUFReader(file).tensors}
    planned = dict(_tensors(network, made))
    if read.keys() != planned.keys():
        raise ModelError(
            206, str(file), f"has other tensors: {sorted(read.keys() ^ planned.keys())[:3]}.", "Report this."
        )
    furthest = 0.0
    for name, t in planned.items():
        exact = _changed(name, t, made, network.config)
        found = torch.from_numpy(np.array(gguf.dequantize(read[name].data, read[name].tensor_type)))
        apart = (found.reshape(exact.shape) - exact).abs()
        if _type_of(t, stored) == gguf.GGMLQuantizationType.Q8_0:
            most = exact.unflatten(-1, (-1, _BLOCK)).abs().amax(-1) * (0.5 / 127 + 2.0**-11 + 1e-6) + 127 * 2.0**-25
            allowed = most.repeat_interleave(_BLOCK, -1)
        else:
            digits = {"F32": 24, "F16": 11, "BF16": 8}[_type_of(t, stored).name]
            allowed = exact.abs() * 2.0**-digits + (2.0**-25 if digits == 11 else 0)
        if not bool((apart <= allowed).all()):
            raise ModelError(206, str(file), f"read back, {name} is off by {float(apart.max()):.3g}.", "Report this.")
        furthest = max(furthest, float(apart.max()))
    return f"{len(planned)} tensors read back, none further off than {kind} rounds (at most {furthest:.2g})"
