"""educe beside TRL on one GPU, with random weights of real shapes: tokens a second, utilisation, peak memory.

    python bench/gpu.py [--sizes 0.6b,1.7b,4b,8b] [--tokens 2048,8192] [--tunings full,lora,qlora] [--sides educe,trl] [--steps 6]

Shapes are those of Qwen3. Rows are random ids with lengths like those of chat data, 60 % of their tokens trained; both sides get
the same rows. Tokens are those of rows, never padding. Utilisation is what the mathematics needs (6 FLOPs a weight and token, 4 with
LoRA; the head at trained tokens only; attention within rows) over the rate of a large bf16 matrix product on this machine.
Without a GPU it runs at toy size, to show that it runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

VOCABULARY = 151_936
# hidden, layers, heads, key heads, intermediate, tied head
SIZES = {
    "toy": (64, 2, 4, 2, 128, True),
    "0.6b": (1024, 28, 16, 8, 3072, True),
    "1.7b": (2048, 28, 16, 8, 6144, True),
    "4b": (2560, 36, 32, 8, 9728, True),
    "8b": (4096, 36, 32, 8, 12288, False),
}
TRAINED_SHARE = 0.6
WARM_STEPS = 3
STEP_TOKENS = 16_384  # of one optimizer step: several micro-batches where packs are shorter


def network_of(size: str, device: str) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    hidden, layers, heads, groups, inner, tied = SIZES[size]
    config = Qwen3Config(
        vocab_size=512 if size == "toy" else VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        intermediate_size=inner,
        head_dim=16 if size == "toy" else 128,
        tie_word_embeddings=tied,
        max_position_embeddings=40_960,
        use_cache=False,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return Qwen3ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def packs_of(tokens: int, num: int, vocabulary: int) -> list[list[tuple[np.ndarray, int]]]:
    """`num` packs of exactly `tokens` tokens: rows of a log-normal length about 400, each with where its answer begins."""
    rng = np.random.default_rng(0)
    packs = []
    for _ in range(num):
        pack, room = [], tokens
        while room:
            n = min(room, max(16, int(rng.lognormal(np.log(400), 0.8))))
            n = room if room - n < 16 else n
            pack.append((rng.integers(0, vocabulary, n), max(1, int(n * (1 - TRAINED_SHARE)))))
            room -= n
        packs.append(pack)
    return packs


def flops_of(size: str, packs: list[list[tuple[np.ndarray, int]]], tuning: str) -> float:
    """Of forward and backward over these packs."""
    hidden, layers, heads, groups, inner, _ = SIZES[size]
    width = 16 if size == "toy" else 128
    body = layers * (hidden * width * (2 * heads + 2 * groups) + 3 * hidden * inner)
    head = (512 if size == "toy" else VOCABULARY) * hidden
    tokens = sum(len(ids) for pack in packs for ids, _ in pack)
    trained = sum(len(ids) - start for pack in packs for ids, start in pack)
    pairs = sum(len(ids) ** 2 / 2 for pack in packs for ids, _ in pack)
    times = 6 if tuning == "full" else 4
    return times * (body * tokens + head * trained) + 12 * layers * heads * width * pairs


def matmul_rate(device: str) -> float:
    n = 8192 if device == "cuda" else 256
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(20):
        _wait(device)
        started = time.perf_counter()
        a @ b
        _wait(device)
        times.append(time.perf_counter() - started)
    return 2 * n**3 / statistics.median(times[5:])


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(step: Callable[[int], None], steps: int, tokens: int, device: str) -> dict[str, Any]:
    began = time.perf_counter()
    for k in range(WARM_STEPS):
        step(k)
    _wait(device)
    warm = time.perf_counter() - began
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for k in range(steps):
        started = time.perf_counter()
        step(WARM_STEPS + k)
        _wait(device)
        times.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {"tokens_per_s": tokens / statistics.median(times), "peak_bytes": peak, "warm_s": warm}


def run_educe(size: str, tokens: int, tuning: str, steps: int, device: str, options: dict[str, Any]) -> dict[str, Any]:
    from educe.config import Lora
    from educe.model import attention
    from educe.model.adapters import with_adapters
    from educe.model.device import Device
    from educe.model.load import CausalLM, load_model
    from educe.pack.batch import build_batch
    from educe.training.optim import Adam, AdamSettings
    from educe.training.sft import SftLoss
    from educe.types import Example

    attention.register()
    where = Device(kind=device, dtype="bfloat16", name="", flops=0.0, why="")
    network = network_of(size, device)
    network.set_attn_implementation(attention.NAME)
    micro = max(1, STEP_TOKENS // tokens)
    vocabulary = network.config.vocab_size
    packs = packs_of(tokens, (WARM_STEPS + steps) * micro, vocabulary)
    model = CausalLM(network, where, adapted=False)
    if tuning == "lora":
        model = CausalLM(with_adapters(network, Lora(kind="lora", rank=32, alpha=32.0), []), where, adapted=True)
    elif tuning == "qlora":  # codes are made as files are read
        with tempfile.TemporaryDirectory() as place:
            network.save_pretrained(place)
            del model, network
            gc.collect()
            torch.cuda.empty_cache()
            low = Lora(kind="lora", rank=32, alpha=32.0, base_bits=4)
            model = load_model(Path(place), where, low)
    model.network.train()
    if options.get("compile", True):
        model.compile(tokens)
    model.offloads = options.get("activations") == "offload"
    if options.get("activations") == "recompute":
        model.recompute(len(model.layers))
    settings = AdamSettings(weights=options.get("weights", "fp32"), moments=options.get("moments", "fp32"))
    optimizer = Adam(model.trainable(), settings)
    loss = SftLoss(logit_bytes=options.get("logit_bytes", 2**30))

    def example(ids: np.ndarray, start: int) -> Example:
        weights = np.zeros(len(ids), np.float32)
        weights[start:] = 1
        return Example(ids_T=ids.astype(np.int32), weights_T=weights)

    batches = [build_batch([example(*row) for row in pack]) for pack in packs]

    def step(k: int) -> None:
        parts = batches[k * micro : (k + 1) * micro]
        weight = sum(b.total_weight for b in parts)
        for batch in parts:
            with model.gradients(synchronised=True):
                loss(model, batch, weight).loss.backward()
        norm = float(optimizer.gradient_norm())
        optimizer.step(1e-5, shrink=min(1.0, 1.0 / norm))

    found = timed(step, steps, tokens * micro, device)
    if options.get("profile"):
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            step(WARM_STEPS)
            torch.cuda.synchronize()
        print(seen.key_averages().table(sort_by="self_cuda_time_total", row_limit=30, max_name_column_width=70))
    return found


def run_trl(size: str, tokens: int, tuning: str, steps: int, device: str, options: dict[str, Any]) -> dict[str, Any]:
    import datasets
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    network = network_of(size, device)
    network.set_attn_implementation(options.get("attention", "sdpa"))
    micro = max(1, STEP_TOKENS // tokens)
    vocabulary = network.config.vocab_size
    packs = packs_of(tokens, (WARM_STEPS + steps) * micro, vocabulary)
    rows = [
        {"input_ids": ids.tolist(), "completion_mask": [0] * start + [1] * (len(ids) - start)}
        for pack in packs
        for ids, start in pack
    ]
    words = {f"w{k}": k for k in range(8)} | {"<pad>": 8, "<eos>": 9}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), pad_token="<pad>", eos_token="<eos>"
    )
    marks: list[float] = []
    with tempfile.TemporaryDirectory() as place:
        config = SFTConfig(
            output_dir=place,
            completion_only_loss=True,
            report_to="none",
            use_cpu=device == "cpu",
            bf16=True,
            packing=True,
            max_length=tokens,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=micro,
            gradient_checkpointing=options.get("checkpointing", False),
            use_liger_kernel=options.get("liger", False),
            torch_compile=options.get("compile", False),
            optim=options.get("optim", "adamw_torch_fused"),
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            num_train_epochs=1,
            max_steps=WARM_STEPS + steps,
            logging_strategy="no",
            save_strategy="no",
            dataset_kwargs={"skip_prepare_dataset": False},
            disable_tqdm=True,
        )

        class Marks(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                _wait(device)
                marks.append(time.perf_counter())
                if len(marks) == WARM_STEPS and device == "cuda":
                    torch.cuda.reset_peak_memory_stats()

        lora = LoraConfig(r=32, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer: Any = SFTTrainer(
            model=network,
            args=config,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Marks()],
            peft_config=lora if tuning == "lora" else None,
        )
        real = [len(r["input_ids"]) for r in trainer.train_dataset]
        trainer.train()
    times = [b - a for a, b in zip(marks[WARM_STEPS - 1 :], marks[WARM_STEPS:], strict=False)]
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    fill = float(np.mean(real)) / tokens
    return {
        "tokens_per_s": tokens * micro * min(1.0, fill) / statistics.median(times),
        "peak_bytes": peak,
        "fill": fill,
    }


SIDES = {"educe": run_educe, "trl": run_trl}


def apart(side: str, size: str, tokens: int, tuning: str, steps: int, options: dict[str, Any]) -> dict[str, Any]:
    """One side in a process of its own."""
    args = ["--one", json.dumps([side, size, tokens, tuning, steps, options])]
    done = subprocess.run([sys.executable, __file__, *args], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"error": (done.stderr.strip().splitlines() or ["?"])[-1][:300], "stderr": done.stderr[-3000:]}
    if options.get("profile"):
        print(done.stdout[:9000])
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="0.6b,1.7b,4b,8b")
    parser.add_argument("--tokens", default="2048,8192")
    parser.add_argument("--tunings", default="full,lora")
    parser.add_argument("--sides", default="educe,trl")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--options", default='[["", {}]]', help="JSON: a list of [name, settings] for each educe run")
    parser.add_argument("--trl-options", default='[["", {}]]')
    parser.add_argument("--one")
    a = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if a.one:
        side, size, tokens, tuning, steps, options = json.loads(a.one)
        print(json.dumps(SIDES[side](size, tokens, tuning, steps, device, options)))
        return
    rate = matmul_rate(device)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}; matrix product {rate / 1e12:.0f} TFLOP/s\n")
    print("| model | tuning | tokens | side | tokens/s | utilisation | peak GB | |\n|---|---|---|---|---|---|---|---|")
    sizes = a.sizes.split(",") if device == "cuda" else ["toy"]
    for size in sizes:
        for tokens in [int(t) for t in a.tokens.split(",")] if device == "cuda" else [256]:
            for tuning in a.tunings.split(","):
                for side in a.sides.split(","):
                    for label, options in json.loads(a.options if side == "educe" else a.trl_options):
                        found = apart(side, size, tokens, tuning, a.steps, options)
                        row(size, tuning, tokens, side, label, found, rate)


def row(size: str, tuning: str, tokens: int, side: str, label: str, found: dict[str, Any], rate: float) -> None:
    if "error" in found:
        print(f"| {size} | {tuning} | {tokens} | {side} {label} | | | | {found['error']} |", flush=True)
        print(found["stderr"], file=sys.stderr, flush=True)
        return
    packs = packs_of(tokens, 8, 512 if size == "toy" else VOCABULARY)
    share = flops_of(size, packs, tuning) / (8 * tokens) * found["tokens_per_s"] / rate
    rest = ", ".join(f"{k} {v:.3g}" for k, v in found.items() if k not in ("tokens_per_s", "peak_bytes"))
    print(
        f"| {size} | {tuning} | {tokens} | {side} {label} | {found['tokens_per_s']:,.0f} | {share:.1%} | "
        f"{found['peak_bytes'] / 2**30:.1f} | {rest} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
