"""`educe report`: a run directory to one self-contained page."""

from __future__ import annotations

from pathlib import Path

from educe.files.atomic import write_text
from educe.files.run_dir import RunDir
from educe.report import build_report


def report(run: RunDir) -> Path:
    """Write report.html and return its path."""
    write_text(run.report, build_report(run))
    return run.report
