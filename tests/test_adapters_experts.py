"""Adapters on fused experts: counted, trained beside a base in 4 bits, refused where peft has none."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
import educe  # noqa: E402
from educe.errors import ModelError  # noqa: E402
from educe.model import four_bit  # noqa: E402
from educe.model.describe import describe_model  # noqa: E402
from educe.model.load import load_model  # noqa: E402
from educe.recipes.memory import num_adapter_parameters, num_packed, num_trained  # noqa: E402
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM  # noqa: E402

from conftest import write_tokenizer  # noqa: E402
from families import FAMILIES, make  # noqa: E402
from small_runs import recipe as recipe_file  # noqa: E402
from small_runs import small_place  # noqa: E402
from test_adapters import moved, tuning  # noqa: E402
from test_engine import cpu, examples, gradients, groups  # noqa: E402


@pytest.fixture(scope="module")
def experts_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, the second without experts."""
    place = tmp_path_factory.mktemp("experts")
    write_tokenizer(place)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=3, num_experts=4,
        num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32, mlp_only_layers=[1],
        max_position_embeddings=512, eos_token_id=2, bos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(place)
    return place


def test_dora_on_fused_experts_is_refused(experts_model: Path) -> None:
    with pytest.raises(ModelError, match=r"E-MODEL-204.*DoRA takes one matrix at a time.*tuning\.variant"):
        load_model(experts_model, cpu(), tuning("dora"))


@pytest.mark.parametrize("name", ["Qwen3", "Qwen3-MoE", "gpt-oss"])
def test_planned_numbers_count_every_expert(name: str, tmp_path: Path) -> None:
    """Four experts are four times the adapters: a plan without them would take too large a rank, and too little memory."""
    make(FAMILIES[name]).save_pretrained(tmp_path)
    about, model = describe_model(tmp_path, name), load_model(tmp_path, cpu(), tuning("lora"))
    assert num_adapter_parameters(about, 4) == sum(p.numel() for p in model.trainable().values())


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_layers_with_and_without_experts_are_planned_apart(experts_model: Path, kind: str) -> None:
    about, model = describe_model(experts_model, "m"), load_model(experts_model, cpu(), tuning(kind))
    assert (about.num_expert_layers, about.num_experts, about.expert_intermediate) == (2, 4, 32)
    assert num_trained(about, tuning(kind)) == sum(p.numel() for p in model.trainable().values())
    assert num_packed(about, tuning(kind)) == four_bit.num_packed(model.network)


def test_beside_a_base_in_4_bits_experts_stay_in_16_and_are_trained(experts_model: Path) -> None:
    model = moved(load_model(experts_model, cpu(), tuning("qlora")))
    assert "experts, whose matrices are fused, are not" in four_bit.said_of(model.network)
    rows = [dataclasses.replace(e, ids_T=e.ids_T % model.vocabulary) for e in examples()]
    _, found = gradients(model, groups(rows, 4))
    assert found.keys() == model.trainable().keys()
    assert all(bool(g.any()) for n, g in found.items() if "experts" in n)


@pytest.mark.slow
def test_a_run_on_4_bits_with_experts_is_exported(tmp_path_factory: Any, experts_model: Path) -> None:
    pytest.importorskip("bitsandbytes")
    with small_place(tmp_path_factory, experts_model) as place:
        file = recipe_file(place, "experts", epochs=2)
        file.write_text(file.read_text() + "tuning: {kind: lora, rank: 4, base_bits: 4}\n")
        said: list[str] = []
        run = educe.train(file, say=said.append)
        findings = json.loads((run.path / "preflight.json").read_text())["before"]
        assert "fail" not in {f["verdict"] for f in findings}
        assert any("and the experts, whose matrices are fused, are not" in s for s in said)
        assert run.export(place / "out", say=said.append).is_dir()
        with pytest.raises(ModelError, match=r"E-MODEL-206.*mlp.down_proj and 2 more that peft.*for its experts'"):
            run.export(place / "adapter", form="adapter")
        assert not (place / "adapter").exists()
