"""One step with 8-bit moments, in a process that has not loaded torchao yet."""

from __future__ import annotations

import sys

import torch
from educe.training.optim import Adam, AdamSettings


def step() -> None:
    assert "torchao" not in sys.modules
    p = torch.nn.Parameter(torch.ones(64, 64))
    optimizer = Adam({"p": p}, AdamSettings(moments="8bit"))
    p.sum().backward()
    optimizer.step(1e-3)
    print(round(p.detach().mean().item(), 4))
