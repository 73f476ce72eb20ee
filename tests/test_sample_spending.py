"""Money, keys and kill -9: caps hold, keys go nowhere, and a killed process loses nothing and repeats only what was in flight."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from educe.errors import SampleError
from educe.sample.server import Server, ServerSampler
from educe.sample.spending import Caps
from hypothesis import given, settings
from hypothesis import strategies as st

from servers import Seen, Sent, said, serving, upper
from test_sample_server import BUSY, PASSING, PRICED, QUICK, SHORT, _no_keys, asked, first, kinds, lines, sampler

__all__ = ["_no_keys"]
KEY = "sk-Secret0Secret1Secret2Secret3"


def stopped_at(seen: Seen, journal: Path, caps: Caps, num: int) -> SampleError:
    with pytest.raises(SampleError) as e:
        sampler(seen, journal, caps=caps).sample(asked(num), SHORT)
    return e.value


def test_what_was_spent(tmp_path: Path) -> None:
    with serving(first(PASSING["closed"])) as seen:
        speaker = sampler(seen, tmp_path, caps=PRICED)
        speaker.sample(asked(2), SHORT)
        speaker.sample(asked(3), SHORT)
        spent = speaker.spent
        assert spent is not None
        assert (spent.requests, spent.tokens_in, spent.tokens_out, spent.maybe_twice) == (6, 30, 15, 3)
        assert spent.cost == pytest.approx((30 * 1 + 15 * 10) / 1e6)
        assert 0 < spent.maybe_cost < 1
        later = sampler(seen, tmp_path, caps=PRICED)
        later.sample(asked(3), SHORT)
        assert later.spent == spent  # from the journal


def test_a_cap_is_for_all_that_a_sampler_is_asked(tmp_path: Path) -> None:
    with serving() as seen:
        speaker = sampler(seen, tmp_path, caps=Caps(max_requests=5))
        speaker.sample(asked(3), SHORT)
        with pytest.raises(SampleError, match="E-SAMPLE-201"):
            speaker.sample(asked(3, "other"), SHORT)
        assert len(speaker.sample(asked(2, "other"), SHORT)) == 2


def test_refused_before_the_first_request_where_the_estimate_passes_a_cap(tmp_path: Path) -> None:
    with serving() as seen:
        assert stopped_at(seen, tmp_path, Caps(max_requests=9), 10).code == "E-SAMPLE-201"
        e = stopped_at(seen, tmp_path, Caps(price_in=1, price_out=10, max_cost=0.001), 10)
        assert e.code == "E-SAMPLE-201"
        assert "0.0023 USD: more than 0.001 USD" in e.found
        assert not seen.bodies


@pytest.mark.parametrize("concurrency", [1, 8])
def test_never_more_than_the_cap_and_what_was_answered_is_kept(tmp_path: Path, concurrency: int) -> None:
    """The server counts twice the tokens that were estimated."""
    caps = Caps(price_in=1.0, price_out=10.0, max_cost=0.006)
    with serving(lambda body, times: said("x", tokens_in=70, tokens_out=20)) as seen:
        how = type(QUICK)(first_wait_s=0.01, concurrency=concurrency)
        with pytest.raises(SampleError) as caught:
            sampler(seen, tmp_path, how=how, caps=caps).sample(asked(26), SHORT)
        assert caught.value.code == "E-SAMPLE-202"
        kept = kinds(tmp_path)["answered"]
        cost = caps.cost(kept * 70, kept * 20)
        assert 0.006 - 0.0004 < cost <= 0.006
        assert f"{kept} of 26" in caught.value.found
        again = stopped_at(seen, tmp_path, caps, 26)  # counted over processes
        assert again.code in ("E-SAMPLE-201", "E-SAMPLE-202")
        assert len(seen.bodies) == kept
        more = Caps(price_in=1.0, price_out=10.0, max_cost=1.0)
        assert len(sampler(seen, tmp_path, caps=more).sample(asked(26), SHORT)) == 26
        assert len(seen.bodies) == 26


def test_requests_are_capped_with_those_made_again(tmp_path: Path) -> None:
    with serving(first(PASSING["500"])) as seen:
        e = stopped_at(seen, tmp_path, Caps(max_requests=7), 5)
        assert e.code == "E-SAMPLE-202"
        assert len(seen.bodies) == 7


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from([None, "500", "garbage", "closed", "truncated"]), min_size=1, max_size=8),
    st.floats(0.0005, 0.01),
    st.integers(1, 6),
)
def test_any_failures_any_cap(tmp_path_factory: pytest.TempPathFactory, ways: list[Any], cap: float, many: int) -> None:
    """What may have been paid never passes the cap; each answer stands once in the journal."""
    place = tmp_path_factory.mktemp("journal")
    caps = Caps(price_in=1.0, price_out=10.0, max_cost=cap)

    def answer(body: dict[str, Any], times: int) -> Sent:
        way = ways[int(body["messages"][-1]["content"].split()[-1]) % len(ways)]
        return PASSING[way] if way and not times else said("x", tokens_in=40, tokens_out=20)

    with serving(answer) as seen:
        how = type(QUICK)(first_wait_s=0.001, concurrency=many)
        with contextlib.suppress(SampleError):
            sampler(seen, place, how=how, caps=caps, say=lambda line: None).sample(asked(8), SHORT)
    found = lines(place)
    paid = sum(caps.cost(x["tokens_in"], x["tokens_out"]) for x in found if x["kind"] == "answered")
    most = {x["id"]: caps.cost(x["most_in"], x["most_out"]) for x in found if x["kind"] == "asked"}
    maybe = sum(most[x["id"]] for x in found if x["kind"] == "failed" and x["maybe_paid"])
    assert paid + maybe <= cap + 1e-12
    assert max(Counter(x["id"] for x in found if x["kind"] == "answered").values(), default=1) == 1
    assert len(seen.bodies) == sum(x["kind"] == "asked" for x in found)


CHILD = """
import sys
from educe.sample.asking import How
from educe.sample.server import Server, ServerSampler
from educe.types import Message, Prompt, Sampling
from pathlib import Path
prompts = [Prompt(key=f"q{i}", messages=(Message(role="user", content=f"question {i}"),)) for i in range(60)]
server = Server(url=sys.argv[1], model="m", how=How(concurrency=4))
answers = ServerSampler(server, say=print, journal=Path(sys.argv[2])).sample(prompts, Sampling(max_new_tokens=20))
print(len(answers), "there", flush=True)
"""


def test_killed_at_any_time_nothing_is_lost_and_only_what_was_in_flight_is_asked_again(tmp_path: Path) -> None:
    def slow(body: dict[str, Any], times: int) -> Sent:
        sent = upper(body, times)
        sent.after_s = 0.04
        return sent

    with serving(slow) as seen:
        command = [sys.executable, "-c", CHILD, seen.url, str(tmp_path / "j.jsonl")]
        kills = (1, 25)
        for num in kills:
            child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            while len(seen.bodies) < num:
                time.sleep(0.003)
            os.kill(child.pid, signal.SIGKILL)
            child.communicate()
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        assert "60 there" in done.stdout
        told = [line for line in done.stdout.splitlines() if "paid for twice" in line]
        said_twice = int(told[0].split(": ")[2].split()[0]) if told else 0
        answered = Counter(line["key"] for line in lines(tmp_path) if line["kind"] == "answered")
        assert answered == {f"q{i}": 1 for i in range(60)}
        repeats = seen.times.total() - 60
        assert repeats <= QUICK.concurrency * len(kills)
        assert repeats <= said_twice <= QUICK.concurrency * len(kills)  # written down before it is sent
        assert len(seen.times) == 60


def test_a_torn_line_is_of_a_request_that_never_counted(tmp_path: Path) -> None:
    with serving() as seen:
        sampler(seen, tmp_path).sample(asked(5), SHORT)
        file = tmp_path / "j.jsonl"
        whole = file.read_bytes()
        file.write_bytes(whole[:-20])
        told: list[str] = []
        assert len(sampler(seen, tmp_path, say=told.append).sample(asked(5), SHORT)) == 5
        assert seen.times.total() == 6
        assert any("1 requests were sent before" in line for line in told)


@pytest.mark.parametrize("line", [
    {"kind": "asked"}, {"kind": "answered"}, {"kind": "failed"}, {"kind": "asked", "most_in": "3", "most_out": 4},
    {"kind": "other"}, {"kind": []},
    {"kind": "answered", "text": 3, "finish": "stop", "tokens_in": 1, "tokens_out": 1}, {"kind": "failed", "maybe_paid": None},
])  # fmt: skip
def test_a_line_that_lacks_something_is_left_out_and_said(tmp_path: Path, line: dict[str, Any]) -> None:
    with serving() as seen:
        before = sampler(seen, tmp_path).sample(asked(2), SHORT)
        file = tmp_path / "j.jsonl"
        whole = file.read_text()
        file.write_text(json.dumps({"id": lines(tmp_path)[0]["id"], **line}) + "\n" + whole + "[" * 9999 + "\n")
        told: list[str] = []
        assert sampler(seen, tmp_path, say=told.append).sample(asked(2), SHORT) == before
        assert file.read_text() == whole
        assert seen.times.total() == 2
    assert any("1 lines lack what they should hold" in x for x in told)


def test_a_gateway_that_gives_up_after_the_model_wrote_counts_as_paid(tmp_path: Path) -> None:
    """A reply that may be billed counts in full, so that the cap holds though no answer comes."""
    caps = Caps(price_in=1.0, price_out=10.0, max_cost=0.001)
    with serving(lambda body, times: Sent(status=504, body=b"gateway timeout")) as seen:
        e = stopped_at(seen, tmp_path, caps, 1)
        assert e.code == "E-SAMPLE-202"
        most = next(caps.cost(x["most_in"], x["most_out"]) for x in lines(tmp_path) if x["kind"] == "asked")
        assert len(seen.bodies) == int(0.001 / most)


def test_no_answer_counts_that_cannot_be_kept(tmp_path: Path) -> None:
    from educe.errors import MachineError
    from educe.files.journal import Journal

    with serving() as seen, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "_write", _full)
        with pytest.raises(MachineError, match="disk is full"):
            sampler(seen, tmp_path).sample(asked(3), SHORT)
        assert not seen.bodies


def _full(self: Any) -> None:
    raise OSError(28, "No space left on device")


def test_the_key_is_sent_and_stands_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDUCE_API_KEY", KEY)
    told: list[str] = []
    echo = Sent(status=401, body=json.dumps({"error": {"message": f"Incorrect API key: {KEY}"}}).encode())
    with serving(lambda body, times: upper(body, times) if len(seen.bodies) < 3 else echo) as seen:
        sampler(seen, tmp_path, say=told.append).sample(asked(2), SHORT)
        with pytest.raises(SampleError) as e:
            sampler(seen, tmp_path, say=told.append).sample(asked(5), SHORT)
    assert {h["Authorization"] for h in seen.headers} == {f"Bearer {KEY}"}
    assert "Incorrect API key" in str(e.value)
    everything = str(e.value) + "".join(told) + "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file())
    assert "Secret0" not in everything


def test_no_key_goes_to_another_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving() as seen:
        sampler(seen, tmp_path).sample(asked(1), SHORT)
        assert not any("Authorization" in h for h in seen.headers)
        monkeypatch.setenv("OTHER_API_KEY", "short-key")
        named = Server(url=seen.url, model="m", key_variable="OTHER_API_KEY")
        ServerSampler(named, journal=tmp_path / "other.jsonl").sample(asked(1), SHORT)
        assert seen.headers[-1]["Authorization"] == "Bearer short-key"
    assert Server(url="https://api.openai.com", model="m").key() == KEY


@pytest.mark.parametrize("variable,value", [("MY_VALUE", "x"), ("NONE_API_KEY", ""), ("BAD_API_KEY", "a\nb")])
def test_keys_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SampleError, match="E-SAMPLE-104"):
        Server(url="http://localhost:1", model="m", key_variable=variable).key()


@pytest.mark.parametrize(
    "url,code",
    [
        ("http://example.org/v1", "301"),
        ("http://127.0.0.1.example.org/v1", "301"),
        ("https://user:pass@example.org/v1", "101"),
        ("ftp://example.org", "101"),
        ("https://exa mple.org", "101"),
        ("https://", "101"),
        ("example.org/v1", "101"),
        ("https://example.org/v1?key=1", "101"),
        ("https://[::1/v1", "101"),
        ("http://127.0.0.1:port", "101"),
    ],
)
def test_addresses_that_are_not_asked(url: str, code: str) -> None:
    with pytest.raises(SampleError) as e:
        Server(url=url, model="m")
    assert e.value.code == f"E-SAMPLE-{code}"
    assert "pass@" not in str(e.value)


def test_addresses_that_are() -> None:
    for url in ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000/v1/chat/completions"):
        assert Server(url=url, model="m").endpoint == "http://127.0.0.1:8000/v1/chat/completions"
    assert Server(url="http://[::1]:8", model="m").endpoint.startswith("http://[::1]:8/v1")
    assert Server(url="http://example.org/v1", model="m", plain_http=True).endpoint.startswith("http://example.org")
    assert Server(url="https://host/api/openai/v1", model="m").endpoint == "https://host/api/openai/v1/chat/completions"


@pytest.mark.parametrize("wrong", [{"max_cost": 1.0}, {"price_in": 1.0}, {"price_in": -1.0, "price_out": 1.0}])
def test_caps_that_make_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(SampleError, match="E-SAMPLE-103"):
        Caps(**wrong)  # type: ignore[arg-type]


def test_busy_without_end(tmp_path: Path) -> None:
    busy = Sent(status=BUSY.status, body=BUSY.body)
    with serving(lambda body, times: busy) as seen, pytest.raises(SampleError, match=r"E-SAMPLE-004.*slow down"):
        sampler(seen, tmp_path).sample(asked(1), SHORT)
