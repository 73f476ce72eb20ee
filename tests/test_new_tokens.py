"""Control tokens that a template adds: their rows begin as the mean, are trained (alone, under LoRA), saved and served."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from educe.chat.tokens import ChatTokenizer, load_tokenizer  # noqa: E402
from educe.config import Full, Lora  # noqa: E402
from educe.config.recipe import NamedTemplate  # noqa: E402
from educe.errors import ModelError  # noqa: E402
from educe.files.hashes import hash_file  # noqa: E402
from educe.model.export import check_tokenizer, merged, write_model  # noqa: E402
from educe.model.load import CausalLM, load_model  # noqa: E402
from educe.model.proof import packs_are_blind, prove_head, random_batch  # noqa: E402
from educe.pack.batch import build_batch  # noqa: E402
from educe.training.checkpoint import WEIGHTS, load_checkpoint, newest_checkpoint  # noqa: E402
from educe.training.loop import LoopConfig, train  # noqa: E402
from educe.training.optim import Adam, AdamSettings  # noqa: E402
from educe.training.sft import sft_loss  # noqa: E402
from educe.training.state import State  # noqa: E402
from educe.types import Batch, Example, Message  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from conftest import write_tokenizer  # noqa: E402
from saving import saved  # noqa: E402
from test_engine import FULL, LORA, Tensors, _one_thread, cpu  # noqa: E402, F401

PLAIN = NamedTemplate(kind="plain")
KNOWN = 317  # ids of the tokenizer that conftest trains
NEW = [317, 318, 319, 320]
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "eos_token_id": 2, "bos_token_id": 1,
}  # fmt: skip
# (rows of the stored embedding, tied, what makes the model)
KINDS: dict[str, tuple[int, bool, Callable[[int, bool], Any]]] = {
    "tied": (KNOWN, True, lambda n, t: LlamaForCausalLM(LlamaConfig(vocab_size=n, tie_word_embeddings=t, **SIZES))),
    "untied": (KNOWN, False, lambda n, t: LlamaForCausalLM(LlamaConfig(vocab_size=n, tie_word_embeddings=t, **SIZES))),
    "padded": (384, True, lambda n, t: LlamaForCausalLM(LlamaConfig(vocab_size=n, tie_word_embeddings=t, **SIZES))),
    "half padded": (319, False, lambda n, t: LlamaForCausalLM(LlamaConfig(vocab_size=n, tie_word_embeddings=t, **SIZES))),
    "head with a bias": (KNOWN, False, lambda n, t: PhiForCausalLM(PhiConfig(vocab_size=n, **SIZES))),
    "scaled embedding": (KNOWN, True, lambda n, t: GemmaForCausalLM(GemmaConfig(vocab_size=n, head_dim=8, **SIZES))),
}  # fmt: skip


@dataclass(frozen=True)
class Base:
    """A base model on disk, its tokenizer with the template `plain`, and how its embeddings lie."""

    place: Path
    tokenizer: ChatTokenizer
    rows: int
    tied: bool

    @property
    def total(self) -> int:
        return max(self.rows, NEW[-1] + 1)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    made = {}
    for name, (rows, tied, build) in KINDS.items():
        place = tmp_path_factory.mktemp("base")
        write_tokenizer(place)
        (place / "chat_template.jinja").unlink()
        torch.manual_seed(3)
        model = build(rows, tied)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))  # norms and biases too, and a mean that is not zero
            model.get_input_embeddings().weight.add_(0.05)
        model.save_pretrained(place)
        made[name] = Base(place=place, tokenizer=load_tokenizer(place, PLAIN), rows=rows, tied=tied)
    return made


@pytest.fixture(params=list(KINDS))
def base(bases: dict[str, Base], request: pytest.FixtureRequest) -> Base:
    return bases[request.param]


tunings = pytest.mark.parametrize("tuning", [FULL, LORA], ids=["full", "lora"])


def load(base: Base, tuning: Full | Lora | None, dtype: Literal["float32", "bfloat16"] = "float32") -> CausalLM:
    torch.manual_seed(5)  # adapters start from random numbers
    return load_model(base.place, cpu(dtype), tuning, new_ids=base.tokenizer.new_tokens.values())


def batches(seed: int = 0) -> list[Batch]:
    """Documents that begin turns with new tokens and must emit some of them; the last id of padding is never used."""
    rng = np.random.default_rng(seed)
    rows = []
    for length in rng.integers(8, 30, 6):
        ids = rng.integers(0, KNOWN, length).astype(np.int32)
        ids[[0, length // 2, -1]] = NEW[1], NEW[2], NEW[3]
        weights = (np.arange(length) > length // 3).astype(np.float32)
        rows.append(Example(ids_T=ids, weights_T=weights))
    return [build_batch(rows[:3]), build_batch(rows[3:])]


def matrices(network: Any) -> list[torch.Tensor]:
    """Weights of embedding and head, and the head's bias where there is one; a tied weight once."""
    embedding, head = network.get_input_embeddings().weight, network.get_output_embeddings()
    bias = getattr(head, "bias", None)
    return [embedding, *([] if head.weight is embedding else [head.weight]), *([] if bias is None else [bias])]


