"""Adapters of every kind: the fused layer is peft's, merging is exact; a base in 4 bits is NF4, has the right gradients, resumes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
import educe  # noqa: E402
from educe.config import Lora, Recipe  # noqa: E402
from educe.errors import MachineError, ModelError  # noqa: E402
from educe.model import four_bit  # noqa: E402
from educe.model.adapted import AdaptedLinear, _Adapted  # noqa: E402
from educe.model.describe import describe_model  # noqa: E402
from educe.model.export import merged, put  # noqa: E402
from educe.model.load import CausalLM, load_model  # noqa: E402
from educe.recipes.memory import FOUR_BIT_BYTES, num_trained, plan_memory  # noqa: E402
from educe.recipes.rates import advise_rate, stretch_of  # noqa: E402
from educe.training.checkpoint import load_checkpoint, newest_checkpoint  # noqa: E402
from educe.training.loop import LoopConfig, train  # noqa: E402
from educe.training.optim import Adam, AdamSettings  # noqa: E402
from educe.training.sft import sft_loss  # noqa: E402
from educe.training.state import State  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from conftest import write_tokenizer  # noqa: E402
from saving import saved  # noqa: E402
from small_runs import recipe as recipe_file  # noqa: E402
from small_runs import small_place  # noqa: E402
from test_engine import EXACT, _one_thread, apart, cpu, examples, gradients, groups  # noqa: E402, F401
from test_memory import device, facts, pack_plan  # noqa: E402

# Dettmers et al. 2023 (arXiv 2305.14314), appendix E.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "lora": {}, "rslora": {"variant": "rslora"}, "dora": {"variant": "dora"}, "qlora": {"base_bits": 4},
    "qdora": {"variant": "dora", "base_bits": 4},
}  # fmt: skip
kinds = pytest.mark.parametrize("kind", list(KINDS))


def tuning(kind: str, rank: int = 4, **more: Any) -> Lora:
    if KINDS[kind].get("base_bits") == 4:
        pytest.importorskip("bitsandbytes")
    return Lora(kind="lora", rank=rank, **{**KINDS[kind], **more})


def moved(model: CausalLM) -> CausalLM:
    """Away from where adapters begin: there half of them would have no gradient."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.trainable().values():
            p.add_(0.05 * torch.randn(p.shape, generator=generator).to(p.dtype))
    return model


def logits(model: CausalLM) -> torch.Tensor:
    ids = torch.arange(5, 69)[None]
    with model.answering():
        found: torch.Tensor = model.network(input_ids=ids, use_cache=False).logits
    return found.float()


def masters_of(model: CausalLM, file: Path) -> Path:
    save_file({n: p.detach().float().contiguous() for n, p in model.trainable().items()}, file)
    return file


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like the tiny one, with inputs that fill blocks of 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    place = tmp_path_factory.mktemp("wide")
    write_tokenizer(place)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=2, bos_token_id=1,
        pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(place)
    return place


# One operation in place of peft's four


