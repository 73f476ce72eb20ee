"""One self-contained page per run: did tuning help, how surely, was it needed, what was trained, what did it cost."""

from educe.report.page import build_report

__all__ = ["build_report"]
