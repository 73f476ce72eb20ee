"""suites/NAME.json → the page's section on public benchmarks. What is damaged is left out: a page about a run must not fail on it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from educe.files.run_dir import RunDir

MOST_SYSTEMS = 12  # as many columns as the page has
_MEASURES = {
    "prompt_strict": "All of a prompt's instructions, strict",
    "prompt_loose": "All of a prompt's instructions, loose",
    "instruction_strict": "Single instructions, strict",
    "instruction_loose": "Single instructions, loose",
}
_RULES = {"sum": "The whole option", "per_token": "Its mean token", "per_byte": "Its mean byte"}
Made = TypeVar("Made")
_CHOICES = "choices-"  # what the names of their files begin with


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A type of instruction: how many prompts have it, how many answers of each system follow it (strict), and the paired test."""

    name: str
    total: int
    followed: tuple[int, ...]
    p: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A benchmark: its verdict, the systems, and of each measure a cell for each system and one for the difference."""

    verdict: str
    num_prompts: int
    systems: tuple[str, ...]
    compared: bool
    measures: tuple[tuple[str, tuple[str, ...]], ...]
    cut: tuple[tuple[str, float], ...]
    most_tokens: int
    kinds: tuple[Kind, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """Multiple-choice questions of a file: under each rule a cell for each system, one for the difference, and McNemar's p."""

    name: str
    num_rows: int
    chance: float
    systems: tuple[str, ...]
    rules: tuple[tuple[str, tuple[str, ...], float], ...]


def read_suites(run: RunDir) -> tuple[Suite, ...]:
    """All benchmarks that the run answered, by name."""
    return tuple(_read(run, lambda name, found: None if name.startswith(_CHOICES) else _suite(found)))


def read_choices(run: RunDir) -> tuple[Choices, ...]:
    """All files of multiple-choice questions that the run ranked, by name."""
    return tuple(_read(run, lambda name, found: _choices(name, found) if name.startswith(_CHOICES) else None))


def _read(run: RunDir, make: Callable[[str, dict[str, Any]], Made | None]) -> Iterator[Made]:
    for file in sorted(run.suites.glob("*.json")):
        try:
            made = make(file.stem, json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, OverflowError, KeyError, TypeError, AttributeError, RecursionError):
            continue
        if made is not None:
            yield made


def _choices(name: str, found: dict[str, Any]) -> Choices:
    systems = dict(islice(found["systems"].items(), MOST_SYSTEMS))
    rules = []
    for c in found["comparisons"]:
        by = str(c["measure"])
        cells = (*(_span(s[by], "") for s in systems.values()), _span(c["difference"], "+"))
        rules.append((_RULES.get(by, by), cells, float(c["p"])))
    return Choices(
        name=name.removeprefix(_CHOICES),
        num_rows=int(found["num_rows"]),
        chance=float(found["chance"]),
        systems=tuple(systems),
        rules=tuple(rules),
    )


def _suite(found: dict[str, Any]) -> Suite:
    systems = dict(islice(found["systems"].items(), MOST_SYSTEMS))
    apart = {c["measure"]: c["difference"] for c in found["comparisons"]}
    measures = [
        (title, tuple(_span(s[m], "") for s in systems.values()) + ((_span(apart[m], "+"),) if apart else ()))
        for m, title in _MEASURES.items()
    ]
    return Suite(
        verdict=str(found["verdict"]),
        num_prompts=int(found["num_prompts"]),
        systems=tuple(systems),
        compared=bool(apart),
        measures=tuple(measures),
        cut=tuple((n, 1 - float(s["stopped"])) for n, s in systems.items() if s["stopped"] < 1),
        most_tokens=int(found["max_new_tokens"]),
        kinds=tuple(_kind(k, tuple(systems)) for k in found["kinds"]),
    )


def _kind(row: dict[str, Any], systems: tuple[str, ...]) -> Kind:
    followed = tuple(int(row["systems"][n]["strict"]) for n in systems)
    p = float(row["p_holm"]) if "p_holm" in row else None
    return Kind(name=str(row["kind"]).replace("_", " "), total=int(row["total"]), followed=followed, p=p)


def _span(i: dict[str, Any], sign: str) -> str:
    value, low, high = (100 * float(i[k]) for k in ("value", "low", "high"))
    unit = " points" if sign else " %"
    return f"{value:{sign}.1f}{unit} ({low:{sign}.1f} to {high:{sign}.1f})"
