"""What a preference pair costs, from the log-probabilities of its two answers: one small function a loss, and a name in `LOSSES`.

Shape legend: K pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

# The largest mean log-probability of a token that `orpo` takes odds of: those of a sure answer are infinite.
_SURE = -1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """The chosen answers of K pairs, or the rejected ones: log-probability in nats of the trained tokens of each together, under the
    model and under the reference, and how many they are."""

    log_p_K: Float[Tensor, " k"]
    reference_K: Float[Tensor, " k"]
    tokens_K: Float[Tensor, " k"]

    @property
    def ratio(self) -> Float[Tensor, " k"]:
        """Log-ratio of the model to the reference."""
        return self.log_p_K - self.reference_K

    @property
    def mean_ratio(self) -> Float[Tensor, " k"]:
        return self.ratio / self.tokens_K

    @property
    def mean_log_p(self) -> Float[Tensor, " k"]:
        return self.log_p_K / self.tokens_K


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """The loss of each pair, and `margin_K`: what the loss compares of the chosen answer, less the same of the rejected one. A loss
    wants it above 0."""

    loss_K: Float[Tensor, " k"]
    margin_K: Float[Tensor, " k"]


PairLoss = Callable[[Answers, Answers], Compared]


def dpo(beta: float, label_smoothing: float = 0.0, per_token: bool = False) -> PairLoss:
    """-log σ(β (log-ratio chosen - log-ratio rejected)): Rafailov et al. 2023, arXiv 2305.18290, eq. 7.

    `label_smoothing` is the share of pairs taken to be the wrong way round (conservative DPO, Mitchell 2023,
    ericmitchell.ai/cdpo.pdf). `per_token`: log-ratios per token, so that long answers do not weigh more (Tulu 3, arXiv 2411.15124).
    """

    def of(chosen: Answers, rejected: Answers) -> Compared:
        margin_K = chosen.mean_ratio - rejected.mean_ratio if per_token else chosen.ratio - rejected.ratio
        right_K, wrong_K = logsigmoid(beta * margin_K), logsigmoid(-beta * margin_K)
        return Compared(loss_K=-(1 - label_smoothing) * right_K - label_smoothing * wrong_K, margin_K=margin_K)

    return of


def ipo(beta: float) -> PairLoss:
    """(log-ratio chosen - log-ratio rejected - 1/2β)²: Azar et al. 2023, arXiv 2310.12036, eq. 17, β its τ. Log-ratios are per token,
    as TRL has them and says that the authors meant: else the loss would grow with the square of an answer's length."""

    def of(chosen: Answers, rejected: Answers) -> Compared:
        margin_K = chosen.mean_ratio - rejected.mean_ratio
        return Compared(loss_K=(margin_K - 1 / (2 * beta)) ** 2, margin_K=margin_K)

    return of


def simpo(beta: float, margin: float) -> PairLoss:
    """-log σ(β (log p per token of chosen - of rejected) - γ), γ = `margin`; no reference: Meng et al. 2024, arXiv 2405.14734,
    eq. 6."""

    def of(chosen: Answers, rejected: Answers) -> Compared:
        margin_K = chosen.mean_log_p - rejected.mean_log_p
        return Compared(loss_K=-logsigmoid(beta * margin_K - margin), margin_K=margin_K)

    return of


def orpo(weight: float) -> PairLoss:
    """nll per token of chosen - `weight` log σ(log-odds of chosen - of rejected), odds of the mean log p of a token; no reference:
    Hong et al. 2024, arXiv 2403.07691, eq. 6 and 7."""

    def of(chosen: Answers, rejected: Answers) -> Compared:
        margin_K = _log_odds(chosen.mean_log_p) - _log_odds(rejected.mean_log_p)
        return Compared(loss_K=-chosen.mean_log_p - weight * logsigmoid(margin_K), margin_K=margin_K)

    return of


def _log_odds(log_p_K: Tensor) -> Float[Tensor, " k"]:
    """log(p / (1 - p)), exact where p is near 1. Flat above `_SURE`."""
    sure_K = log_p_K.clamp(max=_SURE)
    return sure_K - torch.log(-torch.expm1(sure_K))


LOSSES: dict[str, Callable[..., PairLoss]] = {"dpo": dpo, "ipo": ipo, "simpo": simpo, "orpo": orpo}

# Those that compare with a reference; to others it is nothing but what is reported.
WITH_REFERENCE = frozenset({"dpo", "ipo"})
