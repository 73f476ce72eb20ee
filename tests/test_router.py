"""The auxiliary loss of a mixture of experts: transformers' own value, when it counts, and what it is over several micro-batches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from educe.errors import ModelError  # noqa: E402
from educe.model.load import CausalLM, load_model  # noqa: E402
from educe.pack.batch import build_batch  # noqa: E402
from educe.training.sft import held_out_loss, sft_loss  # noqa: E402

from families import FAMILIES, make  # noqa: E402
from test_engine import FULL, LORA, _one_thread, apart, cpu  # noqa: E402, F401
from test_families import rows  # noqa: E402

FAMILY = pytest.mark.parametrize("family", ["Qwen3-MoE", "gpt-oss"])


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name in ("Qwen3-MoE", "gpt-oss", "Llama"):
        made[name] = tmp_path_factory.mktemp("router")
        make(FAMILIES[name]).save_pretrained(made[name])
    return made


def theirs(model: CausalLM, *ids: torch.Tensor) -> torch.Tensor:
    """transformers' auxiliary loss of rows side by side, padded on the right, before its coefficient."""
    length = max(i.numel() for i in ids)
    padded = torch.stack([torch.nn.functional.pad(i, (0, length - i.numel())) for i in ids])
    mask = torch.stack([(torch.arange(length) < i.numel()).long() for i in ids])
    model.base.set_attn_implementation("eager")
    return model.base(input_ids=padded, attention_mask=mask, output_router_logits=True, use_cache=False).aux_loss


@FAMILY
@pytest.mark.parametrize("checkpointing", [False, True])
def test_value_and_gradient_are_transformers_own_without_filler(
    places: dict[str, Path], family: str, checkpointing: bool
) -> None:
    model = load_model(places[family], cpu(), FULL, router_loss=0.25)
    if checkpointing:
        model.recompute(len(model.layers))
    batch = build_batch(rows())
    assert batch.num_tokens % 16  # there is filler in the row
    found = model.forward(batch).router_loss
    assert found is not None
    ours = torch.autograd.grad(found, list(model.trainable().values()), allow_unused=True)
    expected = 0.25 * theirs(model, *(torch.tensor(e.ids_T, dtype=torch.int64) for e in rows()))
    wanted = torch.autograd.grad(expected, list(model.trainable().values()), allow_unused=True)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for a, b in zip(ours, wanted, strict=True):
        assert (a is None) == (b is None)
        assert a is None or apart(a, b) < 1e-5


@FAMILY
def test_it_counts_where_config_or_recipe_ask_for_it(places: dict[str, Path], family: str, tmp_path: Path) -> None:
    """A coefficient alone asks for nothing: gpt-oss's config carries 0.9, transformers leaves it out, and so is it here."""
    asking = tmp_path / "asking"
    shutil.copytree(places[family], asking)
    config = json.loads((asking / "config.json").read_text())
    (asking / "config.json").write_text(
        json.dumps({**config, "output_router_logits": True, "router_aux_loss_coef": 0.5})
    )

    def coefficient(place: Path, asked: float | None) -> float:
        return load_model(place, cpu(), FULL, router_loss=asked).router_coefficient

    assert [coefficient(places[family], a) for a in (None, 0.0, 0.1)] == [0, 0, 0.1]
    assert [coefficient(asking, a) for a in (None, 0.0, 0.1)] == [0.5, 0, 0.1]
    assert load_model(places["Llama"], cpu(), FULL).forward(build_batch(rows())).router_loss is None
    with pytest.raises(ModelError, match=r"E-MODEL-204.*train\.router_loss"):
        load_model(places["Llama"], cpu(), FULL, router_loss=0.1)


@FAMILY
@pytest.mark.parametrize("tuning", [FULL, LORA], ids=["full", "lora"])
def test_a_step_is_the_mean_of_its_micro_batches_by_weight(places: dict[str, Path], family: str, tuning) -> None:  # type: ignore[no-untyped-def]
    plain, model = (load_model(places[family], cpu(), tuning, router_loss=asked) for asked in (0.0, 2.0))
    torch.manual_seed(0)
    for name, p in model.trainable().items():
        with torch.no_grad():
            p.add_(0.05 * torch.randn_like(p))
            plain.trainable()[name].copy_(p)
    split = [build_batch(rows()[:2]), build_batch(rows()[2:])]
    total = sum(b.total_weight for b in split)
    for batch in split:
        more = sft_loss(model, batch, total).loss - sft_loss(plain, batch, total).loss
        balance = model.forward(batch).router_loss
        assert balance is not None
        assert more.item() == pytest.approx(balance.item() * batch.total_weight / total, rel=1e-4)
        assert torch.equal(sft_loss(model, batch, total).nll_N, sft_loss(plain, batch, total).nll_N)
    sft_loss(model, split[0], total).loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.trainable().values())


def test_held_out_loss_has_none_of_it(places: dict[str, Path]) -> None:
    plain, model = (load_model(places["Qwen3-MoE"], cpu(), FULL, router_loss=asked) for asked in (0.0, 2.0))
    assert held_out_loss(model, [build_batch(rows())]).mean == held_out_loss(plain, [build_batch(rows())]).mean
