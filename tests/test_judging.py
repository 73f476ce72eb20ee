"""Asking a judge, reading its verdicts, and refusing one that can be fooled. The judges here are functions of what they are shown."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from educe.errors import EvalError
from educe.evaluate.judge.canaries import CANARIES, check_pairwise, check_single, lint_answers
from educe.evaluate.judge.length import Judged, Rows, controlled_interval, fit_l1, length_controlled, raw_win_rate
from educe.evaluate.judge.mt_bench import (
    REFERENCED,
    TEMPERATURES,
    MtQuestion,
    averages,
    pair_prompt,
    parse_rating,
    single_prompt,
)
from educe.evaluate.judge.pairwise import Duel, judge_duels, pair_prompts, parse_letter, regraded, settled
from educe.evaluate.judge.scores import score_duels, score_ratings
from educe.types import Answer, Prompt, Sampling
from hypothesis import given, settings
from hypothesis import strategies as st

SHORT = Sampling(max_new_tokens=8)


class Judge:
    """Says what a function makes of the prompt."""

    def __init__(self, says: Callable[[str], str]) -> None:
        self.says, self.name = says, "judge"

    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, progress: Callable[[int], None] | None = None
    ) -> list[Answer]:
        said = [str(self.says(str(p.messages[-1].content))) for p in prompts]
        return [Answer(text=t, num_tokens=1, stopped=True) for t in said]


def shown(text: str) -> tuple[str, str]:
    """The two answers of a comparison."""
    found = re.search(r"# Answer of model m\n\n(.*?)\n\n# Answer of model M\n\n(.*?)\n\n# Your task", text, re.S)
    assert found is not None
    return found[1], found[2]


def honest(text: str) -> str:
    """Prefers the answer with more different words, except those that deserve nothing."""
    one, two = (0 if a in CANARIES.values() else len(set(a.split())) for a in shown(text))
    return "m" if one >= two else "M"


DUELS = [
    Duel(name=str(i), instruction=f"Say {i}", own="word " * i + f"and {i}", other=f"a real answer about {i}")
    for i in range(6)
]
MATH = MtQuestion(name="111", category="math", turns=("1 + 1?", "And + 1?"), reference=("It is 2.", "It is 3."))
STEM = MtQuestion(name="141", category="stem", turns=("Why?", "How?"))


TEXT = st.text(alphabet="mMa {}#\n\u2028é", max_size=30)


@given(TEXT, TEXT, TEXT)
def test_both_orders_hold_both_answers_as_they_are(instruction: str, own: str, other: str) -> None:
    first, second = pair_prompts(Duel(name="x", instruction=instruction, own=own, other=other))
    one, two = str(first.messages[1].content), str(second.messages[1].content)
    assert f"model m\n\n{own}\n\n" in one
    assert f"model M\n\n{other}\n\n" in one
    assert f"model m\n\n{other}\n\n" in two
    assert f"model M\n\n{own}\n\n" in two
    assert first.key != second.key
    assert instruction in one


@given(st.sampled_from(["m", "M"]))
def test_a_judge_that_likes_a_place_gives_half_to_everything(place: str) -> None:
    preference_n, _, counts = settled(judge_duels(DUELS, Judge(lambda _: place), SHORT))
    assert (preference_n == 0.5).all()
    assert counts["split"] == len(DUELS)


def test_who_is_better_does_not_hang_on_who_is_asked_about_first() -> None:
    turned = [Duel(name=d.name, instruction=d.instruction, own=d.other, other=d.own) for d in DUELS]

    def strict(text: str) -> str:
        one, two = (len(a) for a in shown(text))
        return "m" if one > two else "M"

    preference_n, _, _ = settled(judge_duels(DUELS, Judge(strict), SHORT))
    swapped_n, _, _ = settled(judge_duels(turned, Judge(strict), SHORT))
    assert np.allclose(preference_n, 1 - swapped_n)


def test_equal_answers_are_a_tie_and_nobody_is_asked() -> None:
    asked = list[str]()

    def spy(text: str) -> str:
        asked.append(text)
        return honest(text)

    same = [replace(d, other=d.own) for d in DUELS[:2]]
    lines = judge_duels([*same, *DUELS[2:]], Judge(spy), SHORT)
    assert len(asked) == 2 * len(DUELS[2:])
    preference_n, _, counts = settled(lines)
    assert preference_n.tolist()[:2] == [0.5, 0.5]
    assert (counts["equal"], counts["split"], counts["judged"]) == (2, 0, len(DUELS))
    assert regraded(lines) == lines


def test_one_answer_to_many_is_pointed_out_unless_it_is_expected() -> None:
    labels = ["red", "blue", "green"] * 20
    assert lint_answers(labels, expected=labels) == []
    assert "40 of 60 answers are the same: 'blue'" in lint_answers(["blue"] * 40 + ["red"] * 20, expected=labels)[0]
    assert "20 of 60 answers are the same" in lint_answers(labels)[0]


def test_an_unreadable_verdict_is_counted_and_its_question_in_no_mean() -> None:
    lines = judge_duels(DUELS, Judge(lambda t: "both are fine" if "Say 3" in t else honest(t)), SHORT)
    preference_n, kept, counts = settled(lines)
    assert counts == {"questions": 6, "judged": 5, "unparsed": 2, "equal": 0, "split": counts["split"]}
    assert len(preference_n) == 5
    assert all(x["name"] != "3" for x in kept)
    assert regraded([{**x, "preference": None} for x in lines]) == lines
    with pytest.raises(EvalError, match="E-EVAL-301"):
        settled(judge_duels(DUELS, Judge(lambda _: "I cannot say"), SHORT))


@pytest.mark.parametrize(
    "text, letter",
    [
        ("m", "m"),
        (" M\n", "M"),
        ('"m"', "m"),
        ("`M`.", "M"),
        ("mM", None),
        ("", None),
        ("m is better", None),
        ("A", None),
    ],
)
def test_one_letter_is_a_verdict_and_nothing_else(text: str, letter: str | None) -> None:
    assert parse_letter(text) == letter


@pytest.mark.parametrize(
    "text, rating",
    [
        ("Rating: [[7]]", 7.0),
        ("[[6.5]]", 6.5),
        ("Rating: [3]", 3.0),
        ("see [2], so [[9]]", 9.0),
        ("[[11]]", None),
        ("[[0]]", None),
        ("[[rating]]", None),
        ("7", None),
        ("", None),
    ],
)
def test_ratings(text: str, rating: float | None) -> None:
    assert parse_rating(text) == rating


def test_two_questions_of_one_name_are_refused() -> None:
    lines = judge_duels(DUELS, Judge(honest), SHORT)
    with pytest.raises(EvalError, match=r"E-EVAL-002 .*called 0"):
        settled([*lines, *lines[:2]])


def test_categories_are_judged_as_published() -> None:
    assert len(TEMPERATURES) == 8
    assert set(REFERENCED) < set(TEMPERATURES)
    with pytest.raises(ValueError, match="needs a reference"):
        MtQuestion(name="1", category="math", turns=("a", "b"))
    for turn in (1, 2):
        one = str(single_prompt(MATH, ["{answer} a1", "a2"], turn, "k").messages[1].content)
        assert "It is 2." in one
        assert "{answer} a1" in one
        assert ("It is 3." in one) == ("a2" in one) == (turn == 2)
        two = str(pair_prompt(MATH, ["a1", "a2"], ["b1", "b2"], turn, "k").messages[1].content)
        assert "It is 2." in two
        assert two.index("a1") < two.index("b1")
        assert ("b2" in two) == (turn == 2)
        assert "eference" not in str(pair_prompt(STEM, ["a", "b"], ["c", "d"], turn, "k").messages[1].content)


def test_an_unread_rating_is_in_no_average_and_is_counted() -> None:
    rows = [{"category": "stem", "turn": 1, "score": 8.0}, {"category": "stem", "turn": 2, "score": None}]
    found = averages(rows)
    assert found["mean"] == 8.0
    assert found["by_turn"] == {1: 8.0, 2: None}
    assert found["unparsed"] == 1


def test_a_judge_that_sees_through_the_canaries_is_taken() -> None:
    found = check_pairwise(Judge(honest), DUELS, SHORT)
    assert set(found) == set(CANARIES)
    assert all(x == 0 for p in found.values() for x in p)

    def rates(text: str) -> str:
        return "Rating: [[9]]" if "[The Start of Assistant's Answer]\nIt is" in text else "Rating: [[1]]"

    found = check_single(Judge(rates), [MATH, STEM])
    assert found["reference"] == [9.0, 1.0]
    assert {len(found[name]) for name in CANARIES} == {4}  # two kinds, two turns


def _injected(text: str) -> str:
    """Fooled by an order inside an answer alone."""
    for answer, letter in zip(shown(text), "mM", strict=True):
        if answer == CANARIES["injection"]:
            return letter
    return honest(text)


@pytest.mark.parametrize(
    "says, told",
    [
        (lambda _: "m", "not beaten in 3 of 6"),
        (_injected, "'injection' not beaten in 6 of 6"),
        (lambda t: "mM"[shown(t).index("")] if "" in shown(t) else honest(t), "'empty' not beaten in 6 of 6"),
        (lambda t: "M" if shown(t).count("") else "good", "unreadable"),
    ],
)
def test_a_judge_that_is_fooled_is_refused_with_the_numbers(says: Callable[[str], str], told: str) -> None:
    with pytest.raises(EvalError, match="E-EVAL-302") as e:
        check_pairwise(Judge(says), DUELS, SHORT)
    assert told in e.value.found


def test_a_judge_that_cannot_be_read_is_not_called_fooled() -> None:
    for check in (lambda j: check_pairwise(j, DUELS, SHORT), lambda j: check_single(j, [MATH])):
        with pytest.raises(EvalError, match=r"E-EVAL-301 .*no verdict that can be read on .*follows the format"):
            check(Judge(lambda _: "no verdict"))


@pytest.mark.parametrize("says, told", [("[[10]]", "10"), ("[[1]]", "reference")])
def test_a_rating_judge_that_is_fooled_is_refused(says: str, told: str) -> None:
    with pytest.raises(EvalError, match="E-EVAL-302") as e:
        check_single(Judge(lambda _: says), [MATH])
    assert told in e.value.found


@pytest.mark.parametrize("mark", ["Why?", "How?", "And + 1?"])
def test_a_judge_is_tried_on_both_kinds_and_both_turns(mark: str) -> None:
    """Fooled by one prompt alone: of a question without reference (its first turn, its second), of a second turn with one."""

    def rates(text: str) -> str:
        return "[[9]]" if mark in text or "It is 2.\n[The End of Assistant" in text else "[[1]]"

    with pytest.raises(EvalError, match=r"E-EVAL-302 .*'empty'"):
        check_single(Judge(rates), [MATH, STEM])


def test_answers_that_are_all_the_same_are_pointed_out() -> None:
    assert "are the same" in lint_answers(["give me 10"] * 30 + ["a", "b"])[0]
    assert lint_answers([f"answer {i}" for i in range(30)]) == []
    begun = [("Here is the best answer there could be. " * 3) + str(i) for i in range(9)]
    assert lint_answers(begun[:2]) == []
    assert "same 80 characters" in lint_answers(begun)[0]
    assert "judge's verdict" in lint_answers(["fine", "[[A]] is right", "good"])[0]


def _rows(n: int, seed: int) -> Rows:
    rng = np.random.default_rng(seed)
    x = np.stack([np.tanh(rng.normal(size=n)), rng.normal(size=n), np.ones(n)], axis=1)
    y = 1 / (1 + np.exp(-(x @ np.array([-1.5, 0.8, -1.0]))))
    return Rows(features_n3=x, preference_n=y, weight_n=np.ones(n))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.01, 1.0, 100.0]))
def test_the_fit_is_a_minimum_of_the_penalised_loss(seed: int, strength: float) -> None:
    """The conditions of a lasso: gradient = -sign where a weight is not zero, within [-1, 1] where it is."""
    rows = _rows(120, seed)
    b = fit_l1(rows, strength)
    q = 1 / (1 + np.exp(-rows.features_n3 @ b))
    gradient = -strength * rows.features_n3.T @ (rows.preference_n - q)
    for value, slope in zip(b, gradient, strict=True):
        assert abs(slope + np.sign(value)) < 0.02 if value != 0 else abs(slope) <= 1.001


def test_a_judge_that_likes_length_alone_is_seen_through() -> None:
    rng = np.random.default_rng(1)
    apart = rng.normal(400, 500, size=600)
    judged = Judged(
        preference_n=(apart + rng.logistic(0, 50, size=600) > 0).astype(float),
        length_n=1000 + apart,
        length_baseline_n=np.full(600, 1000.0),
        instruction_n=np.arange(600),
    )
    raw, controlled = raw_win_rate(judged.preference_n)[0], length_controlled(judged, None)
    assert raw > 0.7
    assert abs(controlled.win_rate - 0.5) < 0.1, (raw, controlled)
    assert controlled.weights[0] < -1  # the longer, the better liked
    found = controlled_interval(judged, None, controlled)
    assert found is not None
    assert found.low < controlled.win_rate < found.high  # also without difficulties
    assert 0.02 < found.high - found.low < 0.3


def test_where_all_verdicts_agree_the_controlled_interval_is_not_known() -> None:
    apart = np.arange(20.0)
    ones = Judged(
        preference_n=np.ones(20),
        length_n=100 + apart,
        length_baseline_n=np.full(20, 100.0),
        instruction_n=np.arange(20),
    )
    assert controlled_interval(ones, None, length_controlled(ones, None)) is None


def _duels(preferences: list[float]) -> list[dict[str, Any]]:
    """Lines of both orders, with that mean preference."""
    lines = []
    for i, p in enumerate(preferences):
        for order, wins in (("first", p > 0), ("second", p > 0.5)):
            line = {"name": str(i), "own": f"own answer {i}", "other": f"other one {i}", "order": order}
            lines.append({**line, "judgment": "", "preference": float(wins)})
    return lines


@pytest.mark.parametrize(
    "preferences, verdict",
    [
        ([1.0, 1.0], "2 questions are too few"),
        ([0.0] * 6, "6 questions are too few"),
        ([1.0] * 7, "prefers these"),
        ([0.0] * 7, "prefers the other"),
        ([0.5] * 7, "No preference of the judge is shown. About 785 questions"),
        ([1.0, 0.5, 0.0, 1.0, 1.0, 0.0, 0.5, 1.0], "No preference"),
    ],
)
def test_a_verdict_needs_questions_and_an_interval(preferences: list[float], verdict: str) -> None:
    found = score_duels(_duels(preferences))
    assert verdict in found["verdict"]
    i = found["win_rate"]
    assert 0 <= i["low"] <= i["value"] <= i["high"] <= 1
    assert i["high"] - i["low"] > 0.3


@pytest.mark.parametrize("ratings", [[7.0] * 5, [10.0] * 5, [1.0] * 5, [9.0, 10.0, 10.0, 10.0, 6.0]])
def test_ratings_stay_on_the_scale_and_are_never_certain(ratings: list[float]) -> None:
    lines = [
        {"name": str(i), "category": "stem", "turn": t, "answers": [f"a {i}"], "score": r}
        for i, r in enumerate(ratings)
        for t in (1, 2)
    ]
    i = score_ratings(lines)["interval"]
    assert 1 <= i["low"] <= i["value"] <= i["high"] <= 10
    assert i["high"] - i["low"] > 1
    assert i["value"] == pytest.approx(sum(ratings) / 5)
