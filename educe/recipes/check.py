"""`educe check`: everything that can be known before spending, and a verdict. Loads no model."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from educe.config import Recipe
from educe.data.finding import passed_over
from educe.model.describe import ModelFacts, describe_model
from educe.model.source import Say
from educe.pack.plan import PackPlan
from educe.recipes.build import Input
from educe.recipes.estimate import Estimate, estimate_run, whether_to_compile
from educe.recipes.memory import MemoryPlan, memory_of_run, trained_share
from educe.recipes.mixing import TaskPlan, mix, num_undrawn
from educe.recipes.plan import plan_run, too_many_unused, warnings_of
from educe.recipes.prepare import Prepared, inputs_of, named_twice, prepare
from educe.recipes.survey import odd_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What a run would be. `num_undrawn` rows are never drawn by the mixture; `blockers` are reasons it would fail: with none it
    is ready."""

    recipe: Recipe
    facts: ModelFacts
    prepared: Prepared
    plan: PackPlan
    tasks: tuple[TaskPlan, ...]
    num_undrawn: int
    estimate: Estimate
    memory: MemoryPlan
    compiling: str
    device: str
    device_why: str
    memory_bytes: int
    free_disk_bytes: int
    reasons: list[dict[str, Any]]
    odd: list[str]
    warnings: list[str]
    blockers: list[str]

    @property
    def ready(self) -> bool:
        return not self.blockers


def check(recipe: Recipe, say: Say) -> Check:
    """Prepare the data, plan the run, estimate its cost, compare with the machine."""
    from educe.recipes.machine import busy, device_of, memory_of, refuse_offload

    prepared = prepare(recipe, say)
    inputs, names = inputs_of(recipe)
    facts = describe_model(prepared.model_dir, recipe.model)
    mixed = mix(recipe, prepared)
    plan = plan_run(recipe, prepared, facts, mixed)
    device = device_of(recipe)
    refuse_offload(recipe, device.kind)
    share = trained_share(prepared)
    estimate = estimate_run(facts, recipe, plan, share, device)
    memory = memory_of(device.kind)
    compiled, why = whether_to_compile(recipe, facts, plan, device, share, packed=True)
    needed = memory_of_run(recipe, prepared, facts, plan, device, compiled=compiled)
    free = shutil.disk_usage(_existing(Path(recipe.runs))).free
    blockers = []
    if not needed.fits:
        blockers.append(
            f"needs {needed.total / 1e9:.1f} GB of memory, {memory / 1e9:.1f} GB are there: lower "
            "train.micro_batch_tokens, set tuning.kind: lora, or train.activations: auto"
        )
    if estimate.disk_bytes > free:
        blockers.append(f"needs {estimate.disk_bytes / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free")
    blockers += too_many_unused(recipe, prepared)
    return Check(
        recipe=recipe,
        facts=facts,
        prepared=prepared,
        plan=plan,
        tasks=mixed.tasks,
        num_undrawn=num_undrawn(prepared, mixed),
        estimate=estimate,
        memory=needed,
        compiling=f"{'yes' if compiled else 'no'}: {why}",
        device=f"{device.kind} ({device.name}), {device.dtype}",
        device_why=device.why,
        memory_bytes=memory,
        free_disk_bytes=free,
        reasons=_reasons(prepared),
        odd=odd_rows(inputs, names),
        warnings=[*_about_files(recipe, inputs), *warnings_of(recipe, prepared, facts, plan), *busy(device.kind)],
        blockers=blockers,
    )


def _about_files(recipe: Recipe, inputs: Sequence[Input]) -> list[str]:
    said = [f"{file} is named more than once: its rows count as often" for file in named_twice(inputs)]
    for rows in recipe.data.sources.values():
        if aside := passed_over(rows.files):
            names = ", ".join(p.name for p in aside[:3]) + (f" and {len(aside) - 3} more" if len(aside) > 3 else "")
            said.append(f"{rows.files}: not read, by their names: {names}")
    return said


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _reasons(prepared: Prepared) -> list[dict[str, Any]]:
    """Rows that are not used, by code: count and the first five places with what was found."""
    counts: Counter[str] = Counter()
    first: dict[str, list[dict[str, Any]]] = {}
    with (prepared.path / "ledger.jsonl").open("rb") as ledger:
        for raw in ledger:
            if b'"code":null' in raw:
                continue
            line = orjson.loads(raw)
            counts[line["code"]] += 1
            if len(seen := first.setdefault(line["code"], [])) < 5:
                seen.append(line)
    return [{"code": code, "count": n, "first": first[code]} for code, n in counts.most_common()]
