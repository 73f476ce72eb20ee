"""AdamW on fp32 master weights, whatever arithmetic the model computes in.

Adam on bf16 weights at a rate of 1e-5 leaves 85 % of them where they were: the update is smaller than half a unit in the
last place. So each trained parameter has an fp32 master here; gradients are added up in fp32, the masters are stepped, and
the parameters are the masters rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MasterAdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) over fp32 masters of named parameters.

    Gradients flow into the masters as soon as a parameter's gradient is complete, so only one low-precision gradient
    exists at a time. Where a parameter is fp32 itself, it is its own master.
    """

    def __init__(
        self, parameters: dict[str, nn.Parameter], *, betas: tuple[float, float], weight_decay: float, eps: float = 1e-8
    ) -> None:
        self._parameters = parameters
        self.masters: dict[str, Tensor] = {}
        self._hooks = []
        for name, p in parameters.items():
            own = p.dtype == torch.float32
            master = p.data if own else p.detach().float()
            master.grad = None
            self.masters[name] = master
            if not own:
                self._hooks.append(p.register_post_accumulate_grad_hook(_adder(master)))
        decayed = [m for m in self.masters.values() if m.ndim >= 2]
        others = [m for m in self.masters.values() if m.ndim < 2]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        self._adam = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, eps=eps, fused=True)

    def step(self, learning_rate: float, clip_norm: float) -> float:
        """Clip, update, round into the model. Returns the gradient norm before clipping; a norm that is not finite updates nothing."""
        for name, p in self._parameters.items():
            if p.dtype == torch.float32:
                self.masters[name].grad = p.grad
        masters = list(self.masters.values())
        norm = float(torch.nn.utils.clip_grad_norm_(masters, clip_norm))
        if norm == norm and norm != float("inf"):
            for group in self._adam.param_groups:
                group["lr"] = learning_rate
            self._adam.step()
            with torch.no_grad():
                for name, p in self._parameters.items():
                    if p.dtype != torch.float32:
                        p.copy_(self.masters[name])
        for name, p in self._parameters.items():
            p.grad = self.masters[name].grad = None
        return norm

    def reset(self, masters: dict[str, Tensor]) -> None:
        """Begin again from these masters: no moments, no gradient left over."""
        self._adam.state.clear()
        for name, p in self._parameters.items():
            p.grad = self.masters[name].grad = None
        self.load(masters, {})

    def state_tensors(self) -> dict[str, Tensor]:
        """Moments by name, as `moment1.NAME`, `moment2.NAME`, `step.NAME`; empty before the first step."""
        tensors = {}
        for name, master in self.masters.items():
            if state := self._adam.state.get(master):
                tensors[f"moment1.{name}"] = state["exp_avg"]
                tensors[f"moment2.{name}"] = state["exp_avg_sq"]
                tensors[f"step.{name}"] = state["step"]
        return tensors

    def load(self, masters: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """Take over masters and moments; every name must be there. The model's parameters follow."""
        if masters.keys() != self.masters.keys():
            raise ValueError(f"weights do not fit: {sorted(masters.keys() ^ self.masters.keys())[:3]}")
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(masters[name])
                self._parameters[name].copy_(master)
                if f"step.{name}" not in moments:  # it never received a gradient
                    continue
                self._adam.state[master] = {
                    "step": moments[f"step.{name}"].clone(),
                    "exp_avg": moments[f"moment1.{name}"].to(master.device).clone(),
                    "exp_avg_sq": moments[f"moment2.{name}"].to(master.device).clone(),
                }


def _adder(master: Tensor):  # type: ignore[no-untyped-def]  # torch's hook type is not public
    def add(p: Tensor) -> None:
        if p.grad is None:
            return
        if master.grad is None:
            master.grad = p.grad.float()
        else:
            master.grad.add_(p.grad)
        p.grad = None

    return add
