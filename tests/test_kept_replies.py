"""What is kept of a model's replies: nothing is asked twice, nothing lost by a kill, nothing that is no number kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from educe.files.jsonl import read_jsonl
from educe.recipes.kept_replies import Keep, KeptReplies

PIECE = 8
KEYS = [f"request {k}" for k in range(PIECE + 5)]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDUCE_CACHE", str(tmp_path))


class Asked:
    """Replies to a request by its place, and what was asked for."""

    def __init__(self, dies_after: int = 10**6) -> None:
        self.places: list[int] = []
        self.loads = 0
        self._dies_after = dies_after

    def ready(self) -> None:
        self.loads += 1

    def __call__(self, places: Sequence[int], keep: Keep) -> None:
        for at in range(0, len(places), PIECE):
            if len(self.places) >= self._dies_after:
                raise KeyboardInterrupt
            piece = places[at : at + PIECE]
            self.places += piece
            keep(piece, [(-1.0 * k, True) for k in piece])


def replied(of: Any, asked: Asked, keys: Sequence[str] = KEYS, said: list[str] | None = None) -> list[Any]:
    kept = KeptReplies("tuned", of, (said if said is not None else []).append)
    with kept.open():
        return kept.replies(keys, asked, asked.ready)


def test_what_was_replied_before_a_kill_is_not_asked_again() -> None:
    first, second, third = Asked(dies_after=PIECE), Asked(), Asked()
    with pytest.raises(KeyboardInterrupt):
        replied("w", first)
    said: list[str] = []
    found = replied("w", second, said=said)
    assert (first.places, second.places) == ([*range(PIECE)], [*range(PIECE, len(KEYS))])
    assert [log_p for log_p, _ in found] == [-1.0 * k for k in range(len(KEYS))]
    assert f"tuned: {PIECE} of {len(KEYS)} answered before on this machine; taken from the cache" in said
    assert [list(x) for x in replied("w", third)] == [list(x) for x in found]
    assert (third.places, third.loads) == ([], 0)


def test_another_model_is_asked_anew_and_equal_requests_once() -> None:
    replied("w", Asked())
    other = Asked()
    assert len(replied("other weights", other, ["a", "b", "a", "a"])) == 4
    assert other.places == [0, 1]
    assert other.loads == 1


def test_a_number_that_is_none_is_given_and_not_kept(tmp_path: Path) -> None:
    def broken(places: Sequence[int], keep: Keep) -> None:
        keep(places, [(math.nan, False), (-math.inf, False), (-2.0, True)])

    kept = KeptReplies("tuned", "w", lambda _: None)
    with kept.open():
        assert math.isnan(kept.replies(["x", "y", "z"], broken, lambda: None)[0][0])
    (file,) = (tmp_path / "answers").glob("kept-*.jsonl")
    assert [line["key"] for line in read_jsonl(file)] == ["z"]