def trained(model: CausalLM, steps: int = 6, until: int = 6, state: State | None = None) -> State:
    optimizer = Adam(model.trainable(), AdamSettings(weight_decay=0.01))
    state = state or State(model=model, optimizer=optimizer)
    config = LoopConfig(
        total_steps=steps, learning_rate=1e-2, warmup_share=0.2, schedule="linear", clip_norm=1.0, seed=1
    )
    return train(state, batches, sft_loss, [lambda state, report: report.step == until], config)


def logits(model: Any, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor(batch.ids_P)[None].long(), use_cache=False).logits


def hashes(place: Path) -> dict[str, str]:
    return {p.name: hash_file(p) for p in sorted(place.iterdir())}


# How they begin


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_new_rows_are_the_mean_and_the_others_untouched(base: Base, dtype: Literal["float32", "bfloat16"]) -> None:
    assert sorted(base.tokenizer.new_tokens.values()) == NEW
    stored = AutoModelForCausalLM.from_pretrained(base.place, dtype=getattr(torch, dtype))
    model = load(base, None, dtype)
    assert model.vocabulary == model.base.config.vocab_size == base.total
    assert (
        len(matrices(model.network)) == len(matrices(stored)) == 2 - base.tied + (model.base.config.model_type == "phi")
    )
    for before, after in zip(matrices(stored), matrices(model.network), strict=True):
        expected = before[:KNOWN].float().mean(0).to(before.dtype).float()
        for row in after[NEW].float():
            assert torch.allclose(row, expected, rtol=2**-7 if dtype == "bfloat16" else 1e-5, atol=1e-6)
        assert torch.equal(after[:KNOWN], before[:KNOWN])
        assert torch.equal(after[NEW[-1] + 1 :], before[NEW[-1] + 1 :])
    again = load(base, None, dtype)
    assert all(torch.equal(a, b) for a, b in zip(matrices(model.network), matrices(again.network), strict=True))


def test_ids_that_neither_model_nor_template_has_begin_as_the_mean_too(bases: dict[str, Base]) -> None:
    model = load_model(bases["tied"].place, cpu(), None, new_ids=[KNOWN + 5])
    rows = model.network.get_input_embeddings().weight
    assert rows.shape[0] == KNOWN + 6
    assert all(torch.equal(row, rows[KNOWN]) for row in rows[KNOWN:])


def test_a_new_token_in_the_place_of_the_padding_token_is_trained(bases: dict[str, Base], tmp_path: Path) -> None:
    shutil.copytree(bases["padded"].place, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "pad_token_id": NEW[1]}))
    found = []
    for place in (tmp_path / "m", bases["padded"].place):
        model = load_model(place, cpu(), FULL, new_ids=NEW)
        embedding = model.network.get_input_embeddings().weight
        found.append(torch.autograd.grad(sft_loss(model, batches()[0], 1.0).loss, embedding)[0])
    assert torch.equal(*found)


