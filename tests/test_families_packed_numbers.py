"""Checkpoints whose weights are packed 4-bit numbers: unpacked exactly and exported plain, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from educe.config import Full, Lora  # noqa: E402
from educe.errors import ModelError  # noqa: E402
from educe.model.export import merged  # noqa: E402
from educe.model.load import load_model, quiet  # noqa: E402
from educe.model.proof import packs_are_blind, prove_head  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import GptOssConfig, GptOssForCausalLM  # noqa: E402

from families import SLIDING, sizes  # noqa: E402
from test_engine import FULL, LORA, Tensors, _one_thread, cpu  # noqa: E402, F401
from test_families import logits  # noqa: E402

VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # of the eight positive codes; OCP Microscaling Formats v1.0, E2M1


def written(place: Path, method: str) -> Tensors:
    """A gpt-oss whose experts are random 4-bit codes with a scale for each 32; returns their true values by name."""
    torch.manual_seed(0)
    with quiet():
        made = GptOssForCausalLM(
            GptOssConfig(**sizes(SLIDING, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2))
        )
        made.save_pretrained(place)
    stored, true = load_file(place / "model.safetensors"), {}
    for name in [n for n in stored if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, inside, outside = stored.pop(name).shape
        codes = torch.randint(0, 16, (experts, outside, inside // 32, 32))
        scales = torch.randint(118, 126, (experts, outside, inside // 32))
        sign = torch.where(codes >= 8, -1.0, 1.0)
        numbers = sign * VALUES[codes % 8] * 2.0 ** (scales[..., None] - 127)
        true[name] = numbers.flatten(2).transpose(1, 2)
        stored[name + "_blocks"] = (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)
        stored[name + "_scales"] = scales.to(torch.uint8)
    save_file(stored, place / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    return true


@pytest.mark.parametrize("tuning", [FULL, LORA], ids=["full", "lora"])
def test_four_bit_experts_are_unpacked_trained_and_exported_plain(tuning: Full | Lora, tmp_path: Path) -> None:
    true = written(tmp_path / "base", "mxfp4")
    plain = dict(load_model(tmp_path / "base", cpu()).network.named_parameters())
    assert true
    assert all(torch.equal(plain[name], numbers) for name, numbers in true.items())

    model = load_model(tmp_path / "base", cpu("bfloat16"), tuning)
    prove_head(model)
    assert packs_are_blind(model)
    save_file({n: p.detach().float().contiguous() for n, p in model.trainable().items()}, tmp_path / "w.safetensors")
    served = merged(tmp_path / "base", tmp_path / "w.safetensors", tuning, cpu("bfloat16"))
    with quiet():
        served.network.save_pretrained(tmp_path / "tuned")
    assert "quantization_config" not in json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert true.keys() <= load_file(tmp_path / "tuned" / "model.safetensors").keys()
    again = load_model(tmp_path / "tuned", cpu("bfloat16"))
    assert torch.equal(logits(again.network, again.base), logits(served.network, served.base))


def test_other_packings_are_refused(tmp_path: Path) -> None:
    written(tmp_path / "base", "awq")
    with pytest.raises(ModelError, match=r"E-MODEL-204.*awq"):
        load_model(tmp_path / "base", cpu(), FULL)
