"""The frozen linear layers of a model in 4 bits, for QLoRA (Dettmers et al. 2023, arXiv 2305.14314): NF4 codes in blocks of 64, their
scales in 8 bits in blocks of 256 (double quantisation), through bitsandbytes. Why so: docs/decisions/014."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from educe.errors import MachineError, ModelError
from educe.model.adapters import expert_matrices, linear_layers

BLOCK = 64


def why_not_four_bits() -> str:
    """What this machine lacks for weights in 4 bits; empty where it has it."""
    return "" if importlib.util.find_spec("bitsandbytes") else "bitsandbytes is not installed"


def four_bits(maker: Any, config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """What makes `maker.from_pretrained` quantise each weight as it is read, so that no more than a few are there in 16 bits: all
    linear layers that get adapters and whose inputs fill blocks. Embeddings, head, fused experts, norms and towers stay as they are.
    Raises `MachineError`."""
    if why := why_not_four_bits():
        raise MachineError(
            1, "tuning.base_bits: 4", f"{why}.", "pip install 'educe[lowbit]', or set tuning.base_bits: 16."
        )
    with torch.device("meta"):
        shape = maker(config)
    modules = dict(shape.named_modules())
    # A block that goes over the end of a row is unpacked wrongly on CPUs, or ends the process (bitsandbytes 0.50.2).
    small = {n for n in linear_layers(shape) if _inputs(modules[n]) % BLOCK == 0}
    if not small:
        found = f"has no linear layer whose inputs fill blocks of {BLOCK}: none can be in 4 bits."
        raise ModelError(204, config.model_type, found, "Set tuning.base_bits: 16.")
    others = [n for n, m in modules.items() if isinstance(m, (nn.Linear, transformers.Conv1D)) and n not in small]
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=others or ["none"],  # None would have transformers choose
    )
    return {"quantization_config": how}


def _inputs(layer: Any) -> int:
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.nx)


def dense(weight: Tensor, state: Any) -> Tensor:
    """The weight as plain numbers; `state` is what bitsandbytes knows of a packed one, None for another."""
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    plain: Tensor = dequantize_4bit(weight, state)
    return plain


def keep_gradients(network: nn.Module) -> None:
    """bitsandbytes would rearrange codes for answering, for good, on a CPU with AVX512-BF16; what then goes through them has no
    gradient (torch warns at most once)."""
    for module in network.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def is_four_bit(p: Tensor) -> bool:
    return getattr(p, "quant_state", None) is not None


def num_numbers(p: Tensor) -> int:
    """Of a weight, packed or not."""
    return int(p.quant_state.shape.numel()) if is_four_bit(p) else p.numel()


def num_packed(network: nn.Module) -> int:
    """Numbers that are in 4 bits."""
    return sum(num_numbers(p) for p in network.parameters() if is_four_bit(p))


def said_of(network: Any) -> str:
    """What of the network is in 4 bits and what is not; empty where nothing is."""
    packed = num_packed(network)
    if not packed:
        return ""
    every = sum(num_numbers(p) for p in network.parameters() if not p.requires_grad)
    experts = " and the experts, whose matrices are fused," if expert_matrices(network) else ""
    return f"{packed / every:.0%} of the frozen weights are in 4 bits (NF4); embeddings, head, norms{experts} are not"
