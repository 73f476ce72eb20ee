"""`python preflight_ranks.py PLACE MODEL TUNING`, as one rank of several: PLACE/RANK.json has what every check of the loaded model
finds, as it should be and where gradients are averaged over the ranks instead of added up."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from educe.config import load_recipe
from educe.model.describe import describe_model
from educe.parallel.world import World, join, leave
from educe.recipes.mixing import draw
from educe.recipes.preflight_run import on_model
from educe.recipes.prepare import prepare
from educe.recipes.trainee import trainee
from torch.distributed.fsdp import FSDPModule

sys.path.insert(0, str(Path(__file__).parent / "zoo"))
from zoo_stand import DATA, TRAIN, Stand

from test_engine import cpu


def found(stand: Stand, tuning: str, world: World, *, averaged: bool) -> list[Any]:
    recipe = load_recipe(stand.recipe(tuning + DATA + TRAIN))
    prepared = prepare(recipe, stand.said.append)
    facts = describe_model(prepared.model_dir, recipe.model)
    given = (recipe, prepared, facts, draw(recipe, prepared), cpu(recipe.dtype), None, stand.said.append)
    t = trainee(*given, compiled=False, world=world, planned_ranks=world.size)
    before = {n: m.to_local().clone() for n, m in t.state.optimizer.masters.items()}
    for module in t.state.model.sharded._root.modules() if averaged and t.state.model.sharded is not None else ():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(float(world.size))
    findings = on_model(recipe, prepared, t, stand.place.parent / "run", world=world)
    kept = all(torch.equal(before[n], m.to_local()) for n, m in t.state.optimizer.masters.items())
    return [{f"{f.id} {f.name}": [f.verdict, f.number, f.evidence] for f in findings}, kept]


if __name__ == "__main__":
    place, model, tuning = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    world, told = join("cpu"), {}
    for averaged in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            stand = Stand.at(place / f"{world.rank}-{averaged}", model, patch)
            told[str(averaged)] = found(stand, tuning, world, averaged=averaged)
    (place / f"{world.rank}.json").write_text(json.dumps(told), encoding="utf-8")
    world.wait()
    leave()
