"""Graders (a pass, a fail and a near miss each), the few-shot choice, scores and their verdict in words."""

from __future__ import annotations

import json
from typing import Any

import pytest
from educe.errors import EvalError
from educe.evaluate.compare import SYSTEMS, expected_loss, grade, regrade, score
from educe.evaluate.few_shot import choose_examples, with_examples
from educe.evaluate.metrics import METRICS, Question
from educe.types import Answer, Conversation, Message, Source
from hypothesis import given, settings
from hypothesis import strategies as st

CASES = [
    # metric, answer, expected, right?
    ("exact", "Paris", "Paris", True),
    ("exact", " Paris\n", "Paris", True),
    ("exact", "London", "Paris", False),
    ("exact", "paris", "Paris", False),
    ("exact", "Paris.", "Paris", False),
    ("exact", "", "Paris", False),
    ("text", "a b", "a b ", True),
    ("text", "a  b", "a b", False),
    ("label", "Refund.", "refund", True),
    ("label", " REFUND \n", "refund", True),
    ("label", "track", "refund", False),
    ("label", "refunds", "refund", False),
    ("label", "refund, I think", "refund", False),
    ("label", "straße", "STRASSE", True),
    ("label", "", "refund", False),
    ("sql", "select a\n from t;", "SELECT a FROM t", True),
    ("sql", "SELECT a FROM u", "SELECT a FROM t", False),
    ("sql", "SELECT a FROM t WHERE x = 'b'", "SELECT a FROM t WHERE x = 'B'", False),
    ("sql", "SELECT a FROM t WHERE x = 'b  c'", "SELECT a FROM t WHERE x = 'b c'", False),
    ("sql", 'select "A" from t', 'SELECT "A" FROM t', True),
    ("sql", 'select "a" from t', 'SELECT "A" FROM t', False),
    ("sql", "SELECT a FROM t WHERE x = ';'", "SELECT a FROM t WHERE x = ''", False),
    ("sql", "selecta from t", "select a from t", False),
    ("json", '{"b": [1, 2], "a": null}', '{"a":null,"b":[1,2]}', True),
    ("json", '\n{ "a" : 1 }\n', '{"a":1}', True),
    ("json", '"\\u00e9"', '"é"', True),
    ("json", '{"a": 2}', '{"a": 1}', False),
    ("json", '{"a": "1"}', '{"a": 1}', False),
    ("json", '{"a": true}', '{"a": 1}', False),
    ("json", '{"a": 1.0}', '{"a": 1}', False),
    ("json", '{"a": null}', "{}", False),
    ("json", '{"a": "x "}', '{"a": "x"}', False),
    ("json", "[2, 1]", "[1, 2]", False),
    ("json", 'Sure: {"a": 1}', '{"a": 1}', False),
    ("json", '```json\n{"a": 1}\n```', '{"a": 1}', False),
    ("json", '{"a": 1}{"a": 1}', '{"a": 1}', False),
    ("json", '{"a": 1,}', '{"a": 1}', False),
    ("json", '{"a": 2, "a": 1}', '{"a": 1}', False),
    ("json", "NaN", "null", False),
    ("json", "", "{}", False),
]


def wanted(expected: str) -> Question:
    return Question(row="t.jsonl:1", prompt=(), expected=expected)


@pytest.mark.parametrize("metric,answer,expected,right", CASES)
def test_each_metric_passes_fails_and_sees_the_near_miss(metric: str, answer: str, expected: str, right: bool) -> None:
    verdict = METRICS[metric](answer, wanted(expected))
    assert verdict.correct is right
    assert verdict.score == right
    assert verdict.reason


def test_every_metric_has_a_pass_and_a_fail() -> None:
    others = {"json_fields", "rouge_l", "tool_calls"}  # test_metrics.py
    assert {(m, r) for m, _, _, r in CASES} == {(m, r) for m in set(METRICS) - others for r in (True, False)}


