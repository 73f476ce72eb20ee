"""The loss alone on one GPU: educe, Liger, cut-cross-entropy, plain torch; forward and backward, time and memory.

python bench/gpu_loss.py [--positions 4096,16384] [--shapes 2048x151936,4096x151936]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from educe.loss.cross_entropy import chunk_positions, token_nll
from torch import Tensor


def educe_loss(logit_bytes: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        weights = torch.ones(len(targets), device=hidden.device)
        chunk = chunk_positions(len(head), logit_bytes, 2)
        out = token_nll(
            hidden,
            lambda h: F.linear(h, head),
            targets,
            weights,
            parameters=[head] if head.requires_grad else [],
            denominator=len(targets),
            chunk=chunk,
        )
        return out.loss

    return loss


def liger_loss() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda hidden, head, targets: liger_fused_linear_cross_entropy(hidden, head, targets)


def cce_loss() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, head, targets: linear_cross_entropy(hidden, head, targets)


def plain_loss() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda hidden, head, targets: F.cross_entropy(F.linear(hidden, head).float(), targets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--positions", default="4096,16384")
    parser.add_argument("--shapes", default="2048x151936,4096x151936")
    a = parser.parse_args()
    sides: dict[str, Callable[[], Any]] = {
        "educe 0.5 GB": lambda: educe_loss(2**29),
        "educe 1 GB": lambda: educe_loss(2**30),
        "educe 4 GB": lambda: educe_loss(2**32),
        "liger": liger_loss,
        "cce": cce_loss,
        "plain": plain_loss,
    }
    print("| positions | hidden x vocabulary | head | loss | ms | GB | value |\n|---|---|---|---|---|---|---|")
    for shape in a.shapes.split(","):
        width, vocabulary = map(int, shape.split("x"))
        for num in map(int, a.positions.split(",")):
            for trained in (True, False):
                torch.manual_seed(0)
                hidden = torch.randn(num, width, device="cuda").bfloat16().requires_grad_()
                head = (torch.randn(vocabulary, width, device="cuda") * 0.02).bfloat16().requires_grad_(trained)
                targets = torch.randint(0, vocabulary, (num,), device="cuda")
                for name, make in sides.items():
                    try:
                        found = measure(make(), hidden, head, targets)
                    except Exception as e:
                        found = f"| | {type(e).__name__}: {str(e)[:80]}"
                    print(f"| {num} | {shape} | {'trained' if trained else 'frozen'} | {name} | {found} |", flush=True)


def measure(loss: Callable[[Tensor, Tensor, Tensor], Tensor], hidden: Tensor, head: Tensor, targets: Tensor) -> str:
    times = []
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    value = 0.0
    for _ in range(8):
        hidden.grad = head.grad = None
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        out = loss(hidden, head, targets)
        out.backward()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
        value = float(out.detach())
    peak = torch.cuda.max_memory_allocated() - before
    hidden.grad = head.grad = None
    return f"{statistics.median(times[3:]):.1f} | {peak / 2**30:.2f} | {value:.4f}"


if __name__ == "__main__":
    main()
