"""The matrix of model families, full and LoRA: loaded, proved, trained as one row at a time would be, saved, served."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from educe.chat.tokens import ChatTokenizer, load_tokenizer  # noqa: E402
from educe.config import Full, Lora  # noqa: E402
from educe.model.attention import answers_with  # noqa: E402
from educe.model.export import merged, write_model  # noqa: E402
from educe.model.load import CausalLM, load_model, quiet  # noqa: E402
from educe.model.proof import packs_are_blind, prove_head  # noqa: E402
from educe.pack.batch import build_batch  # noqa: E402
from educe.sample.local import LocalSampler  # noqa: E402
from educe.training.optim import Adam, AdamSettings  # noqa: E402
from educe.training.sft import sft_loss  # noqa: E402
from educe.types import Batch, Example  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from families import FAMILIES, Family, make  # noqa: E402
from test_engine import FULL, LORA, Tensors, _one_thread, apart, cpu, gradients  # noqa: E402, F401

CLOSE = 1e-6  # of a tensor's norm


@dataclass(frozen=True)
class Saved:
    """A family's model on disk, as its makers would publish it."""

    family: Family
    place: Path

    def load(self, tuning: Full | Lora, *, checkpointing: bool = False) -> CausalLM:
        torch.manual_seed(5)  # adapters start from random numbers
        model = load_model(self.place, cpu(), tuning)
        if checkpointing:
            model.recompute(len(model.layers))
        model.packable = self.family.packed
        return model


@pytest.fixture(scope="session", params=list(FAMILIES))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    family, place = FAMILIES[request.param], tmp_path_factory.mktemp("family")
    with quiet():
        make(family).save_pretrained(place)
    return Saved(family, place)


@pytest.fixture(scope="session")
def tokenizer(tiny_tokenizer_dir: Path) -> ChatTokenizer:
    return load_tokenizer(tiny_tokenizer_dir)


TUNINGS = {"full": FULL, "lora": LORA}
# In each run every family in one of both ways.
PAIRS = [
    pytest.param(name, tuning, id=f"{name}-{how}", marks=pytest.mark.slow if (i + k) % 2 else ())
    for i, name in enumerate(FAMILIES)
    for k, (how, tuning) in enumerate(TUNINGS.items())
]
tunings = pytest.mark.parametrize("saved, tuning", PAIRS, indirect=["saved"])


def rows() -> list[Example]:
    """Documents of 3 to 21 tokens: most are longer than the windows, none is a multiple of 16, ids are none of an image's."""
    rng = np.random.default_rng(7)
    made = []
    for length in (9, 21, 3, 14, 7):
        weights = rng.uniform(0.5, 2, length).astype(np.float32)
        weights[0] = 0
        made.append(Example(ids_T=rng.integers(3, 120, length).astype(np.int32), weights_T=weights))
    return made


def batches(family: Family) -> list[Batch]:
    return [build_batch(rows())] if family.packed else [build_batch([row]) for row in rows()]


def stirred(model: CausalLM) -> CausalLM:
    """With adapters away from zero, where half of them would have no gradient."""
    torch.manual_seed(6)
    with torch.no_grad():
        for name, p in model.trainable().items():
            if "lora_" in name:
                p.normal_(0, 0.1)
    return model


def one_at_a_time(model: CausalLM, dtype: torch.dtype) -> Tensors:
    """Gradients of the same rows by transformers' own forward, attention and experts, one row after the other."""
    model.base.set_attn_implementation("eager")
    model.base.set_experts_implementation("eager")
    model.network.to(dtype).eval()
    total = sum(float(e.weights_T.astype(np.float64).sum()) for e in rows())
    for e in rows():
        ids = torch.tensor(e.ids_T, dtype=torch.int64)
        logits = model.base(input_ids=ids[None], use_cache=False).logits[0, :-1]
        nll = F.cross_entropy(logits, ids[1:], reduction="none")
        ((nll * torch.tensor(e.weights_T[1:])).sum() / total).backward()
    return {n: p.grad for n, p in model.trainable().items() if p.grad is not None}


@tunings
def test_loaded_as_the_checkpoints_class_and_proved(saved: Saved, tuning: Full | Lora) -> None:
    model = saved.load(tuning)
    config = json.loads((saved.place / "config.json").read_text())
    assert type(model.base).__name__ == config["architectures"][0]
    window = getattr(model.base.config.get_text_config(), "sliding_window", None)
    prove_head(model)
    assert packs_are_blind(model) is model.packable is saved.family.packed
    assert (
        getattr(model.base.config.get_text_config(), "sliding_window", None) == window
    )  # was shortened for the proofs


