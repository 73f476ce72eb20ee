"""Writes docs/errors.md from `educe.errors.CODES`; a test keeps them equal."""

from __future__ import annotations

from pathlib import Path

from educe.errors import CODES

HEAD = """# Error codes

Every message has a code, the place, what was found and what to do; the exit code is 2. A row that is not used is listed in
`ledger.jsonl` with its code. The hundreds digit says what kind of thing is wrong: 0 it cannot be read, 1 it has the wrong form,
2 it means something impossible, 3 it was refused to keep a promise.

| code | meaning |
|---|---|
"""


def page() -> str:
    """The whole page."""
    return HEAD + "".join(f"| {code} | {meaning} |\n" for code, meaning in CODES.items())


if __name__ == "__main__":
    (Path(__file__).parents[1] / "docs" / "errors.md").write_text(page(), encoding="utf-8")
