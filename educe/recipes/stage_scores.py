"""`educe eval` of a run of stages: every stage's model, and the one that all began with, on the same held-out sets.

What was measured of a model lies in RUN/measured/KEY/, written whole, and is never measured again.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from educe.config import StagedRecipe
from educe.config.stages import BASE
from educe.errors import RunError
from educe.evaluate.stages import Rows, numbers_of, verdict_of
from educe.files.atomic import directory, verify, write_json
from educe.files.hashes import cache_dir, hash_json
from educe.files.jsonl import write_jsonl
from educe.files.run_dir import STAGE_SCORES
from educe.model.blended import read_packed
from educe.model.device import CLOSE_OTHERS, release_free_memory, told_of_memory
from educe.model.load import CausalLM, load_model
from educe.model.source import Say
from educe.recipes.arithmetic import arithmetic_of
from educe.recipes.eval import final_manifest, recipe_of
from educe.recipes.kept_answers import OnAnswers
from educe.recipes.model_of import model_of, weights_hash
from educe.recipes.stage_rows import Scale, as_json, measured, of_json, scale_of
from educe.recipes.stage_suite import followed, measure_suite
from educe.recipes.stages import open_staged, summary_of
from educe.recipes.suite import Wish

# Bump when the same model and rows would be measured otherwise.
STAGE_SCORES_VERSION = 2


@told_of_memory("evaluating the stages", CLOSE_OTHERS)
def score_stages(path: Path, say: Say, on_answers: OnAnswers, suite: Wish | None = None) -> dict[str, Any]:
    """Measure what is not measured yet, instructions where a suite of them is asked for; writes stage_scores.json and returns it.
    Raises `RunError` for a stage that has not ended."""
    run, staged = open_staged(path)
    for stage in run.runs.values():
        if not stage.resolved.is_file():
            raise RunError(
                2, str(stage.path), "is not trained yet.", "Give the same `educe train RECIPE` again: it goes on."
            )
        final_manifest(stage, say)
    scale = scale_of(staged, list(run.runs.values()), say)
    places = {BASE: _base(staged, say)} | {name: model_of(str(stage.path), say) for name, stage in run.runs.items()}
    weights = {name: weights_hash(place) for name, place in places.items()}
    points: dict[str, dict[str, Rows]] = {}
    for name, place in places.items():
        key = hash_json([STAGE_SCORES_VERSION, weights[BASE], weights[name], scale.key])[:16]
        hashes = weights[BASE], weights[name]
        points[name] = _point(path / "measured" / key, name, place, places[BASE], hashes, scale, say, on_answers)
    if suite is not None:
        measure_suite(path, suite, weights, lambda name: _loaded(places[name], scale), scale, say, on_answers)
    known, rows = followed(path, weights, say)
    for name, instructions in rows.items():
        points[name] = points[name] | {"instructions": instructions}
    starts = {
        name: BASE if (k0 := staged.start_of(k)) is None else staged.names[k0] for k, name in enumerate(staged.names)
    }
    lines = numbers_of(points, starts, staged.last)
    found = {
        "name": staged.name,
        "model": staged.model if isinstance(staged.model, str) else staged.model.model_dump(mode="json"),
        "metric": staged.evaluation.metric.kind,
        "suite": known,
        "last": staged.last,
        "device": {"kind": scale.device.kind, "name": scale.device.name, "dtype": scale.device.dtype},
        "stages": {
            name: summary_of(stage, recipe_of(stage), starts[name])
            | {"run": stage.path.name, "said": verdict_of(lines, name)}
            for name, stage in run.runs.items()
        },
        "measures": lines,
    }
    write_json(path / STAGE_SCORES, found)
    return found


def _base(staged: StagedRecipe, say: Say) -> Path:
    return model_of(staged.model, say) if isinstance(staged.model, str) else staged.scratch_path()


def _point(
    place: Path, name: str, model_dir: Path, base_dir: Path, hashes: tuple[str, str], scale: Scale, say: Say,
    on_answers: OnAnswers,
) -> dict[str, Rows]:  # fmt: skip
    """As measured before, or measured now. `hashes`: of the start's weights and of these."""
    if place.is_dir() and not isinstance(verify(place), str):
        return of_json(json.loads((place / "rows.json").read_text(encoding="utf-8")))
    _remember(base_dir, scale)
    say(f"{name}: measured on the held-out sets")
    began = time.perf_counter()
    found, answers = _measured(name, model_dir, hashes, scale, say, on_answers)
    release_free_memory()
    with directory(place, about={"stage": "measured", "model": name, "seconds": time.perf_counter() - began}) as part:
        write_json(part / "rows.json", as_json(found))
        write_jsonl(part / "answers.jsonl", answers)
    return found


def _measured(
    name: str, model_dir: Path, hashes: tuple[str, str], scale: Scale, say: Say, on_answers: OnAnswers
) -> tuple[dict[str, Rows], list[dict[str, Any]]]:
    model = _loaded(model_dir, scale)
    return measured(model, scale.kept(lambda: model, *hashes, say), scale, name, on_answers)


def _loaded(model_dir: Path, scale: Scale) -> CausalLM:
    """Ready to answer and to read packed rows. Tokens that the stages added begin in the start's model as they did in training."""
    known = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    size = int(known.get("vocab_size") or known.get("text_config", {}).get("vocab_size", 0))
    added = [i for i in scale.asking.tokenizer.control.values() if i >= size]
    model = load_model(model_dir, scale.device, new_ids=added)
    read_packed(model, scale.packs)
    return model


def _remember(base_dir: Path, scale: Scale) -> None:
    """What the start says of the general text: once, kept in the cache."""
    if scale.general.base_nll_R:
        return
    template = scale.asking.tokenizer.template_hash  # its tokens are added to the vocabulary
    key = hash_json([weights_hash(base_dir), template, scale.general.key, *arithmetic_of(scale.device)])[:24]
    file = cache_dir() / "general" / f"stages-{key}.safetensors"
    if not scale.general.read(file):
        scale.general.remember(_loaded(base_dir, scale))
        release_free_memory()
        scale.general.write(file)