def test_the_fused_operation_has_the_gradients_of_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w, bias, a, b = (
        torch.randn(*s, dtype=torch.float64, generator=generator) for s in ((2, 3, 5), (4, 5), (4,), (2, 5), (4, 2))
    )
    given = [t.requires_grad_() for t in (x, a, b)]
    assert torch.autograd.gradcheck(lambda x, a, b: _Adapted.apply(x, w, bias, a, b, 1.7), given)
    assert torch.allclose(_Adapted.apply(x, w, bias, a, b, 1.7), x @ (w + 1.7 * b @ a).T + bias)


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_the_fused_layer_is_pefts(tiny_model: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = moved(load_model(tiny_model, cpu(), tuning(kind)))
    assert sum(isinstance(m, AdaptedLinear) for m in model.network.modules()) == 14
    loss, ours = gradients(model, groups(examples(), 4))
    with monkeypatch.context() as patch:
        patch.delattr(AdaptedLinear, "forward")
        peft_loss, theirs = gradients(model, groups(examples(), 4))
    assert loss == pytest.approx(peft_loss, rel=EXACT)
    assert ours.keys() == theirs.keys() == model.trainable().keys()
    assert max(apart(ours[n], g) for n, g in theirs.items()) < 2 * EXACT
    assert any(not torch.equal(ours[n], g) for n, g in theirs.items())  # two ways, not one compared with itself


def test_frozen_weights_get_no_gradient_and_are_not_kept_in_the_graph(tiny_model: Path) -> None:
    model = moved(load_model(tiny_model, cpu(), tuning("lora")))
    gradients(model, groups(examples(), 8))
    frozen = [p for p in model.network.parameters() if not p.requires_grad]
    assert frozen
    assert all(p.grad is None for p in frozen)


# Merging


@pytest.fixture(params=["tiny", "stories260k"])
def real_model(request: pytest.FixtureRequest) -> Path:
    if request.param == "tiny":
        return Path(request.getfixturevalue("tiny_model"))
    return Path(request.getfixturevalue("shared")) / "models" / "stories260k"


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_is_adapted(real_model: Path, kind: str, dtype: Any, tmp_path: Path) -> None:
    """In fp32 logits differ by at most 1e-4; in bf16, where merging rounds the weights once more, by 4 % of what adapters change."""
    torch.manual_seed(0)
    model = moved(load_model(real_model, cpu(dtype), tuning(kind)))
    file = masters_of(model, tmp_path / "weights.safetensors")
    base = logits(load_model(real_model, cpu(dtype)))
    adapted, whole = logits(model), logits(merged(real_model, file, tuning(kind), cpu(dtype)))
    change = float((adapted - base).abs().max())
    assert change > 0.1
    off = float((adapted - whole).abs().max())
    print(f"{real_model.name} {kind} {dtype}: max |difference| {off:.2e} of a change of {change:.2f}")
    assert off <= (1e-4 if dtype == "float32" else 0.04 * change)


@pytest.mark.parametrize("kind", ["qlora", "qdora"])
def test_a_4_bit_run_is_merged_into_the_published_base(wide_model: Path, kind: str, tmp_path: Path) -> None:
    whole = tuning(kind).model_copy(update={"base_bits": 16})
    torch.manual_seed(0)
    file = masters_of(moved(load_model(wide_model, cpu(), tuning(kind))), tmp_path / "weights.safetensors")
    on_published = load_model(wide_model, cpu(), whole)
    put(load_file(file), on_published)
    found = logits(merged(wide_model, file, tuning(kind), cpu()))
    assert float((found - logits(on_published)).abs().max()) <= 1e-4


# The base in 4 bits


def test_4_bits_are_nf4_with_scales_in_8_bits(wide_model: Path) -> None:
    """Against the published table and a plain quantiser: each block of 64 over its largest, to the nearest code."""
    pytest.importorskip("bitsandbytes")
    plain = load_file(wide_model / "model.safetensors")
    model = load_model(wide_model, cpu(), tuning("qlora"))
    table, seen = np.array(NF4), 0
    for name, p in model.network.named_parameters():
        if not four_bit.is_four_bit(p):
            continue
        seen += 1
        stem = name.removeprefix("base_model.model.").replace(".base_layer", "")
        blocks = plain[stem].double().numpy().reshape(-1, 64)
        largest = np.abs(blocks).max(1, keepdims=True)
        scale = np.abs(four_bit.dense(p.data, p.quant_state).double().numpy().reshape(-1, 64)).max(1, keepdims=True)
        spread = np.abs(largest - largest.mean()).max()  # scales are kept less their mean, in 8 bits
        assert np.abs(scale - largest).max() <= 0.01 * spread, name
        codes = np.abs(blocks[:, :, None] / largest[:, :, None] - table).argmin(-1)
        packed = four_bit.dense(p.data, p.quant_state).double().numpy().reshape(-1, 64)
        assert np.allclose(packed, table[codes] * scale, rtol=1e-6, atol=1e-9), name
        assert p.dtype == torch.uint8
        assert p.numel() == blocks.size // 2
        assert p.quant_state.nested
    assert seen == 14
    assert four_bit.num_packed(model.network) == sum(
        t.numel() for n, t in plain.items() if "proj" in n
    )  # embedding, norms and head are not


def test_layers_whose_rows_do_not_fill_blocks_stay_in_16_bits(tiny_model: Path) -> None:
    model = load_model(tiny_model, cpu(), tuning("qlora"))  # 32 wide, 64 between
    packed = [n for n, p in model.network.named_parameters() if four_bit.is_four_bit(p)]
    assert len(packed) == 2
    assert all("down_proj" in n for n in packed)


def test_4_bits_that_no_layer_can_have_are_refused(tmp_path: Path) -> None:
    from families import FAMILIES, make

    qlora = tuning("qlora")
    make(FAMILIES["Qwen3-MoE"]).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"E-MODEL-204.*none can be in 4 bits.*base_bits: 16"):
        load_model(tmp_path, cpu(), qlora)