def test_json_reasons_name_the_keys() -> None:
    expected = wanted('{"intent": "track", "order": "1"}')
    reason = METRICS["json"]('{"intent": "refund", "order": 1, "note": ""}', expected).reason
    assert reason == "differs in intent, order; adds note"
    assert METRICS["json"]("[]", wanted("{}")).reason == "other JSON value"
    assert "not JSON" in METRICS["json"]("oops", wanted("{}")).reason


def test_an_expected_answer_that_is_not_json_is_the_users_mistake() -> None:
    with pytest.raises(EvalError, match="E-EVAL-201"):
        METRICS["json"]("{}", wanted("not json"))


def test_graders_have_no_default() -> None:
    for metric in METRICS.values():
        with pytest.raises(TypeError):
            metric("answer")  # type: ignore[call-arg]


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text('aé1 "')
)
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text("ab", max_size=2), v, max_size=3), max_leaves=8
)


def shuffled(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: shuffled(value[k]) for k in reversed(value)}
    return [shuffled(v) for v in value] if isinstance(value, list) else value


@settings(max_examples=60, deadline=None, derandomize=True)
@given(VALUES, st.sampled_from([None, 0, 3]), st.booleans())
def test_json_is_graded_by_value_not_by_writing(value: Any, indent: int | None, escaped: bool) -> None:
    written = json.dumps(shuffled(value), indent=indent, ensure_ascii=escaped)
    assert METRICS["json"](written, wanted(json.dumps(value))).correct
    assert not METRICS["json"](json.dumps([value]), wanted(json.dumps(value))).correct


# Few-shot examples


def talk(question: str, *answers: str, system: str | None = None) -> Conversation:
    turns = [] if system is None else [Message(role="system", content=system)]
    for answer in answers:
        turns += [Message(role="user", content=question), Message(role="assistant", content=answer)]
    return Conversation(messages=tuple(turns), source=Source(file="t.jsonl", line=1))


ROWS = [talk(f"q{i}", f"{kind} thing {i}") for i, kind in enumerate(["refund"] * 30 + ["track"] * 3 + ["cancel order"])]


def test_choice_is_deterministic_and_follows_the_seed() -> None:
    assert choose_examples(ROWS, 4, 1) == choose_examples(list(ROWS), 4, 1)
    assert len({tuple(c.messages[0].content for c in choose_examples(ROWS, 4, s)) for s in range(5)}) > 1


@pytest.mark.parametrize("seed", range(6))
def test_choice_is_diverse(seed: int) -> None:
    """Three kinds of answers, one of them in 30 of 34 rows: three examples show all three."""
    same = [talk(f"q{i}", kind) for i, kind in enumerate(["refund it"] * 30 + ["track now"] * 3 + ["cancel order"])]
    chosen = choose_examples(same, 3, seed)
    assert {c.messages[-1].content for c in chosen} == {"refund it", "track now", "cancel order"}


def test_choice_is_of_distinct_single_turn_rows_and_never_more_than_there_are() -> None:
    rows = [talk("long", "a", "b"), *(talk(f"q{i}", f"w{i}") for i in range(3))]
    chosen = choose_examples(rows, 10, 0)
    assert sorted(c.messages[0].content for c in chosen) == ["q0", "q1", "q2"]
    assert choose_examples(rows[:1], 3, 0) == rows[:1]  # nothing better is there


def test_examples_stand_between_the_system_message_and_the_question() -> None:
    shots = [talk("q1", "a1", system="other"), talk("q2", "a2")]
    system, question = Message(role="system", content="S"), Message(role="user", content="Q")
    made = with_examples((system, question), shots)
    assert [m.content for m in made] == ["S", "q1", "a1", "q2", "a2", "Q"]
    assert [m.content for m in with_examples((question,), shots)] == ["q1", "a1", "q2", "a2", "Q"]
    assert with_examples((system, question), []) == (system, question)


# Scores


def lines(right: int, total: int, *, first: bool = True) -> list[dict[str, Any]]:
    """Graded lines, the `right` ones at the beginning (or the end)."""
    marks = [i < right if first else i >= total - right for i in range(total)]
    rest = {"answer": "a b"}
    return [
        {"correct": m, "score": float(m), "stopped": i % 2 == 0, "num_tokens": i, **rest} for i, m in enumerate(marks)
    ]


