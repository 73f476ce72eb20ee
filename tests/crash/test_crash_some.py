"""A few crash tests of every kind, in one file so that they share a run; `pytest -m crash -s tests/crash` does all."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from crash_cases import Base, make_base, tell  # noqa: E402
from test_crash_damage import PLAIN, add_garbage, checkpoints, empty, flips, halve, of_checkpoint, of_other, stop  # noqa: E402
from test_crash_faults import at_writes, num_able  # noqa: E402
from test_crash_kills import killed_at, killed_often  # noqa: E402
from test_crash_order import late, unsafe  # noqa: E402

NUM_KILLS = 3


@pytest.fixture(scope="module")
def last(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Base:
    return make_base(tmp_path_factory.mktemp("some"), tiny_model, "last")


def test_killed_at_some_events(last: Base) -> None:
    number = last.num_events["bare"]
    points = [1 + round((number - 1) * i / (NUM_KILLS - 1)) for i in range(NUM_KILLS)]
    tell("kill points", len(points), killed_at(last, points, "bare"), "resumed to the same bits")


def test_killed_again_while_it_goes_on(last: Base) -> None:
    tell("double kills", 1, killed_often([last], 1, 6), "resumed to the same bits")


def test_a_power_cut_loses_nothing(last: Base) -> None:
    renames = sum(e[0] == "os.rename" for e in last.trace)
    assert renames > 10
    wrong = sorted({*unsafe(last.trace), *late(last.trace)})
    print(f"\norder of calls: {renames} renames, {len(wrong)} unsafe")
    assert not wrong, "\n".join(wrong)


def test_damage(last: Base) -> None:
    stopped, run = stop(last), Path("runs/run")
    weights = next(flips(checkpoints(stopped)[-1] / "weights.safetensors", 20, "some"))
    cases = [("weights.safetensors", *weights), ("optimizer.safetensors", "deleted", PLAIN["deleted"])]
    tell("damaged checkpoints", len(cases), of_checkpoint(last, stopped, cases), "found, said, gone back from")
    others = [(run / "metrics.jsonl", "garbage added", add_garbage), (run / "recipe.resolved.json", "halved", halve)]
    others.append((run / "provenance.json", "emptied", empty))
    tell("damage elsewhere", len(others), of_other(last, stopped, others)[0], "same bits, or what to do is said")


def test_some_writes_fail(last: Base) -> None:
    number = num_able(last)
    points = [number // 3, 2 * number // 3, number - 8]
    tell(
        "failing writes", len(points), at_writes(last, points, "bare"), "gone on or stopped cleanly, then the same bits"
    )
