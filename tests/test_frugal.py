"""Time for memory and back: layers computed again, activations on the host, layers that are compiled."""

from __future__ import annotations

import contextlib
import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import educe  # noqa: E402
import educe.model.load as loading  # noqa: E402
from educe.config import Full, Lora  # noqa: E402
from educe.errors import MachineError, RecipeError  # noqa: E402
from educe.model.compiled import why_not_trained  # noqa: E402
from educe.model.documents import Documents  # noqa: E402
from educe.model.frugal import why_not_compiled  # noqa: E402
from educe.model.load import CausalLM, load_model  # noqa: E402
from educe.model.proof import packs_are_blind, random_batch  # noqa: E402
from educe.pack.batch import build_batch  # noqa: E402
from educe.recipes import estimate  # noqa: E402
from educe.training.sft import SftLoss, held_out_loss  # noqa: E402
from educe.types import Batch  # noqa: E402

from test_engine import EXACT, FULL, LORA, Tensors, _one_thread, apart, cpu, examples, gradients, groups  # noqa: E402, F401
from test_engine_state import DROPPING  # noqa: E402
from test_keeping import Dying, final, made, place, recipe, same, story  # noqa: E402, F401

ROW = 112  # tokens of a compiled row
can_compile = pytest.mark.skipif(bool(why_not_compiled("cpu")), reason=why_not_compiled("cpu"))

# Computed again


def begun(tiny_model: Path, tuning: Full | Lora) -> CausalLM:
    torch.manual_seed(5)
    model = load_model(tiny_model, cpu(), tuning)
    if isinstance(tuning, Lora):
        with torch.no_grad():
            for p in model.trainable().values():
                p.normal_(0, 0.1)
    return model


def seeded(model: CausalLM, batches: list[Batch]) -> tuple[float, Tensors]:
    torch.manual_seed(11)
    return gradients(model, batches)


@pytest.mark.parametrize("tuning", [FULL, LORA, DROPPING], ids=["full", "lora", "lora with dropout"])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_what_is_computed_again_has_the_same_gradients(tiny_model: Path, tuning: Full | Lora, count: int) -> None:
    """To the bit, dropout included; of some layers or of all."""
    plain, again = begun(tiny_model, tuning), begun(tiny_model, tuning)
    again.recompute(count)
    again.recompute(1)  # changes nothing
    batches = groups(examples(6), 3)
    (loss, expected), (found_loss, found) = seeded(plain, batches), seeded(again, batches)
    assert found_loss == loss
    assert found.keys() == expected.keys()
    assert all(torch.equal(g, expected[n]) for n, g in found.items())
    if tuning is DROPPING:
        assert seeded(plain, batches)[0] == loss != gradients(plain, batches)[0]


def test_what_is_computed_again_has_its_adapters_though_the_pull_to_the_base_turned_them_off(tiny_model: Path) -> None:
    plain, again = begun(tiny_model, LORA), begun(tiny_model, LORA)
    again.recompute(2)
    batches, pulled = groups(examples(6), 3), SftLoss(beta=0.5)
    (loss, expected), (found_loss, found) = (gradients(m, batches, pulled) for m in (plain, again))
    assert found_loss == loss != gradients(plain, batches)[0]
    assert all(torch.equal(g, expected[n]) for n, g in found.items())


@pytest.mark.parametrize("count", [0, 1, 2])
def test_fewer_activations_are_kept(tiny_model: Path, count: int) -> None:
    def kept(model: CausalLM) -> int:
        sizes: list[int] = []
        batch = groups(examples(6), 6)[0]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
            model.hidden_states(batch)
        return sum(sizes)

    less, more = begun(tiny_model, FULL), begun(tiny_model, FULL)
    less.recompute(count + 1)
    more.recompute(count)
    assert kept(less) < 0.75 * kept(more) or (count == 2 and kept(less) == kept(more))


# Kept on the host


@pytest.mark.parametrize("verb", [educe.check, educe.train])
def test_offloading_is_refused_where_there_is_no_gpu(place: Path, verb: Any) -> None:  # noqa: F811
    with pytest.raises(RecipeError, match=r"E-RECIPE-201 train.activations.*auto or recompute") as refused:
        verb(recipe(place, "offloaded", activations="offload"))
    assert "is the host's" in str(refused.value)
    assert not list((place / "runs").glob("offloaded/checkpoints/*"))


