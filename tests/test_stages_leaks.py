"""What one stage trains on and another is tested on: no stage sees it by itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
from educe.recipes.run_stages import check_stages

from test_stages import place, recipe  # noqa: F401


def test_a_row_that_is_trained_here_and_tested_there_is_told(place: Path) -> None:  # noqa: F811
    text = (recipe(place, "leaks")).read_text(encoding="utf-8")
    other = "  - kind: sft\n    name: again\n    data: {train: rows.jsonl, test: {kind: share, share: 0.5}, max_tokens: 64}\n"
    (place / "leaks.yaml").write_text(
        text.replace("  - kind: preference", other + "  - kind: preference"), encoding="utf-8"
    )
    said: list[str] = []
    check_stages("leaks.yaml", say=said.append)
    assert [line for line in said if "stage sft trains on" in line and "stage again is tested on, rows.jsonl:" in line]
    assert not [line for line in said if "stage preference" in line and "trains on" in line]


def test_a_prompt_that_is_trained_in_one_file_and_tested_in_another_is_told(place: Path) -> None:  # noqa: F811
    """sft on the chosen answers of what the preference stage is tested on."""
    pairs = [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]
    rows = [{"prompt": p["prompt"], "response": p["chosen"]} for p in pairs]
    (place / "same.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows), encoding="utf-8")
    path = recipe(place, "same")
    text = path.read_text(encoding="utf-8").replace("rows.jsonl", "same.jsonl")
    for share, told in (("0.2", False), ("0.0001", True)):  # equal shares hold out equal prompts
        path.write_text(
            text.replace(
                "same.jsonl, test: {kind: share, share: 0.2}", f"same.jsonl, test: {{kind: share, share: {share}}}"
            )
        )
        said: list[str] = []
        check_stages(path, say=said.append)
        mine = [
            x for x in said if "stage sft trains on" in x and "that stage preference is tested on, in another file" in x
        ]
        assert bool(mine) is told, said


def test_a_row_of_one_file_is_told_however_it_is_grouped(place: Path) -> None:  # noqa: F811
    """Another `data.group` gives rows other keys."""
    lines = [json.loads(x) | {"who": k % 7} for k, x in enumerate((place / "rows.jsonl").read_text().splitlines())]
    (place / "who.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")
    path = recipe(place, "grouped")
    own = "  - kind: sft\n    name: again\n    data: {train: who.jsonl, test: {kind: share, share: 0.2}, max_tokens: 64}\n"
    text = path.read_text(encoding="utf-8").replace("train: rows.jsonl", "group: who, train: who.jsonl")
    path.write_text(text.replace("  - kind: preference", own + "  - kind: preference"), encoding="utf-8")
    said: list[str] = []
    check_stages(path, say=said.append)
    assert [x for x in said if "stage sft trains on" in x and "that stage again is tested on, who.jsonl:" in x]
