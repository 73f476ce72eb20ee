"""`educe check` run in this process on files written for it: what it left and all it said."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from educe.cli.main import main

DATA = "data: {train: rows.jsonl, max_tokens: 256}\n"


def row(ask: str, answer: str) -> str:
    """One line of training data."""
    turns = [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns}, ensure_ascii=False)


GOOD = [row(f"the cat {i}", f"mat {i}") for i in range(8)]
ROWS = "\n".join(GOOD) + "\n"


@dataclass(frozen=True)
class Outcome:
    """Exit code, everything printed, and the prepared directory if one was made."""

    exit_code: int
    told: str
    prepared: Path | None

    def lines(self, name: str) -> list[dict[str, Any]]:
        assert self.prepared is not None
        return [json.loads(line) for line in (self.prepared / name).read_text(encoding="utf-8").split("\n") if line]

    @property
    def unused(self) -> list[dict[str, Any]]:
        return [line for line in self.lines("ledger.jsonl") if line["code"]]

    @property
    def said_by_users(self) -> set[str]:
        rows = [row for name in ("shots.jsonl", "dev.jsonl", "test.jsonl") for row in self.lines(name)]
        return {m["content"] for row in rows for m in row["messages"] if m["role"] == "user"}


@dataclass(frozen=True)
class Checker:
    """Writes rows.jsonl and recipe.yaml, runs the command; it ends in time, with a known exit code and no traceback."""

    place: Path
    model: Path
    screen: pytest.CaptureFixture[str]

    def __call__(self, data: str | bytes | None = ROWS, recipe: str = DATA, *, model: Path | None = None) -> Outcome:
        if data is not None:
            (self.place / "rows.jsonl").write_bytes(data.encode() if isinstance(data, str) else data)
        head = f"name: t\nmodel: {model or self.model}\n"
        (self.place / "recipe.yaml").write_text(head + recipe, encoding="utf-8")
        began = time.monotonic()
        with pytest.raises(SystemExit) as ended:
            main(["check", str(self.place / "recipe.yaml")])
        assert time.monotonic() - began < 30
        printed = self.screen.readouterr()
        told = printed.out + printed.err
        assert "Traceback" not in told
        assert len(told) < 30_000
        assert ended.value.code in (0, 2)
        made = sorted((self.place / "runs" / "prepared").glob("*"))
        return Outcome(exit_code=int(ended.value.code or 0), told=told, prepared=made[0] if made else None)
