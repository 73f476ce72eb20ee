"""A trained model as a directory that transformers, vLLM and others load: what was trained is what is served."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from educe.chat.tokens import load_tokenizer
from educe.config import Full, Lora
from educe.model.device import Device
from educe.model.load import CausalLM, load_model

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model")


def merged(base: Path, weights: Path, tuning: Full | Lora, device: Device) -> CausalLM:
    """The tuned model, ready to answer, in the device's arithmetic: fp32 masters rounded once; adapters merged in fp32."""
    exact = Device(kind=device.kind, dtype="float32", name=device.name, flops=device.flops, why=device.why)
    merging = isinstance(tuning, Lora)
    model = load_model(base, exact if merging else device, tuning)
    put(load_file(weights, device=device.kind), model)
    network = model.network.merge_and_unload() if merging else model.network
    with torch.no_grad():
        for p in network.parameters():  # not `network.to(...)`: that would round the rotary frequencies too
            p.data = p.data.to(device.torch_dtype)
    network.set_attn_implementation("sdpa")
    network.eval()
    return CausalLM(network, device, adapted=False)


def put(masters: dict[str, Tensor], model: CausalLM) -> None:
    """Copy fp32 masters into the model's trainable parameters; the names must be the same, all of them."""
    parameters = model.trainable()
    if masters.keys() != parameters.keys():
        raise ValueError(f"weights do not fit: {sorted(masters.keys() ^ parameters.keys())[:3]}")
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(masters[name])


def write_model(model: CausalLM, base: Path, card: str, directory: Path) -> None:
    """Weights, tokenizer, template, config and generation config (with every stop token) into a directory being built."""
    model.network.save_pretrained(directory)
    for name in _TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, directory / name)
    tokenizer = load_tokenizer(base)
    (directory / "chat_template.jinja").write_text(tokenizer.template.source, encoding="utf-8")
    file = directory / "generation_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    stop = sorted(tokenizer.stop)
    settings["eos_token_id"] = stop[0] if len(stop) == 1 else stop
    settings.setdefault("pad_token_id", tokenizer.eos)
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (directory / "README.md").write_text(card, encoding="utf-8")
