"""Adapters merged into the model that is served: one matrix at a time, to the bit as into a whole one in fp32; and how far it is from
what was trained."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from educe.config import Full  # noqa: E402
from educe.evaluate import drift  # noqa: E402
from educe.model import export as export_model  # noqa: E402
from educe.model.export import adapted, merged  # noqa: E402
from educe.model.load import load_model  # noqa: E402
from educe.recipes.served import said_of_served  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM  # noqa: E402

import test_blend  # noqa: E402
from test_adapters import cpu  # noqa: E402
from test_blend import KINDS, NEW, examples, numbers, tuning  # noqa: E402

checkpoints = test_blend.checkpoints  # a fixture


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("dtype, stored", [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")])
def test_adapters_are_merged_as_into_a_whole_model_in_fp32(
    tiny_model: Path, checkpoints: dict[str, list[Path]], tmp_path: Path, kind: str, dtype: Any, stored: str
) -> None:
    """To the bit, layer by layer too, which is done where the model here holds all that was published."""
    shutil.copytree(tiny_model, base := tmp_path / "base")
    published = {n: t.to(getattr(torch, stored)) for n, t in load_file(base / "model.safetensors").items()}
    save_file(published, base / "model.safetensors", {"format": "pt"})
    same_as_whole(base, checkpoints[kind][0], tuning(kind), dtype, NEW)


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_adapters_on_fused_experts_are_merged_as_into_a_whole_model(tmp_path: Path, kind: str) -> None:
    config = Qwen3MoeConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2, num_experts=4,
        num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(base := tmp_path / "base")
    start = load_model(base, cpu(), tuning(kind), new_ids=(126, 127)).trainable()
    assert any("experts" in n for n in start)
    save_file({n: (p.detach() + 0.05 * torch.randn(p.shape)).contiguous() for n, p in start.items()}, tmp_path / "w")
    same_as_whole(base, tmp_path / "w", tuning(kind), "bfloat16", (126, 127))


def same_as_whole(base: Path, weights: Path, kind: Any, dtype: Any, new_ids: tuple[int, ...]) -> None:
    whole = dict(adapted(base, weights, kind, cpu(), new_ids=new_ids).network.merge_and_unload().named_parameters())
    found = merged(base, weights, kind, cpu(dtype), new_ids=new_ids)
    assert not found.network.training
    assert not any("lora" in n or "token_adapter" in n for n, _ in found.network.named_modules())
    assert numbers(found).keys() == whole.keys()
    moved = numbers(load_model(base, cpu(dtype), new_ids=new_ids))
    for name, t in numbers(found).items():
        assert t.dtype == getattr(torch, dtype)
        assert torch.equal(t, whole[name].to(t.dtype)), name
    assert sum(not torch.equal(t, moved[n]) for n, t in numbers(found).items()) >= 14


def test_one_model_is_loaded_where_it_holds_all_that_was_published(
    tiny_model: Path, checkpoints: dict[str, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    monkeypatch.setattr(export_model, "load_model", lambda *a, **k: loaded.append(a) or load_model(*a, **k))
    merged(tiny_model, checkpoints["dora"][0], tuning("dora"), cpu(), new_ids=NEW)
    assert len(loaded) == 1


def test_what_is_served_is_compared_in_pieces_of_positions(
    tiny_model: Path, checkpoints: dict[str, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers as from transformers' own logits in float64, and never the logits of a whole row."""
    one, two = (merged(tiny_model, f, Full(kind="full"), cpu()) for f in checkpoints["full"])
    rows, together, sizes = examples(3), np.zeros(4), []
    for e in rows:
        ids, w = torch.tensor(e.ids_T.astype(np.int64)), torch.tensor(e.weights_T[1:]).double()
        with torch.no_grad():
            p, q = (m.network(input_ids=ids[None]).logits[0, :-1].double().log_softmax(-1) for m in (one, two))
        losses = (-float((w * x.gather(1, ids[1:, None])[:, 0]).sum()) for x in (p, q))
        together += [*losses, float((w * (p.exp() * (p - q)).sum(1)).sum()), float(w.sum())]
    for m in (one, two):
        m.base.get_output_embeddings().register_forward_pre_hook(lambda _m, args: sizes.append(args[0].shape[-2]))
    monkeypatch.setattr(drift, "_LOGIT_BYTES", 3 * one.vocabulary * 4)
    said = said_of_served(one, two, rows)
    was, is_, kl = together[:3] / together[3]
    assert f"the loss is {is_:.4f}, it was {was:.4f}; KL {kl:.4f} nats" in said
    assert max(sizes) == 3