@tunings
def test_gradients_are_those_of_one_row_at_a_time(saved: Saved, tuning: Full | Lora) -> None:
    """With and without checkpointing, in fp32, to 1e-6 of each tensor's norm, or to three times what transformers' own are off
    float64: those in fp32 are up to 2.5e-5 off (Gemma 4, whose scores are not scaled)."""
    found = gradients(stirred(saved.load(tuning)), batches(saved.family))[1]
    theirs = one_at_a_time(stirred(saved.load(tuning)), torch.float32)
    assert found.keys() == theirs.keys()
    far = {n: d for n, g in theirs.items() if (d := apart(found[n], g)) > CLOSE}
    if far:
        exact = one_at_a_time(stirred(saved.load(tuning)), torch.float64)
        off = {n: (apart(found[n], exact[n]), apart(theirs[n], exact[n])) for n in far}
        assert {n: both for n, both in off.items() if both[0] > 3 * both[1]} == {}

    again = gradients(stirred(saved.load(tuning, checkpointing=True)), batches(saved.family))[1]
    assert again.keys() == found.keys()
    assert max(apart(again[n], g) for n, g in found.items()) < CLOSE


@tunings
def test_a_step_moves_all_that_it_should(saved: Saved, tuning: Full | Lora) -> None:
    model = saved.load(tuning)
    before = {n: p.detach().clone() for n, p in model.network.named_parameters()}
    optimizer = Adam(model.trainable(), AdamSettings())
    for _ in range(2):  # the first step moves the second matrix of an adapter, from zero, and only then the first
        for batch in batches(saved.family):
            sft_loss(model, batch, 1.0).loss.backward()
        optimizer.step(1e-3)
    moved = {n for n, p in model.network.named_parameters() if not torch.equal(p, before[n])}
    if isinstance(tuning, Full):
        tower = saved.family.tower
        towers = {n for n in before if tower is not None and (tower in n or "multi_modal_projector" in n)}
        assert before.keys() - moved == towers | {n for n in before if saved.family.stays(n)}
    else:
        assert moved == model.trainable().keys()


@tunings
def test_an_export_has_the_checkpoints_layout_and_answers_the_same(
    saved: Saved, tuning: Full | Lora, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    model = saved.load(tuning)
    torch.manual_seed(9)
    with torch.no_grad():
        for p in model.trainable().values():
            p.add_(0.05 * torch.randn_like(p))
    tuned = logits(model.network, model.base)
    save_file({n: p.detach().contiguous() for n, p in model.trainable().items()}, tmp_path / "weights.safetensors")
    both: list[tuple[Literal["bfloat16", "float32"], float]] = [("bfloat16", 0.1), ("float32", 1e-5)]
    for dtype, near in both[1 if isinstance(tuning, Full) else 0 :]:
        served = merged(saved.place, tmp_path / "weights.safetensors", tuning, cpu(dtype))
        assert apart(logits(served.network, served.base), tuned) < near
        target = tmp_path / dtype
        write_model(served, saved.place, tokenizer, "", target)
        again = load_model(target, cpu(dtype))
        assert torch.equal(logits(again.network, again.base), logits(served.network, served.base))
    assert type(again.base) is type(model.base)
    assert type(again.base.config) is type(model.base.config)
    old, new = tensors(saved.place), tensors(target)
    assert {n: t.shape for n, t in old.items()} == {n: t.shape for n, t in new.items()}
    if saved.family.tower is not None:
        kept = [n for n in old if saved.family.tower in n]
        assert kept
        assert all(torch.equal(old[n], new[n]) for n in kept)


class Numbers:
    """As much of a tokenizer as a sampler asks for: ids are words."""

    def __init__(self, stop: set[int]) -> None:
        self.stop, self.eos = stop, 2

    def decode(self, ids: list[int]) -> str:
        return "".join(f"{i} " for i in ids)


def test_answers_are_those_of_one_prompt_at_a_time_without_a_cache(saved: Saved) -> None:
    """Prompts of several lengths that begin alike, and answers that end at different times."""
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12], [5, 6, 7, 20], [5, 6, 7, 30, 31, 32, 33, 34, 35, 36]]
    model = load_model(saved.place, cpu())
    by_hand = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(6):
            with model.answering():
                ids.append(int(model.network(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        by_hand.append(ids[len(prompt) :])
    stop = by_hand[0][2]
    wanted = [ids[: ids.index(stop)] if stop in ids else ids for ids in by_hand]
    numbers: Any = Numbers({stop})
    sampler = LocalSampler(model, numbers)
    assert [a.text for a in sampler.answer(prompts, 6)] == [numbers.decode(ids) for ids in wanted]
    assert "".join(sampler.stream(prompts[0], 6)) == numbers.decode(wanted[0])


def logits(network: Any, base: Any, ids: torch.Tensor = torch.arange(3, 20)) -> torch.Tensor:  # noqa: B008  # constant
    base.set_attn_implementation(answers_with(type(base), base.config))
    network.eval()
    with torch.no_grad():
        return network(input_ids=ids[None], use_cache=False).logits[0]


def tensors(place: Path) -> Tensors:
    found = {}
    for file in sorted(place.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {n: opened.get_tensor(n) for n in opened.keys()}  # noqa: SIM118  # a file, no dict
    return found
