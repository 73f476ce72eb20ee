"""Tiny random models of the real classes: one per family that is tested, and what is expected of it."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as T  # the matrix reads better

WINDOW = 6  # tokens: shorter than the documents of the tests
VOCABULARY = 128
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SLIDING: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
DELTA: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_conv_kernel_dim": 4,
}  # fmt: skip
MAMBA2: dict[str, Any] = {
    "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_chunk_size": 16, "mamba_d_head": 8,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
PER_LAYER: dict[str, Any] = {  # Gemma 4: embeddings per layer, layers that share keys, other sizes in global layers
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "num_hidden_layers": 4,
    "num_kv_shared_layers": 2, "global_head_dim": 16, "num_global_key_value_heads": 1, "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
EYE: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32}
GEMMA_EYE: dict[str, Any] = {
    **EYE,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
GEMMA4_EYE: dict[str, Any] = {**EYE, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8, "patch_size": 4}
QWEN_EYE: dict[str, Any] = {
    **EYE, "depth": 1, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4, "num_position_embeddings": 16,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Family:
    """`packed`: whether rows may hold several documents. `still`: patterns of parameters that a step of full tuning leaves, with
    `why`. `unadapted`: last names of the language model's linear layers without adapters."""

    name: str
    build: Callable[[], Any]
    packed: bool = True
    tower: str | None = None
    still: tuple[str, ...] = ()
    unadapted: frozenset[str] = frozenset()
    note: str = ""

    def stays(self, parameter: str) -> bool:
        return any(fnmatch.fnmatch(parameter, pattern) for pattern in self.still)


def sizes(*more: dict[str, Any], **own: Any) -> dict[str, Any]:
    made = dict(SIZES)
    for part in (*more, own):
        made |= part
    return made


def image_ids(*names: str) -> dict[str, int]:
    return {name: 120 + k for k, name in enumerate(names)}


def gemma3() -> Any:
    text = sizes(SLIDING, query_pre_attn_scalar=16)
    ids = image_ids("image_token_index", "boi_token_index", "eoi_token_index")
    config = T.Gemma3Config(text_config=text, vision_config=GEMMA_EYE, mm_tokens_per_image=4, **ids)
    return T.Gemma3ForConditionalGeneration(config)


def gemma4() -> Any:
    ids = image_ids("image_token_id", "boi_token_id", "eoi_token_id", "audio_token_id", "video_token_id")
    config = T.Gemma4Config(text_config=sizes(PER_LAYER), vision_config=GEMMA4_EYE, audio_config=None, **ids)
    return T.Gemma4ForConditionalGeneration(config)


