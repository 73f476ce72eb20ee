"""What is looked at before a run's first step and after its last: a finding for each check, kept in the run as preflight.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from educe.errors import EduceError, TrainError
from educe.files.atomic import write_json
from educe.files.run_dir import RunDir
from educe.model.source import Alive, Say
from educe.recipes.finding import Before, Check, Finding, refused
from educe.recipes.preflight_data import DATA
from educe.recipes.preflight_machine import MACHINE

CHECKS: dict[str, Check] = {**DATA, **MACHINE}
_ORDER = {"fail": 0, "warn": 1, "unchecked": 2, "pass": 3, "skip": 4}


def without_model(b: Before, alive: Alive = lambda: None) -> list[Finding]:
    """Every check that needs no model. One that ends in an error of ours has failed."""
    findings = []
    for id, check in CHECKS.items():
        findings.append(_made(id, check, b))
        alive()
    return findings


def _made(id: str, check: Check, b: Before) -> Finding:
    try:
        return check(b)
    except EduceError as e:
        return refused(id, check.__name__.replace("_", " "), e)


def worst_first(findings: Sequence[Finding]) -> list[Finding]:
    """Failures, warnings, what could not be checked, passes, what does not apply; each in the order of their ids."""
    return sorted(findings, key=lambda f: (_ORDER[f.verdict], f.id))


def passed_line(findings: Sequence[Finding]) -> str:
    """So many passed, and what did not."""
    counts = {v: sum(f.verdict == v for f in findings) for v in _ORDER}
    words = {"warn": "warn", "fail": "failed", "unchecked": "not checked"}
    words["skip"] = "does not apply" if counts["skip"] == 1 else "do not apply"
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
    """A line for each warning and for what could not be checked, and one for the rest."""
    for f in worst_first(findings):
        if f.verdict in ("warn", "unchecked"):
            say(f"{'warning: ' if f.verdict == 'warn' else ''}{f}")
    say(passed_line(findings))


def refuse(findings: Sequence[Finding], where: str) -> None:
    """Raises `TrainError` where a check has failed: its name, number and evidence, then `where` all of them are seen."""
    failed = [f for f in worst_first(findings) if f.verdict == "fail"]
    if failed:
        others = f" {', '.join(f.id for f in failed[1:])} failed too." if len(failed) > 1 else ""
        found = f"{failed[0].name}: {failed[0].number}. {failed[0].evidence.rstrip('.')}.{others}"
        raise TrainError(302, failed[0].id, found, f"Mend that; {where}.")
