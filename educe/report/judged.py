"""judged/NAME.json → lines of the page's section on judges. What is damaged is left out: a page about a run must not fail on it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from educe.files.run_dir import RunDir


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A row of the table: what was judged, by whom, the figures that must stand together, what is to be known of them."""

    what: str
    judge: str
    score: str
    controlled: str
    length: str
    unread: int
    warnings: tuple[str, ...]


def read_judged(run: RunDir) -> tuple[Judged, ...]:
    """All results of judges, by name."""
    made: list[Judged] = []
    for file in sorted(run.judged.glob("*.json")):
        try:
            made += _rows(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return tuple(made)


def _rows(found: dict[str, Any]) -> list[Judged]:
    if "systems" in found:
        return [_rating(name, s, found["judge"]) for name, s in found["systems"].items()]
    i, controlled, lengths = found["win_rate"], found.get("length_controlled"), found["mean_length"]
    return [
        Judged(
            what=f"{found['bench']}: tuned against {found['against']}",
            judge=str(found["judge"]),
            score=f"{100 * i['value']:.1f} % wins ({100 * i['low']:.1f} to {100 * i['high']:.1f})",
            controlled=_controlled(controlled) if controlled is not None else "–",
            length=f"{lengths['own']:.0f} against {lengths['other']:.0f}",
            unread=int(found["counts"]["unparsed"]),
            warnings=tuple(map(str, found["lint"])),
        )
    ]


def _controlled(found: dict[str, Any]) -> str:
    i = found.get("interval")
    known = f"{100 * i['low']:.1f} to {100 * i['high']:.1f}" if i else "interval not known"
    return f"{100 * found['win_rate']:.1f} % ({known})"


def _rating(name: str, s: dict[str, Any], judge: Any) -> Judged:
    i = s["interval"]
    return Judged(
        what=f"MT-Bench: {name}",
        judge=str(judge),
        score=f"{i['value']:.2f} of 10 ({i['low']:.2f} to {i['high']:.2f})",
        controlled="–",
        length=f"{s['mean_length']:.0f}",
        unread=int(s["unparsed"]),
        warnings=tuple(map(str, s["lint"])),
    )
