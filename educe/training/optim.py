"""AdamW on fp32 master weights, whatever arithmetic the model computes in; or on bf16 weights rounded at random.

Adam on bf16 weights at a rate of 1e-5 leaves 85 % of them where they were: the update is smaller than half a unit in the
last place. So each trained parameter has an fp32 master here: gradients are added up in fp32, the masters are stepped, and the
parameters are the masters rounded once. Where memory is short, bf16 weights are their own masters and an update is rounded up or
down at random in proportion to what it is, right in the mean (torchao).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from educe.errors import MachineError
from educe.model.frugal import uncompiled, why_not_compiled
from educe.model.load import quiet

# A parameter's name to what its learning rate is multiplied with.
RateOf = Callable[[str], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamSettings:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101). `weights`: where updates are added up; `moments`: how they are kept, 8bit in
    blocks of 256 with a scale each (Dettmers et al. 2021, arXiv 2110.02861)."""

    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    eps: float = 1e-8
    weights: Literal["fp32", "bf16"] = "fp32"
    moments: Literal["fp32", "8bit"] = "fp32"

    def __post_init__(self) -> None:
        if self.weights == "bf16" and self.moments == "fp32":
            raise ValueError("bf16 weights go with 8-bit moments: plain ones would be kept in bf16 too, which forgets")


def even(name: str) -> float:
    """The same rate for every parameter."""
    return 1.0


class Adam:
    """AdamW over named parameters. `masters` are what is trained, in its most exact form: what checkpoints hold.

    With fp32 masters, gradients flow into them as soon as a parameter's gradient is complete, so only one low-precision gradient
    exists at a time. Where a parameter is fp32 itself, it is its own master.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], settings: AdamSettings, rate_of: RateOf = even) -> None:
        self._parameters = parameters
        self._own = {n for n, p in parameters.items() if p.dtype == torch.float32 or settings.weights == "bf16"}
        self._sums: dict[str, _Sum] = {}
        self.masters: dict[str, Tensor] = {}
        for name, p in parameters.items():
            self.masters[name] = p.data if name in self._own else p.detach().float()
            if name not in self._own:
                self._sums[name] = _Sum()
                p.register_post_accumulate_grad_hook(self._sums[name])
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, m in self.masters.items():
            key = (rate_of(name), settings.weight_decay if m.ndim >= 2 else 0.0)
            groups.setdefault(key, []).append(parameters[name] if name in self._own else m)
        self._adam = _adam([{"params": m, "times": t, "weight_decay": d} for (t, d), m in groups.items()], settings)
        self._fused = settings.moments == "fp32"
        # torchao compiles a step for each shape of weight: seconds each, then a fourth of the time and of the memory
        self._compiles = all(not why_not_compiled(kind) for kind in {p.device.type for p in parameters.values()})

    def gradient_norm(self) -> Tensor:
        """Of all gradients together, over all ranks, in fp32; on the device."""
        gradients = [g for _, g in self._gradients()]
        if any(g.dtype == torch.bfloat16 for g in gradients):  # three digits would not do to clip by
            return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, torch.float32)))
        norm = get_total_norm(gradients)
        whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return whole

    def gradients(self) -> dict[str, Tensor]:
        """What was added up since the last step, by name; parameters without a gradient are not in it."""
        self._gradients()
        return {name: key.grad for name, key in self._keys().items() if key.grad is not None}

    def step(self, learning_rate: float, *, shrink: float = 1.0) -> None:
        """Update with the gradients times `shrink` (what clipping asks for), round into the model, forget the gradients."""
        for group in self._adam.param_groups:
            rate = learning_rate * group["times"]
            group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate
        grads = [g for key, g in self._gradients()]
        if self._fused and grads[0].device.type in ("cpu", "cuda"):  # the kernel divides by this while it reads them
            self._adam.grad_scale = grads[0].new_full((), 1 / shrink, dtype=torch.float32)  # type: ignore[attr-defined]
        elif shrink < 1.0:
            torch._foreach_mul_(grads, shrink)
        with contextlib.nullcontext() if self._fused or self._compiles else uncompiled():
            self._adam.step()
        with torch.no_grad():
            rounded = [n for n in self.masters if n not in self._own]
            if rounded:
                torch._foreach_copy_([self._parameters[n] for n in rounded], [self.masters[n] for n in rounded])
        self.forget_gradients()

    def forget_gradients(self, *, but: Collection[str] = ()) -> None:
        """Begin a step anew: after a step, or where one is given up. What has no gradient is not stepped; `but` these keep theirs."""
        for name, p in self._parameters.items():
            if name in but:
                continue
            p.grad = None
            if name in self._sums:
                self.masters[name].grad, self._sums[name].fresh = None, True

    def _gradients(self) -> list[tuple[Tensor, Tensor]]:
        """What the optimizer steps, and its gradient, where there is one."""
        for name, s in self._sums.items():
            self.masters[name].grad = None if s.fresh else s.total
        return [(key, key.grad) for key in self._keys().values() if key.grad is not None]

    @property
    def num_trained(self) -> int:
        """Numbers that are trained, on all ranks together."""
        return sum(m.numel() for m in self.masters.values())

    def reset(self, masters: dict[str, Tensor]) -> None:
        """Begin again from these masters: no moments, no gradient left over."""
        self._adam.state.clear()
        self.forget_gradients()
        self.load(masters, {})

    def state_tensors(self) -> dict[str, Tensor]:
        """Moments by name, as `moment1.NAME`, `moment2.NAME`, `step.NAME` (8-bit ones in parts); empty before the first step."""
        tensors = {}
        for name, key in self._keys().items():
            if state := self._adam.state.get(key):
                for ours, theirs in _MOMENTS.items():
                    for part, t in _parts(state[theirs]).items():
                        tensors[f"{ours}.{name}{part}"] = t
        return tensors

    def load(self, masters: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """Take over masters and moments; every name must be there. The model's parameters follow."""
        if masters.keys() != self.masters.keys():
            raise ValueError(f"weights do not fit: {sorted(masters.keys() ^ self.masters.keys())[:3]}")
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(masters[name])
                self._parameters[name].copy_(master)
        known = {
            n: k for n, k in self._keys().items() if f"step.{n}" in moments
        }  # the others never received a gradient
        for name, key in known.items():
            self._adam.state[key] = {
                theirs: _whole(self._fresh_moment(theirs, key), ours, name, moments)
                for ours, theirs in _MOMENTS.items()
            }

    def _keys(self) -> dict[str, Tensor]:
        return {n: self._parameters[n] if n in self._own else m for n, m in self.masters.items()}

    def _fresh_moment(self, kind: str, key: Tensor) -> Tensor:
        if kind == "step":
            return torch.zeros((), dtype=torch.float32, device=key.device if self._fused else "cpu")
        make = getattr(self._adam, "_new_buffer", None)
        fresh: Tensor = torch.zeros_like(key) if make is None else make(key, kind == "exp_avg")
        return fresh


