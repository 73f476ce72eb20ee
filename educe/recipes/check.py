"""`educe check`: everything that can be known before spending, and a verdict. Loads no model."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from jaxtyping import Int64

from educe.config import Recipe
from educe.data.finding import passed_over
from educe.files.atomic import existing, sized
from educe.model.describe import ModelFacts, describe_model
from educe.model.source import Say
from educe.pack.plan import PackPlan
from educe.recipes.build import Input
from educe.recipes.estimate import Estimate, estimate_run, whether_to_compile
from educe.recipes.finding import Finding, before
from educe.recipes.memory import MemoryPlan, memory_of_run, trained_share
from educe.recipes.mixing import TaskPlan, draw, mixture_of, num_undrawn
from educe.recipes.plan import idle_ranks, plan_run, too_many_unused, warnings_of
from educe.recipes.preflight import without_model, worst_first
from educe.recipes.prepare import Prepared, inputs_of, named_twice, prepare, without_rows
from educe.recipes.survey import odd_rows

# Checks whose failure is said above, in words of its own.
_TOLD = frozenset({"P02"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What a run would be. `num_undrawn` rows are never drawn by the mixture; `blockers` are reasons it would fail: with none it
    is ready. `findings`: what each check found."""

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
    of_machine: list[str]
    blockers: list[str]
    findings: list[Finding]

    @property
    def ready(self) -> bool:
        return not self.blockers

    def as_json(self) -> dict[str, Any]:
        """The verdict, what the run would be and cost, and every finding."""
        s = self.prepared.summary
        return {
            "ready": self.ready,
            "blockers": self.blockers,
            "warnings": [*self.warnings, *self.of_machine],
            "odd": self.odd,
            "rows": {"in": s["rows_in"], **s["rows"], "dropped": s["dropped"], "refused": s["refused"]},
            "tokens": s["tokens"],
            "trained_tokens": s["trained_tokens"],
            "steps": self.plan.num_steps,
            "device": self.device,
            "estimate": {**asdict(self.estimate), "total_s": self.estimate.total_s},
            "memory": self.memory.as_json(),
            "free_disk_bytes": self.free_disk_bytes,
            "reasons": self.reasons,
            "findings": [f.as_json() for f in worst_first(self.findings)],
        }


def check(
    recipe: Recipe,
    say: Say,
    *,
    text: str = "",
    argv: Sequence[str] = (),
    on_model: bool = False,
    stands_in: bool = False,
    ranks: int = 1,
    hang_after_s: float | None = None,
    gpu: str = "",
) -> Check:
    """Prepare the data, plan the run, estimate its cost, compare with the machine; `on_model` loads the model too and makes a step.

    `text` is the recipe as given, `argv` the words of the command: neither should hold a secret. `stands_in`: the recipe's model is
    there for another, whose weights are not known yet. `ranks`: devices that share the run. `hang_after_s`: as `educe train` has it.
    `gpu`: plan for such GPUs, none of which needs to be here (see `gpus`).
    """
    from educe.recipes.gpus import planned_gpu
    from educe.recipes.machine import busy, device_of, memory_of, refuse_offload
    from educe.training.watchdog import HANG_AFTER_S

    prepared = prepare(recipe, say)
    inputs, names = inputs_of(recipe)
    facts = describe_model(prepared.model_dir, recipe.model)
    order_K = draw(recipe, prepared)
    idle = idle_ranks(recipe, ranks)
    plan = plan_run(recipe, prepared, facts, order_K, num_ranks=1 if idle else ranks)
    device = planned_gpu(gpu, recipe) if gpu else device_of(recipe)
    refuse_offload(recipe, device.kind)
    share = trained_share(prepared)
    estimate = estimate_run(facts, recipe, plan, prepared, device, ranks)
    memory = memory_of(device, ranks)
    compiled, why = whether_to_compile(recipe, facts, plan, device, share, packed=True)
    needed = memory_of_run(recipe, prepared, facts, plan, device, compiled=compiled, ranks=ranks)
    free = shutil.disk_usage(existing(Path(recipe.runs))).free
    blockers = [
        *([f"--devices {ranks}: {idle}"] if idle else []),
        *_too_large(recipe, device.kind, needed, memory, estimate, free),
        *too_many_unused(recipe, prepared),
    ]
    odd = odd_rows(inputs, names)
    planned = (recipe, prepared, facts, plan, needed, device.kind, estimate.tokens_per_s)
    b = before(
        *planned,
        text=text,
        argv=argv,
        odd=odd,
        hang_after_s=hang_after_s or HANG_AFTER_S,
        stands_in=stands_in,
        memory_bytes=device.memory_bytes,
    )
    findings = without_model(b)
    blockers += [str(f) for f in findings if f.verdict == "fail" and f.id not in _TOLD]
    if on_model and not blockers:  # a model that does not fit is not loaded to see that
        loaded = _on_model(recipe, prepared, facts, order_K, say)
        findings += loaded
        blockers += [str(f) for f in loaded if f.verdict == "fail"]
    drawn = mixture_of(recipe, prepared, plan)
    return Check(
        recipe=recipe,
        facts=facts,
        prepared=prepared,
        plan=plan,
        tasks=drawn.tasks,
        num_undrawn=num_undrawn(prepared, drawn),
        estimate=estimate,
        memory=needed,
        compiling=f"{'yes' if compiled else 'no'}: {why}",
        device=f"{f'{ranks} x ' if ranks > 1 else ''}{device.kind} ({device.name}), {device.dtype}",
        device_why=device.why,
        memory_bytes=memory,
        free_disk_bytes=free,
        reasons=_reasons(prepared),
        odd=odd,
        warnings=[*_about_files(recipe, inputs), *warnings_of(recipe, prepared, facts, plan, stands_in=stands_in)],
        of_machine=busy(device.kind) if not gpu else [],
        blockers=blockers,
        findings=findings,
    )


def _on_model(
    recipe: Recipe, prepared: Prepared, facts: ModelFacts, order_K: Int64[np.ndarray, " k"], say: Say
) -> list[Finding]:
    from educe.recipes.preflight_run import look_on_model

    return look_on_model(recipe, prepared, facts, order_K, say)


def _too_large(
    recipe: Recipe, device: str, needed: MemoryPlan, memory: int, estimate: Estimate, free: int
) -> list[str]:
    """What the machine has too little of, in bytes."""
    said = []
    if not needed.fits:
        less = ["lower train.micro_batch_tokens"]
        less += ["set tuning.kind: lora"] if recipe.tuning.kind != "lora" else []
        less += ["set train.activations: auto"] if recipe.train.activations != "auto" else []
        less += ["use several devices (--devices)"] if device == "cuda" else []
        there = f"{memory / 1e9:.1f} GB are there"
        said.append(f"needs {needed.total / 1e9:.1f} GB of memory, {there}: {', or '.join(less)}")
    if estimate.disk_bytes > free:
        said.append(f"needs {sized(estimate.disk_bytes)} of disk, {sized(free)} are free")
    return said


def _about_files(recipe: Recipe, inputs: Sequence[Input]) -> list[str]:
    said = [f"{file} is named more than once: its rows count as often" for file in named_twice(inputs)]
    said += [f"{file} is empty: not read" for file in without_rows(recipe)]
    for rows in recipe.data.sources.values():
        if aside := passed_over(rows.files):
            names = ", ".join(p.name for p in aside[:3]) + (f" and {len(aside) - 3} more" if len(aside) > 3 else "")
            said.append(f"{rows.files}: not read, by their names: {names}")
    return said


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
