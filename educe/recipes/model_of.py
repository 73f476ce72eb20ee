"""The directory of the model that a recipe names: a directory, a Hub id, or an earlier run, whose tuned weights are meant."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from educe.files.hashes import cache_dir, hash_file_once, hash_json
from educe.files.locks import one_at_a_time
from educe.files.run_dir import RunDir
from educe.model.describe import refuse_unsafe
from educe.model.source import Say, find_model


def model_of(model: str, say: Say) -> Path:
    """Fetched or made when it has to be. Raises `ModelError`; `RunError` for a run that is not trained to its end."""
    run = RunDir(Path(model).expanduser())
    return _tuned(run, say) if run.resolved.is_file() else find_model(model, say)


def weights_hash(directory: Path) -> str:
    """Hash of a model's weights and config, by content."""
    return hash_json([hash_file_once(f) for f in [*sorted(directory.glob("*.safetensors")), directory / "config.json"]])


def _tuned(run: RunDir, say: Say) -> Path:
    """What the run has learned, as a model directory in the cache, whole and in fp32: made once for each set of weights."""
    from educe.recipes.machine import need_torch

    need_torch()
    from educe.recipes.eval import final_manifest
    from educe.recipes.export import write_tuned
    from educe.recipes.machine import chosen_device

    manifest = final_manifest(run, say)
    key = hash_json(manifest["files"])[:12]
    target = cache_dir() / "models" / f"run--{run.path.name}--{key}"
    waits = partial(say, f"another process writes the model of {run.path.name}: waiting for it")
    with one_at_a_time(cache_dir() / "locks" / f"run--{key}", waits):
        if not target.is_dir():
            say(f"{run.path} is a run: its tuned model, of step {manifest['weights_step']}, is written to the cache")
            write_tuned(run, target, chosen_device("cpu", "float32"), say)
    refuse_unsafe(target)
    return target
