"""Small words for the terminal's sentences."""

from __future__ import annotations

from collections.abc import Sequence


def num_rows(count: int) -> str:
    """1 row, 2 rows, 12,000 rows."""
    return f"{count:,} row{'s' * (count != 1)}"


def listed(items: Sequence[str], most: int) -> str:
    """a, b, c and 9 more"""
    left = len(items) - most
    return ", ".join(items[:most]) + (f" and {left} more" if left > 0 else "")
