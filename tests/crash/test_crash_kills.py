"""Killed at every event, twice, and with two ranks: the same command goes on to the same bits."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from crash_cases import Base, End, broken_off, copied, end_of, make_base, tell, train_in  # noqa: E402


@pytest.fixture(scope="module")
def last(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Base:
    return make_base(tmp_path_factory.mktemp("last"), tiny_model, "last")


@pytest.fixture(scope="module")
def best(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Base:
    return make_base(tmp_path_factory.mktemp("best"), tiny_model, "best")


def killed_at(base: Base, points: list[int], start: str) -> dict[str, list[str]]:
    """What is wrong, by the event that the run was killed at."""
    found = {k: broken_off(base, base.case(f"kill-{start}-{k}", start), [{"kill_at": k}]) for k in points}
    return {f"event {k} of {start} ({base.trace[k - 1] if start == 'bare' else ''})": w for k, w in found.items() if w}


@pytest.mark.crash
def test_killed_at_every_event(last: Base, best: Base) -> None:
    """Of a run from nothing, and of one that keeps the best weights and finds its data prepared."""
    wrong: dict[str, list[str]] = {}
    for base, start in ((last, "bare"), (best, "prepared")):
        wrong |= killed_at(base, list(range(1, base.num_events[start] + 1)), start)
    number = last.num_events["bare"] + best.num_events["prepared"]
    assert number >= 200
    tell("kill points", number, wrong, "resumed to the same bits")


def some_deaths(numbers: random.Random, num_events: int) -> list[dict[str, Any]]:
    """Two or three ends of a run: at an event, most often, or after some time."""
    return [
        {"kill_after": numbers.uniform(0.05, 1.2)}
        if numbers.random() < 0.3
        else {"kill_at": numbers.randint(1, num_events)}
        for _ in range(2 + (numbers.random() < 0.3))
    ]


def killed_often(bases: list[Base], number: int, seed: int) -> dict[str, list[str]]:
    numbers, wrong = random.Random(seed), {}
    for n in range(number):
        base, start = numbers.choice(bases), numbers.choice(["bare", "prepared", "prepared", "prepared"])
        deaths = some_deaths(numbers, base.num_events[start])
        if problems := broken_off(base, base.case(f"often-{n}", start), deaths):
            wrong[f"{n} {start} {deaths}"] = problems
    return wrong


@pytest.mark.crash
def test_killed_again_and_again(last: Base, best: Base) -> None:
    tell("double and triple kills", 200, killed_often([last, best], 200, 7), "resumed to the same bits")


@pytest.mark.crash
def test_one_of_two_ranks_killed_or_both(
    tmp_path_factory: pytest.TempPathFactory, last: Base, tiny_model: Path
) -> None:
    """Over gloo; a rank that lost the other one is ended by who started it, as `--devices` and torchrun do."""
    home = tmp_path_factory.mktemp("ranks")
    straight = copied(last.prepared, home / "straight")
    code, said = train_in(straight, ranks=2)
    assert code == 0, said
    end = end_of(straight)
    assert isinstance(end, End), end
    base = Base(home=home, end=end, bare=last.bare, prepared=last.prepared, num_events=last.num_events, trace=[])
    numbers, wrong = random.Random(3), {}
    for n in range(12):
        deaths: list[dict[str, Any]] = []
        for _ in range(2):
            if numbers.random() < 0.5:
                deaths.append({"kill_after": numbers.uniform(0.5, 2.5), "who": numbers.choice([[0], [1], [0, 1]])})
            else:
                deaths.append({"kill_at": numbers.randint(1, base.num_events["prepared"]), "who": 0})
        if problems := broken_off(base, base.case(f"ranks-{n}", "prepared"), deaths, ranks=2):
            wrong[f"{n} {deaths}"] = problems
    tell("double kills with 2 ranks", 12, wrong, "resumed to the same bits")
