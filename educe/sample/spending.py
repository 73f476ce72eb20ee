"""What was asked of a server and what it cost, written down before it counts; and where to stop.

The file is journal and cache in one. A request is in it as `asked` before it is sent, and as `answered` or `failed` before its answer
counts. So a process that is killed loses no answer, and of what it left as asked alone one knows that it may be paid for twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from educe.errors import SampleError
from educe.files.journal import Journal
from educe.sample.wire import Reply

_BYTES_PER_TOKEN = 4  # of English in common vocabularies: for estimates alone
_MESSAGE_TOKENS = 16  # what a template writes around a message, at most
# What a journal's line must hold, by its kind.
_LINES: dict[str, dict[str, type]] = {
    "asked": {"id": str, "most_in": int, "most_out": int},
    "answered": {"id": str, "text": str, "finish": str, "tokens_in": int, "tokens_out": int},
    "failed": {"id": str, "maybe_paid": bool},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Caps:
    """Prices in USD per million tokens, as the server's owner charges, and what may be spent on a set of questions, by all processes
    that asked them. None: no price known, no limit."""

    price_in: float | None = None
    price_out: float | None = None
    max_requests: int | None = None
    max_cost: float | None = None

    def __post_init__(self) -> None:
        if any(v is not None and not 0 <= v < float("inf") for v in (self.price_in, self.price_out, self.max_cost)):
            raise SampleError(
                103, "price", "a price or a cap is no amount of money.", "Give numbers of USD, 0 or more."
            )
        if (self.price_in is None) != (self.price_out is None):
            raise SampleError(103, "price", "one of two prices is missing.", "Give those of tokens read and written.")
        if self.max_cost is not None and self.price_in is None:
            fix = "Give both prices, in USD per million tokens."
            raise SampleError(103, "max cost", "a cap on money, and no price to count with.", fix)

    def cost(self, tokens_in: float, tokens_out: float) -> float:
        """USD; 0 where no price is known."""
        return ((self.price_in or 0.0) * tokens_in + (self.price_out or 0.0) * tokens_out) / 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One request: `num_bytes` of what the model reads, in `num_messages`."""

    id: str
    key: str
    body: dict[str, Any]
    num_bytes: int
    num_messages: int

    @property
    def most_in(self) -> int:
        """Tokens the model reads, at most: none is shorter than a byte."""
        return self.num_bytes + _MESSAGE_TOKENS * (self.num_messages + 1)

    @property
    def most_out(self) -> int:
        return int(self.body["max_tokens"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """On a set of questions. `cost` in USD, None without prices; `maybe_twice`: requests that no answer is known of, which the server
    may have counted too, and `maybe_cost` what they cost at most."""

    requests: int
    tokens_in: int
    tokens_out: int
    cost: float | None
    maybe_twice: int
    maybe_cost: float


class Record:
    """The journal of one model of one server, open in one process at a time, and what of it belongs to the questions `ids`."""

    def __init__(self, file: Path, caps: Caps, say: Callable[[str], None], ids: Collection[str]) -> None:
        self._journal, self._caps, self._ids = Journal(file, say), caps, set(ids)
        self.answers: dict[str, Reply] = {}
        self._requests = self._tokens_in = self._tokens_out = 0
        self._lost: Counter[tuple[str, int, int]] = Counter()  # asked, and neither answered nor known to be free
        self._last: dict[str, tuple[str, int, int]] = {}
        self._unfit = 0
        self._journal.begin(self._read, keys={"kind", "id"})
        if self._unfit:
            what = "lines lack what they should hold and are left out: what those requests cost is not counted"
            say(f"warning: {file}: {self._unfit} {what}")

    def _read(self, line: dict[str, Any]) -> bool:
        if not _fits(line):
            self._unfit += 1
            return False
        if line["id"] not in self._ids:
            return True
        kind, id = line["kind"], line["id"]
        if kind == "asked":
            self._requests += 1
            self._last[id] = (id, line["most_in"], line["most_out"])
            self._lost[self._last[id]] += 1
        elif kind == "answered":
            reply = Reply(**{k: line[k] for k in ("text", "finish", "tokens_in", "tokens_out")})
            self._tokens_in, self._tokens_out = self._tokens_in + reply.tokens_in, self._tokens_out + reply.tokens_out
            self.answers[id] = reply
            self._found(id)
        elif not line["maybe_paid"]:
            self._found(id)
        return True

    def _found(self, id: str) -> None:
        """What became of its last request. The line that says it was asked may be damaged."""
        if id in self._last:
            self._lost -= Counter([self._last[id]])

    def _add(self, line: dict[str, Any]) -> None:
        self._read(line)
        self._journal.append(line)
        self._journal.settle(must=True)

    def asked(self, q: Question) -> None:
        """To be called before it is sent."""
        self._add({"kind": "asked", "id": q.id, "key": q.key, "most_in": q.most_in, "most_out": q.most_out})

    def answered(self, q: Question, reply: Reply) -> None:
        line = {"kind": "answered", "id": q.id, "key": q.key, "text": reply.text, "finish": reply.finish}
        self._add({**line, "tokens_in": reply.tokens_in, "tokens_out": reply.tokens_out})

    def failed(self, q: Question, why: str, *, maybe_paid: bool) -> None:
        self._add({"kind": "failed", "id": q.id, "key": q.key, "why": why, "maybe_paid": maybe_paid})

    @property
    def spent(self) -> Spent:
        """On these questions, by all processes that asked them."""
        most = ((n * most_in, n * most_out) for (_, most_in, most_out), n in self._lost.items())
        cost = self._caps.cost(self._tokens_in, self._tokens_out)
        return Spent(
            requests=self._requests,
            tokens_in=self._tokens_in,
            tokens_out=self._tokens_out,
            cost=cost if self._caps.price_in is not None else None,
            maybe_twice=self._lost.total(),
            maybe_cost=sum(self._caps.cost(*m) for m in most),
        )


def _fits(line: dict[str, Any]) -> bool:
    fields = _LINES.get(line["kind"]) if isinstance(line["kind"], str) else None
    return fields is not None and all(type(line.get(k)) is t for k, t in fields.items())


class Till:
    """What is left to spend on a set of questions. Never more is promised than the caps allow, whatever the answers in flight cost."""

    def __init__(self, caps: Caps, record: Record, where: str) -> None:
        self._caps, self._record, self._where = caps, record, where
        self.in_flight = 0

    def estimate(self, questions: Collection[Question]) -> float:
        """USD for these: read by the usual length of a token, each answer as long as it may be."""
        read = sum(q.num_bytes / _BYTES_PER_TOKEN + _MESSAGE_TOKENS * q.num_messages for q in questions)
        return self._caps.cost(read, sum(q.most_out for q in questions))

    def check(self, questions: Collection[Question]) -> None:
        """Before the first request. Raises `SampleError`."""
        spent, caps = self._record.spent, self._caps
        if caps.max_requests is not None and spent.requests + len(questions) > caps.max_requests:
            before = f", and {spent.requests} were made before" if spent.requests else ""
            found = f"{len(questions)} requests are to be made{before}: more than {caps.max_requests}."
            raise SampleError(201, self._where, found, "Allow more (--max-requests), or ask less.")
        total = self.estimate(questions) + (spent.cost or 0.0) + spent.maybe_cost
        if caps.max_cost is not None and total > caps.max_cost:
            found = f"asking would cost up to about {money(total)}: more than {money(caps.max_cost)}."
            raise SampleError(201, self._where, found, "Allow more (--max-cost), or ask for fewer or shorter answers.")

    def has(self, q: Question) -> bool | None:
        """Whether one more request is within the caps; None where that depends on what is in flight. Raises `SampleError`."""
        spent, caps = self._record.spent, self._caps
        if caps.max_requests is not None and spent.requests >= caps.max_requests:
            found = f"stopped at the cap of {caps.max_requests} requests."
            raise SampleError(202, self._where, found, "Allow more (--max-requests) and run it again.")
        wanted = (spent.cost or 0.0) + spent.maybe_cost + caps.cost(q.most_in, q.most_out)  # in flight: counted as lost
        if caps.max_cost is None or wanted <= caps.max_cost:
            return True
        if self.in_flight:
            return None
        found = f"stopped before the cap of {money(caps.max_cost)}: one more answer might pass it."
        raise SampleError(202, self._where, found, "Allow more (--max-cost) and run it again.")


def money(usd: float) -> str:
    """0.0042 USD, 1.25 USD: two digits that matter."""
    return f"{usd:.2f} USD" if usd >= 1 or usd == 0 else f"{usd:.2g} USD"
