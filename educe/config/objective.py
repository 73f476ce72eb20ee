"""What a run learns: answers, raw text, or which of two answers is better."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from educe.config.knobs import Knobs, by_name


class Sft(Knobs):
    """Answers to prompts."""

    kind: Literal["sft"]


class Pretrain(Knobs):
    """Raw text, every token of it."""

    kind: Literal["pretrain"]


class Dpo(Knobs):
    """Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290); label_smoothing: conservative DPO."""

    kind: Literal["dpo"]
    beta: float = Field(default=0.1, gt=0, le=100, description="how near to the start: larger stays nearer")
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="share of the pairs whose labels may be the wrong way round"
    )
    per_token: bool = Field(
        default=False,
        description="mean log-ratios of tokens in place of their sums: long answers gain nothing (beta 5)",
    )


class Ipo(Knobs):
    """Identity preference optimization (Azar et al. 2023, arXiv 2310.12036), log-ratios averaged over tokens."""

    kind: Literal["ipo"]
    beta: float = Field(default=0.1, gt=0, le=100, description="the margin that is aimed at is 1 / (2 beta)")


class SimPo(Knobs):
    """Simple preference optimization (Meng et al. 2024, arXiv 2405.14734): no reference."""

    kind: Literal["simpo"]
    beta: float = Field(default=2.0, gt=0, le=100, description="scale of the mean log-probabilities")
    margin: float = Field(default=0.5, ge=0, le=100, description="by how much the chosen answer should lead")


class Orpo(Knobs):
    """Odds ratio preference optimization (Hong et al. 2024, arXiv 2403.07691): the chosen answer's nll and an odds ratio."""

    kind: Literal["orpo"]
    weight: float = Field(default=0.1, gt=0, le=100, description="of the odds ratio's term")


PairLoss = Annotated[Dpo | Ipo | SimPo | Orpo, Field(discriminator="kind"), BeforeValidator(by_name)]


class Preference(Knobs):
    """Which of two answers is better."""

    kind: Literal["preference"]
    loss: PairLoss = Field(default=Dpo(kind="dpo"), description="the loss of a pair")
    nll_weight: float = Field(
        default=0.0, ge=0, le=100, description="of the chosen answer's mean nll, added to the loss of its pair"
    )

    @property
    def has_reference(self) -> bool:
        """Whether its loss compares with what the start says; others do without."""
        return isinstance(self.loss, Dpo | Ipo)


Objective = Annotated[Sft | Pretrain | Preference, Field(discriminator="kind"), BeforeValidator(by_name)]
