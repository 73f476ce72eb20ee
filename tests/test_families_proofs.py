"""What the proofs of a family must catch, and what keeps a pack's documents, its filler and its experts apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from educe.config import Lora  # noqa: E402
from educe.errors import ModelError  # noqa: E402
from educe.model.adapters import expert_matrices, linear_layers  # noqa: E402
from educe.model.attention import attend_documents  # noqa: E402
from educe.model.load import CausalLM, load_model, quiet  # noqa: E402
from educe.model.mixers import mixers_of  # noqa: E402
from educe.model.proof import packs_are_blind, prove_head  # noqa: E402
from educe.pack.batch import build_batch  # noqa: E402
from educe.types import Example  # noqa: E402
from torch import nn  # noqa: E402
from transformers import AttentionInterface  # noqa: E402
from transformers.masking_utils import AttentionMaskInterface  # noqa: E402

from families import FAMILIES, make, table  # noqa: E402
from test_engine import FULL, LORA, Tensors, _one_thread, apart, cpu, gradients  # noqa: E402, F401
from test_families import rows  # noqa: E402

STATEFUL = ["Qwen3.5 (text)", "Falcon-H1", "Bamba", "Nemotron-H"]


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of the models, by family; made where they are asked for."""

    class Made(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = tmp_path_factory.mktemp("family")
            with quiet():
                make(FAMILIES[name]).save_pretrained(self[name])
            return self[name]

    return Made()


def document(length: int, seed: int) -> Example:
    ids = np.random.default_rng(seed).integers(3, 120, length).astype(np.int32)
    return Example(ids_T=ids, weights_T=(np.arange(length) > 0).astype(np.float32))


def recomputing(model: CausalLM) -> CausalLM:
    model.recompute(len(model.layers))
    return model


# Leaks


@pytest.mark.parametrize("family", STATEFUL)
def test_a_state_that_runs_on_into_the_next_document_is_found(places: dict[str, Path], family: str) -> None:
    model = load_model(places[family], cpu(), FULL)
    assert packs_are_blind(model)
    mixers = mixers_of(model.base.get_decoder())
    assert mixers
    for mixer in mixers.values():
        del mixer.forward  # the class's own again: one run over the whole row
    assert not packs_are_blind(model)
    prove_head(model)  # alone it is right: only packing leaks


@pytest.mark.parametrize("family", STATEFUL)
def test_documents_of_a_pack_are_what_they_are_alone(places: dict[str, Path], family: str) -> None:
    """States of a pack and of its rows alone differ by rounding only."""
    model = load_model(places[family], cpu(), FULL)
    model.network.eval()
    with torch.no_grad():
        packed = model.hidden_states(build_batch(rows()))
        alone = torch.cat([model.hidden_states(build_batch([row])) for row in rows()])
    assert apart(packed, alone) < 2e-6


def test_checkpointing_and_a_forward_in_between_keep_the_boundaries(places: dict[str, Path]) -> None:
    """Activations are computed again in the backward pass, after a forward of another row: with this row's boundaries."""
    from educe.training.sft import sft_loss

    def interrupted(model: CausalLM) -> Tensors:
        out = sft_loss(model, build_batch(rows()), 50.0)
        with torch.no_grad():
            model.hidden_states(build_batch([document(40, 1), document(2, 2)]))
        out.loss.backward()
        return {n: p.grad for n, p in model.trainable().items()}

    for family in ("Qwen3.5 (text)", "Falcon-H1"):
        plain = interrupted(load_model(places[family], cpu(), FULL))
        again = interrupted(recomputing(load_model(places[family], cpu(), FULL)))
        assert max(apart(again[n], g) for n, g in plain.items()) < 1e-6


@pytest.mark.parametrize("family", ["Llama", "Qwen3-MoE", "gpt-oss", "Gemma 2", "Gemma 4 (text)", *STATEFUL, "Jamba"])
def test_head_and_blindness_are_proved_in_bf16_too(places: dict[str, Path], family: str) -> None:
    model = load_model(places[family], cpu("bfloat16"), FULL)
    prove_head(model)
    assert packs_are_blind(model) is FAMILIES[family].packed


def attend_without(name: str) -> Any:
    def attend(*args: Any, **kwargs: Any) -> Any:
        return attend_documents(*args, **{k: v for k, v in kwargs.items() if k != name})

    return attend


@pytest.mark.parametrize(
    ("family", "feature"),
    [("Mistral", "sliding_window"), ("Gemma 3 (text)", "sliding_window"), ("gpt-oss", "s_aux"), ("Gemma 2", "softcap")],
)
@pytest.mark.parametrize("window", [6, 4096])
def test_attention_without_a_feature_of_the_family_is_refused(
    places: dict[str, Path], family: str, feature: str, window: int
) -> None:
    """Windows of thousands of tokens too, with a document of 16: the proof shortens them."""
    model = load_model(places[family], cpu(), FULL)
    for owner in (model.base.config, *model.base.modules()):
        if getattr(owner, "sliding_window", None):
            owner.sliding_window = window
    if feature == "softcap":
        for layer in model.base.get_decoder().layers:
            layer.self_attn.attn_logit_softcapping = 0.5  # scores of a tiny model come nowhere near Gemma's 50
    prove_head(model)
    AttentionInterface.register("without", attend_without(feature))
    AttentionMaskInterface.register("without", lambda *_, **__: None)
    model.base.set_attn_implementation("without")
    with pytest.raises(ModelError, match="E-MODEL-204"):
        prove_head(model)


# Filler


def seen(model: CausalLM, *lengths: int) -> tuple[int, torch.Tensor]:
    """Tokens that the decoder was given, and the states that came back."""
    given: list[int] = []
    hook = model.base.get_decoder().register_forward_pre_hook(
        lambda _m, _a, kwargs: given.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    model.network.eval()
    with torch.no_grad():
        states = model.hidden_states(build_batch([document(n, 3) for n in lengths]))
    hook.remove()
    return given[0], states


def test_filler_is_a_document_of_its_own_and_changes_nothing(places: dict[str, Path]) -> None:
    for family in ("Llama", "Falcon-H1", "Qwen3-MoE"):
        model = load_model(places[family], cpu(), FULL)
        with_filler, states = seen(model, 9, 12)
        model.packable = False
        without, plain = seen(model, 9, 12)
        assert (with_filler, without) == (32, 21)
        assert apart(states, plain) < 1e-6


def test_nothing_is_put_beside_a_document_that_cannot_be_packed(places: dict[str, Path]) -> None:
    model = load_model(places["Falcon Mamba"], cpu(), FULL)
    assert not packs_are_blind(model)
    tokens, states = seen(model, 9)
    assert tokens == 9
    ids = torch.tensor(document(9, 3).ids_T, dtype=torch.int64)[None]
    with model.answering():
        theirs = model.base(input_ids=ids, use_cache=False).logits[0]
    with torch.no_grad():
        assert torch.equal(model.head(states), theirs)


# Adapters


@pytest.mark.parametrize("family", list(FAMILIES))
def test_adapters_are_on_every_linear_layer_and_all_experts(places: dict[str, Path], family: str) -> None:
    from peft.tuners.lora.layer import LoraLayer

    plain = load_model(places[family], cpu(), FULL).network
    decoder, head = plain.get_decoder(), plain.get_output_embeddings()
    linear = {m: n for n, m in plain.named_modules() if isinstance(m, nn.Linear) and m is not head}
    inside = {linear[m] for m in decoder.modules() if m in linear}
    left = inside - set(linear_layers(plain))
    assert {name.rpartition(".")[2] for name in left} == FAMILIES[family].unadapted
    assert all("mamba" in name or "mixer" in name for name in left)

    adapted = load_model(places[family], cpu(), LORA).network
    layers = [m for m in adapted.modules() if isinstance(m, LoraLayer)]
    assert len(layers) == len(linear_layers(plain)) + len(expert_matrices(plain))
    assert bool(expert_matrices(plain)) == ("experts" in FAMILIES[family].note)
    assert not any(m.lora_bias["default"] for m in layers)


def test_dropout_on_fused_experts_is_refused(places: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=r"E-MODEL-204.*tuning\.dropout"):
        load_model(places["gpt-oss"], cpu(), Lora(kind="lora", rank=2, dropout=0.1))
    load_model(places["Llama"], cpu(), Lora(kind="lora", rank=2, dropout=0.1))


def test_the_readme_has_the_matrix_as_it_is_tested() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert table() in readme