def scored(untouched: int, few_shot: int | None, tuned: int, total: int = 20, **more: Any) -> dict[str, Any]:
    graded = {"untouched": lines(untouched, total), "tuned": lines(tuned, total)}
    if few_shot is not None:
        graded["few_shot"] = lines(few_shot, total)
    return score(graded, more.get("metric", "exact"), {"tuned": 1.5}, more.get("dev_loss"))


ASKED = "With examples in its prompt the untouched model reaches"


@pytest.mark.parametrize(
    "untouched,few_shot,tuned,headline,also",
    [
        (2, None, 16, "Tuning helped: 10 % → 80 % of the test rows right.", "p < 0.001"),
        (8, None, 14, "Tuning helped: 40 % → 70 % of the test rows right.", "p = 0.031"),
        (2, 8, 16, "Tuning helped: 10 % → 80 % of the test rows right.", f"{ASKED} 40 %; the tuned one is better"),
        (
            2,
            15,
            16,
            "Tuning helped, but not shown to beat a prompt: 10 % → 80 %",
            f"{ASKED} 75 %; the tuned one is not",
        ),
        (2, 16, 8, "Do not tune: a prompt does better, 80 % against 40 %.", f"{ASKED} 80 %; the tuned one is worse"),
        (16, None, 2, "Do not tune: it did harm, 80 % → 10 % of the test rows right.", "Paired test: p"),
        (16, 2, 8, "Do not tune: it did harm, 80 % → 40 %", f"{ASKED} 10 %; the tuned one is better"),
        (8, None, 13, "No difference shown: 40 % → 65 % of the test rows right.", "p = 0.062"),
        (8, None, 8, "No difference shown: 40 % → 40 % of the test rows right.", "p = 1"),
        (8, 2, 12, "No difference shown: 40 % → 60 %", "the tuned one is better (p = 0.002)"),
        (8, 18, 8, "Do not tune: a prompt does better, 90 % against 40 %.", "the tuned one is worse (p = 0.002)"),
        (0, 0, 0, "No difference shown: 0 % → 0 % of the test rows right.", "More test rows"),
    ],
)
def test_the_verdict_says_what_the_paired_tests_allow(
    untouched: int, few_shot: int | None, tuned: int, headline: str, also: str
) -> None:
    found = scored(untouched, few_shot, tuned)
    assert found["verdict"].startswith(headline)
    assert also in found["verdict"]
    assert (ASKED in found["verdict"]) is (few_shot is not None)
    assert found["num_rows"] == 20


@pytest.mark.parametrize(
    "untouched,few_shot,tuned,headline",
    [
        (20, 392, 394, "Do not tune: a prompt does as well, 98 % against 98.5 %."),
        (20, 380, 396, "Tuning helped: 5 % → 99 % of the test rows right."),
        (380, None, 381, "Do not tune: the untouched model does as well, 95 % → 95.2 %"),
        (380, 381, 380, "Do not tune: the untouched model does as well, 95 % → 95 % of"),  # no prompt is needed
        (
            380,
            None,
            387,
            "Do not tune: the untouched model does nearly as well, 95 % → 96.8 %",
        ),  # better for sure, by little
        (20, 380, 387, "Do not tune: a prompt does nearly as well, 95 % against 96.8 %."),
    ],
)
def test_many_rows_can_say_that_a_prompt_does_as_well(
    untouched: int, few_shot: int | None, tuned: int, headline: str
) -> None:
    assert scored(untouched, few_shot, tuned, total=400)["verdict"].startswith(headline)


@pytest.mark.parametrize("rows", [2, 4, 5])
def test_too_few_rows_show_nothing_however_much_worse_it_looks(rows: int) -> None:
    """No exact test of so few rows reaches 5 %; its interval may leave out 0 all the same."""
    found = scored(rows, rows, 0, total=rows)["verdict"]
    assert found.startswith("No difference shown: 100 % → 0 % of the test rows right.")
    assert "which decides though the interval leaves out 0" in found