_MOMENTS = {"moment1": "exp_avg", "moment2": "exp_avg_sq", "step": "step"}


class _Sum:
    """Adds a parameter's gradients up in fp32, in memory that is kept from step to step."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.fresh = True

    def __call__(self, p: Tensor) -> None:
        if p.grad is None:
            return
        if self.total is None:
            self.total = p.grad.float()
        elif self.fresh:
            self.total.copy_(p.grad)
        else:
            self.total.add_(p.grad)
        self.fresh = False
        p.grad = None


def _adam(groups: list[dict[str, Any]], settings: AdamSettings) -> torch.optim.Optimizer:
    if settings.moments == "fp32":
        return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=settings.eps, fused=True)
    try:
        with quiet():
            from torchao.optim import AdamW8bit
    except ImportError as e:
        found = "is not installed; 8-bit moments and bf16 weights need it."
        raise MachineError(1, "torchao", found, "pip install 'educe[lowbit]'.") from e
    warnings.filterwarnings("ignore", "OptimState8bit does not implement _stable_hash_for_caching")

    class Adam8bit(AdamW8bit):  # type: ignore[misc]
        def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
            """fp32 where a tensor is too small for blocks; torchao would keep the moments of small bf16 weights in bf16."""
            made: Tensor = super()._new_buffer(p, signed)
            return made if hasattr(made, "tensor_attrs") else made.float()

    made: torch.optim.Optimizer = Adam8bit(
        groups,
        lr=1e-3,
        betas=settings.betas,
        eps=settings.eps,
        bf16_stochastic_round=settings.weights == "bf16",
    )
    return made


def _parts(moment: Tensor) -> dict[str, Tensor]:
    """A moment as plain tensors: itself, or codes and scales of one that is kept in 8 bits."""
    names = getattr(moment, "tensor_attrs", None)
    return {f".{n}": getattr(moment, n) for n in names} if names else {"": moment}


def _whole(fresh: Tensor, ours: str, name: str, tensors: dict[str, Tensor]) -> Tensor:
    for part, t in _parts(fresh).items():
        t.copy_(tensors[f"{ours}.{name}{part}"])
    return fresh
