"""The memory plan: what a layer keeps is what its saved tensors weigh; what is planned fits, and little is done twice."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
from educe.config import Recipe  # noqa: E402
from educe.model import attention  # noqa: E402
from educe.model import device as device_module  # noqa: E402
from educe.model.describe import ModelFacts  # noqa: E402
from educe.model.device import Device  # noqa: E402
from educe.model.load import CausalLM  # noqa: E402
from educe.pack.batch import build_batch  # noqa: E402
from educe.pack.plan import PackPlan, plan_packs  # noqa: E402
from educe.recipes.machine import chosen_device, memory_of, process_bytes  # noqa: E402
from educe.recipes.memory import MemoryPlan, kept_attention, layer_bytes, memory_plan_of, plan_memory  # noqa: E402
from educe.types import Example  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM  # noqa: E402

import forked  # noqa: E402
from conftest import write_tokenizer  # noqa: E402

LENGTHS = [64, 100, 28]


def device(kind: str = "cuda", dtype: str = "bfloat16") -> Device:
    return Device(kind=kind, dtype=dtype, name="", flops=1e12, why="")


def facts(
    layers: int = 32, width: int = 4096, inner: int = 12288, heads: int = 32, groups: int = 8, **more: Any
) -> ModelFacts:
    body = layers * (width * 128 * (2 * heads + 2 * groups) + 3 * width * inner)
    given: dict[str, Any] = {
        "name": "m", "directory": Path("m"), "model_type": "llama", "architecture": "M", "num_parameters": body + 2 * 128_000 * width,
        "num_embedding_parameters": 128_000 * width, "hidden_size": width, "intermediate_size": inner, "active_intermediate": inner,
        "num_layers": layers, "num_heads": heads, "num_key_value_heads": groups, "head_dim": 128, "normalises_queries": False,
        "num_expert_layers": 0, "num_experts": 0, "expert_intermediate": 0,
        "vocab_size": 128_000, "max_positions": 8192, "licence": "unknown", "files": (), "unread": (),
    }  # fmt: skip
    return ModelFacts(**{**given, **more})


def recipe(tuning: str = "full", **train: Any) -> Recipe:
    return Recipe.model_validate(
        {"name": "a", "model": "m", "data": {"train": "t.jsonl"}, "tuning": {"kind": tuning}, "train": train}
    )


def pack_plan(capacity: int = 8192) -> PackPlan:
    lengths = np.full(64, capacity // 8)
    return plan_packs(lengths, np.arange(64), batch_tokens=capacity, capacity_tokens=capacity, seed=0)


def planned(gigabytes: float, tuning: str = "full", **train: Any) -> MemoryPlan:
    return plan_memory(
        facts(), recipe(tuning, **train), pack_plan(), device(), reach=0.0, trained_share=0.6, memory_bytes=gigabytes * 1e9,
        compiled=False,
    )  # fmt: skip


def kept_by_a_layer(family: str, dtype: Any) -> float:
    """Bytes a token that one more layer keeps for the backward pass, counted where autograd saves them."""
    config, network_class = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}[family]

    def count(layers: int) -> float:
        network = network_class(
            config(
                vocab_size=128, hidden_size=96, intermediate_size=160, num_hidden_layers=layers, num_attention_heads=4,
                num_key_value_heads=2, head_dim=32, attn_implementation=attention.NAME,
            )
        ).to(dtype)  # fmt: skip
        model = CausalLM(network, device("cpu", str(dtype).removeprefix("torch.")), adapted=False)
        weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
        seen: dict[int, tuple[int, Any]] = {}

        def note(t: Any) -> Any:
            storage = t.untyped_storage()
            if storage.data_ptr() not in weights:
                seen[storage.data_ptr()] = (storage.nbytes(), t)  # held, so that no address comes twice
            return t

        rows = [Example(ids_T=np.ones(n, np.int32), weights_T=(np.arange(n) > 0).astype(np.float32)) for n in LENGTHS]
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            model.hidden_states(build_batch(rows))
        return sum(size for size, _ in seen.values()) / sum(LENGTHS)

    attention.register()
    return count(3) - count(2)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype,number", [(torch.bfloat16, 2), (torch.float32, 4)])
def test_what_a_layer_keeps_is_what_autograd_saves(family: str, dtype: Any, number: int) -> None:
    reach, spread = kept_attention(np.array(LENGTHS), on_gpu=False)
    small = facts(width=96, inner=160, heads=4, groups=2, head_dim=32, normalises_queries=family == "qwen3")
    expected = layer_bytes(small, number, reach=reach, spread=spread, compiled=False)
    assert expected == pytest.approx(kept_by_a_layer(family, dtype), rel=0.03)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.floats(20, 400), st.sampled_from(["full", "lora"]), st.sampled_from(["adamw", "adamw_8bit", "adamw_8bit_bf16"])
)
def test_as_few_layers_as_will_do_are_computed_again(gigabytes: float, tuning: str, optimizer: str) -> None:
    found = planned(gigabytes, tuning, optimizer=optimizer)
    room = 0.92 * gigabytes * 1e9
    assert found.fits == (found.total <= room)
    if not found.fits:
        assert found.recomputed_layers == 32
        return
    kept = planned(gigabytes, tuning, optimizer=optimizer, activations="keep")
    assert (found.recomputed_layers == 0) == kept.fits
    more = planned(gigabytes + 30, tuning, optimizer=optimizer)
    assert more.recomputed_layers <= found.recomputed_layers


def test_each_part_is_what_it_says() -> None:
    n = facts().num_parameters
    full, low, lora = planned(200), planned(200, optimizer="adamw_8bit_bf16"), planned(200, "lora")
    assert (full.weights, full.gradients, full.optimizer) == (2 * n, 4 * n, 12 * n)
    assert (low.weights, low.gradients) == (2 * n, 2 * n)
    assert low.optimizer < 2.2 * n
    assert lora.gradients + lora.optimizer < 0.03 * full.total
    assert memory_plan_of(full.as_json()) == full
    assert "12% above the plan" in full.compared(1.12 * full.total)
    assert "3% below the plan" in replace(full, process=0.0).compared(0.97 * full.total)


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not let a peak be forgotten"
)
def test_a_peak_is_forgotten() -> None:
    held = np.ones(60_000_000)  # 480 MB
    before = device_module.peak_memory_bytes("cpu")
    del held
    device_module.forget_peak_memory()
    assert device_module.peak_memory_bytes("cpu") < before - 300_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere psutil does not tell pages of files apart")
def test_mapped_weights_are_not_there_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of a file are this process's and free as the system counts (held still here, since others use it too); its own memory
    is not free any more."""
    monkeypatch.setattr(device_module, "free_host_memory", lambda: 10**10)
    (tmp_path / "weights").write_bytes(bytes(200_000_000))
    there, held = memory_of(chosen_device("cpu", "float32")), process_bytes()
    mapped = np.memmap(tmp_path / "weights", np.uint8, "r")
    assert int(mapped[::4096].sum()) == 0
    assert process_bytes() - held > 150_000_000
    assert memory_of(chosen_device("cpu", "float32")) - there < 50_000_000
    own = np.ones(200_000_000, np.uint8)
    assert memory_of(chosen_device("cpu", "float32")) - there > 150_000_000 * int(own[0])
    assert memory_of(chosen_device("cpu", "float32"), ranks=4) - there < -7_000_000_000


