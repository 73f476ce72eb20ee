"""Ten setups in which nothing is wrong, and no check may say otherwise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from zoo_stand import DATA, ROWS, TRAIN, Stand, talk

HELD = "dev: {kind: share, share: 0.2}"
Healthy = Callable[[Stand, Path | None], Path]


def model_with(stand: Stand, **more: Any) -> None:
    """The tiny model with another config, or for another tokenizer."""
    sizes: dict[str, Any] = {
        "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "eos_token_id": 2, "bos_token_id": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**sizes, **more})).save_pretrained(stand.model)


def tokenizer_of(stand: Stand, shared: Path | None, name: str) -> None:
    """A real tokenizer and template; skips where they are not beside the repository."""
    if shared is None:
        pytest.skip("needs ../shared/data, which is not here")
    place = shared / "tokenizers" / name
    shutil.rmtree(stand.model)
    shutil.copytree(place, stand.model)
    from tokenizers import Tokenizer

    stock = Tokenizer.from_file(str(place / "tokenizer.json"))
    settings = json.loads((place / "tokenizer_config.json").read_text(encoding="utf-8"))
    words = [settings.get(f"{kind}_token") for kind in ("bos", "eos")]
    bos, eos = (stock.token_to_id(w["content"] if isinstance(w, dict) else w) if w else None for w in words)
    model_with(stand, vocab_size=-(-stock.get_vocab_size() // 64) * 64, bos_token_id=bos, eos_token_id=eos)


def plain_sft(stand: Stand, shared: Path | None) -> Path:
    return stand.recipe()


def in_bf16(stand: Stand, shared: Path | None) -> Path:
    return stand.recipe(dtype="bfloat16")


def with_adapters(stand: Stand, shared: Path | None) -> Path:
    return stand.recipe("tuning: {kind: lora, rank: 4, dropout: 0.1}\n" + DATA + TRAIN)


def rows_alone(stand: Stand, shared: Path | None) -> Path:
    """RoPE that depends on the longest example of a pack: every row is trained alone."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    model_with(stand, rope_parameters=rope)
    return stand.recipe()


def tasks_mixed(stand: Stand, shared: Path | None) -> Path:
    rows = [talk(f"track order {i} for the user", f"item {i * 3}") for i in range(24)]
    (stand.place / "more.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    tasks = "a: {files: rows.jsonl, rate: 1}, b: {files: more.jsonl, rate: 2, loss_weight: 0.5}"
    return stand.recipe(f"data: {{tasks: {{{tasks}}}, rates: {{kind: explicit}}, max_tokens: 128, {HELD}}}\n" + TRAIN)


def several_turns(stand: Stand, shared: Path | None) -> Path:
    rows = [talk(f"the cat {i}", f"mat {i}", "and the user said", f"order {i * 7}") for i in range(30)]
    return stand.recipe(f"data: {{train: rows.jsonl, max_tokens: 128, system: Be brief., {HELD}}}\n" + TRAIN, rows)


def base_model(stand: Stand, shared: Path | None) -> Path:
    (stand.model / "chat_template.jinja").unlink()
    return stand.recipe("template: {kind: plain}\n" + DATA + TRAIN)


def raw_text_replayed(stand: Stand, shared: Path | None) -> Path:
    texts = [json.dumps({"text": f"the cat sat on the mat and said hello to user {i} " * 3}) for i in range(20)]
    (stand.place / "texts.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
    more = "replay: {files: texts.jsonl, share: 0.2}"
    return stand.recipe(f"data: {{train: rows.jsonl, max_tokens: 128, {more}, {HELD}}}\n" + TRAIN)


def with_reasoning(stand: Stand, shared: Path | None) -> Path:
    """A template that keeps reasoning of the last turn only."""
    tokenizer_of(stand, shared, "qwen3")
    rows = [
        json.dumps({"messages": [
            {"role": "user", "content": f"How many cats are {i} and {i + 1}?"},
            {"role": "assistant", "reasoning": f"I add {i} and {i + 1}.", "content": str(2 * i + 1)},
        ]})
        for i in range(30)
    ]  # fmt: skip
    return stand.recipe(rows=rows)


def pieces_of_words(stand: Stand, shared: Path | None) -> Path:
    """A tokenizer of pieces that falls back to bytes, whose template begins with its first token; adapters in bf16."""
    tokenizer_of(stand, shared, "gemma2")
    return stand.recipe("tuning: {kind: lora, rank: 4}\n" + DATA + TRAIN, ROWS, dtype="bfloat16")


HEALTHY: dict[str, Healthy] = {
    "full tuning, packed, float32, ChatML": plain_sft,
    "full tuning in bfloat16": in_bf16,
    "LoRA with dropout": with_adapters,
    "a model whose rows are trained alone": rows_alone,
    "a mixture of two tasks with rates and loss weights": tasks_mixed,
    "several turns, with a system prompt": several_turns,
    "a base model with the template `plain`": base_model,
    "raw text replayed": raw_text_replayed,
    "a template with reasoning (Qwen3)": with_reasoning,
    "a tokenizer of pieces and bytes, LoRA in bfloat16 (Gemma 2)": pieces_of_words,
}
