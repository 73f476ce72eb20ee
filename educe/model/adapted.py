"""A frozen linear layer and its low-rank adapter as one operation: peft's own reads and writes what the layer gives three times more
often, which costs as much as the adapter's products. What it computes is peft's; where it differs is rounding.

Shape legend: P tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor

from educe.model.four_bit import dense
from educe.model.new_rows import NewRows


class AdaptedLinear(Linear):  # type: ignore[misc]
    """peft's layer, with a forward of its own while one plain adapter is on and nothing is dropped."""

    as_peft = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self.active_adapters[0]
        plain = len(self.active_adapters) == 1 and not (
            args or kwargs or self.merged or self.lora_variant or self.as_peft
        )
        dropout = self.lora_dropout[name]
        if not plain or self.disable_adapters or (self.training and not isinstance(dropout, torch.nn.Identity)):
            out: Tensor = super().forward(x, *args, **kwargs)
            return out
        base, a_RI, b_OR = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
        assert base.bias is None or not base.bias.requires_grad  # its gradient is not computed
        made: Tensor = _Adapted.apply(x, base.weight, base.bias, a_RI, b_OR, self.scaling[name])
        return made


@contextlib.contextmanager
def computed_by_peft(network: torch.nn.Module) -> Iterator[None]:
    """Adapted layers compute as peft has it within, to the bit: to compare with what peft loads."""
    layers = [m for m in network.modules() if isinstance(m, AdaptedLinear | NewRows)]
    for layer in layers:
        layer.as_peft = True
    try:
        yield
    finally:
        for layer in layers:
            layer.as_peft = False


class _Adapted(torch.autograd.Function):  # type: ignore[misc]
    """y = x W' + bias + s (x A') B'. Of what is kept for the backward pass only x is large; W has no gradient, and where it is in 4
    bits it is unpacked anew."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a_RI: Tensor, b_OR: Tensor, scaling: float
    ) -> Tensor:
        x_PI = x.reshape(-1, x.shape[-1])
        state = getattr(weight, "quant_state", None)
        y_PO = torch.nn.functional.linear(x_PI, dense(weight, state), bias)
        low_PR = (x_PI @ a_RI.t()).mul_(scaling)
        y_PO.addmm_(low_PR, b_OR.t())
        ctx.save_for_backward(x_PI, low_PR, weight, a_RI, b_OR)
        ctx.state, ctx.scaling = state, scaling
        return y_PO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        x_PI, low_PR, weight, a_RI, b_OR = ctx.saved_tensors
        slope_PO = slope.reshape(-1, slope.shape[-1])
        low_slope_PR = (slope_PO @ b_OR).mul_(ctx.scaling)
        slope_PI = None
        if ctx.needs_input_grad[0]:
            slope_PI = slope_PO @ dense(weight, ctx.state)
            slope_PI = slope_PI.addmm_(low_slope_PR, a_RI).view(*slope.shape[:-1], -1)
        return slope_PI, None, None, low_slope_PR.t() @ x_PI, slope_PO.t() @ low_PR, None
