"""Attention with a cap or sinks on one GPU: flex attention beside document by document, forward and backward.

python bench/gpu_attention.py
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from educe.model.attention import Scoring, attend_each
from educe.model.attention_flex import attend_flex
from educe.model.documents import documents_of
from torch import Tensor

# heads, key heads, head size, cap, sinks, window
SHAPES = {
    "Gemma 2 9B": (16, 8, 256, 50.0, False, None),
    "Gemma 2 9B, window 4,096": (16, 8, 256, 50.0, False, 4096),
    "gpt-oss 20B": (64, 8, 64, None, True, None),
    "gpt-oss 20B, window 128": (64, 8, 64, None, True, 128),
}


def lengths_of(tokens: int) -> list[int]:
    """Of rows as chat data has them, about 400 tokens."""
    rng, room, lengths = np.random.default_rng(0), tokens, []
    while room:
        n = min(room, max(16, int(rng.lognormal(np.log(400), 0.8))))
        lengths.append(n)
        room -= n
    return lengths


def milliseconds(step: Callable[[], Any]) -> float:
    for _ in range(3):
        step()
    times = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def main() -> None:
    print("| heads of | row | flex ms | document by document ms | ratio |\n|---|---|---|---|---|")
    for name, (heads, groups, size, cap, sinks, window) in SHAPES.items():
        for label, lengths in (
            ("2,048", lengths_of(2048)),
            ("8,192", lengths_of(8192)),
            ("8,192, one document", [8192]),
        ):
            q, k, v = (
                torch.randn(1, h, sum(lengths), size, device="cuda").bfloat16().requires_grad_()
                for h in (heads, groups, groups)
            )
            sinks_H = torch.randn(heads, device="cuda", requires_grad=True) if sinks else None
            documents = documents_of(lengths, "cuda")
            how = Scoring(scale=size**-0.5, window=window, softcap=cap, sinks_H=sinks_H)
            grad = torch.randn(1, sum(lengths), heads, size, device="cuda").bfloat16()

            def step(attend: Callable[[], Tensor], grad: Tensor = grad) -> None:
                attend().backward(grad)

            def flex() -> Tensor:
                return attend_flex(q, k, v, documents, how.scale, window, cap, sinks_H)  # noqa: B023

            def each() -> Tensor:
                return attend_each(q, k, v, documents, how)  # noqa: B023

            one, two = milliseconds(lambda: step(flex)), milliseconds(lambda: step(each))
            print(f"| {name} | {label} | {one:.2f} | {two:.2f} | {two / one:.1f} |", flush=True)


if __name__ == "__main__":
    main()
