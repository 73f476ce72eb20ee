"""What became of every row of a run: written with the run, and asked of it (`educe ledger`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from educe.errors import RunError, UsageError
from educe.files.atomic import replacing
from educe.files.run_dir import RunDir
from educe.recipes.mixing import Mixed
from educe.recipes.prepare import Prepared

# Every row has one of these; together they are all rows that were read.
STATUSES = ("train", "dev", "test", "not drawn", "dropped", "refused")


@dataclass(slots=True)
class Totals:
    """Rows by status, and for each task; codes of the rows that are not used, with their number and first places."""

    rows: Counter[str] = field(default_factory=Counter)
    tasks: dict[str, Counter[str]] = field(default_factory=dict)
    codes: dict[str, tuple[int, list[dict[str, Any]]]] = field(default_factory=dict)

    @property
    def read(self) -> int:
        return self.rows.total()


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which rows are asked for; an empty choice takes all. `row` is LINE or FILE:LINE, with [ITEM] for one of several in a line."""

    statuses: Sequence[str] = ()
    codes: Sequence[str] = ()
    tasks: Sequence[str] = ()
    row: str = ""

    def __post_init__(self) -> None:
        unknown = [s for s in self.statuses if s not in STATUSES]
        if unknown:
            raise UsageError(101, "--status", f"{unknown[0]!r} is no status.", f"One of {', '.join(STATUSES)}.")

    def takes(self, line: dict[str, Any]) -> bool:
        name, _, number = self.row.rpartition(":")
        return (
            (not self.statuses or line["status"] in self.statuses)
            and (not self.codes or line["code"] in self.codes)
            and (not self.tasks or line["task"] in self.tasks)
            and (not self.row or (number in _numbers(line) and line["file"].endswith(name)))
        )


def _numbers(line: dict[str, Any]) -> tuple[str, str]:
    """LINE, and LINE[ITEM] as answers name the rows of a line that holds several."""
    return str(line["line"]), f"{line['line']}[{line['item']}]"


def write_ledger(path: Path, prepared: Prepared, mixed: Mixed) -> None:
    """The run's ledger: a line for each row in order, with how often it is drawn; rows that the mixture never draws are
    `not drawn`."""
    store = prepared.store("train")
    last = int(store.rows.max()) + 1 if len(store) else 0
    # A row of several examples is trained if one of them is; it is drawn as often as the one drawn most.
    draws_R = np.zeros(last, np.int64)
    np.maximum.at(draws_R, np.asarray(store.rows), mixed.draws_N)
    with replacing(path) as part, part.open("wb") as out, (prepared.path / "ledger.jsonl").open("rb") as lines:
        for n, raw in enumerate(lines):
            line = orjson.loads(raw)
            drawn = int(draws_R[n]) if n < last and line["status"] == "train" else 0
            if line["status"] == "train" and not drawn:
                line["status"] = "not drawn"
            out.write(orjson.dumps({**line, "draws": drawn}, option=orjson.OPT_APPEND_NEWLINE))


def ledger_lines(run: RunDir, wanted: Wanted | None = None) -> Iterator[dict[str, Any]]:
    """Lines of a run's ledger in order. Raises `RunError`."""
    try:
        with run.ledger.open("rb") as f:
            for number, raw in enumerate(f, 1):
                try:
                    line: dict[str, Any] = orjson.loads(raw)
                except ValueError as e:
                    place = f"{run.ledger}:{number}"
                    raise RunError(2, place, "is damaged.", f"Run `{run.goes_on}` again.") from e
                if wanted is None or wanted.takes(line):
                    yield line
    except FileNotFoundError as e:
        raise RunError(2, str(run.ledger), "is not there yet.", f"Run `{run.goes_on}` first.") from e


def totals_of(lines: Iterator[dict[str, Any]], first: int = 5) -> Totals:
    """Count ledger lines; of each code the `first` rows are kept."""
    totals = Totals()
    for line in lines:
        totals.rows[line["status"]] += 1
        totals.tasks.setdefault(line["task"], Counter())[line["status"]] += 1
        if line["code"]:
            number, places = totals.codes.get(line["code"], (0, []))
            totals.codes[line["code"]] = number + 1, places if len(places) >= first else [*places, line]
    return totals