# Compiled


def compilations() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.fixture(scope="module")
def compiled(tiny_model: Path) -> Iterator[tuple[CausalLM, str]]:
    """A tiny Llama with compiled layers, and what is wrong with them."""
    if why_not_compiled("cpu"):
        pytest.skip(why_not_compiled("cpu"))
    from torch._inductor import config, cpu_vec_isa
    from torch._inductor.utils import fresh_cache

    torch._dynamo.reset()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = begun(tiny_model, FULL)
    model.compile(ROW)
    with pytest.MonkeyPatch.context() as patch, config.patch(compile_threads=1), fresh_cache():
        patch.setattr(
            cpu_vec_isa, "valid_vec_isa_list", list
        )  # plain loops: finding out what the CPU has takes as long again
        yield model, why_not_trained(model, ROW)
    torch.set_num_threads(threads)
    torch._dynamo.reset()


def test_compiled_layers_train_as_written_ones_and_compile_no_more(
    tiny_model: Path, compiled: tuple[CausalLM, str]
) -> None:
    """Over rows of all lengths, with documents of all lengths, after the proof, which has compiled all there is."""
    model, fault = compiled
    assert fault == ""
    before, calls = compilations(), int(torch._dynamo.utils.counters["stats"]["calls_captured"])
    assert before > 0
    assert calls > 20  # it is no empty graph
    plain = begun(tiny_model, FULL)
    for seed in range(6):
        rows = examples(2 + seed % 3, seed)
        batches = [b for b in groups(rows, 1 + seed % 3) if b.num_tokens <= ROW]
        (loss, expected), (found_loss, found) = gradients(plain, batches), gradients(model, batches)
        assert found_loss == pytest.approx(loss, rel=1e-3)
        assert max(apart(g, expected[n]) for n, g in found.items()) < 1e-3
    assert compilations() == before


def test_other_passes_run_as_written(tiny_model: Path, compiled: tuple[CausalLM, str]) -> None:
    """To the bit, with no filler: their shapes vary."""
    model, _ = compiled
    before, plain = compilations(), begun(tiny_model, FULL)
    for size in (5, 2, 1):
        batches = groups(examples(5), size)
        assert held_out_loss(model, batches).mean == held_out_loss(plain, batches).mean
    batch = random_batch(model.vocabulary)
    ids = torch.tensor(batch.ids_P)[None]
    with model.answering(), plain.answering():
        assert torch.equal(model.base(input_ids=ids).logits, plain.base(input_ids=ids).logits)
    assert compilations() == before


