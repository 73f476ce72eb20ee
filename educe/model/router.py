"""The auxiliary loss that keeps a mixture of experts balanced.

Shape legend: P tokens of a packed row, E experts.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from educe.errors import ModelError


def router_coefficient(base: Any, asked: float | None) -> float:
    """What the auxiliary loss is multiplied with; 0 where there is none.

    `asked` is the recipe's; None leaves it to the config, which means it only where `output_router_logits` is true (as in
    transformers: gpt-oss's config carries 0.9 and does not). Raises `ModelError` where it is asked for and cannot be.
    """
    config = base.config.get_text_config()
    balances = hasattr(
        sys.modules[type(base).__module__], "load_balancing_loss_func"
    )  # this model's own loss is that function
    able = balances and hasattr(config, "router_aux_loss_coef") and records_router(base.get_decoder())
    if asked is None:
        return float(config.router_aux_loss_coef) if able and getattr(config, "output_router_logits", False) else 0.0
    if asked > 0 and not able:
        found = "has no router whose balance transformers can compute, and train.router_loss asks for one."
        raise ModelError(204, base.config.model_type, found, "Leave train.router_loss out.")
    return asked


def records_router(decoder: Any) -> bool:
    """Whether transformers can hand out this decoder's router logits."""
    return "router_logits" in (getattr(decoder, "_can_record_outputs", None) or {})


def balance_loss(router_logits: tuple[Tensor, ...], config: Any, num_tokens: int) -> Tensor:
    """E * sum_e f_e p_e over the first `num_tokens` tokens of all layers: f_e assignments to expert e per token, p_e its mean
    probability (Fedus et al. 2021, arXiv 2101.03961, eq. 4 to 6). top_k where routing is balanced; filler does not count."""
    real = tuple(layer.reshape(-1, layer.shape[-1])[:num_tokens] for layer in router_logits)
    loss: Tensor = load_balancing_loss_func(real, real[0].shape[-1], config.num_experts_per_tok)
    return loss