def test_a_prompt_that_is_none_and_one_that_harms_have_no_price() -> None:
    for label, right, says in (
        ("as it is", 4, "No prompt makes the untouched model better (the best of 3 on 9 dev rows)."),
        (
            "1 example",
            2,
            "With its best prompt (1 example; the best of 3 on 9 dev rows) the untouched model reaches 10 %",
        ),
    ):
        graded = {"untouched": lines(4, 20), "few_shot": lines(right, 20), "tuned": lines(16, 20)}
        chosen = {"prompt_tokens": 90.0, "prompt": {"label": label, "how": "the best of 3 on 9 dev rows"}}
        found = score(graded, "exact", {}, None, {"untouched": {"prompt_tokens": 40.0}, "few_shot": chosen})["verdict"]
        assert says in found
        assert "tokens with every request" not in found


def test_several_models_asked_beside_are_corrected_for_their_number() -> None:
    graded = {"untouched": lines(4, 20), "tuned": lines(10, 20), "one": lines(4, 20), "two": lines(3, 20)}
    told = score(graded, "exact", {}, None)
    one, two = told["comparisons"][1:]
    assert (one["p"], two["p"]) == (pytest.approx(2 / 2**6), pytest.approx(2 / 2**7))
    assert (one["p_holm"], two["p_holm"]) == (pytest.approx(2 / 2**6), pytest.approx(4 / 2**7))
    assert "p_holm" not in told["comparisons"][0]
    graded["three"] = lines(4, 20)
    told = score(graded, "exact", {}, None)
    assert [c["p_holm"] > 0.05 for c in told["comparisons"][1:]] == [True, False, True]
    assert (
        "one reaches 20 %; the tuned one is not shown to be better (p = 0.031, by Holm p = 0.062)." in told["verdict"]
    )


def general(*flags: str, most: float = 0.05, unfit: str = "") -> dict[str, Any]:
    text = {"before": 1.0, "change": {"value": 0.01}}
    prompts = {"right": (20, 21), "questions": 46, "unfit": unfit}
    return {"flags": list(flags), "text": text, "prompts": prompts, "most": most}


def test_the_verdict_weighs_what_was_forgotten_and_the_price() -> None:
    graded = {"untouched": lines(2, 20), "few_shot": lines(8, 20), "tuned": lines(16, 20)}
    chosen = {"prompt_tokens": 351.0, "prompt": {"label": "5 examples", "how": "so"}}
    about = {"untouched": {"prompt_tokens": 40.0}, "few_shot": chosen}
    for flags, headline, says in (
        (
            (),
            "Tuning helped: 10 % → 80 % of the test rows right.",
            "Nothing is shown to be forgotten: general text +1.0%",
        ),
        (
            ("general text costs 5.0% more",),
            "Tuning helped, at a price: 10 % → 80 % of the test rows right, and the model forgot.",
            "Forgotten: general text costs 5.0% more.",
        ),
    ):
        measured = {"general": general(*flags), "training_s": 530.0}
        found = score(graded, "exact", {}, None, about, measured)
        assert found["verdict"].startswith(headline)
        assert says in found["verdict"]
        assert "its best prompt (5 examples; so)" in found["verdict"]
        assert found["verdict"].endswith(
            "Price: 9 min of training steps against +311 tokens with every request for the prompt."
        )
        assert found["general"] == measured["general"]


def test_what_is_hardly_forgotten_is_no_headline() -> None:
    """Over 36 passages any change that all share is beyond its interval."""
    graded = {"untouched": lines(2, 20), "tuned": lines(16, 20)}
    little = general("general text costs 0.1% more", most=0.001)
    found = score(graded, "exact", {}, None, measured={"general": little})["verdict"]
    assert found.startswith("Tuning helped: 10 % → 80 % of the test rows right.")
    assert "Forgotten, but little: general text costs 0.1% more." in found
    thinks = general(unfit="general questions say little, so")
    found = score(graded, "exact", {}, None, measured={"general": thinks})["verdict"]
    assert "general text +1.0% bits per byte, general questions say little, so." in found