def test_a_leak_in_compiled_layers_is_found(compiled: tuple[CausalLM, str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = compiled
    monkeypatch.setattr(loading, "documents_of", lambda lengths, kind: Documents(lengths=(sum(lengths),)))
    assert why_not_trained(model, ROW) == "packing would leak between examples"
    monkeypatch.undo()
    assert why_not_trained(model, ROW) == ""
    assert all(p.grad is None for p in model.trainable().values())


def test_layers_that_compute_something_else_are_found(
    compiled: tuple[CausalLM, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a compiler's mistake would: what is compiled is scaled."""
    model, _ = compiled
    layer = model.layers[0]
    right = layer._compiled_call_impl
    layer._compiled_call_impl = lambda *args, **kwargs: (
        1.01 * right(*args, **kwargs) if stance() else right(*args, **kwargs)
    )
    try:
        assert "something else" in why_not_trained(model, ROW)
    finally:
        layer._compiled_call_impl = right


def stance() -> bool:
    """Whether compiled layers run compiled."""
    return bool(torch._dynamo.eval_frame._stance.stance == "default")


@pytest.mark.slow
@can_compile
@pytest.mark.parametrize("tuning", [LORA, DROPPING], ids=["lora", "lora with dropout"])
def test_compiled_adapters_and_layers_computed_again(tiny_model: Path, tuning: Lora) -> None:
    torch._dynamo.reset()
    model, plain = begun(tiny_model, tuning), begun(tiny_model, tuning)
    model.recompute(1)
    model.compile(ROW)
    assert why_not_trained(model, ROW) == ""
    before = compilations()
    for seed in range(4):
        batches = [b for b in groups(examples(4, seed), 2) if b.num_tokens <= ROW]
        (loss, expected), (found_loss, found) = seeded(plain, batches), seeded(model, batches)
        if tuning is LORA:
            assert found_loss == pytest.approx(loss, rel=1e-3)
            assert max(apart(g, expected[n]) for n, g in found.items()) < 1e-3
        assert seeded(model, batches)[0] == found_loss
    assert compilations() == before
    assert packs_are_blind(model)


@pytest.mark.slow
@can_compile
def test_halved_rows_compile_once_more_and_no_oftener(tiny_model: Path) -> None:
    torch._dynamo.reset()
    model, plain = begun(tiny_model, FULL), begun(tiny_model, FULL)
    model.compile(8 * 128)
    assert why_not_trained(model, 8 * 128) == ""
    model.fill_less(128)
    counts = []
    for k in (1, 6, 14, 20, 30, 9, 3):
        batch = build_batch(examples(k, seed=k))
        (loss, _), (found, _) = gradients(plain, [batch]), gradients(model, [batch])
        assert found == pytest.approx(loss, rel=1e-3)
        counts.append(compilations())
    assert len(set(counts[2:])) == 1


# Where compiling fails


@pytest.fixture
def broken_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A C++ compiler that says which version it is, and compiles nothing; and a recipe for which compiling would pay."""
    from torch._inductor import config, cpp_builder
    from torch._inductor.utils import fresh_cache

    broken = tmp_path / "g++"
    broken.write_text('#!/bin/sh\ncase "$*" in *version*) echo "g++ 13.0.0";; *) echo "no room" >&2; exit 1;; esac\n')
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setitem(estimate._COMPILE_S, "cpu", 0.0)
    torch._dynamo.reset()
    cpp_builder.cpp_compiler_search.cache_clear()
    with config.patch({"cpp.cxx": (None, str(broken))}), fresh_cache():
        yield
    cpp_builder.cpp_compiler_search.cache_clear()
    torch._dynamo.reset()


@pytest.mark.usefixtures("broken_compiler")
def test_auto_goes_on_without_and_says_so(place: Path) -> None:  # noqa: F811
    said: list[str] = []
    run = educe.train(recipe(place, "auto", epochs=1), say=said.append)
    assert run.finished
    assert not made(run.path)["compiled"]
    assert any(line.startswith("layers are compiled: ") for line in said)
    (line,) = [line for line in said if line.startswith("layers are not compiled after all: ")]
    assert "cannot be compiled here" in line
    other = educe.train(recipe(place, "off", epochs=1, compile='"off"'))
    assert same(final(run.path), final(other.path))


@pytest.mark.usefixtures("broken_compiler")
def test_on_ends_with_advice(place: Path) -> None:  # noqa: F811
    with pytest.raises(MachineError) as refused:
        educe.train(recipe(place, "on", epochs=1, compile='"on"'))
    assert refused.value.code == "E-SYS-005"
    assert "cannot be compiled here" in str(refused.value)
    assert "train.compile: off" in str(refused.value)


@pytest.mark.slow
@can_compile
def test_a_compiled_run_resumes_to_the_bit(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Compiled, since it began so, even where it would not be begun so now."""
    path = recipe(place, "again", epochs=4, checkpoint_every_steps=3)
    monkeypatch.setitem(estimate._COMPILE_S, "cpu", 0.0)
    with contextlib.suppress(MemoryError):
        educe.train(path, screen=Dying(step=4))
    monkeypatch.undo()
    monkeypatch.chdir(place)
    said: list[str] = []
    resumed = educe.train(path, say=said.append).path
    assert "layers are compiled: as the run began" in said
    assert made(resumed)["compiled"]
    monkeypatch.setitem(estimate._COMPILE_S, "cpu", 0.0)
    straight = educe.train(recipe(place, "straight", epochs=4, checkpoint_every_steps=3)).path
    assert same(final(resumed), final(straight))
    assert json.dumps(story(resumed)) == json.dumps(story(straight))
