"""Cross-entropy at trained positions: equal to a float64 calculation done one row at a time, in any number of chunks."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from educe.loss.cross_entropy import LossOut, chunk_positions, token_nll  # noqa: E402

EXACT = 1e-6  # of a value, and of a gradient's norm
Arrays = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small are slower with several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(n: int, d: int, v: int, seed: int) -> Arrays:
    """Hidden states, a head and weighted targets in fp32, logits of unit size: no answer so sure that its nll is lost in rounding."""
    rng = np.random.default_rng(seed)
    return {
        "hidden": rng.normal(size=(n, d)).astype(np.float32),
        "head": (rng.normal(size=(v, d)) / math.sqrt(d)).astype(np.float32),
        "targets": rng.integers(0, v, n),
        "weights": rng.uniform(0.01, 2.5, n).astype(np.float32),
    }


def oracle(a: Arrays, denominator: float) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """Loss, nll of each row and both gradients in float64, one row at a time."""
    head = a["head"].astype(np.float64)
    d_hidden, d_head = np.zeros(a["hidden"].shape), np.zeros(head.shape)
    loss, nll = 0.0, np.zeros(len(a["targets"]))
    for n, target in enumerate(a["targets"]):
        hidden = a["hidden"][n].astype(np.float64)
        logits = head @ hidden
        exps = np.exp(logits - logits.max())
        share = exps / exps.sum()
        nll[n] = -(logits[target] - logits.max() - math.log(exps.sum()))
        loss += float(a["weights"][n]) * nll[n] / denominator
        share[target] -= 1.0
        share *= float(a["weights"][n]) / denominator
        d_hidden[n] = share @ head
        d_head += np.outer(share, hidden)
    return loss, nll, d_hidden, d_head


def ours(
    a: Arrays, denominator: float, *, chunk: int | None = None, dtype: torch.dtype = torch.float32
) -> tuple[LossOut, np.ndarray, np.ndarray, list[int]]:
    """`token_nll` with at most `chunk` rows at a time: its result, both gradients, and the rows of each call of the head."""
    hidden = torch.tensor(a["hidden"]).to(dtype).requires_grad_()
    head = torch.tensor(a["head"]).to(dtype).requires_grad_()
    calls: list[int] = []

    def logits(rows: torch.Tensor) -> torch.Tensor:
        calls.append(len(rows))
        return rows @ head.T

    targets, weights = torch.tensor(a["targets"]), torch.tensor(a["weights"])
    out = token_nll(hidden, logits, targets, weights, parameters=[head], denominator=denominator, chunk=chunk or 10**6)
    out.loss.backward()
    assert hidden.grad is not None
    assert head.grad is not None
    return out, hidden.grad.float().numpy(), head.grad.float().numpy(), calls


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """Distance of `a` from `b` as a share of b's norm."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(1, 30), st.integers(4, 24), st.integers(20, 70), st.integers(0, 2**31), st.sampled_from([1, 2, 7, None])
)
def test_value_and_gradients_equal_the_oracle(n: int, d: int, v: int, seed: int, chunk: int | None) -> None:
    a = make(n, d, v, seed)
    denominator = 0.5 + float(a["weights"].sum(dtype=np.float64))
    loss, nll, d_hidden, d_head = oracle(a, denominator)
    out, our_d_hidden, our_d_head, _ = ours(a, denominator, chunk=chunk)
    assert out.loss.item() == pytest.approx(loss, rel=EXACT)
    assert apart(out.nll_N.numpy(), nll) < EXACT
    assert apart(our_d_hidden, d_hidden) < EXACT
    assert apart(our_d_head, d_head) < EXACT


def test_chunks_bound_the_logits_and_cover_every_row() -> None:
    a = make(23, 8, 50, 1)
    assert ours(a, 1.0, chunk=5)[3] == [5] * 5  # once: gradients are found where the logits are; the last is filled up
    assert ours(a, 1.0, chunk=1000)[3] == [64]


def test_a_vocabulary_larger_than_the_bound_still_goes_one_row_at_a_time() -> None:
    assert chunk_positions(50, 8, 4) == 1
    assert chunk_positions(50, 400, 4) == 2


def test_a_step_does_not_depend_on_how_it_is_split() -> None:
    a = make(30, 12, 40, 3)
    total = float(a["weights"].sum(dtype=np.float64))
    whole, d_hidden, d_head, _ = ours(a, total)
    cuts = (slice(0, 1), slice(1, 19), slice(19, 30))
    parts = [ours({k: x if k == "head" else x[rows] for k, x in a.items()}, total) for rows in cuts]
    assert sum(p[0].loss.item() for p in parts) == pytest.approx(whole.loss.item(), rel=EXACT)
    assert apart(np.concatenate([p[1] for p in parts]), d_hidden) < EXACT
    assert apart(np.sum([p[2] for p in parts], 0), d_head) < EXACT


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(1, 20), st.integers(0, 2**31), st.sampled_from([1, 7, None]))
def test_weights_may_be_negative(n: int, seed: int, chunk: int | None) -> None:
    a = make(n, 12, 40, seed)
    a["weights"] *= np.random.default_rng(seed).choice([-1, 1], n).astype(np.float32)
    loss, nll, d_hidden, d_head = oracle(a, 3.0)
    out, our_d_hidden, our_d_head, _ = ours(a, 3.0, chunk=chunk)
    assert out.loss.item() == pytest.approx(loss, rel=EXACT, abs=EXACT * float(np.abs(a["weights"]) @ nll))
    assert apart(our_d_hidden, d_hidden) < EXACT
    assert apart(our_d_head, d_head) < EXACT


