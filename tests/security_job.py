"""A job of seconds on the tiny model, and `educe` run on it in this process."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest
from educe.cli.main import main

from check_command import row

TRAIN = """train: {epochs: 1, batch_tokens: 256, micro_batch_tokens: 256, learning_rate: 1e-3}
device: cpu
dtype: float32
evaluation: {max_new_tokens: 4, few_shot: 0}
"""


def write_job(place: Path, model: Path | str, more: str = TRAIN, *, rows: int = 24) -> Path:
    """Rows and a recipe in a new directory; returns the recipe. The run is `runs/t` beside it."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "rows.jsonl").write_text("".join(row(f"the cat {i}", f"mat {i}") + "\n" for i in range(rows)))
    head = f"name: t\nmodel: {model}\ndata: {{train: rows.jsonl, max_tokens: 64, near_copies: keep}}\n"
    (place / "recipe.yaml").write_text(head + more, encoding="utf-8")
    return place / "recipe.yaml"


def command(*words: str | Path) -> tuple[int, str]:
    """`educe WORDS`: exit code, and everything it said on stdout and stderr."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), pytest.raises(SystemExit) as ended:
        main([str(w) for w in words])
    return int(ended.value.code or 0), said.getvalue()


END = "\n--- said ---\n"


def verbs(commands: list[list[str]]) -> None:
    """`educe WORDS` of each, one after another in a process of their own: says what they say, and their exit codes last."""
    codes = []
    for words in commands:
        code, said = command(*words)
        print(said, end=END)
        codes.append(code)
    print(json.dumps(codes))