RECIPE = """
name: peak
model: model
device: cpu
dtype: float32
data: {train: rows.jsonl, max_tokens: 512}
train: {epochs: 1, batch_tokens: TOKENS, micro_batch_tokens: TOKENS, learning_rate: 1e-4, compile: off, activations: ACTIVATIONS}
evaluation: {max_new_tokens: 8, few_shot: 0, metric: {kind: exact}}
"""


@pytest.mark.parametrize(
    "activations,tokens,width",
    [
        pytest.param("keep", 2048, 768, marks=pytest.mark.slow),
        pytest.param("recompute", 1024, 768, marks=pytest.mark.slow),
        ("recompute", 1024, 512),
    ],
)
def test_the_peak_of_the_first_full_step_is_near_the_plan(
    tmp_path: Path, activations: str, tokens: int, width: int
) -> None:
    """A whole run in a process of its own: 44 million weights in fp32, or 20 million; documents of 20 to 220 tokens."""
    write_tokenizer(tmp_path / "model")
    config = LlamaConfig(
        vocab_size=512, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=6, num_attention_heads=width // 64,
        num_key_value_heads=4, max_position_embeddings=1024, eos_token_id=2, bos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    with (tmp_path / "rows.jsonl").open("w") as file:
        for i in range(tokens * 3 // 110):
            row = {"prompt": f"order {i} " * (3 + i % 40), "completion": f"item {i * 7} " * (3 + i % 11)}
            print(json.dumps(row), file=file)
    (tmp_path / "r.yaml").write_text(RECIPE.replace("ACTIVATIONS", activations).replace("TOKENS", str(tokens)))
    env = {**os.environ, "EDUCE_CACHE": str(tmp_path / "cache")}
    process = forked.begin(forked.EDUCE, [["train", "r.yaml"]], cwd=tmp_path, env=env)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    run = tmp_path / "runs" / "peak"
    plan = memory_plan_of(json.loads((run / "provenance.json").read_text())["memory"])
    steps = [x for x in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if x["kind"] == "step"]
    assert plan.recomputed_layers == (6 if activations == "recompute" else 0)
    full = next(x for x in steps if x["tokens"] > 0.92 * tokens)
    assert full["peak_memory_bytes"] == pytest.approx(plan.total, rel=0.15), plan.said()
    off = abs(full["peak_memory_bytes"] / plan.total - 1)
    assert f"GB at the peak of the first full step, {off:.0%}" in out