def qwen3_5() -> Any:
    ids = image_ids("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return T.Qwen3_5ForConditionalGeneration(T.Qwen3_5Config(text_config=sizes(DELTA), vision_config=QWEN_EYE, **ids))


FUSED = frozenset({"out_proj"})
FAMILIES: dict[str, Family] = {
    f.name: f
    for f in (
        Family(name="Llama", build=lambda: T.LlamaForCausalLM(T.LlamaConfig(**sizes()))),
        Family(name="Mistral", build=lambda: T.MistralForCausalLM(T.MistralConfig(**sizes(sliding_window=WINDOW)))),
        Family(
            name="Qwen3",
            build=lambda: T.Qwen3ForCausalLM(T.Qwen3Config(**sizes(SLIDING, use_sliding_window=True))),
        ),
        Family(
            name="Qwen3-MoE",
            build=lambda: T.Qwen3MoeForCausalLM(T.Qwen3MoeConfig(**sizes(EXPERTS, moe_intermediate_size=16))),
            note="experts fused",
        ),
        Family(
            name="Qwen3.5 (text)",
            build=lambda: T.Qwen3_5ForCausalLM(T.Qwen3_5TextConfig(**sizes(DELTA))),
            note="gated delta layers run document by document",
        ),
        Family(
            name="Qwen3.5 (multimodal)", build=qwen3_5, tower="model.visual.", note="tuned on text; the tower is kept"
        ),
        Family(name="Gemma 2", build=lambda: T.Gemma2ForCausalLM(T.Gemma2Config(**sizes(SLIDING)))),
        Family(
            name="Gemma 3 (text)",
            build=lambda: T.Gemma3ForCausalLM(T.Gemma3TextConfig(**sizes(SLIDING, query_pre_attn_scalar=16))),
        ),
        Family(
            name="Gemma 3 (multimodal)", build=gemma3, tower="vision", note="tuned on text; the tower is kept"
        ),
        Family(name="Gemma 4 (text)", build=lambda: T.Gemma4ForCausalLM(T.Gemma4TextConfig(**sizes(PER_LAYER)))),
        Family(
            name="Gemma 4 (multimodal)", build=gemma4, tower="vision", note="tuned on text; the tower is kept"
        ),
        Family(
            name="gpt-oss",
            build=lambda: T.GptOssForCausalLM(
                T.GptOssConfig(**sizes(SLIDING, num_local_experts=4, num_experts_per_tok=2))
            ),
            note="experts fused",
        ),
        Family(name="Phi", build=lambda: T.PhiForCausalLM(T.PhiConfig(**sizes()))),
        Family(name="Phi-3", build=lambda: T.Phi3ForCausalLM(T.Phi3Config(**sizes(sliding_window=WINDOW)))),
        Family(name="GLM-4", build=lambda: T.Glm4ForCausalLM(T.Glm4Config(**sizes()))),
        Family(
            name="Falcon-H1",
            build=lambda: T.FalconH1ForCausalLM(
                T.FalconH1Config(**sizes(MAMBA2, mamba_d_ssm=32, mamba_n_heads=4, lm_head_multiplier=0.5))
            ),
            unadapted=FUSED,
            note="state-space layers run document by document; none of their outputs is adapted",
        ),
        Family(
            name="Bamba",
            build=lambda: T.BambaForCausalLM(T.BambaConfig(**sizes(MAMBA2, mamba_n_heads=8, attn_layer_indices=[1]))),
            unadapted=FUSED,
            note="state-space layers run document by document; none of their outputs is adapted",
        ),
        Family(
            name="Jamba",
            build=lambda: T.JambaForCausalLM(
                T.JambaConfig(
                    **sizes(EXPERTS, expert_layer_period=2, expert_layer_offset=1, attn_layer_period=2),
                    attn_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4,
                )
            ),
            packed=False,
            unadapted=frozenset({"out_proj", "dt_proj"}),
            note="experts fused; one row at a time, as Falcon Mamba",
        ),
        Family(
            name="Nemotron-H",
            build=lambda: T.NemotronHForCausalLM(
                T.NemotronHConfig(
                    **sizes(layers_block_type=["mamba", "attention", "mlp"], num_hidden_layers=3),
                    mamba_num_heads=8, mamba_head_dim=8, n_groups=1, ssm_state_size=8, conv_kernel=4, chunk_size=16,
                )
            ),
            unadapted=FUSED,
            note="state-space layers run document by document; none of their outputs is adapted",
        ),
        Family(
            name="Falcon Mamba",
            build=lambda: T.FalconMambaForCausalLM(
                T.FalconMambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8)
            ),
            packed=False,
            unadapted=frozenset({"out_proj", "dt_proj"}),
            note="its state-space layers are not told where documents end: one row at a time",
        ),
    )
}  # fmt: skip


def make(family: Family) -> Any:
    """The model with no parameter at a round number: norms, biases and sinks count too."""
    torch.manual_seed(0)
    model = family.build()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def table() -> str:
    """The README's table: families of the same standing in one row."""
    lines = ["| tested | full | LoRA | packed | |", "|---|---|---|---|---|"]
    groups: dict[tuple[bool, str], list[str]] = {}
    for f in FAMILIES.values():
        groups.setdefault((f.packed, f.note), []).append(f.name)
    for (packed, note), names in groups.items():
        lines.append(f"| {', '.join(names)} | yes | yes | {'yes' if packed else 'no'} | {note} |")
    return "\n".join(lines) + "\n"