def test_gradients_on_4_bits_are_those_of_the_dequantised_base_in_float64(
    wide_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By peft's own layer on plain weights."""
    torch.manual_seed(0)
    model = moved(load_model(wide_model, cpu(), tuning("qlora")))
    loss, ours = gradients(model, groups(examples(), 4))
    torch.manual_seed(0)
    exact = moved(load_model(wide_model, cpu(), tuning("lora")))
    with torch.no_grad():
        for (_, p), (_, q) in zip(model.network.named_parameters(), exact.network.named_parameters(), strict=True):
            q.copy_(four_bit.dense(p, getattr(p, "quant_state", None)))
    exact.network.double()
    monkeypatch.delattr(AdaptedLinear, "forward")
    monkeypatch.setattr(type(exact.device), "torch_dtype", property(lambda _: torch.float64))
    exact_loss, theirs = gradients(exact, groups(examples(), 4))
    assert loss == pytest.approx(exact_loss, rel=1e-5)
    assert ours.keys() == theirs.keys()
    assert max(apart(ours[n], g) for n, g in theirs.items()) < 1e-5


def test_answering_does_not_take_the_gradients_away(wide_model: Path) -> None:
    """bitsandbytes rearranges codes for answering on some CPUs; through those no gradient flows."""
    model = moved(load_model(wide_model, cpu("bfloat16"), tuning("qlora")))
    _, before = gradients(model, groups(examples(), 8))
    with model.answering():
        model.network(input_ids=torch.arange(9)[None])
    with model.as_loaded(), torch.no_grad():
        model.hidden_states(groups(examples(), 8)[0])
    _, after = gradients(model, groups(examples(), 8))
    assert all(torch.equal(g, after[n]) for n, g in before.items())


def test_a_nan_behind_4_bits_is_seen(wide_model: Path, tmp_path: Path) -> None:
    qlora = tuning("qlora")
    for file in wide_model.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    name = next(n for n in weights if n.endswith("q_proj.weight"))
    weights[name][0, 0] = torch.nan
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=rf"E-MODEL-203.*{name} holds NaN"):
        load_model(tmp_path, cpu(), qlora)


def test_4_bits_without_bitsandbytes_are_refused(wide_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r"E-SYS-001.*bitsandbytes is not installed.*base_bits: 16"):
        load_model(wide_model, cpu(), Lora(kind="lora", base_bits=4))


# Steps and whole runs


def fresh(model_dir: Path, kind: str) -> State:
    torch.manual_seed(5)
    model = load_model(model_dir, cpu("bfloat16"), tuning(kind))
    return State(model=model, optimizer=Adam(model.trainable(), AdamSettings()))


def steps(state: State, until: int) -> list[float]:
    losses: list[float] = []

    def stop(state: State, report: Any) -> bool:
        losses.append(report.loss)
        return report.step == until

    config = LoopConfig(total_steps=8, learning_rate=1e-1, warmup_share=0.0, schedule="constant", clip_norm=1.0, seed=1)
    train(state, lambda _: groups(examples(3), 2), sft_loss, [stop], config)
    return losses


