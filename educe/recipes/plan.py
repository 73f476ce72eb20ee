"""What `check` and `train` both need: the prepared data, the pack plan, and the warnings that follow from them."""

from __future__ import annotations

import difflib
import math

import numpy as np
from jaxtyping import Int64

from educe.chat.template import FIXED_DATE
from educe.config import Lora, Recipe
from educe.data.formats import BESIDE
from educe.data.messages import TURN_KEYS
from educe.errors import DataError, ModelError, RecipeError, UsageError
from educe.model.describe import ModelFacts
from educe.pack.plan import PackPlan, plan_packs, plan_pairs
from educe.recipes.prepare import Prepared
from educe.recipes.rates import RateAdvice, advise_fresh, advise_rate, stretch_of
from educe.recipes.scratch import is_scratch

# Keys that mean something in a row or a turn: what an unread key may have been meant for.
READ_KEYS = sorted(TURN_KEYS | BESIDE)


_SHORT_RUN = 20  # steps


def looked_at(recipe: Recipe, num_steps: int) -> frozenset[int]:
    """After which steps the sample questions are answered: in a short run they would be the same answers again."""
    return measured_at(recipe, num_steps) if num_steps >= _SHORT_RUN else frozenset({0, num_steps})


def measured_at(recipe: Recipe, num_steps: int) -> frozenset[int]:
    """After which steps the held-out loss is measured, as far as the recipe says it; once more after the last."""
    every = recipe.train.measure_every_share
    return frozenset({0, num_steps, *(round(num_steps * every * k) for k in range(1, int(1 / every) + 1))})


def plan_run(
    recipe: Recipe,
    prepared: Prepared,
    facts: ModelFacts,
    order_K: Int64[np.ndarray, " k"],
    *,
    packed: bool = True,
    num_ranks: int = 1,
) -> PackPlan:
    """The run's plan for so many ranks, of the examples that were drawn; refuses what could only fail later."""
    store = prepared.store("train")
    if recipe.data.max_tokens > facts.max_positions:
        found = f"data.max_tokens is {recipe.data.max_tokens}, {facts.name} has {facts.max_positions} positions."
        raise ModelError(201, "data.max_tokens", found, "Lower it.")
    if not len(prepared.store("dev")) and (recipe.train.patience or recipe.train.keep_weights == "best"):
        knob = "train.patience" if recipe.train.patience else "train.keep_weights: best"
        raise RecipeError(
            201, knob, "goes by the held-out loss, and no row is held out.", "Give data.dev rows, or drop it."
        )
    added = sorted(prepared.tokenizer.new_tokens.values())
    known = max(facts.vocab_size, added[-1] + 1) if added and added[0] <= facts.vocab_size else facts.vocab_size
    if store.max_id >= known:
        found = f"the tokenizer gives id {store.max_id}, the model knows {facts.vocab_size} ids."
        raise ModelError(202, str(facts.directory), found, "Use the tokenizer that belongs to the model.")
    lengths, pairs = store.lengths, recipe.learns_pairs
    longest = int((lengths[::2] + lengths[1::2]).max() if pairs else lengths.max())
    return (plan_pairs if pairs else plan_packs)(
        lengths,
        order_K,
        batch_tokens=recipe.train.batch_tokens,
        capacity_tokens=recipe.train.micro_batch_tokens if packed else longest,
        seed=recipe.train.seed,
        packed=packed,
        num_ranks=num_ranks,
        most_steps=recipe.train.steps,
    )


def idle_ranks(recipe: Recipe, num_ranks: int) -> str:
    """Why a step has not a pack for each rank: it would grow, or some would compute nothing. Empty where it has."""
    batch, micro = recipe.train.batch_tokens, recipe.train.micro_batch_tokens
    if num_ranks * micro <= batch:
        return ""
    return f"{num_ranks} devices need {num_ranks} packs of {micro} tokens a step, train.batch_tokens holds {batch // micro}"


def refuse_idle_ranks(recipe: Recipe, num_ranks: int) -> None:
    """Raises `UsageError` where `idle_ranks` says why."""
    if idle := idle_ranks(recipe, num_ranks):
        fix = "Lower train.micro_batch_tokens, or raise train.batch_tokens."
        raise UsageError(101, "--devices", f"{idle}.", fix)


def too_many_unused(recipe: Recipe, prepared: Prepared) -> list[str]:
    """Why so many rows are left out that a run must not start; nothing where they are few enough."""
    unused, rows = prepared.summary["refused"] + prepared.summary["dropped"], prepared.summary["rows_in"]
    if unused <= recipe.data.max_unused * rows:
        return []
    return [
        f"{unused} of {rows} rows are not used, more than the share of data.max_unused ({recipe.data.max_unused:g})"
    ]


def refuse_unused(recipe: Recipe, prepared: Prepared) -> None:
    """Raises `DataError` where `too_many_unused` says why."""
    if why := too_many_unused(recipe, prepared):
        raise DataError(11, str(prepared.path / "ledger.jsonl"), f"{why[0]}.", "See why: educe check. Or raise it.")


