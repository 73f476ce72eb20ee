"""The same properties on a GPU: loss and attention against float64, packs that stay apart, a compiled step that is the plain one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

import torch.nn.functional as F  # noqa: E402
from educe.loss.cross_entropy import token_nll  # noqa: E402
from educe.loss.reweigh import eaft  # noqa: E402
from educe.model import attention  # noqa: E402
from educe.model.attention import Scoring  # noqa: E402
from educe.model.attention_cuda import attend_edges  # noqa: E402
from educe.model.attention_flex import attend_flex  # noqa: E402
from educe.model.device import Device  # noqa: E402
from educe.model.documents import documents_of  # noqa: E402
from educe.model.load import CausalLM  # noqa: E402
from educe.pack.batch import build_batch  # noqa: E402
from educe.training.optim import Adam, AdamSettings  # noqa: E402
from educe.training.sft import sft_loss  # noqa: E402
from educe.types import Example  # noqa: E402
from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: E402


def apart(a: Any, b: Any) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("vocabulary", [1000, 151_936])
@pytest.mark.parametrize("dtype,near", [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
def test_loss_is_autograds_in_float64(vocabulary: int, dtype: Any, near: float) -> None:
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    n, d = 300, 128
    hidden = torch.randn(n, d, device="cuda").to(dtype).requires_grad_()
    head = (torch.randn(vocabulary, d, device="cuda") / math.sqrt(d)).to(dtype).requires_grad_()
    targets, weights = torch.randint(0, vocabulary, (n,), device="cuda"), torch.rand(n, device="cuda") + 0.1
    for reweigh in (None, eaft):
        given = {"reweigh": reweigh} if reweigh is not None else {}
        out = token_nll(
            hidden, lambda h: h @ head.T, targets, weights, parameters=[head], denominator=7.0, chunk=128, **given
        )
        out.loss.backward()
        h64, w64 = hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_()
        log_p = (h64 @ w64.T).log_softmax(1)
        nll = -log_p.gather(1, targets[:, None])[:, 0]
        factors = torch.ones_like(nll)
        if reweigh is not None:
            top = log_p.detach().topk(20, 1).values.log_softmax(1)
            factors = -(top.exp() * top).sum(1) / math.log(20)
        ((weights.double() * factors * nll).sum() / 7).backward()
        assert apart(out.nll_N, nll.detach()) < near
        assert apart(out.entropy_N, -(log_p.exp() * log_p).sum(1).detach()) < near
        assert apart(hidden.grad, h64.grad) < 2 * near
        assert apart(head.grad, w64.grad) < 2 * near
        hidden.grad = head.grad = None


@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
@pytest.mark.parametrize("window", [None, 64])
def test_attention_is_that_of_each_document(heads: tuple[int, int], window: int | None) -> None:
    torch.manual_seed(0)
    lengths = [100, 37, 200, 1, 62]
    q, k, v = (
        torch.randn(1, sum(lengths), h, 64, device="cuda").bfloat16().transpose(1, 2).requires_grad_()
        for h in (heads[0], heads[1], heads[1])
    )
    found = attend_edges(q, k, v, documents_of(lengths, "cuda"), 0.125, window)
    weight = torch.randn_like(found)
    ours = torch.autograd.grad((found * weight).sum(), (q, k, v))
    q_, k_, v_ = (x.detach().double().requires_grad_() for x in (q, k, v))
    parts = []
    for a, b, c in zip(q_.split(lengths, 2), k_.split(lengths, 2), v_.split(lengths, 2), strict=True):
        n = a.shape[2]
        seen = torch.ones(n, n, dtype=torch.bool, device="cuda").tril()
        if window is not None:
            seen = seen.triu(1 - window)
        r = heads[0] // heads[1]
        parts.append(
            F.scaled_dot_product_attention(
                a, b.repeat_interleave(r, 1), c.repeat_interleave(r, 1), attn_mask=seen, scale=0.125
            )
        )
    exact = torch.cat(parts, 2).transpose(1, 2)
    theirs = torch.autograd.grad((exact * weight.double()).sum(), (q_, k_, v_))
    assert apart(found, exact) < 8e-3
    for a, b in zip(ours, theirs, strict=True):
        assert apart(a, b) < 1.5e-2


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("softcap,sinks", [(5.0, False), (None, True), (5.0, True)])
@pytest.mark.parametrize("window", [None, 64])
def test_caps_and_sinks_are_those_of_each_document(
    size: int, softcap: float | None, sinks: bool, window: int | None
) -> None:
    torch.manual_seed(0)
    lengths = [100, 37, 400, 1, 200]
    shapes = [(1, h, sum(lengths), size) for h in (8, 2, 2)]
    inputs = [torch.randn(s, device="cuda").bfloat16().requires_grad_() for s in shapes]
    sinks_H = torch.randn(8, device="cuda", requires_grad=True) if sinks else None
    given = [*inputs, *([sinks_H] if sinks_H is not None else [])]
    found = attend_flex(*inputs, documents_of(lengths, "cuda"), size**-0.5, window, softcap, sinks_H)
    weight = torch.randn_like(found)
    ours = torch.autograd.grad((found * weight).sum(), given)
    exact = [x.detach().double().requires_grad_() for x in given]
    how = Scoring(scale=size**-0.5, window=window, softcap=softcap, sinks_H=exact[3] if sinks else None)
    split = zip(*(x.split(lengths, 2) for x in exact[:3]), strict=True)
    each = torch.cat([attention._attend_plain(*one, how, 0).transpose(1, 2) for one in split], 1)
    theirs = torch.autograd.grad((each * weight.double()).sum(), exact)
    assert apart(found, each) < 8e-3
    for a, b in zip(ours, theirs, strict=True):
        assert apart(a, b) < 1.5e-2


def test_flex_attention_compiles_for_lengths_not_for_documents() -> None:
    compiled = []
    for lengths in ([300, 211, 513], [700, 324], [10] * 102 + [4], [1024], [64, 960], [2048], [100, 1900], [3000]):
        q, k, v = (torch.randn(1, h, sum(lengths), 64, device="cuda").bfloat16().requires_grad_() for h in (4, 2, 2))
        attend_flex(q, k, v, documents_of(lengths, "cuda"), 0.125, None, 7.0, None).sum().backward()
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert compiled[0] == compiled[4]
    assert compiled[-1] <= compiled[0] + 1  # the length becomes a symbol


def model_of(compiled: bool) -> CausalLM:
    attention.register()
    config = Qwen3Config(
        vocab_size=2048,
        hidden_size=256,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        intermediate_size=512,
        head_dim=64,
        tie_word_embeddings=True,
        attn_implementation=attention.NAME,
    )
    torch.manual_seed(0)
    network = Qwen3ForCausalLM(config).to("cuda", torch.bfloat16)
    model = CausalLM(network, Device(kind="cuda", dtype="bfloat16", name="", flops=1e12, why=""), adapted=False)
    if compiled:
        model.compile(1024)
    return model


def documents(lengths: list[int], seed: int, keep: int | None = None) -> list[Example]:
    made = []
    for k, n in enumerate(lengths):
        rng = np.random.default_rng(5 if k == keep else 1000 * seed + k)
        weights = np.ones(n, np.float32)
        weights[0] = 0
        made.append(Example(ids_T=rng.integers(0, 2048, n).astype(np.int32), weights_T=weights))
    return made


def test_other_documents_compile_a_layer_once_more_and_no_more() -> None:
    model = model_of(True)
    for k, lengths in enumerate(([300, 211, 513], [700, 300], [10] * 40, [1000], [64, 900])):
        batch = build_batch(documents(lengths, k))
        sft_loss(model, batch, batch.total_weight).loss.backward()
        if k == 2:  # by then both the number of edges and the longest document have changed
            compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled


@pytest.mark.parametrize("compiled", [False, True])
def test_packs_are_blind_to_the_bit(compiled: bool) -> None:
    model = model_of(compiled)
    lengths = [300, 211, 513]
    one, two = (model.hidden_states(build_batch(documents(lengths, seed, keep=1)))[300:511] for seed in (1, 2))
    assert torch.equal(one, two)


def test_a_compiled_step_is_the_plain_one_and_learns() -> None:
    plain, compiled = model_of(False), model_of(True)
    batch = build_batch(documents([300, 211, 513], 1))
    losses: dict[str, list[float]] = {}
    for name, model in (("plain", plain), ("compiled", compiled)):
        optimizer = Adam(model.trainable(), AdamSettings())
        losses[name] = []
        for _ in range(5):
            out = sft_loss(model, batch, batch.total_weight)
            out.loss.backward()
            losses[name].append(out.loss.item())
            optimizer.gradient_norm()
            optimizer.step(1e-3)
    assert losses["plain"][-1] < losses["plain"][0] - 0.5
    assert losses["plain"] == pytest.approx(losses["compiled"], rel=0.02)
