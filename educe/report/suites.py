"""suites/NAME.json → the page's section on public benchmarks. What is damaged is left out: a page about a run must not fail on it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from educe.files.run_dir import RunDir

_OWN = "tuned"
MOST_SYSTEMS = 12  # as many columns as the page has
_MEASURES = {
    "prompt_strict": "All of a prompt's instructions, strict",
    "prompt_loose": "All of a prompt's instructions, loose",
    "instruction_strict": "Single instructions, strict",
    "instruction_loose": "Single instructions, loose",
}
_RULES = {"sum": "The whole option", "per_token": "Its mean token", "per_byte": "Its mean byte"}
Made = TypeVar("Made")
_CHOICES, _HARNESS = "choices-", "lm-eval-"  # what the names of their files begin with


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Harness:
    """A task, group or tag of lm-evaluation-harness: of each measure a cell for each system, one for the difference, and p.
    `by`: which version measured, and whether through the template."""

    name: str
    by: str
    about: str
    systems: tuple[str, ...]
    measures: tuple[tuple[str, tuple[str, ...], float | None], ...]


def read_suites(run: RunDir) -> tuple[Suite, ...]:
    """All benchmarks that the run answered, by name."""
    return tuple(_read(run, lambda name, found: None if name.startswith((_CHOICES, _HARNESS)) else _suite(found)))


def read_choices(run: RunDir) -> tuple[Choices, ...]:
    """All files of multiple-choice questions that the run ranked, by name."""
    return tuple(_read(run, lambda name, found: _choices(name, found) if name.startswith(_CHOICES) else None))


def read_harness(run: RunDir) -> tuple[Harness, ...]:
    """All tasks of lm-eval that the run was put before, by name."""
    return tuple(_read(run, lambda name, found: _harness(found) if name.startswith(_HARNESS) else None))


def benchmarks(runs: Sequence[RunDir]) -> list[tuple[str, tuple[str, ...]]]:
    """Every measure that the tuned model of a run has, beside those of the other runs."""
    rows: dict[str, list[str]] = {}
    for k, run in enumerate(runs):
        for title, cells in _tuned(run):
            rows.setdefault(title, [""] * len(runs))[k] = cells
    return [(title, tuple(cells)) for title, cells in rows.items()]


def _tuned(run: RunDir) -> Iterator[tuple[str, str]]:
    for s in read_suites(run):
        yield from ((f"IFEval: {title}", c[s.systems.index(_OWN)]) for title, c in s.measures if _OWN in s.systems)
    for q in read_choices(run):
        yield from ((f"{q.name}: {title}", c[q.systems.index(_OWN)]) for title, c, _ in q.rules if _OWN in q.systems)
    for h in read_harness(run):
        yield from ((f"{h.by}: {t}", c[h.systems.index(_OWN)]) for t, c, _ in h.measures if _OWN in h.systems)


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


def _harness(found: dict[str, Any]) -> Harness:
    systems = tuple(islice(found["systems"], MOST_SYSTEMS))
    measures = []
    for m in found["measures"]:
        filtered = "" if m["filter"] == "none" else f", {m['filter']}"
        shots = f", {int(m['shots'])} examples" if m["shots"] else ""
        rows = f", {int(m['num_rows']):,} rows" if m["num_rows"] is not None else ""
        better = {True: ", higher is better", False: ", lower is better"}.get(m["higher_is_better"], "")
        cells = [_with_error(m["systems"][n]) for n in systems]
        d = m["difference"]
        apart = str(m["why"]) if d is None else _apart(*(float(d[k]) for k in ("value", "low", "high")))
        title = f"{m['task']}: {m['measure']}{filtered}{shots}{rows}{better}"
        measures.append((title, (*cells, apart), float(m["p"]) if m["p"] is not None else None))
    how = "through the chat template" if found["chat"] is True else "by bare text"
    about = f"lm-evaluation-harness {found['lm_eval']}, prompted {how}"
    by = f"lm-eval {found['lm_eval']}{', chat' if found['chat'] is True else ''}"
    return Harness(name=str(found["task"]), by=by, about=about, systems=systems, measures=tuple(measures))


def _with_error(s: dict[str, Any]) -> str:
    value, error = s["value"], s["stderr"]
    if value is None:
        return "not finite"
    return f"{float(value):.4g}" + (f" ± {float(error):.2g}" if error is not None else "")


def _apart(value: float, low: float, high: float) -> str:
    return f"{value:+.4g} ({low:+.4g} to {high:+.4g})"


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
