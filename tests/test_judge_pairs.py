"""MT-Bench by pairs: asked in both orders, settled as published, canaries first. The judges are functions of what they are shown."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from educe.errors import EvalError
from educe.evaluate.judge.canaries import CANARIES
from educe.evaluate.judge.mt_bench import parse_choice
from educe.evaluate.judge.mt_pairs import Game, check_games, judge_games, reread_games, score_games, settle

from test_judging import MATH, STEM, Judge


def test_choices_and_their_settling() -> None:
    assert [parse_choice(f"so [[{x}]]") for x in "ABC"] == [1.0, 0.0, 0.5]
    assert parse_choice("A is better") is None
    assert settle(1.0, 1.0) == 1.0
    assert settle(0.0, 0.0) == 0.0
    assert settle(1.0, 0.0) == settle(0.5, 1.0) == 0.5  # disagreement is a tie
    assert settle(None, 1.0) is None


def better(text: str) -> str:
    """A judge of pairs, in both turns: reads the last answers of both, and takes the one with more words; a tie where equal."""
    if "<|The Start of Assistant A" in text:
        last = [text.split(f"### Assistant {x}:")[-1].split("<|The End")[0].split() for x in "AB"]
    else:
        last = [text.split(f"[The Start of Assistant {x}'s Answer]")[1].split("[The End")[0].split() for x in "AB"]
    one, two = (0 if " ".join(a) in CANARIES.values() else len(a) for a in last)
    return "[[C]]" if one == two else "[[A]]" if one > two else "[[B]]"


def _games(own: Sequence[str], other: Sequence[str]) -> list[Game]:
    return [
        Game(name=str(i), question=q, own=(own[i], own[i]), other=(other[i], other[i]))
        for i, q in enumerate([MATH, STEM] * 4)
    ]


def test_pairs_of_mt_bench_are_settled_as_published() -> None:
    long, short = ["so many words here"] * 8, ["few words"] * 8
    lines = judge_games(_games(long, short), Judge(better))
    found = score_games(lines)
    assert found["win_rate"]["value"] == 1
    assert found["verdict"] == "The judge prefers these answers."
    assert found["counts"] == {"questions": 16, "judged": 16, "unparsed": 0, "split": 0}
    turned = score_games(judge_games(_games(short, long), Judge(better)))
    assert turned["win_rate"]["value"] == 0
    assert turned["by_turn"] == {"1": 0.0, "2": 0.0}
    assert score_games(judge_games(_games(long, long), Judge(better)))["win_rate"]["value"] == 0.5
    place = score_games(judge_games(_games(long, short), Judge(lambda _: "[[A]]")))
    assert (place["win_rate"]["value"], place["counts"]["split"]) == (0.5, 16)
    assert reread_games([{**x, "preference": None} for x in lines]) == lines


def test_a_pair_that_cannot_be_read_is_in_no_mean() -> None:
    lines = judge_games(_games(["a b"] * 8, ["c"] * 8), Judge(lambda t: "both" if "Why?" in t else better(t)))
    found = score_games(lines)
    assert found["counts"] == {"questions": 16, "judged": 8, "unparsed": 16, "split": 0}
    assert found["by_category"] == {"math": 1.0, "stem": None}
    with pytest.raises(EvalError, match="E-EVAL-301"):
        score_games(judge_games(_games(["a"] * 8, ["b"] * 8), Judge(lambda _: "no")))


def test_a_judge_of_pairs_is_tried_on_both_kinds_turns_and_orders() -> None:
    games = _games([""] * 8, ["a real answer of words"] * 8)[:2]
    found = check_games(Judge(better), games)
    assert {name: len(p) for name, p in found.items()} == dict.fromkeys(CANARIES, 8)
    for mark in ("Why?", "How?", "And + 1?"):
        with pytest.raises(EvalError, match="E-EVAL-302"):
            check_games(Judge(lambda t, m=mark: "[[C]]" if m in t else better(t)), games)
