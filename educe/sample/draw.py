"""Logits → the next token of each row: the likeliest, or one drawn by a number that belongs to its prompt and place alone.

B rows, V ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from educe.seeds import derive
from educe.types import Sampling

# Logits of the rows that go on, their numbers among all prompts, and how many ids each has been given → the next id of each.
Chooser = Callable[[Float[Tensor, "b v"], Sequence[int], int], list[int]]


def likeliest(logits_BV: Float[Tensor, "b v"], rows: Sequence[int], place: int) -> list[int]:
    """Greedy."""
    tokens: list[int] = logits_BV.argmax(-1).tolist()
    return tokens


def chooser_of(sampling: Sampling, keys: Sequence[str]) -> Chooser:
    """How `sampling` chooses for prompts with these keys. What is drawn depends on (seed, key, place) and the row's own logits."""
    if sampling.temperature == 0:
        return likeliest

    def drawn(logits_BV: Float[Tensor, "b v"], rows: Sequence[int], place: int) -> list[int]:
        shares = [share(sampling.seed, keys[row], place) for row in rows]
        return draw(logits_BV, shares, sampling.temperature, sampling.top_p)

    return drawn


def share(seed: int, key: str, place: int) -> float:
    """A number in [0, 1), uniform over keys and places."""
    return (derive(seed, "draw", key, place) >> 10) / 2**53


def draw(logits_BV: Float[Tensor, "b v"], shares: Sequence[float], temperature: float, top_p: float) -> list[int]:
    """The id at which each row's cumulated probability, in order of ids, passes its share.

    With `top_p` < 1 only the likeliest ids count, the fewest that hold that much (nucleus sampling, 1904.09751 §3.1). In order of ids,
    not of probability: rounding that swaps two ids of like probability must not change what a share picks.
    """
    logits_BV = logits_BV.cpu() if logits_BV.device.type == "mps" else logits_BV  # which has no float64
    p_BV = torch.softmax((logits_BV.double() - logits_BV.double().amax(-1, keepdim=True)) / temperature, -1)
    if top_p < 1:
        sorted_BV, order_BV = p_BV.sort(dim=-1, descending=True, stable=True)
        likelier_BV = torch.zeros_like(p_BV).scatter(-1, order_BV, sorted_BV.cumsum(-1) - sorted_BV)
        p_BV = p_BV.masked_fill(likelier_BV >= top_p, 0.0)
    sum_BV = p_BV.cumsum(-1)
    wanted_B1 = torch.tensor(shares, dtype=sum_BV.dtype, device=sum_BV.device)[:, None] * sum_BV[:, -1:]
    tokens: list[int] = torch.searchsorted(sum_BV, wanted_B1, right=True)[:, 0].tolist()
    return tokens
