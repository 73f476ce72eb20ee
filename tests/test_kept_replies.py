"""What is kept of a model's replies: nothing is asked twice, nothing lost by a kill, nothing that is no number kept."""

from __future__ import annotations

import math
import time
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
    kept = KeptReplies(of, (said if said is not None else []).append)
    return kept.replies("tuned", keys, asked, asked.ready)


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

    kept = KeptReplies("w", lambda _: None)
    assert math.isnan(kept.replies("tuned", ["x", "y", "z"], broken, lambda: None)[0][0])
    (file,) = (tmp_path / "answers").glob("kept-*.jsonl")
    assert [line["key"] for line in read_jsonl(file)] == ["z"]


def test_seconds_are_those_of_what_was_asked() -> None:
    """A request that stands ten times among others was asked once."""

    def slow(places: Sequence[int], keep: Keep) -> None:
        time.sleep(0.2)
        keep(places, [(0.0, True) for _ in places])

    kept = KeptReplies("w", lambda _: None)
    for _ in range(2):
        before = kept.seconds
        assert len(kept.replies("tuned", ["same"] * 10, slow, lambda: None)) == 10
        assert 0.2 <= kept.seconds - before < 1


def test_evaluations_of_one_model_go_side_by_side(tmp_path: Path) -> None:
    """Each asks for others; what one wrote meanwhile the other has when it asks for that, and nothing is lost."""
    one, other = KeptReplies("w", lambda _: None), KeptReplies("w", lambda _: None)

    def ask(places: Sequence[int], keep: Keep) -> None:
        inner = Asked()
        assert [t for t, _ in other.replies("b", ["c", "d"], inner, inner.ready)] == [0.0, -1.0]  # while this one asks
        keep(places, [(5.0, True) for _ in places])

    one.replies("a", ["a", "b"], ask, lambda: None)
    nobody = Asked()
    for kept in (one, other, KeptReplies("w", lambda _: None)):
        assert [t for t, _ in kept.replies("a", ["a", "b", "c", "d"], nobody, nobody.ready)] == [5.0, 5.0, 0.0, -1.0]
    assert (nobody.places, nobody.loads) == ([], 0)


def test_what_is_kept_is_read_once_and_written_anew_where_it_is_torn_alone() -> None:
    replied("w", Asked())
    kept, nobody = KeptReplies("w", lambda _: None), Asked()
    before = kept.file.stat().st_ino
    for _ in range(3):
        kept.replies("tuned", KEYS, nobody, nobody.ready)
    assert (kept.file.stat().st_ino, nobody.loads) == (before, 0)
    with kept.file.open("ab") as f:
        f.write(b'{"key": "torn')
    kept.replies("tuned", KEYS, nobody, nobody.ready)
    assert (kept.file.stat().st_ino != before, nobody.loads) == (True, 0)
    assert kept.file.read_bytes().endswith(b"}\n")


def test_half_a_line_of_a_process_that_was_killed_costs_nobody_a_reply() -> None:
    """It dies while another one asks the same model."""
    said = list[str]()
    kept = KeptReplies("w", said.append)

    def ask(places: Sequence[int], keep: Keep) -> None:
        for k in places:
            if k == 1:
                with kept.file.open("ab") as f:
                    f.write(b'{"key": "torn')
            keep([k], [(float(k), True)])

    kept.replies("tuned", ["p", "q", "r"], ask, lambda: None)
    nobody = Asked()
    again = KeptReplies("w", said.append)
    assert [t for t, _ in again.replies("tuned", ["p", "q", "r"], nobody, nobody.ready)] == [0.0, 1.0, 2.0]
    assert (nobody.loads, [x for x in said if "damaged" in x]) == (0, [])
