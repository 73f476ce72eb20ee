"""What made a run: the settings that must not change under it, and where everything came from."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from educe.config import Recipe
from educe.errors import RunError
from educe.files.hashes import hash_file_once, hash_json
from educe.files.jsonl import read_jsonl
from educe.files.run_dir import RunDir
from educe.model.describe import ModelFacts
from educe.model.device import Device
from educe.model.four_bit import num_packed
from educe.pack.plan import PLAN_VERSION
from educe.recipes.arithmetic import PACKAGES, version_of
from educe.recipes.model_of import weights_hash
from educe.recipes.prepare import Prepared, inputs_of
from educe.recipes.trainee import Trainee
from educe.secrets import redacted_values

# Bump when the same settings and data would train other weights.
TRAIN_VERSION = 5


def settings_of(recipe: Recipe, prepared: Prepared, facts: ModelFacts, ranks: int) -> dict[str, Any]:
    """Everything that decides the trained weights, flat: two runs with equal settings are the same run. `ranks`: those that packs
    are dealt to."""
    template = {f"template.{k}": v for k, v in recipe.template.model_dump(mode="json", exclude={"file"}).items()}
    tuning = {f"tuning.{k}": v for k, v in recipe.tuning.model_dump(mode="json").items()}
    skipped = [
        "checkpoint_every_steps",
        "keep_checkpoints",
        "keep_every_steps",
        "score_rows",
        "log_to",
        "activations",
    ]  # what is computed again has the same bits; answers leave nothing behind
    if recipe.train.patience is None and recipe.train.keep_weights == "last":
        skipped.append("measure_every_share")  # nothing follows from the measurements
    steps = {f"train.{k}": v for k, v in recipe.train.model_dump(mode="json").items() if k not in skipped}
    data = {f"files.{name}": digest for name, digest in _data_hashes(recipe).items()}
    policy = recipe.data.model_dump(mode="json", exclude={"max_unused"})
    for block in (policy["train"], policy["dev"], policy["test"], policy["replay"], *policy["tasks"].values()):
        for place in ("file", "files"):
            (block or {}).pop(place, None)
    objective = {f"objective.{k}": v for k, v in recipe.objective.model_dump(mode="json").items()}
    return {
        "model": weights_hash(facts.directory),
        **(objective if recipe.objective.kind != "sft" else {}),
        **template,
        "template.text": prepared.tokenizer.template_hash,
        **data,
        **{f"data.{k}": v for k, v in policy.items()},
        "prepared": prepared.key,
        **tuning,
        **steps,
        "device": recipe.device,
        "dtype": recipe.dtype,
        "ranks": ranks,
        "code.version": [PLAN_VERSION, TRAIN_VERSION],
    }


def how_it_is_computed(device: Device, t: Trainee, ranks: int, started: str | None) -> dict[str, Any]:
    """What was decided on this machine and decides the bits: every checkpoint has it. `started` by an earlier process, if one was."""
    low = ("bitsandbytes",) if num_packed(t.state.model.network) else ()
    return {
        "device": {"kind": device.kind, "dtype": device.dtype, "name": device.name, "why": device.why},
        "packed": t.packed,
        "compiled": t.compiled,
        "ranks": ranks,
        "memory": t.memory.as_json(),
        "packages": {p: version_of(p) for p in (*PACKAGES, *low)},
        "threads": torch.get_num_threads(),
        "started": started or _now(),
    }


def provenance_of(
    recipe: Recipe,
    prepared: Prepared,
    facts: ModelFacts,
    t: Trainee,
    how: dict[str, Any],
) -> dict[str, Any]:
    """provenance.json as it is while the run goes on; `how`: see `how_it_is_computed`."""
    hashes = _data_hashes(recipe)
    made = {
        "educe": version_of("educe"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **how,
        "model": {
            "name": recipe.model,
            "directory": str(facts.directory),
            "architecture": facts.architecture,
            "parameters": facts.num_parameters,
            "licence": facts.licence,
            "sha256": weights_hash(facts.directory),
        },
        "template": prepared.tokenizer.template_name,
        "template_settings": dict(prepared.tokenizer.settings),
        "template_sha256": prepared.tokenizer.template_hash,
        "new_tokens": dict(prepared.tokenizer.new_tokens),
        "tokenizer_sha256": prepared.tokenizer.tokenizer_hash,
        "data": {
            name: {"file": ", ".join(map(str, files)), "sha256": hashes[name]}
            for name, files in _data_files(recipe).items()
        },
        "prepared": prepared.key,
        "plan_sha256": t.plan.hash,
        "planned_ranks": t.plan.num_ranks,
        "trainable_parameters": t.state.optimizer.num_trained,
        "steps": t.plan.num_steps,
        "steps_done": None,
        "weights_step": None,
        "finished": None,
    }
    return dict(redacted_values(made))


def finished(
    provenance: dict[str, Any], run: RunDir, steps_done: int, weights_step: int, checkpoints_s: float | None = None
) -> dict[str, Any]:
    """The same after the last step, with what it took; time and tokens of steps are summed over all processes of the run.

    `weights_step`: the step whose weights the run keeps; `checkpoints_s`: seconds that checkpoints held up the last process.
    """
    needed = {
        "tokens",
        "tokens_per_s",
        "peak_memory_bytes",
    }  # what a damaged disk made of a line must not end a trained run
    steps = [line for line in read_jsonl(run.metrics) if line.get("kind") == "step" and needed <= line.keys()]
    training_s = sum(line["tokens"] / line["tokens_per_s"] for line in steps)
    return {
        **provenance,
        "finished": _now(),
        "steps_done": steps_done,
        "weights_step": weights_step,
        "training_s": training_s,
        "checkpoints_s": checkpoints_s,
        "tokens_per_s": sum(line["tokens"] for line in steps) / training_s if steps else 0.0,
        "peak_memory_bytes": max((int(line["peak_memory_bytes"]) for line in steps), default=0),
    }


def steps_done(run: RunDir) -> int | None:
    """Of a run that is at its very end; None for one that is not, or of which that is not known."""
    try:
        provenance = run.load(run.provenance)
        return int(provenance["steps_done"]) if provenance["finished"] is not None else None
    except (RunError, KeyError, TypeError):
        return None


def _data_files(recipe: Recipe) -> dict[str, list[Path]]:
    """The files of each task and split."""
    inputs, names = inputs_of(recipe)
    found: dict[str, list[Path]] = {}
    for i in inputs:
        found.setdefault(names[i.task] if i.role == "train" else i.role, []).extend(i.files)
    return found


def _data_hashes(recipe: Recipe) -> dict[str, str]:
    """One hash for the files of each task and split."""
    hashes = {name: [hash_file_once(f) for f in files] for name, files in _data_files(recipe).items()}
    return {name: found[0] if len(found) == 1 else hash_json(found) for name, found in hashes.items()}


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
