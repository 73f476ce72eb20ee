"""How long, as a person writes it: 90s, 30m, 1h30m."""

from __future__ import annotations

import re

from educe.errors import UsageError

_FORM = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", re.ASCII)
_MOST_S = 366 * 24 * 3600.0


def seconds(text: str, option: str = "duration") -> float:
    """Seconds of "90s", "30m", "2h", "1h30m". Raises `UsageError`, naming `option`, for all else: a number without a unit too."""
    found = _FORM.fullmatch(text.strip())
    parts = [float(part or 0) for part in found.groups()] if found is not None else [0.0]
    total = sum(part * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))
    if not 0 < total <= _MOST_S:
        raise UsageError(101, option, f"{text!r} is no duration up to a year.", "Such as 90s, 30m, 2h or 1h30m.")
    return total
