"""educe beside TRL on one CPU: real tokens a second and peak memory of full fine-tuning, both sides in turn in one run.

    python bench/cpu.py [--model MODEL_DIR] [--data alpaca.json] [--rows 256] [--rounds 3] [--sweep-rows 64]
    python bench/cpu.py --adapters lora,lora-compiled    # tuning with adapters beside full tuning, both educe's

Same model, same rows, same ids, assistant-only loss, AdamW (fused), about the same rows a step, no activation checkpointing.
Only tokens of rows are counted, never padding; the first step (kernels are made in it) is left out on both sides. TRL runs
with each setting of SWEEP on few rows; the fastest goes on to all rows, in turn with educe.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROWS_PER_STEP = 20  # 2,048 tokens: two packs of 1,024, four of 512
DATA = Path(__file__).parents[2] / "shared" / "data" / "instruct" / "alpaca_5000.json"
STEP_TOKENS = 2048
LEARNING_RATE = 1e-5
# TRL: packing length (0: padded), rows or packs a micro-batch, loss, arithmetic.
SWEEP = [
    (0, 8, "nll", "bf16"),
    (0, 8, "chunked_nll", "bf16"),
    (512, 1, "nll", "bf16"),
    (512, 1, "chunked_nll", "bf16"),
    (1024, 1, "chunked_nll", "bf16"),
    (512, 1, "chunked_nll", "autocast"),
    (1024, 1, "chunked_nll", "autocast"),
]

# educe's sides with adapters, by name; with "-compiled" behind it, layers are compiled.
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"variant": "rslora"},
    "dora": {"variant": "dora"},
    "qlora": {"base_bits": 4},
}


def conversations(file: Path, num_rows: int) -> list[list[dict[str, str]]]:
    rows = json.loads(file.read_text(encoding="utf-8"))[:num_rows]
    return [
        [
            {"role": "user", "content": r["instruction"] + (f"\n\n{r['input']}" if r["input"] else "")},
            {"role": "assistant", "content": r["output"]},
        ]
        for r in rows
    ]


def run_educe(model_dir: Path, file: Path, num_rows: int, capacity: int, dtype: str, how: str) -> dict[str, Any]:
    import numpy as np
    import torch
    from educe.chat.examples import build_examples
    from educe.chat.render import Renderer
    from educe.chat.settle import settle
    from educe.chat.tokens import load_tokenizer
    from educe.config import Full, Lora
    from educe.errors import Refusal
    from educe.model.device import choose_device, peak_memory_bytes, release_free_memory
    from educe.model.load import load_model
    from educe.pack.batch import build_step
    from educe.pack.plan import plan_packs
    from educe.training.loop import LoopConfig, train
    from educe.training.optim import Adam, AdamSettings
    from educe.training.sft import sft_loss
    from educe.training.state import State
    from educe.types import Conversation, Message, Source

    talks = [
        Conversation(messages=tuple(Message(**m) for m in talk), source=Source(file=str(file), line=k + 1))
        for k, talk in enumerate(conversations(file, num_rows))
    ]
    renderer = Renderer(settle(load_tokenizer(model_dir), talks).tokenizer)
    built = build_examples(talks, renderer, max_tokens=1024)
    examples = [e for found in built if not isinstance(found, Refusal) for e in found]
    lengths = np.array([e.ids_T.size for e in examples])
    batch = max(1, STEP_TOKENS // capacity) * capacity
    plan = plan_packs(lengths, np.arange(lengths.size), batch_tokens=batch, capacity_tokens=capacity, seed=0)
    device = choose_device("cpu", dtype)
    tuning = ADAPTERS.get(how.removesuffix("-compiled"))
    torch.manual_seed(0)  # where adapters begin
    model = load_model(model_dir, device, Lora(kind="lora", **tuning) if tuning is not None else Full(kind="full"))
    if how.endswith("compiled"):
        model.compile(capacity)
    # bf16 weights, rounded at random, and 8-bit moments: TRL's bf16 weights and moments without what they lose
    small = how == "bf16"
    settings = AdamSettings(
        betas=(0.9, 0.999), weights="bf16" if small else "fp32", moments="8bit" if small else "fp32"
    )
    state = State(model=model, optimizer=Adam(model.trainable(), settings))
    marks: list[tuple[float, int]] = [(time.perf_counter(), 0)]
    busy = [time.process_time()]

    def mark(state: State, report: Any) -> None:
        if report.step % 2 == 0:  # as a run does
            release_free_memory()
        marks.append((time.perf_counter(), report.tokens))
        busy.append(time.process_time())

    config = LoopConfig(
        total_steps=plan.num_steps,
        learning_rate=LEARNING_RATE,
        warmup_share=0.0,
        schedule="constant",
        clip_norm=1.0,
        seed=0,
    )
    train(
        state, lambda s: build_step([[examples[i] for i in g] for g in plan.step(s)], [1.0]), sft_loss, [mark], config
    )
    rate = _rate(marks)
    busy_s = rate["tokens"] / (busy[-1] - busy[1])
    return {**rate, "tokens_per_cpu_s": busy_s, "peak_memory_bytes": peak_memory_bytes("cpu"), "steps": plan.num_steps}


def run_trl(
    model_dir: Path, file: Path, num_rows: int, packed: int, micro: int, loss: str, arithmetic: str
) -> dict[str, Any]:
    import datasets
    import torch
    from educe.model.device import peak_memory_bytes
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer
    from trl.chat_template_utils import qwen2_5_training_chat_template

    datasets.disable_progress_bars()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.chat_template = qwen2_5_training_chat_template  # ChatML with the tags that TRL needs for assistant masks
    data: Any = datasets.Dataset.from_list([{"messages": t} for t in conversations(file, num_rows)])
    marks: list[tuple[float, int]] = []

    with tempfile.TemporaryDirectory() as place:
        config = SFTConfig(
            output_dir=place,
            assistant_only_loss=True,
            report_to="none",
            use_cpu=True,
            bf16=arithmetic == "autocast",
            gradient_checkpointing=False,
            packing=packed > 0,
            max_length=packed or 1024,
            padding_free=False,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=max(1, (STEP_TOKENS // packed if packed else ROWS_PER_STEP) // micro),
            loss_type=loss,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            num_train_epochs=1,
            logging_strategy="no",
            save_strategy="no",
            dataloader_pin_memory=False,
            disable_tqdm=True,
        )
        weights = torch.bfloat16 if arithmetic == "bf16" else torch.float32
        network = AutoModelForCausalLM.from_pretrained(model_dir, dtype=weights, attn_implementation="sdpa")
        counted = 0

        class Marks(TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                marks.append((time.perf_counter(), 0))

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                marks.append((time.perf_counter(), counted - sum(n for _, n in marks)))

        trainer: Any = SFTTrainer(
            model=network, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[Marks()]
        )
        step = trainer.training_step

        def counting(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal counted
            mask = inputs.get("attention_mask")
            counted += int(mask.sum()) if mask is not None else int(inputs["input_ids"].numel())
            return step(model, inputs, *args, **kwargs)

        trainer.training_step = counting
        trainer.train()
    return {**_rate(marks), "peak_memory_bytes": peak_memory_bytes("cpu"), "steps": len(marks) - 1}


def _rate(marks: list[tuple[float, int]]) -> dict[str, Any]:
    """Tokens a second over all steps but the first."""
    (start, _), (end, _) = marks[1], marks[-1]
    tokens = sum(n for _, n in marks[2:])
    return {"tokens_per_s": tokens / (end - start), "tokens": tokens, "first_step_s": marks[1][0] - marks[0][0]}


def _apart(args: list[str]) -> dict[str, Any]:
    """One side in a process of its own, so that peak memory is its own."""
    done = subprocess.run([sys.executable, __file__, *args], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="default: the quickstart's")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--sweep-rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--capacity", type=int, default=2048)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--adapters", default="", help="in place of TRL: full tuning and these, such as lora,qlora, in turn"
    )
    parser.add_argument("--side", nargs="*")
    a = parser.parse_args()
    if not a.data.is_file():
        raise SystemExit(f"needs {a.data}: Alpaca rows as a JSON array; name another with --data")
    if a.model is None:
        from educe.model.source import DEFAULT_MODEL, find_model

        a.model = find_model(DEFAULT_MODEL, print)
    if a.side and a.side[0] == "educe":
        print(json.dumps(run_educe(a.model, a.data, a.rows, a.capacity, a.dtype, a.side[1])))
        return
    if a.side:
        _, packed, micro, loss, arithmetic = a.side
        print(json.dumps(run_trl(a.model, a.data, a.rows, int(packed), int(micro), loss, arithmetic)))
        return

    common = ["--model", str(a.model), "--data", str(a.data)]

    def side(rows: int, *what: Any) -> dict[str, Any]:
        options = ["--capacity", str(a.capacity), "--dtype", a.dtype, "--rows", str(rows)]
        found = _apart([*common, *options, "--side", *map(str, what)])
        name = " ".join(map(str, what))
        print(
            f"{name:36} {rows:4} rows  {found['tokens_per_s']:7.1f} tokens/s  {found['peak_memory_bytes'] / 1e9:5.2f} GB"
            f"  {found['steps']} steps",
            flush=True,
        )
        return found

    if a.adapters:
        names = ["plain", *a.adapters.split(",")]
        turns: dict[str, list[dict[str, Any]]] = {n: [] for n in names}
        for _ in range(a.rounds):
            for name, results in turns.items():
                results.append(side(a.rows, "educe", name))
        for name, results in turns.items():
            peak = max(f["peak_memory_bytes"] for f in results) / max(f["peak_memory_bytes"] for f in turns["plain"])
            for what in ("tokens_per_s", "tokens_per_cpu_s"):
                each = [f[what] / full[what] for f, full in zip(results, turns["plain"], strict=True)]
                print(f"{name:16} {what:16} {median(each):5.2f} x ({min(each):.2f} to {max(each):.2f})")
            print(f"{name:16} {peak:.0%} of full tuning's peak memory")
        return
    swept = {s: side(a.sweep_rows, "trl", *s) for s in SWEEP}
    best = max(swept, key=lambda s: swept[s]["tokens_per_s"])
    padded = max((s for s in SWEEP if s[0] == 0), key=lambda s: swept[s]["tokens_per_s"])
    sides = [("educe", "compiled"), ("educe", "plain"), ("educe", "bf16"), ("trl", *best), ("trl", *padded)]
    found: dict[Any, list[dict[str, Any]]] = {s: [] for s in sides}
    for _ in range(a.rounds):
        for s, results in found.items():
            results.append(side(a.rows, *s))
    rate = {s: median(f["tokens_per_s"] for f in results) for s, results in found.items()}
    for s, results in found.items():
        print(
            f"{' '.join(map(str, s)):36} {rate[s]:6.0f} tokens/s  {rate[s] / rate['trl', *best]:5.2f} x TRL's best"
            f"  {rate[s] / rate['trl', *padded]:5.2f} x padded  {max(f['peak_memory_bytes'] for f in results) / 1e9:5.2f} GB"
        )


if __name__ == "__main__":
    main()
