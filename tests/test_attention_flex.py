"""Flex attention's blocks, which the host works out, and its formula; values and gradients on a GPU: test_cuda.py."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
from educe.model import attention_flex  # noqa: E402
from educe.model.attention import Scoring, _attend_plain  # noqa: E402
from educe.model.attention_flex import BLOCK, attend_flex, mask_of  # noqa: E402
from educe.model.documents import Documents  # noqa: E402
from torch.nn.attention.flex_attention import flex_attention  # noqa: E402


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=6),
    window=st.sampled_from([None, 1, 60, 128, 129, 400]),
)
def test_blocks_hold_what_is_seen_and_whole_ones_nothing_else(lengths: list[int], window: int | None) -> None:
    mask = mask_of(Documents(lengths=tuple(lengths)), window)
    total = sum(lengths)
    start = np.repeat(np.cumsum([0, *lengths])[:-1], lengths)
    i, j = np.arange(total)[:, None], np.arange(total)[None, :]
    sees = (j <= i) & (j >= start[:, None]) & (i - j < (window or total))
    num = -(-total // BLOCK)
    filled = np.zeros((num * BLOCK, num * BLOCK), bool)
    filled[:total, :total] = sees
    some = filled.reshape(num, BLOCK, num, BLOCK).any((1, 3))
    filled[total:] = True  # rows behind the end are nobody's
    whole = filled.reshape(num, BLOCK, num, BLOCK).all((1, 3)) & some
    part = np.zeros((num, num), bool)
    full = np.zeros((num, num), bool)
    for row in range(num):
        part[row, mask.kv_indices[0, 0, row, : mask.kv_num_blocks[0, 0, row]].numpy()] = True
        full[row, mask.full_kv_indices[0, 0, row, : mask.full_kv_num_blocks[0, 0, row]].numpy()] = True
    assert not (part & full).any()
    assert ((part | full) == some).all()
    assert (full <= whole).all()


@pytest.mark.parametrize("softcap, sinks, window", [(2.0, False, None), (None, True, 7), (2.0, True, 7)])
@pytest.mark.filterwarnings("ignore")
def test_caps_and_sinks_are_those_that_are_spelled_out(
    softcap: float | None, sinks: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_flex, "_compiled", lambda: flex_attention)
    torch.manual_seed(0)
    lengths = (40, 90, 1)
    q, k, v = (torch.randn(1, h, sum(lengths), 16) for h in (4, 2, 2))
    sinks_H = torch.randn(4) if sinks else None
    found = attend_flex(q, k, v, Documents(lengths=lengths), 0.3, window, softcap, sinks_H)
    how = Scoring(scale=0.3, window=window, softcap=softcap, sinks_H=sinks_H)
    each = [_attend_plain(*one, how, 0) for one in zip(*(x.split(lengths, 2) for x in (q, k, v)), strict=True)]
    assert torch.allclose(found, torch.cat([one.transpose(1, 2) for one in each], 1), atol=2e-6)