@pytest.mark.parametrize("kind", ["dora", "qlora"])
def test_the_loss_falls_and_a_resumed_run_has_the_same_bits(wide_model: Path, kind: str, tmp_path: Path) -> None:
    straight, broken = fresh(wide_model, kind), fresh(wide_model, kind)
    losses = steps(straight, 8)
    assert losses[-1] < losses[0] - 0.05
    steps(broken, 4)
    saved(tmp_path, broken, {}, finished=False, keep=1)
    again = fresh(wide_model, kind)
    there = newest_checkpoint(tmp_path, print)
    assert there is not None
    load_checkpoint(*there, again)
    assert steps(again, 8) == losses[4:]
    assert all(torch.equal(m, again.optimizer.masters[n]) for n, m in straight.optimizer.masters.items())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, wide_model: Path) -> Iterator[Path]:
    with small_place(tmp_path_factory, wide_model) as found:
        yield found


@pytest.mark.parametrize("kind", ["qlora", "dora"])
def test_a_whole_run_passes_its_checks_and_is_exported(place: Path, kind: str) -> None:
    given = tuning(kind)
    file = recipe_file(place, kind, epochs=3)
    words = f"tuning: {{kind: lora, rank: 4, variant: {given.variant}, base_bits: {given.base_bits}}}\n"
    file.write_text(file.read_text() + words)
    said: list[str] = []
    run = educe.train(file, say=said.append)
    findings = json.loads((run.path / "preflight.json").read_text())["before"]
    state = {(f["id"], f["name"]): f["verdict"] for f in findings}
    assert "fail" not in state.values()
    assert state["P27", "export and load"] == state["P28", "one step"] == state["P22", "trained parameters"] == "pass"
    out = run.export(place / f"{kind}-out", say=said.append)
    assert out.is_dir()
    low = given.base_bits == 4
    assert any("of the frozen weights are in 4 bits (NF4)" in s for s in said) == low
    assert any("trained on a base in 4 bits, served on the published one" in s for s in said) == low


# What is planned and advised


@kinds
def test_planned_numbers_are_those_of_the_model(wide_model: Path, kind: str) -> None:
    given, about = tuning(kind), describe_model(wide_model, "wide")
    model = load_model(wide_model, cpu(), given)
    assert num_trained(about, given) == sum(p.numel() for p in model.trainable().values())
    made = Recipe.model_validate(
        {"name": "a", "model": "m", "data": {"train": "t.jsonl"}, "tuning": given.model_dump()}
    )
    plans = [
        plan_memory(
            about, made, pack_plan(), device("cpu", "float32"), reach=0.0, trained_share=0.5, memory_bytes=1e12,
            compiled=False, packed=packed,
        )
        for packed in (None, four_bit.num_packed(model.network))
    ]  # fmt: skip
    assert plans[0] == plans[1]
    packed = four_bit.num_packed(model.network)
    held = sum(p.numel() * p.element_size() for p in model.network.parameters() if not p.requires_grad) + packed * (
        FOUR_BIT_BYTES - 0.5
    )
    one_matrix = 4 * 64 * 128 if packed else 0
    assert plans[0].weights == pytest.approx(held + one_matrix, rel=1e-6)


def test_the_rate_goes_with_the_adapters_scale() -> None:
    about = facts(width=2048)

    def at(**more: Any) -> float:
        stretch = stretch_of(Lora(kind="lora", **more))
        return advise_rate(about, lora=True, rows_per_step=128, num_steps=2000, stretch=stretch).value

    assert at(rank=16) == at(rank=256) == at(rank=64, variant="dora")
    assert at(rank=64, variant="rslora") == pytest.approx(at(rank=64) / 8, rel=0.03)
    assert at(rank=64, variant="rslora", alpha=4.0) == at(rank=64)
    why = advise_rate(about, lora=True, rows_per_step=128, num_steps=2000, stretch=8.0).why
    assert "/ 8, the adapters' scale over 32 / rank" in why
