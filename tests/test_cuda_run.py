"""Whole runs on a GPU: killed and gone on with to the same bits, out of memory, hanging kernels, every way of saving memory."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

import educe  # noqa: E402
import transformers as T  # noqa: E402
from educe.config import Full  # noqa: E402
from educe.files.jsonl import read_jsonl  # noqa: E402
from educe.model import attention_flex  # noqa: E402
from educe.model.device import Device  # noqa: E402
from educe.model.load import load_model, quiet  # noqa: E402
from educe.model.proof import packs_are_blind, prove_head  # noqa: E402
from educe.training.loop import accumulate  # noqa: E402
from educe.training.optim import Adam, AdamSettings  # noqa: E402
from educe.training.room import in_room  # noqa: E402
from educe.training.sft import sft_loss  # noqa: E402
from educe.training.state import State  # noqa: E402
from educe.types import Batch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from conftest import write_tokenizer  # noqa: E402
from families import FAMILIES, SLIDING, make, sizes  # noqa: E402
from test_cuda import documents, model_of  # noqa: E402

CLOCK = ("tokens_per_s", "elapsed_s", "peak_memory_bytes", "took_s")
WIDE: dict[str, Any] = {"head_dim": 64, "vocab_size": 512, "hidden_size": 128, "max_position_embeddings": 4096}
MODELS = {
    "qwen": lambda: T.Qwen3ForCausalLM(T.Qwen3Config(**sizes(WIDE))),
    "gemma": lambda: T.Gemma2ForCausalLM(T.Gemma2Config(**sizes(SLIDING, WIDE))),
    "oss": lambda: T.GptOssForCausalLM(
        T.GptOssConfig(**sizes(SLIDING, WIDE, num_local_experts=4, num_experts_per_tok=2))
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Models in bf16, rows, and a cache that all runs share."""
    place = tmp_path_factory.mktemp("cuda")
    for name, build in MODELS.items():
        write_tokenizer(place / name)
        torch.manual_seed(0)
        with quiet():
            build().to(torch.bfloat16).save_pretrained(place / name)
    rows = [(f"track order item {i} the cat", f"order {i * 7 % 13} said hello to the user " * 4) for i in range(240)]
    texts = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in rows]
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, texts)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDUCE_CACHE", str(place / "cache"))
        paths = [str(Path(educe.__file__).parents[1]), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.chdir(place)
        yield place


def recipe(name: str, model: str = "qwen", tuning: str = "{kind: full}", **train: Any) -> list[str]:
    knobs = {
        "epochs": 4, "batch_tokens": 2048, "micro_batch_tokens": 1024, "learning_rate": 1e-3, "checkpoint_every_steps": 5,
        "deterministic": "true", **train,
    }  # fmt: skip
    lines = "".join(f"  {k}: {v}\n" for k, v in knobs.items())
    Path(f"{name}.yaml").write_text(
        f"name: {name}\nmodel: ./{model}\ndevice: cuda\ndata: {{train: rows.jsonl, max_tokens: 256}}\ntuning: {tuning}\n"
        f"train:\n{lines}evaluation: {{max_new_tokens: 8, few_shot: 0, metric: {{kind: exact}}}}\n",
        encoding="utf-8",
    )
    return ["train", f"{name}.yaml"]


def command(*words: str, script: Sequence[str] = ("-m", "educe"), limit_s: float = 300) -> tuple[int, str]:
    done = subprocess.run([sys.executable, *script, *words], capture_output=True, text=True, timeout=limit_s)
    return done.returncode, done.stdout + done.stderr


def trained(name: str, *args: Any, **kwargs: Any) -> str:
    code, said = command(*recipe(name, *args, **kwargs))
    assert code == 0, said[-3000:]
    return said


def final(run: Path) -> dict[str, torch.Tensor]:
    (checkpoint,) = (run / "checkpoints").iterdir()
    return load_file(checkpoint / "weights.safetensors")


def story(run: Path) -> list[Any]:
    lines = [x for f in ("metrics", "samples") for x in read_jsonl(run / f"{f}.jsonl")]
    return [{k: v for k, v in x.items() if k not in CLOCK} for x in lines]


def assert_same(a: Path, b: Path) -> None:
    one, two = final(a), final(b)
    assert one.keys() == two.keys()
    assert not [n for n in one if not torch.equal(one[n], two[n])]
    assert story(a) == story(b)


@pytest.mark.parametrize("how", ["written", "compiled", "lora", "qlora", "bf16", "oss"])
def test_a_killed_run_ends_in_the_same_bits(place: Path, how: str) -> None:
    given: dict[str, Any] = {
        "written": {"compile": "off"},
        "compiled": {"compile": "on"},
        "lora": {"tuning": "{kind: lora}"},
        "qlora": {"tuning": "{kind: lora, base_bits: 4}"},
        "bf16": {"optimizer": "adamw_8bit_bf16"},
        "oss": {"model": "oss"},
    }[how]
    trained(f"{how}-whole", **given)
    words = recipe(f"{how}-killed", **given)
    for steps in (5, 15):
        process = subprocess.Popen(
            [sys.executable, "-m", "educe", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        until = time.monotonic() + 200
        while not (place / f"runs/{how}-killed/checkpoints/step-{steps:06d}").exists() and time.monotonic() < until:
            if process.poll() is not None:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        assert process.returncode == -signal.SIGKILL, process.stdout and process.stdout.read()[-2000:]
    code, said = command(*words)
    assert code == 0, said[-3000:]
    assert "going on after step" in said
    assert_same(place / f"runs/{how}-whole", place / f"runs/{how}-killed")


def test_where_activations_wait_changes_no_bit(place: Path) -> None:
    for how in ("keep", "offload", "recompute"):
        trained(f"wait-{how}", compile="off", epochs=1, activations=how)
    for how in ("offload", "recompute"):
        assert_same(place / "runs/wait-keep", place / f"runs/wait-{how}")


@pytest.mark.parametrize("model", list(MODELS))
def test_a_run_learns_passes_its_checks_and_is_exported(place: Path, model: str) -> None:
    said = trained(f"whole-{model}", model, deterministic="false")
    losses = [x["loss"] for x in read_jsonl(place / f"runs/whole-{model}/metrics.jsonl") if x["kind"] == "step"]
    assert losses[-1] < losses[0] / 2
    assert re.search(r"memory: .* of the first full step", said), said
    code, said = command("export", f"runs/whole-{model}", f"out-{model}")
    assert code == 0, said
    assert "logits are the same to the bit" in said


@pytest.mark.parametrize("variant", ["lora", "dora", "qlora"])
@pytest.mark.parametrize("compiled", ["on", "off"])
def test_adapters_learn_and_are_exported(place: Path, variant: str, compiled: str) -> None:
    if variant == "qlora":
        pytest.importorskip("bitsandbytes")
    tuning = {"lora": "{kind: lora}", "dora": "{kind: lora, variant: dora}", "qlora": "{kind: lora, base_bits: 4}"}
    name = f"{variant}-{compiled}"
    said = trained(name, tuning=tuning[variant], compile=compiled, deterministic="false", learning_rate=1e-2)
    losses = [x["loss"] for x in read_jsonl(place / f"runs/{name}/metrics.jsonl") if x["kind"] == "step"]
    assert losses[-1] < losses[0] - 0.5, said
    code, said = command("export", f"runs/{name}", f"out-{name}")
    assert code == 0, said
    assert ("KL" in said) == (variant == "qlora"), said


def test_a_kernel_that_hangs_is_found(place: Path) -> None:
    script = ["-c", "import sys, hangs; hangs.run('kernel', 3, 0, sys.argv[1:])"]
    started = time.monotonic()
    code, said = command(*recipe("hanging"), "--hang-after", "8s", script=script, limit_s=200)
    assert code == 70, said[-3000:]
    assert "waits_for_a_kernel" in (place / "runs/hanging/stacks/rank-0.txt").read_text()
    print(f"ended {time.monotonic() - started:.0f} s after it began, 8 s of them the limit")


def test_out_of_memory_halves_the_micro_batches_and_keeps_the_step() -> None:
    """On the device's own error: its memory is fenced in between what half of the row needs and what the whole row does."""
    from educe.pack.batch import build_batch

    batch = build_batch(documents([512] * 32, 1))

    def gradients(state: State, said: list[str]) -> tuple[float, dict[str, torch.Tensor]]:
        def compute(micro: Sequence[Batch]) -> list[Any]:
            return accumulate(state, micro, batch.total_weight, sft_loss, seed=1)

        outs = in_room(state, [batch], compute, said.append)[1]
        return sum(float(o.loss) for o in outs), {n: g.clone() for n, g in state.optimizer.gradients().items()}

    def fresh() -> State:
        model = model_of(False)
        return State(model=model, optimizer=Adam(model.trainable(), AdamSettings()))

    state = fresh()
    torch.cuda.reset_peak_memory_stats()
    there = torch.cuda.memory_allocated()
    loss, expected = gradients(state, [])
    peak, room = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(0).total_memory
    del state
    torch.cuda.empty_cache()
    said: list[str] = []
    torch.cuda.set_per_process_memory_fraction((there + 0.7 * (peak - there)) / room)
    try:
        state = fresh()
        less, found = gradients(state, said)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert state.halvings >= 1
    assert "halved" in said[0]
    assert less == pytest.approx(loss, rel=1e-4)
    for name, g in expected.items():
        assert float((found[name] - g).norm() / g.norm()) < 2e-2, name


@pytest.mark.parametrize("family", [n for n in FAMILIES if FAMILIES[n].packed])
def test_families_on_a_gpu(tmp_path: Path, family: str) -> None:
    with quiet():
        make(FAMILIES[family]).to(torch.bfloat16).save_pretrained(tmp_path)
    device = Device(kind="cuda", dtype="bfloat16", name="", flops=1e12, why="")
    model = load_model(tmp_path, device, Full(kind="full"))
    prove_head(model)
    assert packs_are_blind(model), model.why_unpacked


@pytest.mark.parametrize("name", ["gemma", "oss"])
def test_caps_and_sinks_go_through_flex_attention(place: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(kind="cuda", dtype="bfloat16", name="", flops=1e12, why="")
    model = load_model(place / name, device, Full(kind="full"))
    calls: list[int] = []
    real = attention_flex._compiled()
    monkeypatch.setattr(attention_flex, "_compiled", lambda: lambda *a, **k: calls.append(1) or real(*a, **k))
    prove_head(model)
    assert packs_are_blind(model), model.why_unpacked
    assert calls
