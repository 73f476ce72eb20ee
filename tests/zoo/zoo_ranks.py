"""Failures of several ranks. Two processes (gloo) run `python zoo_ranks.py PLACE MODEL`; PLACE/found.json has what rank 0 found."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from educe.parallel.world import World, join, leave
from educe.recipes.trainee import Trainee
from educe.training import loop
from educe.training.means import Means
from zoo_stand import Failure, Stand

HERE = Path(__file__).parent


def as_it_is(stand: Stand, world: World) -> None:
    """Nothing is wrong."""


def own_denominator(stand: Stand, world: World) -> None:
    """Each rank divides by its own tokens."""
    right = loop.counts_of

    def mine(batches: Any, world: Any) -> Any:
        counts = right(batches)
        return counts._replace(weight=counts.weight * world.size or 1.0)  # the mean of the ranks' means

    stand.everywhere(right, mine)


def loss_times_ranks(stand: Stand, world: World) -> None:
    """Sums are added up over the ranks, weights are not."""
    right = Means.over

    def over(self: Means, world: World, num_tasks: int) -> Means:
        own, made = self._weights_T.copy(), right(self, world, num_tasks)
        made._weights_T[:] = np.maximum(own, 1e-9)
        return made

    stand.patch.setattr(Means, "over", over)


def uneven_work(stand: Stand, world: World) -> Callable[[Trainee], Trainee]:
    """The last rank has a micro-batch fewer: the others would wait for it."""

    def then(t: Trainee) -> Trainee:
        def fewer(step: int) -> Any:
            batches = t.batches_of(step)
            return batches[:-1] if world.rank == world.size - 1 else batches

        return replace(t, batches_of=fewer)

    return then


WAYS: dict[str, Callable[[Stand, World], Any]] = {
    "healthy": as_it_is,
    "own denominator": own_denominator,
    "loss times ranks": loss_times_ranks,
    "uneven work": uneven_work,
}


@cache
def of_two_ranks(place: Path, model: Path) -> dict[str, list[str]]:
    """What two real processes notice, for each of `WAYS`."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    paths = os.pathsep.join([str(HERE.parents[1]), str(HERE.parent), str(HERE)])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    env = {**os.environ, **world, "PYTHONPATH": paths}
    words = [sys.executable, str(HERE / "zoo_ranks.py"), str(place), str(model)]
    started = [
        subprocess.Popen(words, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.PIPE, text=True)
        for r in range(2)
    ]
    errors = [p.communicate()[1] for p in started]
    assert [p.returncode for p in started] == [0, 0], errors[0][-3000:]
    found: dict[str, list[str]] = json.loads((place / "found.json").read_text(encoding="utf-8"))
    return found


def two_ranks(way: str) -> Callable[[Stand, bool], set[str]]:
    def show(stand: Stand, wrong: bool) -> set[str]:
        there = stand.place.parent / "ranks"  # the processes show all ways at once
        there.mkdir(exist_ok=True)
        return set(of_two_ranks(there, stand.model.parent.parent / "model")[way if wrong else "healthy"])

    return show


def rank(place: Path, model: Path) -> None:
    """What one process does."""
    world, found = join("cpu"), {}
    for k, (way, wrong) in enumerate(WAYS.items()):
        with pytest.MonkeyPatch.context() as patch:
            stand = Stand.at(place / f"{world.rank}-{k}", model, patch)
            then = wrong(stand, world)
            found[way] = sorted(stand.look_on_model(stand.recipe(), then or (lambda t: t), world, world.size))
    if world.leads:
        (place / "found.json").write_text(json.dumps(found), encoding="utf-8")
    world.wait()
    leave()


IN_RANKS = (
    Failure(
        number=2,
        what="Every rank averages over its own tokens, and the averages are averaged",
        how="a step is divided by the rank's own weight; two processes",
        by="P26 fail",
        show=two_ranks("own denominator"),
    ),
    Failure(
        number=3,
        what="Held-out loss is multiplied by the number of ranks",
        how="sums are added up over the ranks, weights are not; two processes",
        by="P50 fail",
        show=two_ranks("loss times ranks"),
    ),
    Failure(
        number=23,
        what="Ranks have unlike numbers of batches and wait for each other for ever",
        how="the last rank drops its last micro-batch; two processes",
        by="P45 fail",
        show=two_ranks("uneven work"),
    ),
)

if __name__ == "__main__":
    rank(Path(sys.argv[1]), Path(sys.argv[2]))
