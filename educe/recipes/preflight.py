"""What is looked at before a run's first step and after its last: a finding for each check, kept in the run as preflight.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from educe.errors import EduceError, TrainError
from educe.files.atomic import write_json
from educe.files.run_dir import RunDir
from educe.model.source import Say
from educe.recipes.finding import Before, Check, Finding, refused
from educe.recipes.preflight_data import DATA
from educe.recipes.preflight_machine import MACHINE

CHECKS: tuple[Check, ...] = (*DATA, *MACHINE)
_ORDER = {"fail": 0, "warn": 1, "skip": 3}


def without_model(b: Before) -> list[Finding]:
    """Every check that needs no model. One that ends in an error of ours has failed."""
    return [_made(check, b) for check in CHECKS]


def _made(check: Check, b: Before) -> Finding:
    try:
        return check(b)
    except EduceError as e:
        id, _, name = (check.__doc__ or "").split("\n")[0].rstrip(".").partition(": ")
        return refused(id[:3], name, e)


def worst_first(findings: Sequence[Finding]) -> list[Finding]:
    """Failures, warnings, passes, what does not apply; each in the order of their ids."""
    return sorted(findings, key=lambda f: (_ORDER.get(f.verdict, 2), f.id))


def passed_line(findings: Sequence[Finding]) -> str:
    """So many passed, and what did not."""
    counts = {v: sum(f.verdict == v for f in findings) for v in ("pass", "warn", "fail", "skip")}
    words = {"warn": "warn", "fail": "failed", "skip": "does not apply" if counts["skip"] == 1 else "do not apply"}
    others = [f"{counts[v]} {word}" for v, word in words.items() if counts[v]]
    return f"{counts['pass']} check{'' if counts['pass'] == 1 else 's'} passed" + (
        f" ({', '.join(others)})" if others else ""
    )


def keep(run: RunDir, when: str, findings: Sequence[Finding]) -> None:
    """Write them into preflight.json under `when` ("before", "after", "export"), what else it holds kept."""
    value = {**_kept(run), when: [f.as_json() for f in findings]}
    write_json(run.preflight, value)


def _kept(run: RunDir) -> dict[str, Any]:
    try:
        value = json.loads(run.preflight.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def tell(findings: Sequence[Finding], say: Say) -> None:
    """A line for each warning, and one for the rest."""
    for f in worst_first(findings):
        if f.verdict == "warn":
            say(f"warning: {f}")
    say(passed_line(findings))


def refuse(run: RunDir, findings: Sequence[Finding]) -> None:
    """Raises `TrainError` where a check has failed: its name, number and evidence."""
    failed = [f for f in worst_first(findings) if f.verdict == "fail"]
    if failed:
        others = f" {', '.join(f.id for f in failed[1:])} failed too." if len(failed) > 1 else ""
        fix = f"Mend that; all findings are in {run.preflight}, and `educe check RECIPE --on-model` makes them again."
        raise TrainError(302, failed[0].id, f"{failed[0].name}: {failed[0].number}. {failed[0].evidence}.{others}", fix)
