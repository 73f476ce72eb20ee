"""Times as they are written on a command line."""

from __future__ import annotations

import re

from educe.errors import UsageError

_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0}


def seconds(option: str, text: str) -> float:
    """Of `90s`, `55m`, `1.5h` or `1h30m`. Raises `UsageError`."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if not parts or "".join(n + unit for n, unit in parts) != text.strip():
        raise UsageError(101, option, f"{text!r} is no time.", "Such as 90s, 55m, 1.5h or 1h30m.")
    return sum(float(n) * _UNITS_S[unit] for n, unit in parts)
