"""All other templates × tokenizers × shapes: as the golden file says, and what is proved or refused is so by other means."""

from __future__ import annotations

from pathlib import Path

import pytest

from matrix import LARGE, differences, doubtful, fill, golden_cells, part_of

PART = "b"


def test_every_cell(shared: Path, tmp_path: Path) -> None:
    """Every shape before every template of this half with every tokenizer that fits it, but for the large ones."""
    cells = fill(PART, tmp_path, large=False)
    assert {k for k in golden_cells() if part_of(k[0]) == PART and k[1] != LARGE} == set(cells)
    assert not (found := differences(cells)), f"\n{found}"
    assert not (wrong := doubtful(cells)), "\n".join(wrong)


@pytest.mark.slow
def test_large_tokenizers(shared: Path, tmp_path: Path) -> None:
    """The same for Qwen2.5's tokenizer with a template's own control strings: turn ends are learned from the template."""
    cells = fill(PART, tmp_path, large=True)
    assert not (found := differences(cells)), f"\n{found}"
    assert not (wrong := doubtful(cells)), "\n".join(wrong)
