"""Writes docs/zoo.md from the failures of tests/zoo; a test keeps them equal."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from educe.errors import CODES

ROOT = Path(__file__).parents[1]
HEAD = """# The bug zoo

Thirty failures of fine-tuning programs that say nothing and spoil the model; each has happened in a real one. `tests/zoo` makes
each again, in the real program on a small real model, and shows that the check named here notices it, and says nothing of a setup
without it: `make zoo`, and a few of them in every run of the tests.

{caught} of {all} are caught, {late} of these not before the run's end. *Fails*: no step is made, or the run says at its end that it
failed. *Warns*: it may be meant; the run says so and goes on. An error ends the command, or refuses the row and lists it in the
ledger. Where more than one thing is in a failure's way, the first are taken out, and it is said which.

| | the failure | made again by | caught by | |
|---|---|---|---|---|
"""
HEALTH = """
Ten setups in which nothing is wrong raise no alarm, neither a failed check nor a warning (P92 apart: runs of a few steps teach no
model to end its answers):

"""
NAMES = {
    "P01": "data files", "P05": "tokens that carry loss", "P06": "turns end in a stop token", "P08": "prompt as at inference",
    "P10": "rows too long", "P22": "trained parameters", "P24": "packs are blind", "P26": "gradient and split",
    "P27": "save and load, export and load", "P45": "rows and work of the ranks", "P48": "resume", "P50": "held-out loss and batch",
    "P93": "final weights", "P94": "rates as planned",
}  # fmt: skip


def page(zoo: Iterable[Any], healthy: Iterable[str]) -> str:
    """The whole page."""
    failures = list(zoo)
    caught = sum(bool(f.by) for f in failures)
    rows = [f"| {f.number} | {f.what} | {f.how} | {_said(f.by)} | {'yes' if f.by else 'no'} |\n" for f in failures]
    late = sum(f.by[:2] == "P9" for f in failures)
    return (
        HEAD.format(caught=caught, all=len(failures), late=late)
        + "".join(rows)
        + HEALTH
        + "".join(f"- {h}\n" for h in healthy)
    )


def _said(by: str) -> str:
    if by in CODES:
        return f"{by}: {CODES[by]}"
    id, _, verdict = by.partition(" ")
    if id in NAMES:
        when = "after the last step" if id > "P90" else "before the first step"
        return f"{id}, {NAMES[id]}: {verdict}s {when}"
    return {"moved aside": "the resume: it is moved aside, the one before is gone on from", "": "nothing"}[by]


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "zoo")]
    from zoo_healthy import HEALTHY
    from zoo_list import ZOO

    (ROOT / "docs" / "zoo.md").write_text(page(ZOO, HEALTHY), encoding="utf-8")
