"""One step with 8-bit moments, for a process of its own: what torchao says, it says once a process."""

from __future__ import annotations

import torch
from educe.training.optim import Adam, AdamSettings


def step() -> None:
    p = torch.nn.Parameter(torch.ones(64, 64))
    optimizer = Adam({"p": p}, AdamSettings(moments="8bit"))
    p.sum().backward()
    optimizer.step(1e-3)
    print(round(p.detach().mean().item(), 4))
