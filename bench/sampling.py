"""Tokens a second of the local sampler beside `model.generate` one prompt at a time, in turn, on the quickstart's test questions.

    python bench/sampling.py MODEL_DIR [--device cpu] [--prompts 64] [--one-by-one 16] [--new 32] [--rounds 3] [--threads 1]
        [--dtype float32]

Greedy on both sides, the same ids, the same weights in the same arithmetic; transformers' side has its own attention and cache. CPU
seconds of the process where one thread computes, since a busy machine stretches the clock; the clock's are shown too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path
from statistics import median

import torch
from educe.chat.prompt import render_prompt
from educe.chat.tokens import load_tokenizer
from educe.files.jsonl import read_jsonl
from educe.model.device import Device
from educe.model.load import load_model
from educe.sample.local import LocalSampler
from educe.types import Message
from transformers import AutoModelForCausalLM


def timed(job: Callable[[], int]) -> tuple[float, float]:
    """Tokens a CPU second and a second of the clock."""
    cpu, clock = time.process_time(), time.perf_counter()
    made = job()
    return made / (time.process_time() - cpu), made / (time.perf_counter() - clock)


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("model", type=Path)
    for name, usual in (("prompts", 64), ("one-by-one", 16), ("new", 32), ("rounds", 3), ("threads", 1)):
        parse.add_argument(f"--{name}", type=int, default=usual)
    parse.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parse.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    asked = parse.parse_args()
    torch.set_num_threads(asked.threads)
    tokenizer = load_tokenizer(asked.model)
    with as_file(files("educe.quickstart") / "test.jsonl") as file:
        rows = [[m for m in row["messages"] if m["role"] != "assistant"] for row in read_jsonl(file)]
    prompts = [render_prompt(tuple(Message(**m) for m in row), tokenizer) for row in rows[: asked.prompts]]
    device = Device(kind=asked.device, dtype=asked.dtype, name="", flops=1e9, why="")
    sampler = LocalSampler(load_model(asked.model, device), tokenizer)
    theirs = (
        AutoModelForCausalLM.from_pretrained(asked.model, dtype=getattr(torch, asked.dtype)).eval().to(asked.device)
    )
    stop, said = sorted(tokenizer.stop), {}

    def batched() -> int:
        answers = sampler.answer(prompts, asked.new)
        said["ours"] = [a.text for a in answers]
        return sum(a.num_tokens for a in answers)

    @torch.inference_mode()
    def one_by_one() -> int:
        made = []
        for p in prompts[:: len(prompts) // asked.one_by_one][: asked.one_by_one]:
            ids = torch.tensor([p], device=asked.device)
            how = {"max_new_tokens": asked.new, "do_sample": False, "eos_token_id": stop, "pad_token_id": stop[0]}
            made.append(theirs.generate(ids, attention_mask=torch.ones_like(ids), **how)[0, len(p) :].tolist())
        said["theirs"] = [tokenizer.decode(m[:-1] if m[-1] in stop else m) for m in made]
        return sum(map(len, made))

    ratios = []
    for k in range(asked.rounds):
        ours, one = timed(batched), timed(one_by_one)
        ratios.append((ours[0] / one[0], ours[1] / one[1]))
        print(
            f"round {k + 1}: sampler {ours[0]:.1f} tokens/CPU s ({ours[1]:.1f}/s), generate {one[0]:.1f} ({one[1]:.1f}/s): "
            f"{ratios[-1][0]:.2f} times ({ratios[-1][1]:.2f} by the clock)",
            flush=True,
        )
    mine = said["ours"][:: len(prompts) // asked.one_by_one][: asked.one_by_one]
    same = sum(a == b for a, b in zip(mine, said["theirs"], strict=True))
    mean = sum(map(len, prompts)) / len(prompts)
    print(
        f"median {median(r[0] for r in ratios):.2f} times in CPU seconds, {median(r[1] for r in ratios):.2f} by the clock"
    )
    print(f"{len(prompts)} prompts of {mean:.0f} tokens on average; {same} of {len(mine)} answers equal")


if __name__ == "__main__":
    main()
