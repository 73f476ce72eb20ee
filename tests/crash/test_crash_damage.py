"""Damaged files: found, said, moved aside, and gone on from the checkpoint before, to the same bits."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from crash_cases import Base, End, clear, copied, end_of, make_base, tell, train_in  # noqa: E402

Damage = Callable[[Path], None]


def halve(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def zero(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def add_garbage(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b'{"kind": "st\xff\x00')


def add_garbage_line(file: Path) -> None:
    """In the middle of the file, where no write that was broken off can have left it."""
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[: len(lines) // 2], b"\x00\x00garbage\n", *lines[len(lines) // 2 :]]))


PLAIN: dict[str, Damage] = {"deleted": Path.unlink, "halved": halve, "emptied": empty, "zeroed": zero}


def flips(file: Path, number: int, seed: str) -> Iterator[tuple[str, Damage]]:
    """One bit each: in the first byte, the header, the last byte, and anywhere."""
    size, numbers = file.stat().st_size, random.Random(seed)
    offsets = [0, min(9, size - 1), size - 1, *(numbers.randrange(size) for _ in range(number - 3))]
    for offset in offsets[:number]:
        bit = 8 * offset + numbers.randrange(8)
        yield f"bit {bit} flipped", lambda f, bit=bit: flip(f, bit)  # type: ignore[misc]


@pytest.fixture(scope="module")
def last(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Base:
    return make_base(tmp_path_factory.mktemp("damage"), tiny_model, "last")


@pytest.fixture(scope="module")
def stopped(last: Base) -> Path:
    return stop(last)


def stop(last: Base) -> Path:
    """A run that was killed when it had written its fourth checkpoint and still had the third."""
    place = last.case("stopped")
    code, _ = train_in(
        place, kill_before=["os.rename", "/step-000002"]
    )  # the fourth is in place, and the second loses its name
    assert code == 137
    shutil.rmtree(checkpoints(place)[0])
    assert [p.name for p in checkpoints(place)] == ["step-000003", "step-000004"]
    return place


def checkpoints(place: Path) -> list[Path]:
    return sorted((place / "runs" / "run" / "checkpoints").glob("step-*"))


def after(base: Base, begun: Path, name: str, file: Path, damage: Damage) -> tuple[Path, int, str, Path]:
    """The same command after the damage: (place, code, what it said, the file there)."""
    place = copied(begun, base.home / name)
    damage(place / file)
    code, said = train_in(place)
    return place, code, said, place / file


def of_checkpoint(last: Base, stopped: Path, cases: list[tuple[str, str, Damage]]) -> dict[str, list[str]]:
    wrong: dict[str, list[str]] = {}
    at = checkpoints(stopped)[-1].relative_to(stopped)
    for n, (name, what, damage) in enumerate(cases):
        place, code, said, _ = after(last, stopped, f"case-{n}", at / name, damage)
        problems = [] if code == 0 else [f"ended with {code}: {said[-600:]}"]
        if "checkpoint step-000004 is damaged" not in said:
            problems.append("not said")
        if not (place / at).with_name("damaged-step-000004").is_dir():
            problems.append("not kept aside")
        if "going on after step 3 of" not in said:
            problems.append("did not go on from the checkpoint before")
        end = end_of(place) if code == 0 else "no end"
        problems += [end] if isinstance(end, str) else end.differs(last.end)
        if problems:
            wrong[f"{name} {what}"] = problems
        clear(place)
    return wrong


@pytest.mark.crash
def test_every_damage_to_a_checkpoint(last: Base, stopped: Path) -> None:
    at = checkpoints(stopped)[-1]
    files = sorted(p for p in at.iterdir())
    cases = [(f.name, *c) for f in files for c in (*PLAIN.items(), *flips(f, 20, f.name))]
    assert len(cases) == 24 * 3
    tell("damaged checkpoints", len(cases), of_checkpoint(last, stopped, cases), "found, said, gone back from")


@pytest.mark.crash
def test_all_checkpoints_damaged(last: Base, stopped: Path) -> None:
    """It begins again, from the untouched model, and says so."""
    wrong: dict[str, list[str]] = {}
    for name, damage in {**PLAIN, "flipped": lambda f: flip(f, 8 * 999)}.items():
        place = copied(stopped, last.home / f"all-{name}")
        for checkpoint in checkpoints(place):
            damage(checkpoint / "weights.safetensors")
        code, said = train_in(place)
        end = end_of(place) if code == 0 else f"ended with {code}: {said[-600:]}"
        problems = [end] if isinstance(end, str) else end.differs(last.end)
        problems += [] if said.count("is damaged") == 2 else ["not said"]
        if problems:
            wrong[name] = problems
        clear(place)
    tell("all checkpoints damaged", 5, wrong, "begun again")


# The other files of a run, and prepared data.


def told(said: str) -> bool:
    """A message that teaches: a code, and what to do."""
    return "E-" in said and "→" in said and "Traceback" not in said


def of_other(
    last: Base, begun: Path, cases: list[tuple[Path, str, Damage]]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """(what is wrong, what became of the run's story) for each case: the run ends with the same bits, or says what to do, and
    does so when that is done."""
    wrong: dict[str, list[str]] = {}
    lost: dict[str, list[str]] = {}
    for n, (file, what, damage) in enumerate(cases):
        place, code, said, there = after(last, begun, f"other-{n}", file, damage)
        problems: list[str] = []
        if code == 2 and told(said):
            target = next((p for p in (there, *there.parents) if p.parent.name == "prepared"), there)
            shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)  # as such messages say
            code, said = train_in(place)
        if code:
            problems.append(f"ended with {code}: {said[-300:]}")
        end = end_of(place) if code == 0 else None
        if isinstance(end, str):
            problems.append(end)
        elif isinstance(end, End):
            different = end.differs(last.end)
            problems += [d for d in different if d not in ("story", "files")]
            if "story" in different:
                lost[f"{file} {what}"] = different
        if problems:
            wrong[f"{file} {what}"] = problems
        clear(place)
    return wrong, lost


@pytest.mark.crash
def test_every_damage_outside_of_checkpoints(last: Base, stopped: Path) -> None:
    cases: list[tuple[Path, str, Damage]] = []
    for file in sorted(p for p in (stopped / "runs" / "run").iterdir() if p.is_file()):
        if not file.stat().st_size:
            continue
        damages = [*PLAIN.items(), ("garbage added", add_garbage), *flips(file, 6, file.name)]
        if file.suffix == ".jsonl":
            damages.append(("garbage in the middle", add_garbage_line))
        cases += [(file.relative_to(stopped), *d) for d in damages]
    prepared = sorted(p for p in (stopped / "runs" / "prepared").rglob("*") if p.is_file() and p.stat().st_size)
    for file in prepared:
        few = [("deleted", Path.unlink), ("halved", halve), *flips(file, 2, file.name)]
        cases += [(file.relative_to(stopped), *d) for d in few]
    wrong, lost = of_other(last, stopped, cases)
    print(f"\nof those that recovered, {len(lost)} without the whole story: {json.dumps(lost, indent=1)}")
    tell("damage outside of checkpoints", len(cases), wrong, "same bits, or what to do is said")
