"""Prompts for the untouched model: the instruction is drawn from the answers' form, near examples are near, candidates are few."""

from __future__ import annotations

import json

from educe.evaluate.prompting import Nearest, candidates, instruction_of, with_instruction
from educe.types import Conversation, Message, Source
from hypothesis import given, settings
from hypothesis import strategies as st


def row(question: str, answer: str = "a") -> Conversation:
    said = (Message(role="user", content=question), Message(role="assistant", content=answer))
    return Conversation(messages=said, source=Source(file="t.jsonl", line=1))


def test_the_instruction_says_what_answers_look_like() -> None:
    tickets = [json.dumps({"kind": ("refund", "track")[i % 2], "order": str(i) if i % 3 else None}) for i in range(30)]
    assert instruction_of(tickets) == (
        'Answer with one JSON object and nothing else, with the keys "kind", "order". "kind" is one of "refund", "track". '
        '"order" is null where there is none.'
    )
    assert instruction_of(["yes", "no"] * 5) == "Answer with one of these and nothing else: no, yes."
    short = instruction_of([str(1000 + i) for i in range(30)])
    assert short == 'Answer in the form of these, with nothing else: "1000", "1001", "1002".'
    assert instruction_of([" ".join(["word"] * 80)] * 2) == "Answer in about 80 words."
    assert instruction_of([]) == ""
    # Tool calls have no text: no form is told, which would forbid them.
    assert instruction_of([""] * 9) == instruction_of(["", "yes", "no"] * 9) == ""
    # Other keys in one row, or text that is no JSON: no form of JSON is claimed.
    assert "JSON" not in instruction_of([*tickets, '{"other": 1}'])
    assert "JSON" not in instruction_of([*tickets, "sorry"])


def test_the_instruction_stands_where_the_template_takes_it() -> None:
    system, user = Message(role="system", content="S"), Message(role="user", content="U")
    made = {
        as_system: [m.content for m in with_instruction((user,), "I", as_system=as_system)]
        for as_system in (True, False)
    }
    assert made == {True: ["I", "U"], False: ["I\n\nU"]}
    assert [m.content for m in with_instruction((system, user), "I", as_system=False)] == ["S\n\nI", "U"]


def test_candidates_are_cheaper_first_and_only_what_there_is() -> None:
    labels = [c.label for c in candidates("I", 5, 3)]
    assert labels == [
        "as it is", "instruction", "1 example", "instruction + 1 example", "5 examples", "instruction + 5 examples",
        "3 nearest examples", "instruction + 3 nearest examples",
    ]  # fmt: skip
    assert [c.label for c in candidates("", 1, 0)] == ["as it is", "1 example"]


WORDS = st.lists(st.sampled_from(["kettle", "lamp", "order", "late", "refund", "thanks"]), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(WORDS.map(" ".join), min_size=1, max_size=12), st.integers(1, 15))
def test_the_nearest_to_a_row_of_rare_words_is_itself(questions: list[str], count: int) -> None:
    rows = [row(f"{q} only{i}") for i, q in enumerate(questions)]
    near = Nearest(rows)
    for i, r in enumerate(rows):
        found = near.to(r.messages[:1], count)
        assert len(found) == min(count, len(rows)) == len({id(f) for f in found})
        assert near.to([Message(role="user", content=f"only{i}")], 1) == [r]
    assert near.to([Message(role="user", content="nothing of that")], 1) == rows[:1]