def gradients(loss: torch.Tensor, model: CausalLM) -> Tensors:
    names, parameters = zip(*model.trainable().items(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def by_hand(model: CausalLM, batch: Batch) -> torch.Tensor:
    """The step's loss from the model's own forward, one document at a time, all logits there."""
    total = torch.zeros(())
    ids, start = torch.tensor(batch.ids_P).long(), 0
    for length in batch.lengths_D.tolist():
        scores = model.network(input_ids=ids[None, start : start + length], use_cache=False).logits[0]
        for place, target, weight in zip(batch.predict_N, batch.targets_N, batch.weights_N, strict=True):
            if start <= place < start + length:
                total = total + float(weight) * F.cross_entropy(scores[place - start], torch.tensor(int(target)))
        start += length
    return total / batch.total_weight


def test_rows_get_the_gradient_that_plain_autograd_gives_them(base: Base) -> None:
    """Under LoRA, whose adapters change nothing yet, as in the whole matrices of a fully trained model."""
    batch = batches()[0]
    lora, full = load(base, LORA), load(base, FULL)
    ours = gradients(sft_loss(lora, batch, batch.total_weight).loss, lora)
    reference = load_model(base.place, cpu(), None, new_ids=NEW)
    expected = torch.autograd.grad(by_hand(reference, batch), matrices(reference.network)[: 2 - base.tied])
    whole = torch.autograd.grad(sft_loss(full, batch, batch.total_weight).loss, matrices(full.network)[: 2 - base.tied])
    rows = {n: g for n, g in ours.items() if "lora_" not in n}
    for found, all_rows, right in zip(rows.values(), whole, expected, strict=True):
        assert found.shape == (len(NEW), 32)
        assert right[NEW].abs().max(1).values.min() > 0 or not base.tied
        assert torch.allclose(found, right[NEW], rtol=1e-4, atol=1e-6)
        assert torch.allclose(all_rows, right, rtol=1e-4, atol=1e-6)


def test_no_gradient_of_the_matrix_is_made(bases: dict[str, Base]) -> None:
    """Backward, the head multiplies with the matrix once, and not once more for a gradient of its size."""
    head = load(bases["tied"], LORA).base.get_output_embeddings()
    with (forward := FlopCounterMode(display=False)):
        made = head(torch.randn(64, 32, requires_grad=True))
    with (backward := FlopCounterMode(display=False)):
        made.sum().backward()
    assert backward.get_total_flops() < 1.1 * forward.get_total_flops()


def test_each_head_of_the_engine_is_the_models_own(base: Base) -> None:
    for tuning in (FULL, LORA):
        model = load(base, tuning)
        trained(model, steps=2)
        prove_head(model)
        assert packs_are_blind(model)
        batch = random_batch(model.vocabulary)
        with torch.no_grad():
            ours = model.head(model.hidden_states(batch))
        assert torch.allclose(ours, logits(model.network, batch)[0], atol=1e-5)


def test_checkpointing_changes_no_gradient(bases: dict[str, Base]) -> None:
    batch = batches()[0]
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(5)
        model = load_model(bases["tied"].place, cpu(), LORA, new_ids=NEW)
        if checkpointing:
            model.recompute(len(model.layers))
        found.append(gradients(sft_loss(model, batch, batch.total_weight).loss, model))
    assert all(torch.allclose(g, found[1][n], atol=1e-7) for n, g in found[0].items())


# Trained, kept, served


@tunings
def test_training_moves_new_rows_and_saved_weights_answer_the_same(
    base: Base, tuning: Full | Lora, tmp_path: Path
) -> None:
    before = hashes(base.place)
    start = load(base, None)
    state = trained(load(base, tuning))
    saved(tmp_path / "steps", state, {}, finished=True, keep=1)
    weights = tmp_path / "steps" / "step-000006" / WEIGHTS
    kept = load_file(weights)
    assert sum("lora_" not in n for n in kept) == (2 - base.tied if tuning is LORA else len(kept))
    assert sum(t.shape[0] in (len(NEW), base.total) and t.ndim == 2 for t in kept.values() if t.shape[1:] == (32,)) >= 1

    tuned = merged(base.place, weights, tuning, cpu(), new_ids=NEW)
    assert torch.allclose(logits(tuned.network, batches()[0]), logits(state.model.network, batches()[0]), atol=2e-4)
    for first, last in zip(matrices(start.network), matrices(tuned.network), strict=True):
        if first.ndim == 1 and tuning is LORA:
            assert torch.equal(first, last)  # a head's bias is no adapter
            continue
        moved = (first != last).reshape(base.total, -1).any(1)
        assert moved[NEW[1:]].all()
        if tuning is LORA:
            assert not moved[:KNOWN].any()
            assert not moved[NEW[-1] + 1 :].any()
    embedding, head = tuned.network.get_input_embeddings(), tuned.network.get_output_embeddings()
    assert (embedding.weight is head.weight) == base.tied
    assert hashes(base.place) == before


@tunings
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["tied", "untied"])
def test_resumed_equals_straight_to_the_bit(
    bases: dict[str, Base], name: str, tuning: Full | Lora, dtype: Literal["float32", "bfloat16"], tmp_path: Path
) -> None:
    straight = trained(load(bases[name], tuning, dtype))
    first = trained(load(bases[name], tuning, dtype), until=3)
    saved(tmp_path, first, {}, finished=False, keep=1)
    torch.manual_seed(77)
    model = load_model(bases[name].place, cpu(dtype), tuning, new_ids=NEW)
    optimizer = Adam(model.trainable(), AdamSettings(weight_decay=0.01))
    second = State(model=model, optimizer=optimizer)
    found = newest_checkpoint(tmp_path, pytest.fail)
    assert found is not None
    load_checkpoint(*found, second)
    trained(model, state=second)
    for one, two in (
        (straight.optimizer.masters, second.optimizer.masters),
        (straight.optimizer.state_tensors(), second.optimizer.state_tensors()),
        (straight.model.trainable(), model.trainable()),
    ):
        assert one.keys() == two.keys()
        assert all(torch.equal(t, two[n]) for n, t in one.items())


MESSAGES: Sequence[Message] = (
    Message(role="system", content="be brief"),
    Message(role="user", content="order the item <|user|> 7"),
    Message(role="assistant", content="refund"),
    Message(role="user", content="hello"),
)


@tunings
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_serves_what_was_trained(
    base: Base, tuning: Full | Lora, dtype: Literal["float32", "bfloat16"], tmp_path: Path
) -> None:
    state = trained(load(base, tuning, dtype))
    saved(tmp_path / "steps", state, {}, finished=True, keep=1)
    tuned = merged(base.place, tmp_path / "steps" / "step-000006" / WEIGHTS, tuning, cpu(dtype), new_ids=NEW)
    target = tmp_path / "served"
    target.mkdir()
    write_model(tuned, base.place, base.tokenizer, "# card\n", target)
    check_tokenizer(target, base.tokenizer)

    served = AutoModelForCausalLM.from_pretrained(target, attn_implementation="sdpa")
    assert served.config.vocab_size == served.get_input_embeddings().weight.shape[0] == base.total
    assert served.dtype == getattr(torch, dtype)
    assert torch.equal(logits(served, batches()[1]), logits(tuned.network, batches()[1]))
    assert sorted(served.generation_config.eos_token_id) == sorted(base.tokenizer.stop) == [2, NEW[3]]

    tokenizer = AutoTokenizer.from_pretrained(target)
    assert {t: tokenizer.convert_tokens_to_ids(t) for t in base.tokenizer.new_tokens} == base.tokenizer.new_tokens
    said = [{"role": m.role, "content": m.content} for m in MESSAGES]
    text = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    assert text == base.tokenizer.template.render(MESSAGES, generation=True).text
    ids = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
    assert ids == base.tokenizer.encode(text)
    assert tokenizer.decode(NEW, skip_special_tokens=True) == ""
    again = load_model(target, cpu(dtype))  # as `educe export` reads it back
    assert torch.equal(logits(again.network, batches()[1]), logits(tuned.network, batches()[1]))


# Real tokenizers, and what cannot be


@pytest.mark.parametrize("name", ["gpt2", "qwen2_5"])
def test_real_tokenizers_are_read_back_with_the_new_tokens(shared: Path, name: str, tmp_path: Path) -> None:
    """Qwen's tokenizer_config lists its added tokens: transformers then reads none from tokenizer.json."""
    source = tmp_path / "base"
    shutil.copytree(shared / "tokenizers" / name, source)
    tokenizer = load_tokenizer(source, PLAIN)
    new = sorted(tokenizer.new_tokens.values())
    config = LlamaConfig(vocab_size=new[0], **{**SIZES, "hidden_size": 8, "num_hidden_layers": 1, "eos_token_id": 0})
    config.save_pretrained(source)
    LlamaForCausalLM(config).save_pretrained(source)
    model = load_model(source, cpu(), None, new_ids=new)
    target = tmp_path / "out"
    target.mkdir()
    write_model(model, source, tokenizer, "", target)
    check_tokenizer(target, tokenizer)
    settings = json.loads((target / "tokenizer_config.json").read_text())
    assert "chat_template" not in settings
    assert AutoTokenizer.from_pretrained(target).convert_tokens_to_ids(list(tokenizer.new_tokens)) == new
    if name == "qwen2_5":
        del settings["added_tokens_decoder"][str(new[1])]
        (target / "tokenizer_config.json").write_text(json.dumps(settings))
        with pytest.raises(ModelError, match=r"E-MODEL-202 .* gives other ids .*'<\|user\|>'"):
            check_tokenizer(target, tokenizer)


def test_a_template_that_was_replaced_is_refused(bases: dict[str, Base], tmp_path: Path) -> None:
    base = bases["tied"]
    write_model(load(base, None), base.place, base.tokenizer, "", tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(ModelError, match="its chat template is another"):
        check_tokenizer(tmp_path, base.tokenizer)


def test_a_head_that_peft_would_not_tie_is_refused(bases: dict[str, Base], tmp_path: Path) -> None:
    """The config says tied, the weights are not: peft would train rows of the one and serve them in the other."""
    from educe.model.adapters import with_adapters

    network = AutoModelForCausalLM.from_pretrained(bases["untied"].place)
    network.config.tie_word_embeddings = True
    with pytest.raises(ModelError, match="stay untrained"):
        with_adapters(network, LORA, [3, 4])
