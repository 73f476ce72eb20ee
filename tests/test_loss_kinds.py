"""Losses that weigh tokens anew, and the pull to the base model: values and gradients are autograd's in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from educe.loss import cross_entropy  # noqa: E402
from educe.loss.anchor import TOP, Anchor  # noqa: E402
from educe.loss.cross_entropy import LossOut, token_nll  # noqa: E402
from educe.loss.reweigh import Reweigh, dft, eaft, nll  # noqa: E402

from test_engine import _one_thread  # noqa: E402, F401

EXACT = 1e-6
CAP = 3.0


def capped(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A head with a soft cap and a scale, as Gemma and Granite have."""
    return lambda h: CAP * torch.tanh(0.7 * (h @ weight.T) / CAP)


def plain(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda h: h @ weight.T


def tensors(n: int, d: int, v: int, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "hidden": torch.randn(n, d),
        "head": torch.randn(v, d) / math.sqrt(d),
        "reference": torch.randn(n, d),
        "reference_head": torch.randn(v, d) / math.sqrt(d),
        "targets": torch.randint(0, v, (n,)),
        "weights": torch.rand(n) * 2 + 0.01,
    }


def factors(kind: str, log_p: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The published formulas, in float64, spelled out."""
    p = log_p.exp().gather(1, targets[:, None])[:, 0]
    if kind == "dft":
        return p
    if kind == "half":
        return p.sqrt()
    if kind == "eaft":
        k = min(20, log_p.shape[1])
        top = log_p.exp().sort(1, descending=True).values[:, :k]
        top = top / top.sum(1, keepdim=True)
        return -(top * top.log()).sum(1) / math.log(k)
    return torch.ones_like(p)


KINDS: dict[str, Reweigh] = {"nll": nll, "dft": dft(1.0), "half": dft(0.5), "eaft": eaft}


def oracle(
    t: dict[str, torch.Tensor], kind: str, make: Any, beta: float, denominator: float
) -> dict[str, torch.Tensor]:
    hidden, head = (t[k].double().requires_grad_() for k in ("hidden", "head"))
    log_p = make(head)(hidden).log_softmax(1)
    nll_N = -log_p.gather(1, t["targets"][:, None])[:, 0]
    r = factors(kind, log_p.detach(), t["targets"])
    log_ref = make(t["reference_head"].double())(t["reference"].double()).log_softmax(1)
    kept = log_ref.topk(min(TOP, log_ref.shape[1]), 1).indices
    rest = torch.ones_like(log_ref).scatter(1, kept, 0.0)  # all others are one bucket
    p_ref, p = log_ref.exp(), log_p.exp()
    kl = (p_ref.gather(1, kept) * (log_ref.gather(1, kept) - log_p.gather(1, kept))).sum(1)
    if bool((rest > 0).any()):
        a, b = (p_ref * rest).sum(1), (p * rest).sum(1)
        kl = kl + a * (a.log() - b.log())
    loss = (t["weights"].double() * (r * nll_N + beta * kl)).sum() / denominator
    loss.backward()
    entropy = -(p * log_p).sum(1)
    return {"loss": loss, "nll": nll_N, "entropy": entropy, "kl": kl, "hidden": hidden.grad, "head": head.grad}


def ours(
    t: dict[str, torch.Tensor], kind: str, make: Any, beta: float, denominator: float, chunk: int
) -> tuple[LossOut, torch.Tensor, torch.Tensor]:
    hidden, head = (t[k].clone().requires_grad_() for k in ("hidden", "head"))
    anchor = Anchor(hidden_ND=t["reference"], head=make(t["reference_head"]), beta=beta) if beta else None
    out = token_nll(
        hidden,
        make(head),
        t["targets"],
        t["weights"],
        parameters=[head],
        denominator=denominator,
        chunk=chunk,
        reweigh=KINDS[kind],
        anchor=anchor,
    )
    out.loss.backward()
    return out, hidden.grad, head.grad


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.detach().double() - b.detach()).norm() / b.detach().norm())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 24),
    st.integers(4, 20),
    st.sampled_from([3, 40, 150]),
    st.sampled_from(sorted(KINDS)),
    st.sampled_from([plain, capped]),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from([1, 5, 100]),
    st.sampled_from([1, 1000]),
    st.integers(0, 999),
)
def test_value_and_gradients_equal_autograd_in_float64(
    n: int, d: int, v: int, kind: str, make: Any, beta: float, chunk: int, block: int, seed: int
) -> None:
    t = tensors(n, d, v, seed)
    denominator = float(t["weights"].double().sum())
    expected = oracle(t, kind, make, beta, denominator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "_BLOCK_BYTES", 4 * v * block)
        out, d_hidden, d_head = ours(t, kind, make, beta, denominator, chunk)
    assert out.loss.item() == pytest.approx(expected["loss"].item(), rel=2e-6)
    assert apart(out.nll_N, expected["nll"]) < EXACT
    assert apart(out.entropy_N, expected["entropy"]) < EXACT
    assert apart(out.target_p, torch.exp(-expected["nll"])) < EXACT
    assert apart(d_hidden, expected["hidden"]) < 3 * EXACT
    assert apart(d_head, expected["head"]) < 3 * EXACT
    assert (out.kl_N is None) == (beta == 0)
    if out.kl_N is not None:
        assert apart(out.kl_N, expected["kl"]) < 1e-5


def test_the_anchor_pulls_nowhere_where_the_models_agree() -> None:
    t = tensors(6, 8, 90, 1)
    t["reference"], t["reference_head"] = t["hidden"], t["head"]
    t["weights"] = torch.ones(6)
    with_it, d_with, _ = ours(t, "nll", plain, 0.5, 6.0, 100)
    without, d_without, _ = ours(t, "nll", plain, 0.0, 6.0, 100)
    assert with_it.kl_N is not None
    assert with_it.kl_N.abs().max() < 1e-6
    assert apart(d_with, d_without.double()) < EXACT
    assert with_it.loss.item() == pytest.approx(without.loss.item(), rel=1e-6)


def test_eaft_leaves_a_sure_token_alone_and_dft_an_unlikely_one() -> None:
    """A prediction that is sure and wrong: eaft's weight is near 0 and so is dft's; one that is unsure: eaft's is near 1."""
    t = tensors(2, 2, 30, 0)
    t["hidden"] = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    t["head"] = torch.zeros(30, 2)
    t["head"][4, 0] = 20.0  # row 0 is sure of token 4; row 1 of nothing
    t["targets"] = torch.tensor([7, 7])
    t["weights"] = torch.ones(2)
    plainly = ours(t, "nll", plain, 0.0, 1.0, 100)[1]
    assert plainly.norm(dim=1).min() > 1e-3
    for kind, unsure in (("eaft", 1.0), ("dft", 1 / 30)):
        _, d_hidden, _ = ours(t, kind, plain, 0.0, 1.0, 100)
        factors = (d_hidden.norm(dim=1) / plainly.norm(dim=1)).tolist()
        assert factors[0] < 1e-5
        assert factors[1] == pytest.approx(unsure, rel=1e-4)


def test_without_gradients_nothing_is_kept() -> None:
    t = tensors(9, 5, 40, 2)
    t["head"].requires_grad_()
    with torch.no_grad():
        out = token_nll(
            t["hidden"], plain(t["head"]), t["targets"], t["weights"], parameters=[t["head"]], denominator=1.0, chunk=4
        )
    assert not out.loss.requires_grad
    full = ours(t, "nll", plain, 0.0, 1.0, 4)[0]
    assert torch.equal(out.nll_N, full.nll_N)
    assert torch.equal(out.loss, full.loss.detach())


def test_the_anchor_is_right_where_the_model_is_surer_than_its_base() -> None:
    """What all others share is summed: found as 1 - sum it would be rounding alone, and the slope divides by it."""
    v, d = 4000, 8
    torch.manual_seed(0)
    t = {
        "hidden": torch.eye(d)[:4],
        "head": torch.randn(v, d) * 0.3,
        "reference": torch.eye(d)[:4],
        "targets": torch.tensor([7, 7, 9, 9]),
        "weights": torch.ones(4),
    }
    t["reference_head"] = t["head"].clone()
    t["reference_head"][7] += 12.0
    for surer in (14.0, 18.0, 22.0, 26.0):
        t["head"][7] = surer
        expected = oracle(t, "nll", plain, 0.5, 4.0)
        out, d_hidden, d_head = ours(t, "nll", plain, 0.5, 4.0, 100)
        assert out.loss.item() == pytest.approx(expected["loss"].item(), rel=1e-5)
        assert apart(d_hidden, expected["hidden"]) < 1e-4
        assert apart(d_head, expected["head"]) < 1e-4
