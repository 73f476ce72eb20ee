"""Which rows a step of a run trains on: a pure function of what was prepared and the run's settings (`educe rows`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import orjson

from educe.config import Recipe
from educe.errors import RunError, StoreError, UsageError
from educe.files.run_dir import RunDir
from educe.model.describe import describe_model
from educe.model.source import Say
from educe.recipes.mixing import draw
from educe.recipes.plan import plan_run
from educe.recipes.prepare import Prepared, open_prepared_data


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRow:
    """An example of a step: where its row stands, its task, its tokens and the sum of their weights; `pack` counts the step's
    micro-batches from 1."""

    pack: int
    place: str
    task: str
    tokens: int
    weight: float


def rows_of_step(run: RunDir, step: int, say: Say) -> list[StepRow]:
    """The examples of step `step` (from 1), in the order of the packs. Raises `UsageError` for a step the run does not have."""
    recipe = Recipe.model_validate(run.load(run.resolved)["recipe"])
    provenance = run.load(run.provenance)
    prepared = open_prepared_data(recipe, provenance["prepared"], say)
    if prepared is None:
        fix = f"Prepare it again: educe prepare {run.recipe}"
        raise StoreError(1, provenance["prepared"], "the run's prepared data is gone.", fix)
    facts = describe_model(prepared.model_dir, recipe.model)
    ranks = provenance["planned_ranks"]
    plan = plan_run(recipe, prepared, facts, draw(recipe, prepared), packed=provenance["packed"], num_ranks=ranks)
    if plan.hash != provenance["plan_sha256"]:
        raise RunError(201, str(run.path), "was planned by another version of educe.", "Use the version that made it.")
    if not 1 <= step <= plan.num_steps:
        raise UsageError(101, "--step", f"{step} is no step.", f"The run has steps 1 to {plan.num_steps}.")
    store = prepared.store("train")
    packs = plan.step(step - 1)
    places = dict(_places(prepared.path / "ledger.jsonl", {int(store.rows[i]) for pack in packs for i in pack}))
    return [
        StepRow(
            pack=k,
            place=places[int(store.rows[i])],
            task=prepared.tasks[int(store.tasks[i])],
            tokens=int(store.lengths[i]),
            weight=float(store[i].weights_T.sum()),
        )
        for k, pack in enumerate(packs, 1)
        for i in pack
    ]


def names_of(prepared: Prepared, packs: Sequence[Sequence[int]], pack: int | None, most: int = 5) -> str:
    """FILE:LINE of the rows in one of these packs, or in all of them; the first few."""
    store = prepared.store("train")
    chosen = [int(store.rows[i]) for p in (packs if pack is None else [packs[pack]]) for i in p]
    places = dict(_places(prepared.path / "ledger.jsonl", set(chosen)))
    shown = list(dict.fromkeys(places[n] for n in chosen))
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return f"rows {', '.join(shown[:most])}{more}"


def _places(ledger: Path, numbers: set[int]) -> Iterator[tuple[int, str]]:
    """FILE:LINE of some lines of a ledger, by their numbers."""
    with ledger.open("rb") as f:
        for n, raw in enumerate(islice(f, max(numbers, default=-1) + 1)):
            if n in numbers:
                line = orjson.loads(raw)
                item = f"[{line['item']}]" if line["item"] is not None else ""
                yield n, f"{line['file']}:{line['line']}{item}"
