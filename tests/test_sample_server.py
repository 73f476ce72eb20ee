"""Asking a server: a real one on this machine that is slow, busy, broken, or lies; what is kept, said, and spent."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from educe.errors import SampleError
from educe.evaluate.metrics.calls import grade_tool_calls
from educe.evaluate.metrics.question import Question
from educe.sample import asking
from educe.sample.asking import How
from educe.sample.sampler import Sampler
from educe.sample.server import Server, ServerSampler
from educe.sample.spending import Caps
from educe.sample.wire import request_body
from educe.types import Message, Prompt, Sampling, ToolCall

from servers import Seen, Sent, said, serving, upper

SHORT = Sampling(max_new_tokens=20)
QUICK = How(first_wait_s=0.01, concurrency=4)
PRICED = Caps(price_in=1.0, price_out=10.0)
BUSY = Sent(status=429, body=b'{"error": {"message": "slow down"}}', headers={"Retry-After": "1"})


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EDUCE_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def asked(num: int, word: str = "question") -> list[Prompt]:
    return [Prompt(key=f"q{i}", messages=(Message(role="user", content=f"{word} {i}"),)) for i in range(num)]


def sampler(seen: Seen, journal: Path, how: How = QUICK, caps: Caps = Caps(), say: Any = print) -> ServerSampler:  # noqa: B008
    return ServerSampler(Server(url=seen.url, model="m", how=how), caps, say, journal / "j.jsonl")


def lines(journal: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (journal / "j.jsonl").read_text().splitlines()]


def kinds(journal: Path) -> Counter[str]:
    return Counter(line["kind"] for line in lines(journal))


def refused(seen: Seen, journal: Path, num: int = 1, **more: Any) -> SampleError:
    with pytest.raises(SampleError) as e:
        sampler(seen, journal, **more).sample(asked(num), SHORT)
    return e.value


def first(*sent: Sent) -> Callable[[dict[str, Any], int], Sent]:
    """Each question gets these, one a try, and then its answer."""
    return lambda body, times: sent[times] if times < len(sent) else upper(body, times)


def test_answers_in_order_kept_and_not_asked_again(tmp_path: Path) -> None:
    with serving(lambda body, times: replace(upper(body, times), after_s=0.02)) as seen:
        prompts = asked(12)
        speaker: Sampler = sampler(seen, tmp_path)
        counts: list[int] = []
        answers = speaker.sample(prompts, SHORT, counts.append)
        assert [a.text for a in answers] == [f"QUESTION {i}" for i in range(12)]
        assert all(a.num_tokens == 5 and a.stopped for a in answers)
        assert counts == sorted(counts)
        assert (counts[0], counts[-1]) == (0, 12)
        assert 1 < seen.most <= QUICK.concurrency
        assert kinds(tmp_path) == {"asked": 12, "answered": 12}
        assert sampler(seen, tmp_path).sample(prompts[::-1], SHORT) == answers[::-1]
        assert seen.times.total() == 12
        sampler(seen, tmp_path).sample(prompts[:2], replace(SHORT, temperature=0.5))  # another question
        assert seen.times.total() == 14
        assert (
            sampler(seen, tmp_path).sample([*prompts[:1], replace(prompts[0], key="other")], SHORT) == [answers[0]] * 2
        )
        assert seen.times.total() == 14
        assert speaker.name.startswith("m at http://127.0.0.1")


def test_what_is_sent(tmp_path: Path) -> None:
    call = ToolCall(name="f", arguments={"x": 1}, id="c1")
    messages = (
        Message(role="system", content="s"),
        Message(role="user", content="u"),
        Message(role="assistant", content="", tool_calls=(call,)),
        Message(role="tool", content="7", call_id="c1"),
    )
    prompt = Prompt(key="k", messages=messages, tools=({"type": "function", "function": {"name": "f"}},))
    with serving() as seen:
        sampler(seen, tmp_path).sample([prompt], Sampling(max_new_tokens=9, temperature=0.7, top_p=0.9, seed=3))
        sampler(seen, tmp_path).sample([replace(prompt, key="l")], Sampling(max_new_tokens=9, temperature=0.7, seed=3))
        sampler(seen, tmp_path).sample(asked(1), SHORT)
    body, other, greedy = seen.bodies
    assert body["model"] == "m"
    assert (body["max_tokens"], body["temperature"], body["top_p"]) == (9, 0.7, 0.9)
    assert body["seed"] != other["seed"]  # a prompt's own
    assert body["messages"][2]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"x": 1}'}
    assert body["messages"][3] == {"role": "tool", "content": "7", "tool_call_id": "c1"}
    assert body["tools"] == [{"type": "function", "function": {"name": "f"}}]
    assert greedy["temperature"] == 0
    assert "seed" not in greedy
    assert not any(k.lower() == "authorization" for h in seen.headers for k in h)


@pytest.mark.parametrize(
    "sent,text,stopped",
    [
        (said("cut", "length"), "cut", False),
        (said("", "tool_calls", tool_calls=[{"function": {"name": "f"}}]), '{"name": "f"}', True),
        (said("no", "content_filter"), "no", False),
        (said("", refusal="I will not"), "I will not", True),
        (said("cut", None), "cut", False),  # type: ignore[arg-type]
    ],
)
def test_how_an_answer_ends(tmp_path: Path, sent: Sent, text: str, stopped: bool) -> None:
    with serving(lambda body, times: sent) as seen:
        (answer,) = sampler(seen, tmp_path).sample(asked(1), SHORT)
    assert (answer.text, answer.stopped) == (text, stopped)


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


def test_calls_beside_a_text_are_calls(tmp_path: Path) -> None:
    wanted = Question(row="r", prompt=(), expected="", calls=(ToolCall(name="f", arguments={"x": 1}),))
    for text in ("Let me look.", "", "\n", None):
        place = tmp_path / repr(text)
        place.mkdir()
        sent = said(text, "tool_calls", tool_calls=[CALL])  # type: ignore[arg-type]
        with serving(lambda body, times, sent=sent: sent) as seen:
            (answer,) = sampler(seen, place).sample(asked(1), SHORT)
        assert grade_tool_calls(answer.text, wanted).correct, answer.text
        assert answer.text.startswith((text or "").strip())


def test_results_without_ids_belong_to_the_last_calls_in_their_order() -> None:
    f = ToolCall(name="f", arguments={})
    messages = (
        Message(role="user", content="u"),
        Message(role="assistant", content="", tool_calls=(f, f, replace(f, id="own"))),
        *(Message(role="tool", content=str(k)) for k in range(3)),
        Message(role="assistant", content="", tool_calls=(f,)),
        Message(role="tool", content="3"),
    )
    body = request_body("m", Prompt(key="k", messages=messages), SHORT)
    assert [m["tool_call_id"] for m in body["messages"] if m["role"] == "tool"] == ["call_0", "call_1", "own", "call_0"]


@pytest.mark.parametrize(
    "usage", [b"", b', "usage": null', b', "usage": {"prompt_tokens": 3, "completion_tokens": null}']
)
def test_a_server_that_counts_no_tokens_is_asked_once_and_counted_at_the_most(tmp_path: Path, usage: bytes) -> None:
    sent = Sent(body=b'{"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]' + usage + b"}")
    told: list[str] = []
    with serving(lambda body, times: sent) as seen:
        speaker = sampler(seen, tmp_path, caps=PRICED, say=told.append)
        assert [a.text for a in speaker.sample(asked(3), SHORT)] == ["x"] * 3
        assert seen.times.total() == 3
    most = [line for line in lines(tmp_path) if line["kind"] == "asked"]
    assert speaker.spent is not None
    assert speaker.spent.cost == pytest.approx(sum(PRICED.cost(x["most_in"], x["most_out"]) for x in most))
    assert sum("counts no tokens" in line for line in told) == 1


def test_a_server_that_does_not_say_why_it_ends(tmp_path: Path) -> None:
    told: list[str] = []
    with serving(lambda body, times: said("x", None)) as seen:  # type: ignore[arg-type]
        answers = sampler(seen, tmp_path, say=told.append).sample(asked(3), SHORT)
        assert sampler(seen, tmp_path).sample(asked(3), SHORT) == answers
        assert seen.times.total() == 3
    assert not any(a.stopped for a in answers)
    assert sum("taken as cut" in line for line in told) == 1


PASSING = {
    "408": Sent(status=408, body=b"late"),
    "500": Sent(status=500, body=b"oops"),
    "502": Sent(status=502, body=b"bad gateway"),
    "504": Sent(status=504, body=b"gateway timeout"),
    "503 html": Sent(status=503, body=b"<html>"),
    "garbage": Sent(body=b"{nonsense"),
    "html": Sent(body=b"<html>welcome</html>"),
    "no choices": Sent(body=b'{"usage": {}}'),
    "no text and no end": Sent(
        body=b'{"choices": [{"message": {"content": null}, "finish_reason": null}], "usage": {}}'
    ),
    "deep": Sent(body=b"[" * 100_000),
    "not text": said(7),  # type: ignore[arg-type]
    "closed": Sent(close=True),
    "truncated": Sent(body=b'{"choices": [', length=1000),
}


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_is_asked_again(tmp_path: Path, name: str) -> None:
    with serving(first(PASSING[name], PASSING[name])) as seen:
        answers = sampler(seen, tmp_path).sample(asked(2), SHORT)
        assert [a.text for a in answers] == ["QUESTION 0", "QUESTION 1"]
        assert set(seen.times.values()) == {3}
    assert kinds(tmp_path) == {"asked": 6, "failed": 4, "answered": 2}
    paid = {line["maybe_paid"] for line in lines(tmp_path) if line["kind"] == "failed"}
    assert paid == {not name.startswith("503")}


@pytest.mark.parametrize("name,code", [("500", "004"), ("garbage", "102"), ("no choices", "102"), ("closed", "001")])
def test_what_does_not_pass_is_told(tmp_path: Path, name: str, code: str) -> None:
    with serving(lambda body, times: PASSING[name]) as seen:
        e = refused(seen, tmp_path, how=replace(QUICK, tries=3))
        assert e.code == f"E-SAMPLE-{code}"
        assert "3 times" in e.found
        assert seen.times.total() == 3


def test_a_question_refused_is_not_asked_again_and_the_others_are_kept(tmp_path: Path) -> None:
    def answer(body: dict[str, Any], times: int) -> Sent:
        bad = body["messages"][-1]["content"].endswith(" 5")
        return Sent(status=400, body=b'{"error": {"message": "too long"}}') if bad else upper(body, times)

    with serving(answer) as seen:
        e = refused(seen, tmp_path, 20, how=replace(QUICK, concurrency=2))
        assert e.code == "E-SAMPLE-003"
        assert "400 to q5: too long" in e.found
        assert seen.times["question 5"] == 1
        kept = kinds(tmp_path)["answered"]
        assert 4 <= kept <= 6
        assert f"{kept} of 20 questions were answered" in e.found


@pytest.mark.parametrize("status,says", [(401, "EDUCE_API_KEY"), (404, "model's name"), (302, "leads to")])
def test_each_refusal_says_what_to_do(tmp_path: Path, status: int, says: str) -> None:
    with serving(lambda body, times: Sent(status=status, headers={"Location": "http://127.0.0.1:1/"})) as seen:
        assert says in refused(seen, tmp_path).fix
        assert seen.times.total() == 1


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_respected_by_all(tmp_path: Path, as_date: bool) -> None:
    when = format_datetime(datetime.now(UTC) + timedelta(seconds=3), usegmt=True) if as_date else "1"
    busy = replace(BUSY, headers={"Retry-After": when})
    with serving(lambda body, times: busy if len(seen.bodies) == 1 else upper(body, times)) as seen:
        sampler(seen, tmp_path, how=replace(QUICK, concurrency=1)).sample(asked(3), SHORT)
    assert seen.at_s[1] - seen.at_s[0] >= (1.0 if not as_date else 0.5)
    assert kinds(tmp_path)["answered"] == 3


def test_a_wait_beyond_the_deadline_is_not_waited_for(tmp_path: Path) -> None:
    began = time.monotonic()
    with serving(lambda body, times: replace(BUSY, headers={"Retry-After": "60"})) as seen:
        e = refused(seen, tmp_path, how=replace(QUICK, deadline_s=20))
    assert e.code == "E-SAMPLE-002"
    assert "slow down" in e.found
    assert time.monotonic() - began < 5


def test_a_long_wait_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To all requests that are told to wait together: who, how long, until when, how to stop."""
    monkeypatch.setattr(asking, "_SAID_WAIT_S", 1.0)
    told: list[str] = []
    with serving(lambda body, times: BUSY if len(seen.bodies) <= 4 else upper(body, times)) as seen:
        sampler(seen, tmp_path, say=told.append).sample(asked(6), SHORT)
        (line,) = (t for t in told if "Ctrl-C" in t)
    assert re.search(r"slow down.*127\.0\.0\.1.* in 1 s: waiting until \d\d:\d\d:\d\d\. Ctrl-C stops", line), line


