"""Weights between the base model's and the tuned one's, θ0 + α (θ - θ0), and means of checkpoints; in fp32, rounded once.

WiSE-FT: Wortsman et al. 2022, arXiv 2109.01903. Means of checkpoints of one run: Izmailov et al. 2018, arXiv 1803.05407.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from educe.config import Full, Lora
from educe.model import attention
from educe.model.adapters import dilute
from educe.model.device import Device
from educe.model.export import adapted, merged
from educe.model.load import CausalLM, load_model
from educe.model.mixers import run_apart


@dataclass(frozen=True, slots=True, kw_only=True)
class Blend:
    """θ0 + α (θ - θ0); θ is the mean of the `weights`, files of fp32 masters of one run, and θ0 what it began with."""

    alpha: float
    weights: tuple[Path, ...]

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1 or not self.weights:
            raise ValueError(f"need 0 <= alpha <= 1 and weights, got {self.alpha} of {len(self.weights)}")


def blended(
    base: Path, blend: Blend, tuning: Full | Lora, device: Device, *, new_ids: Collection[int] = ()
) -> CausalLM:
    """The blend, ready to answer, in the device's arithmetic. With α = 0 it is the base model to the bit (with the rows that new
    tokens begin with), with α = 1 of one file what `merged` makes of it.

    Beside the model, one tensor in fp32 is in memory; with adapters, between the ends, the model in fp32, and of several checkpoints
    once more, their sum: the mean of products is not the product of means.
    """
    if blend.alpha == 0:
        return load_model(base, device, new_ids=new_ids)
    if blend.alpha == 1 and len(blend.weights) == 1:
        return merged(base, blend.weights[0], tuning, device, new_ids=new_ids)
    if isinstance(tuning, Lora):
        exactly = _mean_of_merged(base, blend, tuning, device, new_ids)
        model = load_model(base, device, new_ids=new_ids)
        with torch.no_grad():
            for name, p in model.network.named_parameters():
                p.copy_(exactly[name])
        return model
    model = load_model(base, device, tuning, new_ids=new_ids)
    _pull(model, blend)
    model.network.set_attn_implementation(attention.answers_with(type(model.network), model.network.config))
    model.network.eval()
    return model


def _pull(model: CausalLM, blend: Blend) -> None:
    """Bring every trained parameter from θ0 to the blend, one after the other."""
    parameters = model.trainable()
    with contextlib.ExitStack() as opened, torch.no_grad():
        files = [opened.enter_context(safe_open(f, "pt", device=model.device.kind)) for f in blend.weights]
        for f in files:
            if set(f.keys()) != parameters.keys():
                raise ValueError(f"weights do not fit: {sorted(set(f.keys()) ^ parameters.keys())[:3]}")
        for name, p in parameters.items():
            total = files[0].get_tensor(name)
            for f in files[1:]:
                total += f.get_tensor(name)
            p.copy_(torch.lerp(p.float(), total.div_(len(files)), blend.alpha))


def _mean_of_merged(
    base: Path, blend: Blend, tuning: Lora, device: Device, new_ids: Collection[int]
) -> dict[str, Tensor]:
    """The mean over checkpoints of θ0 + α (θ - θ0), by name, in fp32."""
    totals: dict[str, Tensor] = {}
    for file in blend.weights:
        _add(totals, base, file, blend.alpha, tuning, device, new_ids)
    return {name: total.div_(len(blend.weights)) for name, total in totals.items()}


def _add(
    totals: dict[str, Tensor],
    base: Path,
    file: Path,
    alpha: float,
    tuning: Lora,
    device: Device,
    new_ids: Collection[int],
) -> None:
    """Add one checkpoint's weights; its model is gone when this returns, before the next is loaded."""
    network = adapted(base, file, tuning, device, new_ids=new_ids).network
    dilute(network, alpha)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # peft's word on layers that are merged already
        for name, p in network.merge_and_unload().named_parameters():
            totals[name] = totals[name].add_(p) if name in totals else p.detach()


def read_packed(model: CausalLM, packs: bool) -> None:
    """Let a model that was loaded to answer read packed rows as in training, for good; where `packs` is False rows must hold one
    document. Answers are made as before, within `answering`."""
    model.base.set_attn_implementation(attention.NAME)
    run_apart(model.network.get_decoder())
    model.packable = packs
