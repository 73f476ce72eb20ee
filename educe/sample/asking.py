"""One run through questions to a server: some at a time, again where that may help, until all are answered or one cannot be."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from educe.errors import EduceError, SampleError
from educe.sample.spending import Question, Record, Till
from educe.sample.wire import Garbled, Reply, read_reply, shown

MAX_REPLY_BYTES = 16 * 2**20
_LONGEST_WAIT_S, _SAID_WAIT_S = 30.0, 10.0
_PASSING = (408, 409, 425, 429)  # and all from 500 on
_NEWER = "max_completion_tokens"  # what some models of OpenAI want instead of `max_tokens`
_NO_COUNTS = "counts no tokens: each answer is counted as the longest that it may be"
_NO_ENDS = "does not say why answers end: they are taken as cut"


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """`deadline_s` is for all questions together, `request_s` for one request up to its answer's last byte, `tries` for one question;
    `first_wait_s` before the second try, twice that before the third, and so on."""

    concurrency: int = 8
    deadline_s: float = 7200.0
    request_s: float = 300.0
    tries: int = 6
    first_wait_s: float = 0.5

    def __post_init__(self) -> None:
        if min(self.concurrency, self.deadline_s, self.request_s, self.tries, self.first_wait_s) <= 0:
            raise ValueError(f"need numbers above 0: {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Again:
    """A request is to be made once more: `error` should it go on so, `wait_s` is what the server asks for."""

    error: SampleError
    maybe_paid: bool
    wait_s: float = 0.0


class Asking:
    """The first error stops what is not sent yet; what is in flight may end."""

    def __init__(
        self,
        endpoint: str,
        key: str,
        how: How,
        record: Record,
        till: Till,
        say: Callable[[str], None],
        count: Callable[[], None],
    ) -> None:
        self._endpoint, self._key, self._how, self._say, self._count = endpoint, key, how, say, count
        self._record, self._till = record, till
        self._error: EduceError | None = None
        self._length = "max_tokens"
        self._told: set[str] = set()
        self._not_before = 0.0  # what a server asked one request to wait, all of them do
        self._ends_at = time.monotonic() + how.deadline_s
        self._settled = asyncio.Condition()
        self._over = asyncio.Event()

    async def all(self, questions: Sequence[Question], *, proxies: bool) -> None:
        """Raises the first error, with what is kept."""
        waiting, how = deque(questions), self._how
        limits = httpx2.Limits(max_connections=how.concurrency)
        # Redirections are not followed: the key would go with them.
        async with httpx2.AsyncClient(timeout=None, limits=limits, trust_env=proxies) as client:
            try:
                async with asyncio.timeout(how.deadline_s):
                    await asyncio.gather(
                        *(self._work(client, waiting) for _ in range(min(how.concurrency, len(waiting))))
                    )
            except TimeoutError:
                found = f"the time for all questions, {how.deadline_s:g} s, is over."
                self._error = SampleError(2, self._endpoint, found, "Run it again.")
        if (e := self._error) is not None:
            kept = sum(q.id in self._record.answers for q in questions)
            said = f"{kept} of {len(questions)} questions were answered, and are kept."
            raise e.adding(said) from e

    async def _work(self, client: httpx2.AsyncClient, waiting: deque[Question]) -> None:
        while waiting and self._error is None:
            try:
                await self._answer(client, waiting.popleft())
            except EduceError as e:
                self._error = self._error or e
                self._over.set()

    async def _answer(self, client: httpx2.AsyncClient, q: Question) -> None:
        """Ask until there is an answer. Raises `SampleError`."""
        for attempt in range(1, self._how.tries + 1):
            while (wait := self._not_before - time.monotonic()) > 0 and self._error is None:
                await self._sleep(wait)
            async with self._in_flight(q) as sent:
                if not sent:
                    return
                found = await self._once(client, q)
                if isinstance(found, Reply):
                    self._record.answered(q, found)
                    self._count()
                    return
                self._record.failed(q, found.error.found, maybe_paid=found.maybe_paid)
            if attempt == self._how.tries:
                raise found.error.adding(f"So {attempt} times.")
            await self._wait(found, attempt)

    async def _wait(self, found: Again, attempt: int) -> None:
        # Chance that no result depends on: clients that failed together should not come back together.
        back_off = min(_LONGEST_WAIT_S, self._how.first_wait_s * 2 ** (attempt - 1)) * random.uniform(0.5, 1)
        back_at = time.monotonic() + found.wait_s + back_off
        if back_at > self._ends_at:
            late = f"To ask again in {found.wait_s + back_off:.0f} s would be after the time for all questions."
            raise SampleError(2, self._endpoint, f"{found.error.found} {late}", "Run it again later.")
        if found.wait_s:
            self._tell_wait(found)
            self._not_before = max(self._not_before, time.monotonic() + found.wait_s)
        await self._sleep(back_at - time.monotonic())

    def _tell_wait(self, found: Again) -> None:
        """Once, though all requests in flight hear it."""
        if found.wait_s < _SAID_WAIT_S or time.monotonic() + found.wait_s < self._not_before + _SAID_WAIT_S:
            return
        until = datetime.now().astimezone() + timedelta(seconds=found.wait_s)
        self._say(
            f"{found.error.found.rstrip('.')}. {self._endpoint} wants to be asked again in {found.wait_s:.0f} s: waiting until "
            f"{until:%H:%M:%S}. Ctrl-C stops; what is answered is kept, and the same command goes on"
        )

    async def _sleep(self, seconds: float) -> None:
        """Or until an error ends it all."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._over.wait()

    @contextlib.asynccontextmanager
    async def _in_flight(self, q: Question) -> AsyncIterator[bool]:
        """Written down as asked, once the caps allow it; False where that is not to be any more."""
        async with self._settled:
            while self._error is None and not self._till.has(q):
                await self._settled.wait()
            sent = self._error is None
            if sent:
                self._record.asked(q)
                self._till.in_flight += 1
        try:
            yield sent
        finally:
            if sent:
                self._till.in_flight -= 1
                async with self._settled:
                    self._settled.notify_all()

    async def _once(self, client: httpx2.AsyncClient, q: Question) -> Reply | Again:
        """One request. Raises `SampleError` for what another request would not change."""
        length, at, fix = self._length, self._endpoint, "See whether the server runs and the address is right."
        body = {length if k == "max_tokens" else k: v for k, v in q.body.items()}
        try:
            async with asyncio.timeout(self._how.request_s):
                status, headers, raw = await self._send(client, body)
            if status == 200:
                return self._heard(read_reply(raw, q.most_in, q.most_out))
        except TimeoutError:
            late = f"it gave no answer in {self._how.request_s:g} s."
            return Again(error=SampleError(2, at, late, fix), maybe_paid=True)
        except (httpx2.ConnectError, httpx2.ProxyError) as e:
            return Again(error=SampleError(1, at, f"it cannot be reached: {_words(e)}.", fix), maybe_paid=False)
        except httpx2.RequestError as e:
            return Again(error=SampleError(1, at, f"the connection broke: {_words(e)}.", fix), maybe_paid=True)
        except Garbled as e:
            return Again(error=SampleError(102, at, f"its answer {e}.", "Is it OpenAI-compatible?"), maybe_paid=True)
        said = shown(raw, self._key)
        if status in _PASSING or status >= 500:
            error = SampleError(4, at, f"it says {status}: {said}.", "Wait, or lower the load.")
            return Again(error=error, maybe_paid=_maybe_paid(status), wait_s=_seconds(headers.get("retry-after", "")))
        refused = self._refused(q, status, said)
        if length != _NEWER and _NEWER in said:
            self._say(f"{at}: takes {_NEWER} in place of max_tokens")
            self._length = _NEWER
            return Again(error=refused, maybe_paid=False)
        self._record.failed(q, refused.found, maybe_paid=False)
        raise refused

    def _heard(self, reply: Reply) -> Reply:
        """What the server leaves out of its replies is said once: every one lacks it, and to ask again would mend none."""
        for lacks, words in ((not reply.counted, _NO_COUNTS), (not reply.finish, _NO_ENDS)):
            if lacks and words not in self._told:
                self._told.add(words)
                self._say(f"warning: {self._endpoint}: {words}")
        return reply

    async def _send(self, client: httpx2.AsyncClient, body: dict[str, Any]) -> tuple[int, httpx2.Headers, bytes]:
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        async with client.stream("POST", self._endpoint, json=body, headers=headers) as reply:
            raw = bytearray()
            async for piece in reply.aiter_bytes():
                raw += piece
                if len(raw) > MAX_REPLY_BYTES:
                    raise Garbled(f"is longer than {MAX_REPLY_BYTES // 2**20} MB")
            return reply.status_code, reply.headers, bytes(raw)

    def _refused(self, q: Question, status: int, said: str) -> SampleError:
        fixes = {
            401: "Give a valid key in the environment (EDUCE_API_KEY; for OpenAI itself OPENAI_API_KEY).",
            403: "See what the key may do.",
            404: "See whether the address (often …/v1) and the model's name are right.",
        }
        leads = "Give the address that it leads to." if 300 <= status < 400 else "Change what the server names."
        return SampleError(3, self._endpoint, f"it says {status} to {q.key}: {said}.", fixes.get(status, leads))


def _maybe_paid(status: int) -> bool:
    """Whoever gave up late (408, a gateway's 502 and 504) may have let the model write to its end; 503, busy, is said before."""
    return status == 408 or (status >= 500 and status != 503)


def _words(e: Exception) -> str:
    return shown(str(e).encode()) or type(e).__name__


def _seconds(retry_after: str) -> float:
    """From now on: a number of seconds or a date (RFC 9110 §10.2.3); 0 for anything else."""
    try:
        return max(0.0, float(retry_after)) if retry_after.strip().isdigit() else _until(retry_after)
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _until(date: str) -> float:
    at = parsedate_to_datetime(date)
    return max(0.0, (at - datetime.now(UTC)).total_seconds())