def test_free_text_is_compared_by_the_loss_of_the_expected_answers() -> None:
    tokens = [10.0] * 30
    noise = [0.1 * (i % 3) for i in range(30)]
    losses = {"untouched": 2.5, "few_shot": 1.5, "tuned": 1.2}
    at = {name: [10 * nats + n for n in noise] for name, nats in losses.items()}
    graded = {name: lines(0, 30) for name in ("untouched", "few_shot", "tuned")}
    for prompt, headline in (
        ("few_shot", "Tuning helped: loss of the expected answers 2.51 → 1.21 nats per token."),
        ("tuned", "Do not tune: a prompt does as well, 1.21 against 1.21."),
    ):
        nll = {"untouched": at["untouched"], "few_shot": at[prompt], "tuned": at["tuned"]}
        found = score(graded, "text", {}, (2.5, 1.2), measured={"loss": expected_loss(nll, tokens)})
        assert found["verdict"].startswith(headline)
        assert "Paired test: over all 30 rows, -1.30 nats" in found["verdict"]
    few = {name: rows[:10] for name, rows in at.items()}
    found = score(graded, "text", {}, None, measured={"loss": expected_loss(few, tokens[:10])})
    assert "over 10 of 30 rows, -1.30 nats" in found["verdict"]
    assert expected_loss({}, ()) is None


def test_scores_count_pair_and_keep_what_was_measured() -> None:
    found = scored(4, 6, 9)
    assert {n: s["correct"] for n, s in found["systems"].items()} == {"untouched": 4, "few_shot": 6, "tuned": 9}
    tuned = found["systems"]["tuned"]
    assert (tuned["seconds"], tuned["stopped"], tuned["mean_tokens"]) == (1.5, 0.5, 9.5)
    assert found["systems"]["untouched"]["seconds"] is None
    assert tuned["low"] < tuned["value"] == 0.45 < tuned["high"]
    assert [(c["before"], c["won"], c["lost"]) for c in found["comparisons"]] == [
        ("untouched", 5, 0),
        ("few_shot", 3, 0),
    ]
    graded = {"untouched": lines(4, 20), "tuned": lines(9, 20, first=False)}
    crossed = score(graded, "exact", {}, None)["comparisons"][0]
    assert (crossed["won"], crossed["lost"]) == (9, 4)  # row by row, not by totals
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("loss,says", [((2.5, 1.25), "fell from 2.50 to 1.25"), ((1.0, 1.5), "rose from 1.00 to 1.50"),
                                       ((2.0, 2.001), "did not change, 2.00 → 2.00")])  # fmt: skip
def test_free_text_goes_by_held_out_loss(loss: tuple[float, float], says: str) -> None:
    told = scored(0, None, 20, metric="text", dev_loss=loss)["verdict"]
    assert says in told
    assert "harm" not in told  # no interval, no harm
    assert "Tuning helped" in scored(0, None, 20, metric="exact", dev_loss=loss)["verdict"]


def test_one_system_alone_compares_with_nothing() -> None:
    assert score({"tuned": lines(3, 5)}, "exact", {}, None)["verdict"] == "Nothing to compare yet."
    assert SYSTEMS == ("untouched", "few_shot", "tuned")


def test_stored_answers_are_graded_again_by_another_metric() -> None:
    asked = [Question(row="t.jsonl:1", prompt=({"role": "user", "content": "?"},), expected="Yes") for _ in range(2)]
    said = [Answer(text=t, num_tokens=2, stopped=True) for t in ("yes", "no")]
    stored = grade(asked, said, METRICS["exact"])
    assert [line["correct"] for line in stored] == [False, False]
    again = regrade(stored, METRICS["label"])
    assert [line["correct"] for line in again] == [True, False]
    verdict = ("correct", "reason", "score")
    assert [{k: v for k, v in line.items() if k not in verdict} for line in again] == [
        {k: v for k, v in line.items() if k not in verdict} for line in stored
    ]
    assert regrade(again, METRICS["exact"]) == stored
    with pytest.raises(ValueError, match="as many answers"):
        grade(asked, said[:1], METRICS["exact"])
