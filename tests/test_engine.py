"""The engine on a tiny Llama: the gradients of a step, attention per document, the proofs made before it, the rate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from educe.config import Full, Lora  # noqa: E402
from educe.errors import ModelError  # noqa: E402
from educe.model import attention  # noqa: E402
from educe.model.attention import attend_documents  # noqa: E402
from educe.model.device import Device  # noqa: E402
from educe.model.documents import Documents  # noqa: E402
from educe.model.load import CausalLM, load_model  # noqa: E402
from educe.model.proof import packs_are_blind, prove_head  # noqa: E402
from educe.pack.batch import build_batch  # noqa: E402
from educe.training.sft import SftLoss, held_out_loss, sft_loss  # noqa: E402
from educe.types import Batch, Example  # noqa: E402
from transformers import AttentionInterface, LlamaForCausalLM  # noqa: E402
from transformers.masking_utils import AttentionMaskInterface  # noqa: E402

EXACT = 1e-6  # of a tensor's norm
FULL, LORA = Full(kind="full"), Lora(kind="lora", rank=4, alpha=8.0)
Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small are slower with several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def cpu(dtype: Literal["float32", "bfloat16"] = "float32") -> Device:
    return Device(kind="cpu", dtype=dtype, name="CPU", flops=1e9, why="")


def examples(count: int = 8, seed: int = 0) -> list[Example]:
    """Random documents of 5 to 40 tokens, some trained, with weights that are not whole numbers."""
    rng = np.random.default_rng(seed)
    made = []
    for length in rng.integers(5, 41, count):
        weights = rng.uniform(0.1, 2, length) * (rng.random(length) < 0.6)
        weights[0], weights[-1] = 0, 1
        ids = rng.integers(0, 512, length).astype(np.int32)
        made.append(Example(ids_T=ids, weights_T=weights.astype(np.float32)))
    return made


def groups(rows: Sequence[Example], size: int) -> list[Batch]:
    return [build_batch(rows[i : i + size]) for i in range(0, len(rows), size)]


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Distance of `a` from `b` as a share of b's norm."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def gradients(model: CausalLM, batches: Sequence[Batch], loss_of: SftLoss = sft_loss) -> tuple[float, Tensors]:
    """Loss and gradients of one step made of these micro-batches."""
    denominator = sum(b.total_weight for b in batches)
    loss = 0.0
    for batch in batches:
        out = loss_of(model, batch, denominator)
        out.loss.backward()
        loss += out.loss.item()
    found = {n: p.grad.clone() for n, p in model.trainable().items() if p.grad is not None}
    model.network.zero_grad()
    return loss, found


# A step's gradient does not depend on how it is split


@pytest.fixture(scope="module")
def by_hand(tiny_model: Path) -> tuple[float, Tensors]:
    """Loss and gradients of the eight examples, in float64, one at a time, by transformers' own forward and plain torch."""
    model = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float64, attn_implementation="eager")
    rows = examples()
    total = sum(float(e.weights_T.astype(np.float64).sum()) for e in rows)
    loss = torch.zeros((), dtype=torch.float64)
    for e in rows:
        ids = torch.tensor(e.ids_T, dtype=torch.int64)
        nll = F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        loss = loss + (nll * torch.tensor(e.weights_T[1:])).sum() / total
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("size", [8, 4, 1])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_do_not_depend_on_the_split(
    tiny_model: Path, by_hand: tuple[float, Tensors], size: int, checkpointing: bool
) -> None:
    model = load_model(tiny_model, cpu(), FULL)
    if checkpointing:
        model.recompute(2)
    loss, found = gradients(model, groups(examples(), size))
    assert found.keys() == by_hand[1].keys()
    assert loss == pytest.approx(by_hand[0], rel=EXACT)
    assert max(apart(found[n], g) for n, g in by_hand[1].items()) < EXACT


def test_adapters_gradients_do_not_depend_on_the_split(tiny_model: Path) -> None:
    torch.manual_seed(3)
    model = load_model(tiny_model, cpu(), LORA)
    with torch.no_grad():
        for p in model.trainable().values():
            p.normal_(0, 0.1)  # else the second adapter matrices are zero and the first have no gradient
    assert all("lora_" in n for n in model.trainable())
    alone = gradients(model, groups(examples(), 1))[1]
    for size in (8, 4):
        packed = gradients(model, groups(examples(), size))[1]
        assert max(apart(packed[n], g) for n, g in alone.items()) < EXACT


def test_held_out_loss_does_not_depend_on_batches(tiny_model: Path, by_hand: tuple[float, Tensors]) -> None:
    model = load_model(tiny_model, cpu(), FULL)
    for size in (8, 3, 1):
        assert held_out_loss(model, groups(examples(), size)).mean == pytest.approx(by_hand[0], rel=EXACT)
    assert model.network.training


