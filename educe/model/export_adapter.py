"""The adapters of a LoRA run as a directory that peft and vLLM load beside the untouched base model."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from educe.chat.tokens import ChatTokenizer
from educe.config import Lora
from educe.errors import ModelError
from educe.model.adapters import dilute
from educe.model.device import Device
from educe.model.export import adapted, write_stops
from educe.model.load import CausalLM, load_model, quiet
from educe.types import Batch

# Ranks up to which vLLM makes room: `--max-lora-rank` takes these values, 16 when it is not given.
_VLLM_RANKS = (16, 32, 64, 128, 256, 320, 512)


def write_adapter(
    base: Path,
    weights: Path,
    tuning: Lora,
    device: Device,
    directory: Path,
    *,
    name: str,
    tokenizer: ChatTokenizer,
    alpha: float = 1.0,
) -> CausalLM:
    """Write `adapter_model.safetensors` (fp32, as trained), `adapter_config.json` and a generation config with every stop token,
    which servers do not find with the base model; returns the adapted model in fp32.

    `name` is what the config calls the base model; with `alpha` the change is that share of what was trained (LoRA and rsLoRA).
    Raises `ModelError` for adapters that peft would put elsewhere.
    """
    model = adapted(base, weights, tuning, device, new_ids=tokenizer.new_tokens.values())
    if tokenizer.new_tokens and getattr(model.base.get_output_embeddings(), "bias", None) is not None:
        found = "has a head with a bias, which peft leaves out where rows of new tokens are trained."
        raise ModelError(206, model.base.config.model_type, found, "Use --as merged.")
    if alpha != 1:
        dilute(model.network, alpha)
    config = model.network.peft_config["default"]
    _refuse_renamed(model.network, config)
    config.base_model_name_or_path = name
    config.target_modules = _short(model.network, set(config.target_modules))
    config.inference_mode = True
    with quiet():
        model.network.save_pretrained(directory, save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)  # peft's own, an empty form
    model.base.generation_config.save_pretrained(directory)
    write_stops(directory, tokenizer)
    return model


def _refuse_renamed(network: Any, config: Any) -> None:
    """peft takes such a list of layers for an older one, and so loads no adapters of blocks without experts beside ones with experts.
    Raises `ModelError`."""
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # a peft that does not do that yet
        return
    read = copy.deepcopy(config)
    convert_peft_config_for_transformers(read, model=network.get_base_model(), conversions=None)
    if lost := sorted(set(config.target_modules) - set(read.target_modules)):
        found = (
            f"has adapters on {lost[0]} and {len(lost) - 1} more that peft, when it loads them, takes for its experts'."
        )
        raise ModelError(206, network.config.model_type, found, "Use --as merged.")


def _short(network: Any, targets: set[str]) -> list[str]:
    """The adapted layers by their last names where those name no other layer, as other tools expect them; else as they are."""
    last = {t.rpartition(".")[2] for t in targets}
    named = [
        n.removeprefix("base_model.model.")
        for n, m in network.named_modules()
        if hasattr(m, "weight") or hasattr(m, "base_layer")
    ]
    others = {n for n in named if n.rpartition(".")[2] in last and ".base_layer" not in n and not _is_inside(n)}
    return sorted(last if others == targets else targets)


def _is_inside(name: str) -> bool:
    """Whether a module is part of an adapter."""
    return any(part.startswith("lora_") for part in name.split("."))


def check_adapter(
    directory: Path, base: Path, model: CausalLM, merged: CausalLM, batch: Batch, *, new_ids: Collection[int] = ()
) -> float:
    """peft must load `directory` onto the base model and give to the bit the logits that it computes of `model`.

    Returns how far those are from the logits of `merged`, which are rounded to its dtype. Raises `ModelError`.
    """
    from peft import PeftModel  # takes seconds to import, and not every export needs it

    from educe.model.adapted import computed_by_peft

    untouched = load_model(base, model.device, new_ids=new_ids)
    with quiet():
        again = PeftModel.from_pretrained(untouched.network, directory, local_files_only=True).eval()
    ids = model.tensor(batch.ids_P)[None]
    with model.answering(), computed_by_peft(model.network):
        one, two, three = (
            n(input_ids=ids, use_cache=False).logits.float() for n in (model.network, again, merged.network)
        )
    if not torch.equal(one, two):
        apart = float((one - two).abs().max())
        raise ModelError(2, str(directory), f"read back by peft, its logits differ by {apart:.3g}.", "Report this.")
    return float((one - three).abs().max())


def vllm_rank(tuning: Lora) -> int | None:
    """What vLLM must be told as `--max-lora-rank`: 0 for nothing, None where it has no such room."""
    room = next((r for r in _VLLM_RANKS if tuning.rank <= r), None)
    return 0 if room == _VLLM_RANKS[0] else room


def adapter_limits(directory: Path, tuning: Lora, new_tokens: Collection[str]) -> list[str]:
    """What a server of adapters must be told, or cannot do with this one; each a sentence."""
    config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    said = []
    if vllm_rank(tuning) is None:
        said.append(f"vLLM has no room for rank {tuning.rank} (at most {_VLLM_RANKS[-1]}): serve the merged model.")
    if config.get("use_dora"):
        said.append("vLLM does not compute DoRA: serve the merged model.")
    if config.get("target_parameters"):
        said.append("It adapts the matrices of experts, which vLLM loads of some models alone: serve the merged model.")
    if new_tokens:
        said.append(
            f"It holds rows for new tokens ({', '.join(sorted(new_tokens))}), which vLLM does not load, and for which the base "
            "model's embeddings may have to be made longer (resize_token_embeddings): serve the merged model."
        )
    return said
