"""Templates of trl × tokenizers × shapes: as the golden file says, and what is proved or refused is so by other means."""

from __future__ import annotations

from pathlib import Path

import pytest

from matrix import differences, doubtful, fill, golden_cells, part_of, templates

PART = "a"


def test_every_18th_template(shared: Path, fitted: Path) -> None:
    """Every shape before every 18th template of this half with one of the tokenizers that fit it; the golden file has all."""
    mine = {name for name in templates() if part_of(name) == PART}
    assert mine == {name for name, _ in golden_cells() if part_of(name) == PART}
    cells = fill(PART, fitted, every=False)
    assert len(cells) >= len(mine) // 18 > 1
    assert not (found := differences(cells)), f"\n{found}"
    assert not (wrong := doubtful(cells)), "\n".join(wrong)


@pytest.mark.slow
def test_every_cell(shared: Path, fitted: Path) -> None:
    """With every tokenizer that fits."""
    cells = fill(PART, fitted, every=True)
    assert {key for key in golden_cells() if part_of(key[0]) == PART} == set(cells)
    assert not (found := differences(cells)), f"\n{found}"
    assert not (wrong := doubtful(cells)), "\n".join(wrong)
