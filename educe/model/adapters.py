"""Low-rank adapters on a loaded network, through peft: on every linear layer of the language model, fused experts included."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from educe.config import Lora
from educe.errors import ModelError
from educe.model.describe import NUM_EXPERTS
from educe.model.mixers import mixers_of

# Mamba's layers read these weights past the module (fused kernels on GPUs take `out_proj.weight`, Jamba multiplies with
# `dt_proj.weight`): an adapter there would be left out of the forward without a word.
_PAST_THE_MODULE = frozenset(("out_proj", "dt_proj"))


def with_adapters(network: Any, tuning: Lora, new_ids: list[int]) -> Any:
    """The network with adapters, all else frozen but the embeddings' (and head's) rows of `new_ids`. Raises `ModelError`.

    Towers for images and sound get none: they see no data here.
    """
    from peft import LoraConfig, get_peft_model

    from educe.model.adapted import AdaptedLinear  # imports peft
    from educe.model.new_rows import computes_rows

    embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
    tied = head.weight is embedding.weight
    names = {module: name for name, module in network.named_modules()}
    holders = [names[embedding], *([] if tied else [names[head]]), *layer_embeddings(network)]
    experts = expert_matrices(network)
    if experts and tuning.dropout:
        found = "has its experts' matrices fused, and adapters on those know no dropout."
        raise ModelError(204, network.config.model_type, found, "Set tuning.dropout: 0.")
    if experts and tuning.variant == "dora":
        found = "has its experts' matrices fused, and DoRA takes one matrix at a time (peft has none for those)."
        raise ModelError(204, network.config.model_type, found, "Set tuning.variant: lora or rslora.")
    config = LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha,
        lora_dropout=tuning.dropout,
        use_rslora=tuning.variant == "rslora",
        use_dora=tuning.variant == "dora",
        bias="none",
        target_modules=linear_layers(network),
        target_parameters=experts or None,
        task_type="CAUSAL_LM",
        trainable_token_indices=dict.fromkeys(holders, new_ids) if new_ids else None,
    )
    config._register_custom_module({nn.Linear: AdaptedLinear})
    dtype = embedding.weight.dtype
    with warnings.catch_warnings(), _names_as_they_are():
        warnings.simplefilter("ignore")  # peft's advice on tied embeddings, experts and GPT-2's layers, heeded here
        adapted = get_peft_model(network, config, autocast_adapter_dtype=False)
    # In the model's arithmetic, like every other weight: the optimizer keeps fp32 masters of all it trains.
    for p in adapted.parameters():
        if p.requires_grad:
            p.data = p.data.to(dtype)
    if new_ids:
        _check_rows(network, tied)
        computes_rows(adapted)
    return adapted


@contextlib.contextmanager
def _names_as_they_are() -> Iterator[None]:
    """peft takes a list of layers for one that was made for transformers 4, where experts were layers of their own: it would drop the
    layers of blocks without experts (DeepSeek's first, GLM's, Qwen's shared ones), which have the same names, and double the experts'
    rank instead."""
    try:
        from peft.utils import transformers_weight_conversion as older
    except ImportError:  # a peft that does not do that yet
        yield
        return
    convert = older.convert_peft_config_for_transformers
    older.convert_peft_config_for_transformers = lambda *_args, **_kwargs: None
    try:
        yield
    finally:
        older.convert_peft_config_for_transformers = convert


def dilute(network: Any, alpha: float) -> None:
    """Bring what adapters change to α times that: merged, the network is then θ0 + α (θ - θ0), exact but for rounding.

    A product of matrices is linear in its second one. DoRA is not linear in what it trains: its layers are merged here, and then
    lie between what they were and that. Raises `ValueError` for adapters that are neither.
    """
    from peft.tuners.lora.layer import LoraLayer
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, LoraLayer):
                if module.lora_variant and not len(module.lora_magnitude_vector):
                    raise ValueError(f"adapters of another kind: {module.lora_variant}")
                if module.lora_variant:
                    before = module.get_base_layer().weight.clone()
                    module.merge()
                    weight = module.get_base_layer().weight
                    weight.copy_(torch.lerp(before, weight, alpha))
                else:
                    for b in module.lora_B.values():
                        b.weight.mul_(alpha)
            elif isinstance(module, TrainableTokensLayer) and module.tied_adapter is None:
                for name, rows in module.trainable_tokens_delta.items():
                    rows.copy_(torch.lerp(module.trainable_tokens_original[name].to(rows), rows, alpha))


def linear_layers(network: Any) -> list[str]:
    """Full names of the language model's linear layers, head left out, as are those whose weight is read past the module."""
    decoder = network.get_decoder()
    mamba = tuple(name + "." for name, mixer in mixers_of(decoder).items() if hasattr(mixer, "D"))
    start = next(name for name, module in network.named_modules() if module is decoder)
    return [
        f"{start}.{name}" if start else name
        for name, module in decoder.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and not (mamba and name.startswith(mamba) and name.rpartition(".")[2] in _PAST_THE_MODULE)
    ]


def expert_matrices(network: Any) -> list[str]:
    """Full names of parameters that hold the matrices of all experts of a layer, shaped (experts, in, out) or (experts, out, in)."""
    config, within = network.config.get_text_config(), {id(p) for p in network.get_decoder().parameters()}
    counts = {getattr(config, name, None) for name in NUM_EXPERTS} - {None, 1}
    return [
        f"{name}.{own}"
        for name, module in network.named_modules()
        if not isinstance(module, nn.Conv1d)
        for own, p in module.named_parameters(recurse=False)
        if p.ndim == 3 and p.shape[0] in counts and id(p) in within
    ]


def layer_embeddings(network: Any) -> dict[str, nn.Embedding]:
    """Further embeddings of tokens, by full name: Gemma 4 has one that feeds every layer."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Embedding) and name.endswith("embed_tokens_per_layer")
    }


def _check_rows(network: Any, tied: bool) -> None:
    """The head must use the trained rows: those of the embedding where the two are tied (peft goes by the config), else its own."""
    head = network.get_output_embeddings()
    rows = getattr(head, "token_adapter", None)
    if rows is None or (rows.tied_adapter is not None) != tied:
        found = "ties its head to its embedding in a way that adapters cannot follow: new control tokens would stay untrained."
        fix = "Set tuning.kind: full, or a template whose control tokens the model has."
        raise ModelError(202, network.config.model_type, found, fix)
