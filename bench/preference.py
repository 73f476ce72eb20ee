"""educe beside TRL on one CPU or GPU: real tokens a second of DPO, the reference's pass counted, both sides in turn in one run.

    python bench/preference.py [--model MODEL_DIR] [--data dpo_en_demo.json] [--pairs 20] [--rounds 3] [--threads 2]
    python bench/preference.py --device cuda --model MODEL_DIR --pairs 160 --sweep-pairs 48 --step-pairs 8 --most-tokens 1024

Same model, same pairs, same ids, AdamW, as many pairs a step, no activation checkpointing, the reference's log-probabilities
computed once on both sides. A token is counted once, whatever is done with it; padding never. Steps in which kernels are made are
left out on both sides, as are educe's passes of the reference that do so on a GPU. TRL runs with each setting
of SWEEP on few pairs; the fastest goes on to all, in turn with educe.
TRL 1.16 has no padding-free DPO: it says so, and pads.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

DATA = Path(__file__).parents[2] / "shared" / "data" / "preference" / "dpo_en_demo.json"
LEARNING_RATE, BETA = 1e-6, 0.1
# TRL: pairs a micro-batch, arithmetic. The reference is computed before training: a third less to do than in each step.
SWEEP = {
    "cpu": [(1, "bf16"), (2, "bf16"), (4, "bf16"), (1, "autocast"), (2, "autocast")],
    "cuda": [(4, "bf16"), (8, "bf16"), (4, "autocast")],
}
WARM_STEPS = {"cpu": 1, "cuda": 4}  # left out: kernels are made in them, on a GPU once more when lengths have changed

Ids = dict[str, list[int]]


def pairs_of(tokenizer: Any, file: Path, number: int, most: int) -> tuple[list[dict[str, Any]], list[Ids]]:
    """The first pairs that are short enough: as messages, and as the ids that TRL makes of them."""
    roles = {"system": "system", "human": "user", "gpt": "assistant"}

    def message(m: dict[str, str]) -> dict[str, str]:
        return {"role": roles[m["from"]], "content": m["value"]}

    def ids_of(messages: list[dict[str, str]], *, asks: bool = False) -> list[int]:
        ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=asks, return_dict=True)[
            "input_ids"
        ]
        return ids

    rows: list[dict[str, Any]] = []
    found: list[Ids] = []
    for row in json.loads(file.read_text(encoding="utf-8")):
        prompt = [message(m) for m in row["conversations"]]
        answers = {k: [message(row[k])] for k in ("chosen", "rejected")}
        ids = {"prompt": ids_of(prompt, asks=True), **{k: ids_of(prompt + a) for k, a in answers.items()}}
        if len(rows) < number and max(map(len, ids.values())) <= most:
            rows.append({"prompt": prompt, **answers})
            found.append(ids)
    return rows, found


@dataclass(frozen=True)
class Job:
    """What both sides do."""

    model_dir: Path
    file: Path
    num_pairs: int
    step_pairs: int
    most_tokens: int  # of an answer with its prompt
    device: str

    def pairs(self, tokenizer: Any) -> tuple[list[dict[str, Any]], list[Ids]]:
        return pairs_of(tokenizer, self.file, self.num_pairs, self.most_tokens)

    def now(self) -> float:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()


def run_educe(job: Job, dtype: str) -> dict[str, Any]:
    from dataclasses import replace

    import numpy as np
    from educe.config import Full
    from educe.model.device import choose_device, peak_memory_bytes, release_free_memory
    from educe.model.load import load_model
    from educe.pack.batch import build_batch
    from educe.preference.loss import PreferenceLoss
    from educe.preference.losses import LOSSES
    from educe.preference.reference import reference_log_p
    from educe.training.loop import LoopConfig, train
    from educe.training.optim import Adam, AdamSettings
    from educe.training.state import State
    from educe.types import Example
    from transformers import AutoTokenizer

    _, pairs = job.pairs(AutoTokenizer.from_pretrained(job.model_dir))
    examples = []
    for ids in pairs:
        for kind in ("chosen", "rejected"):
            trained = (np.arange(len(ids[kind])) >= len(ids["prompt"])).astype(np.float32)
            examples.append(Example(ids_T=np.array(ids[kind], np.int32), weights_T=trained))
    width = 2 * job.step_pairs
    steps = [examples[i : i + width] for i in range(0, len(examples), width)]
    model = load_model(job.model_dir, choose_device(job.device, dtype), Full(kind="full"))
    if job.device == "cuda":  # as `compile: auto` does there
        model.compile(max(sum(len(e.ids_T) for e in step) for step in steps))
        reference_log_p(model, map(build_batch, steps[: WARM_STEPS["cuda"]]))
    began, busy_s = job.now(), time.process_time()
    found = iter(reference_log_p(model, map(build_batch, steps)).tolist())
    reference_s = job.now() - began
    known = [[replace(e, reference=next(found)) for e in step] for step in steps]
    state = State(model=model, optimizer=Adam(model.trainable(), AdamSettings(betas=(0.9, 0.999))))
    marks = [(job.now(), 0)]

    def mark(state: State, report: Any) -> None:
        if report.step % 2 == 0:  # as a run does
            release_free_memory()
        marks.append((job.now(), report.tokens))

    config = LoopConfig(
        total_steps=len(steps),
        learning_rate=LEARNING_RATE,
        warmup_share=0.0,
        schedule="constant",
        clip_norm=1.0,
        seed=0,
    )
    train(state, lambda s: [build_batch(known[s])], PreferenceLoss(compare=LOSSES["dpo"](beta=BETA)), [mark], config)
    busy_s = time.process_time() - busy_s
    return {
        **_rates(reference_s, marks, busy_s, WARM_STEPS[job.device]),
        "peak_memory_bytes": peak_memory_bytes(job.device),
    }


def run_trl(job: Job, micro: int, arithmetic: str) -> dict[str, Any]:
    import datasets
    import torch
    from educe.model.device import peak_memory_bytes
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    datasets.disable_progress_bars()
    tokenizer: Any = AutoTokenizer.from_pretrained(job.model_dir)
    data: Any = datasets.Dataset.from_list(job.pairs(tokenizer)[0])
    marks: list[tuple[float, int]] = []
    counted, reference_s = 0, 0.0

    class Timed(DPOTrainer):  # type: ignore[misc]
        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal reference_s
            began = job.now()
            found = super()._precompute_ref_logps(*args, **kwargs)
            reference_s = job.now() - began
            return found

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal counted
            counted += int(inputs["attention_mask"].sum())
            return super().training_step(model, inputs, *args, **kwargs)

    class Marks(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            marks.append((job.now(), 0))

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            marks.append((job.now(), counted - sum(n for _, n in marks)))

    with tempfile.TemporaryDirectory() as place:
        config = DPOConfig(
            output_dir=place,
            report_to="none",
            use_cpu=job.device == "cpu",
            bf16=arithmetic == "autocast",
            gradient_checkpointing=False,
            precompute_ref_log_probs=True,
            precompute_ref_batch_size=micro,
            max_length=None,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=job.step_pairs // micro,
            beta=BETA,
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
        network = AutoModelForCausalLM.from_pretrained(job.model_dir, dtype=weights, attn_implementation="sdpa")
        busy_s = time.process_time()
        trainer: Any = Timed(
            model=network,
            args=config,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[Marks()],
        )
        trainer.train()
        busy_s = time.process_time() - busy_s
    return {
        **_rates(reference_s, marks, busy_s, WARM_STEPS[job.device]),
        "peak_memory_bytes": peak_memory_bytes(job.device),
    }


def _rates(reference_s: float, marks: list[tuple[float, int]], busy_s: float, warm: int) -> dict[str, Any]:
    """Tokens a second of the steps but the first `warm`; of these and the reference's pass together; and tokens a second of the
    processor, of everything behind loading, which others on the machine disturb less (with --threads 1: threads that wait are busy
    too)."""
    (start, _), (end, _) = marks[warm], marks[-1]
    step_s = (end - start) / sum(n for _, n in marks[warm + 1 :])
    tokens = sum(n for _, n in marks)
    whole_s = step_s + reference_s / tokens
    return {
        "tokens": tokens,
        "steps_per_s": 1 / step_s,
        "tokens_per_s": 1 / whole_s,
        "tokens_per_cpu_s": tokens / busy_s,
    }


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
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--sweep-pairs", type=int, default=8)
    parser.add_argument("--step-pairs", type=int, default=4)
    parser.add_argument("--most-tokens", type=int, default=256, help="of an answer with its prompt")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--side", nargs="*")
    a = parser.parse_args()
    if not a.data.is_file():
        raise SystemExit(
            f"needs {a.data}: pairs as ShareGPT rows with `chosen` and `rejected`; name another with --data"
        )
    if a.model is None:
        from educe.model.source import DEFAULT_MODEL, find_model

        a.model = find_model(DEFAULT_MODEL, print)
    if a.side:
        import torch

        torch.set_num_threads(a.threads)
        job = Job(a.model, a.data, a.pairs, a.step_pairs, a.most_tokens, a.device)
        name, *how = a.side
        print(json.dumps(run_educe(job, a.dtype) if name == "educe" else run_trl(job, int(how[0]), how[1])))
        return

    def side(pairs: int, *what: Any) -> dict[str, Any]:
        sizes = {"pairs": pairs, "step-pairs": a.step_pairs, "threads": a.threads, "most-tokens": a.most_tokens}
        options = {"model": a.model, "data": a.data, "dtype": a.dtype, "device": a.device, **sizes}
        common = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        found = _apart([*common, "--side", *map(str, what)])
        print(
            f"{' '.join(map(str, what)):14} {pairs:4} pairs {found['tokens']:6} tokens {found['tokens_per_s']:6.1f} tokens/s"
            f" (steps alone {found['steps_per_s']:6.1f}) {found['tokens_per_cpu_s']:6.1f} a second of the processor"
            f" {found['peak_memory_bytes'] / 1e9:5.2f} GB",
            flush=True,
        )
        return found

    swept = {s: side(a.sweep_pairs, "trl", *s) for s in SWEEP[a.device] if a.step_pairs % s[0] == 0}
    best = max(swept, key=lambda s: swept[s]["tokens_per_cpu_s"])
    exact = max(
        (s for s in swept if s[1] != "bf16"), key=lambda s: swept[s]["tokens_per_cpu_s"]
    )  # fp32 weights, as educe
    sides: list[tuple[Any, ...]] = [("educe",), ("trl", *best), *([("trl", *exact)] if exact != best else [])]
    found: dict[Any, list[dict[str, Any]]] = {s: [] for s in sides}
    for _ in range(a.rounds):
        for s, results in found.items():
            results.append(side(a.pairs, *s))
    for what in ("tokens_per_s", "steps_per_s", "tokens_per_cpu_s"):
        ours, *others = (median(f[what] for f in results) for results in found.values())
        for s, theirs in zip(sides[1:], others, strict=True):
            print(f"{what:16} educe {ours:6.1f}, {' '.join(map(str, s)):14} {theirs:6.1f}: {ours / theirs:.2f} x")


if __name__ == "__main__":
    main()