def test_where_no_gradient_is_wanted_none_is_computed() -> None:
    a, asked = make(9, 8, 20, 2), list[bool]()
    hidden, head = torch.tensor(a["hidden"]), torch.tensor(a["head"]).requires_grad_()

    def logits(rows: torch.Tensor) -> torch.Tensor:
        asked.append(torch.is_grad_enabled())
        return rows @ head.T

    with torch.no_grad():
        targets, weights = torch.tensor(a["targets"]), torch.tensor(a["weights"])
        out = token_nll(hidden, logits, targets, weights, parameters=[head], denominator=3.0, chunk=4)
    assert not any(asked)
    assert out.loss.item() == ours(a, 3.0, chunk=4)[0].loss.item()


def test_weights_scale_a_row_and_leave_the_others() -> None:
    a = make(6, 8, 20, 4)
    before = ours(a, 3.0)[1]
    a["weights"][2] *= 4
    after = ours(a, 3.0)[1]
    assert apart(after[2], 4 * before[2]) < EXACT
    assert np.array_equal(np.delete(after, 2, 0), np.delete(before, 2, 0))


def test_softmax_is_in_fp32_where_the_model_is_in_bf16() -> None:
    a = make(20, 16, 60, 5)
    for name in ("hidden", "head"):  # what bf16 holds exactly: only the arithmetic differs
        a[name] = torch.tensor(a[name]).bfloat16().float().numpy()
    out = ours(a, 1.0, dtype=torch.bfloat16)[0]
    assert out.loss.dtype == out.nll_N.dtype == torch.float32
    logits = torch.tensor(a["hidden"]).bfloat16() @ torch.tensor(a["head"]).bfloat16().T
    targets = torch.tensor(a["targets"])
    expected = logits.double().logsumexp(1) - logits.double()[torch.arange(20), targets]
    assert apart(out.nll_N.numpy(), expected.numpy()) < EXACT


def test_large_logits_stay_finite() -> None:
    a = make(8, 4, 10, 6)
    a["hidden"] *= 1e4
    out, d_hidden, _, _ = ours(a, 1.0)
    assert np.isfinite(out.loss.item())
    assert np.isfinite(d_hidden).all()
    assert out.loss.item() == pytest.approx(oracle(a, 1.0)[0], rel=1e-5)


CHECKED = """
import sys
import numpy as np, torch, transformers.models.llama.modeling_llama
from jaxtyping import TypeCheckError, install_import_hook
rooms = ["types", "loss", "pack", "model.attention", "model.load", "training.sft"]
with install_import_hook([f"educe.{r}" for r in rooms], "beartype.beartype"):
    from educe.loss.cross_entropy import token_nll
    from educe.model.attention import attend_documents
    from educe.model.device import Device
    from educe.model.load import load_model
    from educe.model.proof import random_batch
    from educe.training.sft import sft_loss
    from educe.pack.plan import plan_packs
from pathlib import Path
from educe.config import Full
device = Device(kind="cpu", dtype="float32", name="CPU", flops=1e9, why="")
model = load_model(Path(sys.argv[1]), device, Full(kind="full"))
batch = random_batch(model.vocabulary)
sft_loss(model, batch, batch.total_weight).loss.backward()
plan_packs(np.array([3, 4, 5]), np.array([0, 1, 2, 1]), batch_tokens=8, capacity_tokens=6, seed=0)
ids, good, bad = torch.tensor([1, 2]), torch.ones(2), torch.ones(3)
q, k = torch.zeros(1, 4, 5, 8), torch.zeros(1, 2, 6, 8)
wrong = [
    lambda: token_nll(torch.zeros(2, 4), lambda h: h @ torch.zeros(4, 9), ids, bad, parameters=[], denominator=1.0, chunk=9),
    lambda: token_nll(torch.zeros(1, 4), lambda h: h @ torch.zeros(4, 9), ids, bad[:1], parameters=[], denominator=1.0, chunk=9),
    lambda: token_nll(torch.zeros(2, 4), lambda h: h @ torch.zeros(4, 9), good, good, parameters=[], denominator=1.0, chunk=9),
    lambda: attend_documents(None, q, k, k, None),
    lambda: plan_packs(np.ones((2, 2), int), np.array([0]), batch_tokens=8, capacity_tokens=6, seed=0),
]
for call in wrong:
    try:
        call()
    except TypeCheckError:
        print("told")
"""


def test_shape_annotations_hold_and_would_tell(tiny_model: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHECKED, str(tiny_model)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["told"] * 5
