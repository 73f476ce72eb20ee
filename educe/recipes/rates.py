"""Which learning rates are sensible for a model, a kind of tuning and a length of run, and the rank of adapters: with reasons."""

from __future__ import annotations

import math
from dataclasses import dataclass

from educe.config import Full, Lora
from educe.model.describe import ModelFacts
from educe.recipes.memory import num_adapter_parameters

# Exponents of the width in tinker-cookbook's `get_lr`, fitted to sweeps of these families.
_EXPONENTS = {"llama": 0.781, "qwen": 0.0775}
# Narrower and wider models than those sweeps had, a little beyond: the formula is not followed further.
_WIDTHS = (512, 8192)
_ROWS = 128  # rows a step of those sweeps
_SHORT_FULL, _SHORT_LORA = 1000, 100  # steps
_RANKS = (16, 256)
_GENTLE = 1 / 20  # of the rate for answers, for preferences
_KAPLAN_MOST = 1e10  # parameters: beyond, the rule breaks down, as they say
_ALPHA = 32.0  # of those sweeps, with a scale of alpha / rank


@dataclass(frozen=True, slots=True, kw_only=True)
class RateAdvice:
    """A range of learning rates, the one to begin with, and where they come from; `guess`: the family was never fitted."""

    low: float
    high: float
    value: float
    why: str
    guess: bool

    @property
    def span(self) -> str:
        return f"{self.low:.2g} to {self.high:.2g}"


def advise_rate(
    facts: ModelFacts, *, lora: bool, rows_per_step: float, num_steps: int, stretch: float = 1.0, pairs: bool = False
) -> RateAdvice:
    """The range and a rate in it.

    Centre: 5e-5 (2000 / width)^p, p = 0.781 for Llama and 0.0775 for Qwen (tinker-cookbook `get_lr`), for other families their
    geometric mean, with a range over both. LoRA: 10 times that, 15 times in runs of up to 100 steps (LoRA Without Regret,
    thinkingmachines.ai/blog/lora). The range goes from a third of the centre, or from the centre times sqrt(rows / 128) where that
    is less, to three times the rate: published advice disagrees by as much; in under 1,000 steps of full tuning to six times, which
    such runs bear, and forget by (docs/decisions/003). The rate itself is not scaled by the rows: on the data of decision 003,
    with 5 rows a step, that would have been too low. `stretch`: see `stretch_of`; all rates are divided by it. `pairs`: for
    preferences, a twentieth, and the range three times as wide (published: 1/10 in Tulu 3, arXiv 2411.15124, 1/20 in TRL's
    defaults, 1/40 in Zephyr, arXiv 2310.16944).
    """
    width = min(max(facts.hidden_size, _WIDTHS[0]), _WIDTHS[1])
    family = next((f for f in _EXPONENTS if facts.model_type.startswith(f)), None)
    exponents = [_EXPONENTS[family]] if family else list(_EXPONENTS.values())
    fits = [5e-5 * (2000 / width) ** p for p in exponents]
    centre = math.exp(sum(map(math.log, fits)) / len(fits))
    usual = (10.0 if lora else 1.0) / stretch
    short = num_steps <= _SHORT_LORA if lora else num_steps < _SHORT_FULL
    factor = 15.0 / stretch if short and lora else usual
    most = 2 * usual if short and not lora else factor
    lowest = usual * min(fits) * min(1 / 3, math.sqrt(rows_per_step / _ROWS))
    value, gentle, wide = centre * factor, _GENTLE if pairs else 1.0, 3.0 if pairs else 1.0
    why = _why(facts, family, width, factor * stretch, lora=lora, short=short and lora, stretch=stretch)
    return RateAdvice(
        low=_two_digits(lowest * gentle / wide),
        high=_two_digits(3 * most * max(fits) * gentle * wide),
        value=_two_digits(value * gentle),
        why=f"{why} / {1 / gentle:g}, preferences" if pairs else why,
        guess=family is None,
    )


def advise_fresh(facts: ModelFacts) -> RateAdvice:
    """For random weights: 0.003239 - 0.0001395 ln(N), N parameters without embeddings (Kaplan et al. 2020, arXiv 2001.08361, eq. D.1),
    and from a third to three times that."""
    body = min(max(facts.num_parameters - facts.num_embedding_parameters, 1), _KAPLAN_MOST)
    value = 0.003239 - 0.0001395 * math.log(body)
    low, middle, high = (_two_digits(factor * value) for factor in (1 / 3, 1.0, 3.0))
    why = f"0.003239 - 0.0001395 ln({body:.2g}), random weights (Kaplan et al. 2020, eq. D.1)"
    return RateAdvice(low=low, high=high, value=middle, why=why, guess=False)


def _why(
    facts: ModelFacts, family: str | None, width: int, factor: float, *, lora: bool, short: bool, stretch: float
) -> str:
    power = f"^{_EXPONENTS[family]}" if family else "^p"
    said = f"5e-5 x (2000 / {width}){power}"
    if width != facts.hidden_size:
        said += f" (the width is {facts.hidden_size}; not fitted so far out)"
    for_what = [*(["LoRA"] if lora else []), *(["short run"] if short else [])]
    if for_what:
        said += f" x {factor:g}, {', '.join(for_what)}"
    if stretch != 1:
        said += f" / {stretch:.3g}, the adapters' scale over 32 / rank"
    if family:
        return f"{said} (tinker-cookbook's fit for {family.capitalize()})"
    return f"{said}: a guess, p was fitted for Llama and Qwen only, not for {facts.model_type}"


def stretch_of(tuning: Full | Lora) -> float:
    """How much further a step of the adapters' second matrix moves the weights than with the scale 32 / rank that the rates are for.

    Adam steps B by the rate whatever the scale, so weights move by scale x rate (LoRA Without Regret, on what alpha and rates have in
    common). rslora's scale is alpha / sqrt(rank).
    """
    if not isinstance(tuning, Lora):
        return 1.0
    return tuning.alpha / _ALPHA * (math.sqrt(tuning.rank) if tuning.variant == "rslora" else 1.0)


def _two_digits(value: float) -> float:
    return float(f"{value:.1e}")


def advise_rank(facts: ModelFacts, trained_tokens: float) -> tuple[int, str]:
    """A rank of adapters that can hold what the data says, and why.

    About 1 bit a trained token to learn, 2 bits a parameter to hold them (LoRA Without Regret): the next power of two above the
    rank that this needs, 16 to 256. More rank than needed costs little, less costs quality.
    """
    needed = trained_tokens / 2 / num_adapter_parameters(facts, 1)
    rank = min(max(2 ** math.ceil(math.log2(max(needed, 1.0))), _RANKS[0]), _RANKS[1])
    say = f"{trained_tokens:,.0f} trained tokens at 1 bit, 2 bits a parameter, need rank {math.ceil(needed)}"
    bound = "; 16 is our least" if needed <= _RANKS[0] else "; 256 is our most" if needed > _RANKS[1] else ""
    return rank, f"{say}{bound} (LoRA Without Regret; its alpha, 32, does for every rank)"
