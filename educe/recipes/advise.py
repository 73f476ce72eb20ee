"""Settings derived from what the data and the model are, and the commented recipe that says why."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from educe.files.jsonl import parse_json
from educe.model.describe import ModelFacts
from educe.recipes.rates import RateAdvice, advise_rank, advise_rate
from educe.stats import percentile

_BASE_SHARE = 0.7  # of the memory that frozen weights in 16 bits may take: activations and the process need the rest


@dataclass(frozen=True, slots=True, kw_only=True)
class Looked:
    """What was seen in the data: how many rows there are, and of a sample of `num_sampled` of them the lengths in tokens of
    those that the model can hold and of their answers, the answers, and how many are longer; `held`: the same of the files of dev and
    test rows, where there are any."""

    rows: int
    num_sampled: int
    num_too_long: int
    lengths: list[int]
    answers: list[str]
    answer_tokens: list[int]
    held: Sequence[Looked] = ()


def metric_of(answers: Sequence[str]) -> tuple[str, str]:
    """The metric that fits the form of the answers, and why."""
    parsed = [parse_json(a, "") for a in answers]
    if all(isinstance(p, (dict, list)) for p in parsed):
        return "json", "every answer is JSON"
    if len(set(answers)) <= max(2, len(answers) // 20) and max(map(len, answers)) <= 60:
        return "label", f"{len(set(answers))} different short answers"
    starts = re.compile(r"\s*(select|insert|update|delete|with|create)\b", re.I)
    if all(starts.match(a) for a in answers):
        return "sql", "every answer starts like an SQL statement"
    if percentile([len(a) for a in answers], 0.9) <= 40:
        return "exact", "short answers"
    return "text", "free text: held-out loss decides, answers are shown side by side"


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """Derived settings with their reasons."""

    max_tokens: int
    why_length: str
    rank: int | None
    base_bits: int
    why_tuning: str
    epochs: float
    why_epochs: str
    batch_tokens: int
    micro_batch_tokens: int
    rows_per_step: int
    rate: RateAdvice


def _epochs(rows: int, on_cpu: bool) -> tuple[float, str]:
    """Passes over the data: more for small sets, few where time is dear (variety beats repetition: docs/decisions/003)."""
    if rows < 500:
        return 3.0, f"{rows} rows: small sets bear several passes"
    if rows > 100_000:
        return 1.0, f"{rows} rows: large sets need one pass"
    if on_cpu and rows >= 1000:
        return 1.25, f"{rows} rows; 2 passes would be usual, on a CPU they are dear"
    return 2.0, f"{rows} rows: small sets bear 2 or 3 passes, large ones need one"


def advise(looked: Looked, facts: ModelFacts, memory_bytes: float, on_cpu: bool) -> Advice:
    """Defaults for this data on this model, as a careful practitioner would choose them."""
    lengths = [n for part in (looked, *looked.held) for n in part.lengths]
    longest = max(lengths)
    p99 = percentile(lengths, 0.995)
    cut = longest > 4096 and p99 < longest
    wanted = 16 * math.ceil((p99 if cut else longest) / 16)
    max_tokens = min(facts.max_positions, wanted)
    which = " (of dev or test)" if longest > max(looked.lengths) else ""
    why_length = f"the longest row{which} has {longest} tokens" + (
        f"; the 0.5 % above {p99} are dropped" if cut else ""
    )
    if looked.num_too_long:
        why_length = f"what the model can hold; {looked.num_too_long} of {looked.num_sampled} rows are longer"
    lora = facts.num_parameters * 18 > 0.6 * memory_bytes or facts.num_parameters > 1e9
    size = facts.num_parameters / 1e6
    tuned = "LoRA" if lora else "all weights"
    why_tuning = f"{tuned}: full tuning of {size:.0f}M parameters needs about {facts.num_parameters * 18 / 1e9:.1f} GB"
    rank, base_bits = None, 16
    if lora:
        if facts.num_parameters * 2 > _BASE_SHARE * memory_bytes:
            base_bits = 4
            why_tuning = f"{why_tuning}; frozen in 16 bits it would take {facts.num_parameters * 2 / 1e9:.1f} GB of "
            why_tuning += f"{memory_bytes / 1e9:.0f}, so its linear layers are in 4 (QLoRA; needs educe[lowbit])"
        rank, why_rank = advise_rank(facts, looked.rows * sum(looked.answer_tokens) / len(looked.answer_tokens))
        why_tuning = f"{why_tuning}. {why_rank}"
    epochs, why_epochs = _epochs(looked.rows, on_cpu)
    mean = sum(looked.lengths) / len(looked.lengths)
    # A step holds enough rows for a steady gradient, few enough for 300 steps where there are the rows, and at most 128 rows.
    rows_per_step = max(4, min(128, round(looked.rows * epochs / 300)))
    batch = max(max_tokens, 64 * math.ceil(rows_per_step * mean / 64))
    # Few long micro-batches rather than many short ones (docs/performance.md); where one does not fit, layers are computed again.
    micro = min(batch, max(max_tokens, 2048 if on_cpu else 4096 if memory_bytes < 64e9 else 8192))
    batch = micro * math.ceil(batch / micro)
    num_steps = math.ceil(looked.rows * epochs / rows_per_step)
    return Advice(
        max_tokens=max_tokens,
        why_length=why_length,
        rank=rank,
        base_bits=base_bits,
        why_tuning=why_tuning,
        epochs=epochs,
        why_epochs=why_epochs,
        batch_tokens=batch,
        micro_batch_tokens=micro,
        rows_per_step=rows_per_step,
        rate=advise_rate(facts, lora=lora, rows_per_step=rows_per_step, num_steps=num_steps),
    )


def recipe_text(
    looked: Looked,
    facts: ModelFacts,
    memory_bytes: float,
    on_cpu: bool,
    *,
    name: str,
    model: tuple[str, str],
    train: str,
    dev: str | None,
    test: str | None,
) -> str:
    """The recipe as YAML with a reason behind each choice."""
    a = advise(looked, facts, memory_bytes, on_cpu)
    metric, why_metric = metric_of(looked.answers)
    longest_answer = max(n for part in (looked, *looked.held) for n in part.answer_tokens)
    new_tokens = min(8 * math.ceil(1.5 * longest_answer / 8), facts.max_positions // 2)
    half = "; half of the model's positions" if new_tokens < longest_answer else ""
    share = 0.1 if looked.rows >= 500 else 0.2

    def split(file: str | None, part: float, why: str) -> str:
        if file is not None:
            return f"{{kind: file, file: {_quoted(file)}}}"
        return f"{{kind: share, share: {part}}}  # {why}"

    bits = ", base_bits: 4" if a.base_bits == 4 else ""
    tuning = "{kind: full}" if a.rank is None else f"{{kind: lora, rank: {a.rank}, alpha: 32.0{bits}}}"
    return f"""\