def test_an_error_ends_what_waits(tmp_path: Path) -> None:
    def answer(body: dict[str, Any], times: int) -> Sent:
        return replace(BUSY, headers={"Retry-After": "60"}) if body["messages"][-1]["content"].endswith("0") else late

    late = Sent(status=404, after_s=0.3)
    began = time.monotonic()
    with serving(answer) as seen:
        assert refused(seen, tmp_path, 2).code == "E-SAMPLE-003"
    assert time.monotonic() - began < 10


def test_one_deadline_for_all_and_one_for_each_request(tmp_path: Path) -> None:
    with serving(first(Sent(after_s=1.0))) as seen:
        assert (
            sampler(seen, tmp_path, how=replace(QUICK, request_s=0.4)).sample(asked(1), SHORT)[0].text == "QUESTION 0"
        )
    (tmp_path / "all").mkdir()
    with serving(lambda body, times: replace(upper(body, times), after_s=0.25)) as seen:
        e = refused(seen, tmp_path / "all", 50, how=replace(QUICK, deadline_s=1.0))
        assert e.code == "E-SAMPLE-002"
        assert 0 < kinds(tmp_path / "all")["answered"] < 50
        told: list[str] = []
        sampler(seen, tmp_path / "all", say=told.append).sample(asked(20), SHORT)
    assert any("may be paid for twice" in line for line in told)  # those in flight when time was over
    assert seen.times.total() <= kinds(tmp_path / "all")["answered"] + QUICK.concurrency


def test_no_server_at_all(tmp_path: Path) -> None:
    with serving() as seen:
        pass
    e = refused(seen, tmp_path, how=replace(QUICK, tries=2))
    assert e.code == "E-SAMPLE-001"
    assert kinds(tmp_path) == {"asked": 2, "failed": 2}


def test_a_newer_name_of_the_limit_is_used_where_the_server_wants_it(tmp_path: Path) -> None:
    def answer(body: dict[str, Any], times: int) -> Sent:
        old = Sent(status=400, body=b'{"error": {"message": "Use \'max_completion_tokens\' instead."}}')
        return old if "max_tokens" in body else upper(body, times)

    told: list[str] = []
    with serving(answer) as seen:
        assert len(sampler(seen, tmp_path, say=told.append).sample(asked(6), SHORT)) == 6
        assert seen.bodies[-1]["max_completion_tokens"] == 20
    assert any("max_completion_tokens" in line for line in told)
