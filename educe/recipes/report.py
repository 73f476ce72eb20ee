"""`educe report`: run directories to one self-contained page, to Markdown, or to the numbers behind them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from educe.errors import RunError, UsageError
from educe.files.atomic import write_new, write_text
from educe.files.run_dir import STAGE_SCORES, RunDir, stages_of
from educe.report import build_report
from educe.report.compare import build_comparison
from educe.report.markdown import comparison_markdown, run_markdown
from educe.report.numbers import MOST_RUNS, comparison_of, named, numbers_of
from educe.report.sections import Price
from educe.report.stage_page import build_stage_page, stages_markdown

_MARKS = {
    "html": "<!doctype html>\n<!-- educe page -->\n",
    "md": "<!-- educe report -->\n",
    "json": '{\n "educe_report": ',
}
"""What the files of this command begin with, and no others: only those are written over."""
FORM_VERSION = 1  # of the JSON: raised where a key gets another meaning


def report(run: RunDir, hourly: Price | None = None) -> Path:
    """Write report.html and return its path."""
    write_text(run.report, build_report(run, hourly=hourly))
    return run.report


def text_of(runs: Sequence[RunDir], form: str, hourly: Price | None = None) -> str:
    """One run or several (at most `MOST_RUNS`) as html, md or json. Raises `UsageError`."""
    if len(runs) > MOST_RUNS:
        raise UsageError(101, "RUN", f"{len(runs)} runs are too many for one page.", f"Give {MOST_RUNS} at most.")
    if form == "html":
        return build_report(runs[0], hourly=hourly) if len(runs) == 1 else build_comparison(runs, hourly=hourly)
    found = named(runs)
    numbers = numbers_of(found[0], hourly) if len(found) == 1 else comparison_of(found, hourly)
    if form == "json":
        return _json(numbers)
    return run_markdown(numbers, runs[0]) if len(found) == 1 else comparison_markdown(numbers, runs)


def write_report(runs: Sequence[RunDir], out: Path | None, form: str, hourly: Price | None = None) -> Path:
    """Write to `out`, or to report.html in the run, of several to compare.html beside them; never over what educe did not write."""
    text = text_of(runs, form, hourly)
    if out is None and form == "html":
        place = runs[0].report if len(runs) == 1 else runs[0].path.parent / "compare.html"
        write_text(place, text) if len(runs) == 1 else write_new(place, text, over=_MARKS["html"])
        return place
    if out is None:
        raise UsageError(101, "--out", "is needed to write another format.", "Without it the text is printed.")
    write_new(out, _MARKS["md"] + text if form == "md" else text, over=_MARKS[form])
    return out


def report_stages(path: Path, out: Path | None, form: str, hourly: Price | None = None) -> Path | str:
    """Of a run of stages: its page, with every stage's own page; the text itself where it is md or json that is not to be written."""
    if not (path / STAGE_SCORES).is_file():
        _stage_pages(path, hourly)
        runs = stages_of(path)
        missing = [name for name, stage in runs.items() if not stage.has_ended]
        if missing:
            begun = [str(stage.report) for stage in runs.values() if stage.report.is_file()]
            found = f"is not there yet, since stage {missing[0]} is not trained to its end."
            fix = f"Give the same `educe train` again: it goes on. Pages of stages: {', '.join(begun) or 'none yet'}."
            raise RunError(2, str(path / STAGE_SCORES), found, fix)
        raise RunError(2, str(path / STAGE_SCORES), "is not there yet.", f"Run `educe eval {path}` first.")
    try:
        text = _stages_text(RunDir(path).load(path / STAGE_SCORES), path, form)
    except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError) as e:
        found = "is damaged, or was written by another version."
        raise RunError(2, str(path / STAGE_SCORES), found, f"Run `educe eval {path}` again.") from e
    if form == "html" and out is None:
        write_text(path / "report.html", text)
    _stage_pages(path, hourly)  # after it: they lead to it
    if form != "html" and out is None:
        return text
    if out is None:
        return path / "report.html"
    write_new(out, _MARKS["md"] + text if form == "md" else text, over=_MARKS[form])
    return out


def _stage_pages(path: Path, hourly: Price | None) -> None:
    for stage in stages_of(path).values():
        if stage.resolved.is_file():
            report(stage, hourly)


def _stages_text(found: dict[str, Any], path: Path, form: str) -> str:
    if form == "html":
        return build_stage_page(found, path)
    if form == "md":
        return stages_markdown(found)
    return _json(found)


def _json(found: dict[str, Any]) -> str:
    text = json.dumps({"educe_report": FORM_VERSION, **found}, indent=1, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode() + "\n"  # half a surrogate pair, as JSON writes it


def price_of(said: str) -> Price:
    """ "2.50 EUR" → what an hour costs. Raises `UsageError`."""
    found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,6})?)\s*([A-Za-z€$£]{0,12})\s*", said)
    if not found:
        raise UsageError(101, "--hourly", f"{said!r} is no price.", "Such as 2.50, or '2.50 EUR'.")
    return Price(amount=float(found[1]), currency=found[2])
