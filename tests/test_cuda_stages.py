"""A chain of stages on a GPU: killed in a later stage and gone on with to the same bits, measured; rows of new tokens."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from educe.config import Lora  # noqa: E402
from educe.files.jsonl import read_jsonl  # noqa: E402
from educe.model.device import Device  # noqa: E402
from educe.model.load import load_model  # noqa: E402
from educe.model.new_rows import NewRows  # noqa: E402
from educe.pack.batch import build_batch  # noqa: E402
from educe.training.sft import sft_loss  # noqa: E402

from test_cuda import documents  # noqa: E402
from test_cuda_run import assert_same, command, place  # noqa: E402, F401

CHAIN = """\
name: {name}
model: {{init: random, vocabulary: 300, layers: 2, width: 128, heads: 2, kv_heads: 2, positions: 512}}
device: cuda
stages:
  - kind: pretrain
    data: {{train: texts.jsonl, max_tokens: 256}}
    train: {{epochs: 2, batch_tokens: 2048, learning_rate: 1e-3, deterministic: true}}
  - kind: sft
    data: {{train: rows.jsonl, max_tokens: 256}}
    train: {{epochs: 1, batch_tokens: 2048, learning_rate: 1e-3, deterministic: true}}
  - kind: preference
    tuning: {{kind: lora, rank: 8}}
    data: {{train: pairs.jsonl, max_tokens: 256}}
    train:
      {{epochs: 2, batch_tokens: 2048, micro_batch_tokens: 1024, learning_rate: 1e-3, checkpoint_every_steps: 5, deterministic: true}}
evaluation: {{max_new_tokens: 8, metric: exact}}
"""


def chain(name: str) -> list[str]:
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    lines = []
    for k, row in enumerate(rows):
        ask, good = row["messages"]
        pair = {"prompt": [ask], "chosen": [good], "rejected": [{"role": "assistant", "content": f"no {k}, never"}]}
        lines.append(json.dumps(pair))
    Path("pairs.jsonl").write_text("\n".join(lines))
    Path("texts.jsonl").write_text("\n".join(json.dumps({"text": r["messages"][1]["content"] * 3}) for r in rows))
    Path(f"{name}.yaml").write_text(CHAIN.format(name=name))
    return ["train", f"{name}.yaml"]


def test_a_chain_killed_in_its_last_stage_ends_in_the_same_bits(place: Path) -> None:  # noqa: F811
    code, said = command(*chain("chain-whole"))
    assert code == 0, said[-3000:]
    words = chain("chain-killed")
    with (place / "killed.log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "educe", *words], stdout=log, stderr=subprocess.STDOUT)
    saved, until = place / "runs/chain-killed/3-preference/checkpoints/step-000005", time.monotonic() + 250
    while not saved.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL, (place / "killed.log").read_text()[-3000:]
    code, said = command(*words)
    assert code == 0, said[-3000:]
    assert "going on after step" in said
    for stage in ("1-pretrain", "2-sft", "3-preference"):
        assert_same(place / f"runs/chain-whole/{stage}", place / f"runs/chain-killed/{stage}")
    steps = [m for m in read_jsonl(place / "runs/chain-whole/3-preference/metrics.jsonl") if m["kind"] == "step"]
    assert steps[-1]["loss"] < steps[0]["loss"] / 2, "preferences are learned"
    code, said = command("eval", "runs/chain-whole")
    assert code == 0, said[-3000:]
    assert "preference" in said


def test_rows_of_new_tokens_are_pefts_on_a_gpu(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16).save_pretrained(tmp_path)
    device = Device(kind="cuda", dtype="bfloat16", name="", flops=1e12, why="")
    new, rows = [2044, 2045, 2047], documents([200] * 4, 1)
    for row in rows:
        row.ids_T[::7] = new[1]
    batch = build_batch(rows)

    def gradients(as_peft: bool, compiled: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        model = load_model(tmp_path, device, Lora(kind="lora"), new_ids=new)
        layers = [m for m in model.network.modules() if isinstance(m, NewRows)]
        assert layers
        for m in layers:
            m.as_peft = as_peft
        if compiled:
            model.compile(len(batch.ids_P))
        sft_loss(model, batch, batch.total_weight).loss.backward()
        return {n: p.grad.float() for n, p in model.network.named_parameters() if p.grad is not None}

    expected = gradients(True, False)
    assert any("token" in n for n in expected)
    for compiled in (False, True):
        found = gradients(False, compiled)
        assert found.keys() == expected.keys()
        for name, g in expected.items():
            assert float((found[name] - g).norm() / g.norm().clamp_min(1e-12)) < 3e-2, (name, compiled)
