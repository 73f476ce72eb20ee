"""The adapters of a LoRA run as a directory that peft and vLLM load beside the untouched base model."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from educe.config import Lora
from educe.errors import ModelError
from educe.model.device import Device
from educe.model.export import adapted
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
    new_ids: Collection[int] = (),
) -> CausalLM:
    """Write `adapter_model.safetensors` (fp32, as trained) and `adapter_config.json`; returns the adapted model in fp32.

    `name` is what the config calls the base model.
    """
    model = adapted(base, weights, tuning, device, new_ids=new_ids)
    config = model.network.peft_config["default"]
    config.base_model_name_or_path = name
    config.target_modules = _short(model.network, set(config.target_modules))
    config.inference_mode = True
    with quiet():
        model.network.save_pretrained(directory, save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)  # peft's own, an empty form
    return model


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


def adapter_limits(directory: Path, tuning: Lora, new_tokens: Collection[str]) -> list[str]:
    """What a server of adapters must be told, or cannot do with this one; each a sentence."""
    config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    room = next((r for r in _VLLM_RANKS if tuning.rank <= r), None)
    said = []
    if room is None:
        said.append(f"vLLM has no room for rank {tuning.rank} (at most {_VLLM_RANKS[-1]}): serve the merged model.")
    elif room > _VLLM_RANKS[0]:
        said.append(f"vLLM needs --max-lora-rank {room}.")
    if config.get("use_dora"):
        said.append("vLLM does not compute DoRA: serve the merged model.")
    if config.get("target_parameters"):
        said.append("It adapts the matrices of experts, which vLLM does not load: serve the merged model.")
    if new_tokens:
        said.append(
            f"It holds rows for new tokens ({', '.join(sorted(new_tokens))}), which vLLM does not load, and for which the base "
            "model's embeddings may have to be made longer (resize_token_embeddings): serve the merged model."
        )
    return said