def warnings_of(
    recipe: Recipe, prepared: Prepared, facts: ModelFacts, plan: PackPlan, *, stands_in: bool = False
) -> list[str]:
    """What may be right but is worth a look. `stands_in`: the model is there for another."""
    s, said = prepared.summary, []
    if s["duplicates"]:
        what = (
            "training row is an exact copy of another"
            if s["duplicates"] == 1
            else "training rows are exact copies of others"
        )
        said.append(f"{s['duplicates']} {what}")
    for split, count in (s["leaks"] or {}).items():
        if count:
            said.append(f"{count} prompts of the {split} rows are also in the training rows: its score will flatter")
    if s["rows_without_a_group"]:
        said.append(f"data.group gives nothing for {s['rows_without_a_group']:,} rows: they are split by their prompts")
    if s["near_copies"]:
        said.append(f"{s['near_copies']} training rows nearly repeat a held-out row and are left out")
    if s["unfinished_answers"]:
        lost = s["lost_trained_tokens"]
        said.append(
            f"{s['unfinished_answers']} answers are cut before their stop token, {lost:,} trained tokens are lost"
        )
    if s["rows"]["dev"] == 0:
        said.append(
            "no dev rows: the held-out loss is not measured, and nothing shows when the rows are learned by heart"
        )
    if s["rows"]["test"] == 0:
        said.append("no test rows: nothing will tell whether tuning helped")
    elif s["rows"]["test"] < 100:
        said.append(f"only {s['rows']['test']} test rows: intervals will be wide (100 or more are better)")
    if s["refused"] + s["dropped"] > 0.01 * s["rows_in"]:
        said.append(f"{s['refused'] + s['dropped']} of {s['rows_in']} rows are not used")
    if "strftime_now" in prepared.tokenizer.template.variables:
        said.append(
            f"the chat template prints the date: rows are trained with {FIXED_DATE:%Y-%m-%d}, a server sends today's"
        )
    for key in s["unread_keys"]:
        near = difflib.get_close_matches(key.removesuffix(" (of a turn)"), READ_KEYS, 1, 0.75)
        if near and near[0] != key:
            said.append(f"the key {key} of {s['unread_keys'][key]:,} rows is not read: is {near[0]} meant?")
    known, words = prepared.tokenizer.known_stop, prepared.tokenizer.control
    if len(s["stop"]) > 1:
        for word in s["stop"]:
            if word in words and words[word] not in known and word not in prepared.tokenizer.new_tokens:
                count = s["stop"][word]
                said.append(
                    f"{count:,} turns are trained to end with {word}, which is none of the model's own end tokens: "
                    "servers stop there only with the export's generation_config"
                )
    batch, micro = recipe.train.batch_tokens, recipe.train.micro_batch_tokens
    if batch % micro:
        said.append(
            f"train.batch_tokens ({batch}) is no multiple of train.micro_batch_tokens ({micro}): "
            f"a step holds at most {batch // micro * micro} tokens"
        )
    every, keep = recipe.train.checkpoint_every_steps, recipe.train.keep_every_steps
    if keep and math.lcm(every, keep) >= plan.num_steps:
        said.append(
            f"train.keep_every_steps {keep} keeps none of {plan.num_steps} steps: checkpoints are written every {every} "
            "steps (train.checkpoint_every_steps), and at the end"
        )
    if recipe.train.patience and recipe.train.patience * recipe.train.measure_every_share >= 1:
        said.append(
            f"train.patience {recipe.train.patience} can end nothing: dev is measured every "
            f"{recipe.train.measure_every_share:g} of the run; lower train.measure_every_share"
        )
    if plan.num_steps < _SHORT_RUN:
        longer = "raise train.steps" if recipe.train.steps else "lower train.batch_tokens or raise train.epochs"
        said.append(f"only {plan.num_steps} step{'s' if plan.num_steps > 1 else ''}: {longer}")
    return [*said, *_of_learning(recipe, facts, plan, fresh=is_scratch(facts.directory) and not stands_in)]


def _of_learning(recipe: Recipe, facts: ModelFacts, plan: PackPlan, *, fresh: bool) -> list[str]:
    """Of the rate and of what is trained."""
    said, lora = [], isinstance(recipe.tuning, Lora)
    if lora and recipe.objective.kind == "pretrain":
        said.append(
            "adapters learn less from raw text than all weights do (Biderman et al. 2024, arXiv 2405.09673): "
            "tuning: {kind: full} where memory allows, else a high rank such as 256"
        )
    rate, advice = recipe.train.learning_rate, advise_fresh(facts) if fresh else advised_rate(recipe, facts, plan)
    if not advice.low <= rate <= advice.high:
        way = "high" if rate > advice.high else "low"
        what = "adapters" if lora else "full tuning"
        tries = "" if recipe.learns_pairs else "; `educe lr` tries rates on your rows"
        said.append(
            f"train.learning_rate {rate:g} is {way}: {advice.span} is advised for {what} of this model "
            f"({advice.value:g} = {advice.why}){tries}"
        )
    return said


def advised_rate(recipe: Recipe, facts: ModelFacts, plan: PackPlan) -> RateAdvice:
    """The rates that are advised for this run."""
    pairs = recipe.learns_pairs
    rows = plan.examples_K.size / plan.num_steps / (2 if pairs else 1)
    lora, stretch = isinstance(recipe.tuning, Lora), stretch_of(recipe.tuning)
    return advise_rate(facts, lora=lora, rows_per_step=rows, num_steps=plan.num_steps, stretch=stretch, pairs=pairs)