# Written by `educe init`. Every value may be changed; `educe check` says what it means before anything is spent.
name: {name}
model: {_quoted(model[0])}  # {model[1]}
runs: runs  # run directories are made in here

data:
  train: {_quoted(train)}
  dev: {split(dev, 0.05, "measured while training")}
  test: {split(test, share, "answered once, at the end")}
  train_on: all  # every assistant turn is trained; `last` trains the last one only
  max_tokens: {a.max_tokens}  # {a.why_length}; longer rows are dropped, never cut

tuning: {tuning}  # {a.why_tuning}

train:
  epochs: {a.epochs}  # {a.why_epochs}
  batch_tokens: {a.batch_tokens}  # about {a.rows_per_step} rows a step
  micro_batch_tokens: {a.micro_batch_tokens}  # a pack of rows: what is held in memory at once
  learning_rate: {_yaml_float(a.rate.value)}  # {a.rate.why}; {a.rate.span} is worth a try: `educe lr` does it
  schedule: linear  # down to 0 after a warm-up of 5 % of the steps
  seed: 0

evaluation:
  metric: {{kind: {metric}}}  # {why_metric}
  max_new_tokens: {new_tokens}  # the longest answer has {longest_answer} tokens{half}
  few_shot: 5  # examples in the untouched model's best prompt, at most: is tuning needed at all?
"""


def _quoted(text: str) -> str:
    """A YAML scalar; quoted only where it has to be."""
    return text if re.fullmatch(r"[A-Za-z0-9_./][A-Za-z0-9_./-]*", text) else json.dumps(text, ensure_ascii=False)


def _yaml_float(value: float) -> str:
    """A float that YAML 1.2 reads as one: 1.3e-4 has its dot."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"
