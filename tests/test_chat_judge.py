"""The judge of the matrix: it passes what is right, and minds each way of being wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from educe.chat.examples import build_rendered
from educe.chat.render import Renderer
from educe.chat.tokens import ChatTokenizer, load_tokenizer
from educe.errors import Refusal
from educe.types import Conversation, Rendered

from judge import judge_proved, judge_refused
from matrix import rows


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_dir: Path) -> ChatTokenizer:
    return load_tokenizer(tiny_tokenizer_dir)


def _built(name: str, tokenizer: ChatTokenizer) -> tuple[Conversation, Rendered]:
    row = rows()[name]
    made = build_rendered([row], Renderer(tokenizer))[0]
    assert not isinstance(made, Refusal)
    return row, made[0]


def _with_ids(r: Rendered, at: int, number: int) -> Rendered:
    ids_T = r.ids_T.copy()
    ids_T[at] = number
    return replace(r, ids_T=ids_T)


def _with_run(r: Rendered, first: int, end: int) -> Rendered:
    """The first trained run moved by so many tokens; its neighbours with it."""
    runs = list(r.runs)
    k = next(k for k, run in enumerate(runs) if run.trained)
    runs[k] = replace(runs[k], first=runs[k].first + first, end=runs[k].end + end)
    return replace(r, runs=tuple(runs))


@pytest.mark.parametrize("name", ["single", "two turns", "unicode", "marks in every turn", "weight of a half"])
def test_right_rows_pass(tokenizer: ChatTokenizer, name: str) -> None:
    row, r = _built(name, tokenizer)
    assert judge_proved(row, [r], tokenizer) == []


def test_wrong_rows_do_not(tokenizer: ChatTokenizer) -> None:
    row, r = _built("single", tokenizer)
    run = next(run for run in r.runs if run.trained)
    stop, start = tokenizer.control["<|im_end|>"], tokenizer.control["<|im_start|>"]
    for wrong, minds in (
        (_with_run(r, 0, -1), "stop tokens at []"),
        (_with_run(r, -1, 0), "not those of its prompt"),
        (_with_run(r, 1, 0), "not in what is trained"),
        (_with_ids(r, 1, start), "not those of its prompt"),
        (_with_ids(r, run.first, stop), "stop tokens at [0, "),
        (_with_ids(r, run.end - 1, start), "stop tokens at []"),
    ):
        found = judge_proved(row, [wrong], tokenizer)
        assert any(minds in f for f in found), (minds, found)
    assert judge_proved(row, [], tokenizer) == ["turns [] are trained"]


def test_control_strings_that_became_tokens_are_minded(tokenizer: ChatTokenizer) -> None:
    row, r = _built("marks said by the user", tokenizer)
    run = next(run for run in r.runs if run.trained)
    sent = tokenizer.encode("".join(s.text for s in r.runs[0].segments))  # a server that does not tell them apart
    ids_T = np.concatenate([np.array(sent, np.int32), r.ids_T[run.first :]])
    moved = tuple(
        replace(x, first=x.first + len(sent) - run.first, end=x.end + len(sent) - run.first) if x.first else x
        for x in r.runs
    )
    wrong = replace(r, ids_T=ids_T, runs=(replace(moved[0], end=len(sent)), *moved[1:]))
    assert any("control tokens in the prompt" in f for f in judge_proved(row, [wrong], tokenizer))


@pytest.mark.parametrize(
    "name, code, found, true",
    [
        ("single", "E-CHAT-102", "the chat template refused: no.", False),
        ("single", "E-CHAT-301", "turn 1 does not follow its prompt: …", False),
        ("single", "E-CHAT-302", "turn 1: the template does not render the assistant's text unchanged.", False),
        ("single", "E-CHAT-304", "turn 1 ends in '', which holds no stop token.", False),
        (
            "single",
            "E-CHAT-309",
            "the template leaves out message 0, a user message, from the prompt of turn 1.",
            False,
        ),
        ("single", "E-CHAT-310", "no assistant turn of the row is to be trained.", False),
        ("all weights 0", "E-CHAT-310", "no assistant turn of the row is to be trained.", True),
        ("reasoning", "E-CHAT-308", "turn 1 has reasoning that the template does not put into the turn.", True),
        ("reasoning inline", "E-CHAT-308", "turn 1 has reasoning that the template does not put into the turn.", False),
        (
            "tools offered, not called",
            "E-CHAT-309",
            "the template does not tell the model of the tool get_weather.",
            True,
        ),
    ],
)
def test_refusals_are_true_or_not(tokenizer: ChatTokenizer, name: str, code: str, found: str, true: bool) -> None:
    refusal = Refusal(code=code, where="f:1", found=found, fix="")
    assert (judge_refused(rows()[name], refusal, tokenizer) == []) == true