# Attention


def documents(lengths: list[int]) -> Documents:
    return Documents(lengths=tuple(lengths))


def one_by_one(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], window: int | None
) -> torch.Tensor:
    """torch's own attention, one document at a time, with the mask written out."""
    parts = []
    for a, b, c in zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), strict=True):
        n = a.shape[2]
        seen = torch.ones(n, n, dtype=torch.bool).tril()
        if window is not None:
            seen = seen.triu(1 - window)
        parts.append(F.scaled_dot_product_attention(a, b, c, attn_mask=seen, enable_gqa=True))
    return torch.cat(parts, 2).transpose(1, 2)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 24), min_size=1, max_size=5),
    st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    st.sampled_from([None, 1, 3, 8, 100]),
    st.sampled_from([0, 9, 512]),
    st.integers(0, 99),
)
def test_attention_is_torchs_own_per_document(
    lengths: list[int], heads: tuple[int, int], window: int | None, plain_below: int, seed: int
) -> None:
    torch.manual_seed(seed)
    q, k, v = (torch.randn(1, h, sum(lengths), 8, requires_grad=True) for h in (heads[0], heads[1], heads[1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "PLAIN_BELOW", plain_below)
        found, _ = attend_documents(
            torch.nn.Module(), q, k, v, None, documents=documents(lengths), sliding_window=window
        )
    expected = one_by_one(q, k, v, lengths, window)
    weight = torch.randn_like(expected)
    ours = torch.autograd.grad((found * weight).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    assert torch.allclose(found, expected, atol=2e-6)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("plain_below", [0, 512])
def test_attention_in_bf16_is_within_rounding(monkeypatch: pytest.MonkeyPatch, plain_below: int) -> None:
    monkeypatch.setattr(attention, "PLAIN_BELOW", plain_below)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, 30, 16).bfloat16() for h in (4, 2, 2))
    found, _ = attend_documents(torch.nn.Module(), q, k, v, None, documents=documents([11, 19]), scaling=0.3)
    exact = one_by_one(q.float() * 0.3 * 4, k.float(), v.float(), [11, 19], None)
    assert found.dtype == torch.bfloat16
    assert apart(found, exact) < 2**-7


def test_attention_refuses_what_it_does_not_compute() -> None:
    q = torch.randn(1, 2, 4, 8)
    for feature in ({"logit_cap": 1.0}, {"position_bias": torch.zeros(2)}, {"never_heard_of": 3}, {"cu_seq_lens_q": q}):
        with pytest.raises(NotImplementedError, match=next(iter(feature))):
            attend_documents(torch.nn.Module(), q, q, q, None, **feature)
    with pytest.raises(NotImplementedError, match="sight of later tokens"):
        attend_documents(torch.nn.Module(), q, q, q, None, is_causal=False)
    with pytest.raises(NotImplementedError, match="cached keys"):
        attend_documents(torch.nn.Module(), q[:, :, :1], q, q, None)
    with pytest.raises(NotImplementedError, match="a mask"):
        attend_documents(torch.nn.Module(), q, q, q, torch.zeros(1, 1, 4, 4))
    attend_documents(torch.nn.Module(), q, q, q, None, softcap=None, position_ids=q, use_cache=False, logit_cap=None)


@pytest.mark.parametrize("tuning", [FULL, LORA])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packs_are_proved_blind(tiny_model: Path, tuning: Full | Lora, dtype: Literal["float32", "bfloat16"]) -> None:
    model = load_model(tiny_model, cpu(dtype), tuning)
    assert packs_are_blind(model)
    prove_head(model)
    assert model.network.training


def test_a_leak_between_packed_documents_is_found(tiny_model: Path) -> None:
    def leaking(*args: Any, documents: Any = None, **kwargs: Any) -> Any:
        return attend_documents(*args, **kwargs)

    def refusing(*args: Any, **kwargs: Any) -> Any:
        return attend_documents(*args, **{**kwargs, "logit_cap": 5.0})

    model = load_model(tiny_model, cpu(), FULL)
    for name, function in (("leaking", leaking), ("refusing", refusing)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, lambda *_, **__: None)
        model.base.set_attn_implementation(name)
        assert not packs_are_blind(model)
    with pytest.raises(ModelError, match="attention with logit_cap"):
        prove_head(model)
    assert model.network.training
    model.base.set_attn_implementation(attention.NAME)
    assert packs_are_blind(model)


def test_a_head_that_is_not_the_models_own_is_refused(tiny_model: Path) -> None:
    model = load_model(tiny_model, cpu(), FULL)
    model.base.config.logit_scale = (
        0.5  # Llama's forward knows no such thing: `head` would scale and the model would not
    )
    with pytest.raises(ModelError, match="E-MODEL-204"):
        prove_head(model)
