"""Attention as model families ask for it, both routes of the CPU: equal to a plain float64 oracle, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
from educe.model import attention, attention_short  # noqa: E402
from educe.model.attention import attend_documents  # noqa: E402
from educe.model.documents import Documents  # noqa: E402
from torch import Tensor  # noqa: E402


def oracle(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, how: dict[str, Any]) -> Tensor:
    """Token by token and head by head, as the papers write it."""
    groups, out, start = q.shape[1] // k.shape[1], [], 0
    for length in lengths:
        for i in range(start, start + length):
            first = start if how["sliding_window"] is None else max(start, i - how["sliding_window"] + 1)
            heads = []
            for h in range(q.shape[1]):
                scores = k[0, h // groups, first : i + 1] @ q[0, h, i] * scale
                if how["softcap"] is not None:
                    scores = how["softcap"] * torch.tanh(scores / how["softcap"])
                top, total = scores.exp(), scores.exp().sum()
                if how["s_aux"] is not None:
                    total = total + how["s_aux"][h].double().exp()
                heads.append(top / total @ v[0, h // groups, first : i + 1])
            out.append(torch.stack(heads))
        start += length
    return torch.stack(out)[None]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=3),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    sizes=st.sampled_from([(8, 8), (8, 5), (4, 8)]),
    window=st.sampled_from([None, 1, 3, 100]),
    softcap=st.sampled_from([None, 2.0]),
    sinks=st.booleans(),
    scale=st.sampled_from([None, 1.0, 0.1]),
    route=st.sampled_from(["plain", "long", "both"]),
    seed=st.integers(0, 99),
)
def test_attention_is_the_oracles(
    lengths: list[int],
    heads: tuple[int, int],
    sizes: tuple[int, int],
    window: int | None,
    softcap: float | None,
    sinks: bool,
    scale: float | None,
    route: str,
    seed: int,
) -> None:
    """The long route is the fused kernel or, with a window, cap or sinks, blocks of 4 queries here; `both`: by length."""
    torch.manual_seed(seed)
    total = sum(lengths)
    shapes = [(1, heads[0], total, sizes[0]), (1, heads[1], total, sizes[0]), (1, heads[1], total, sizes[1])]
    inputs = [torch.randn(s, requires_grad=True) for s in shapes]
    how: dict[str, Any] = {"sliding_window": window, "softcap": softcap, "s_aux": None}
    if sinks:
        how["s_aux"] = torch.randn(heads[0], requires_grad=True)
        inputs.append(how["s_aux"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "PLAIN_BELOW", {"plain": 512, "both": 6, "long": 0}[route])
        patch.setattr(attention, "BLOCK", 4)
        found, _ = attend_documents(
            torch.nn.Module(), *inputs[:3], None, documents=Documents(lengths=tuple(lengths)), scaling=scale, **how
        )
        weight = torch.randn_like(found)
        ours = torch.autograd.grad((found * weight).sum(), inputs)
    expected = oracle(*(x.double() for x in inputs[:3]), lengths, scale or sizes[0] ** -0.5, how)
    theirs = torch.autograd.grad((expected * weight).sum(), inputs)
    assert found.shape == expected.shape
    assert torch.allclose(found.double(), expected, atol=3e-6)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("route", ["plain", "fused", "blocks"])
def test_dropout_leaves_weights_out_and_keeps_the_mean(monkeypatch: pytest.MonkeyPatch, route: str) -> None:
    monkeypatch.setattr(attention, "PLAIN_BELOW", 512 if route == "plain" else 0)
    how = {"softcap": 1e6} if route == "blocks" else {}
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 24, 8) for _ in range(3))
    whole = attend_documents(torch.nn.Module(), q, k, v, None, **how)[0]
    some = torch.stack([attend_documents(torch.nn.Module(), q, k, v, None, dropout=0.3, **how)[0] for _ in range(600)])
    assert not torch.allclose(some[0], whole, atol=1e-2)
    assert float((some.mean(0) - whole).norm() / whole.norm()) < 0.05


def test_the_backward_pass_of_blocks_drops_what_the_forward_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are computed again in the backward pass: with the same dropout, else the gradient is of another function."""
    monkeypatch.setattr(attention, "PLAIN_BELOW", 0)
    torch.manual_seed(0)
    q, k = (torch.randn(1, 2, 24, 8) for _ in range(2))
    v = torch.randn(1, 2, 24, 8, requires_grad=True)
    out = attend_documents(torch.nn.Module(), q, k, v, None, dropout=0.5, softcap=5.0)[0]
    (gradient,) = torch.autograd.grad(out.sum(), v)
    assert torch.allclose((gradient * v).sum(), out.sum(), rtol=1e-4)  # linear in v


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("score_bytes", [1, 4 * 2**20])
@pytest.mark.parametrize("strided", [False, True])
def test_short_documents_of_all_sizes(
    window: int | None, score_bytes: int, strided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Filled up, and in one product where they are of one length and few enough: torch's own attention, one after the other."""
    monkeypatch.setattr(attention_short, "_SCORE_BYTES", score_bytes)
    lengths, scale = [64, 1, 31, 33, 97, 60, 32, 300, 130, 60], 0.3
    torch.manual_seed(1)
    inputs = [torch.randn(1, h, sum(lengths), w) for h, w in ((6, 8), (2, 8), (2, 5))]
    if strided:  # as projections come: by token, then head
        inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    for x in inputs:
        x.requires_grad_()
    found = attention_short.attend_short(*inputs, lengths, scale, window)
    weight = torch.randn_like(found)
    ours = torch.autograd.grad((found * weight).sum(), inputs)

    exact, parts = [x.detach().double().requires_grad_() for x in inputs], []
    for q, k, v in zip(*(x.split(lengths, 2) for x in exact), strict=True):
        at = torch.arange(q.shape[2])
        back = at[:, None] - at[None, :]
        seen = (back >= 0) & (back < (window or len(at)))
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
        )
    expected = torch.cat(parts, 2).transpose(1, 2)
    theirs = torch.autograd.grad((expected * weight).sum(), exact)
    for a, b in zip((found, *ours), (expected, *theirs), strict=True):
        assert float((a.detach().double() - b.detach()).norm() / b.norm()) < 1e-6


def test_a_document_does_not_see_what_fills_another() -> None:
    """Other documents of the same lengths: not a bit changes."""
    lengths = [40, 50, 61]
    torch.manual_seed(2)
    q, k, v = (torch.randn(1, h, 151, 16, dtype=torch.bfloat16) for h in (4, 2, 2))
    before = attention_short.attend_short(q, k, v, lengths, 0.25, None)
    for x in (q, k, v):
        x[:, :, :40] = 1e4 * torch.randn_like(x[:, :, :40])
        x[:, :, 90:] = -1e4
    after = attention_short.attend_short(q, k, v, lengths, 0.25, None)
    assert torch.equal(before[:, 40:90], after[:, 40:90])
    assert not torch.equal(before[:, :40], after[:, :40])
