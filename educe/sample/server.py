"""Ask any OpenAI-compatible server: several requests at a time, again where that may help, each answer kept before it counts."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from educe.errors import SampleError
from educe.files.hashes import cache_dir, hash_json
from educe.files.locks import one_at_a_time
from educe.sample.asking import Asking, How
from educe.sample.spending import Caps, Question, Record, Spent, Till, money
from educe.sample.wire import endpoint_of, is_loopback, request_body
from educe.secrets import is_secret_name
from educe.types import Answer, Prompt, Sampling

_OPENAI = "api.openai.com"


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """`url`: base address. `key_variable` names the environment's variable with the key; "": OPENAI_API_KEY for OpenAI's own address,
    EDUCE_API_KEY for others, so that no key goes to another's server. `plain_http`: also where that is not this machine.
    """

    url: str
    model: str
    key_variable: str = ""
    plain_http: bool = False
    how: How = How()  # noqa: RUF009  (frozen)

    def __post_init__(self) -> None:
        endpoint_of(self.url, self.plain_http)
        if not self.model:
            raise ValueError("a server is asked for a model by its name")

    @property
    def endpoint(self) -> str:
        return endpoint_of(self.url, self.plain_http)

    def key(self) -> str:
        """From the environment alone; "" where there is none. Raises `SampleError`."""
        usual = "OPENAI_API_KEY" if urlsplit(self.url).hostname == _OPENAI else "EDUCE_API_KEY"
        name = self.key_variable or usual
        key = os.environ.get(name, "").strip()
        if not is_secret_name(name):
            found = "its name does not say that it is a secret, so its value would not be hidden."
            raise SampleError(104, name, found, "Name the variable …_API_KEY.")
        if self.key_variable and not key:
            raise SampleError(104, name, "is not in the environment.", f"Set it: export {name}=…")
        if not (key.isascii() and key.isprintable()):
            raise SampleError(104, name, "holds what no key has.", "Set it again, without line breaks.")
        return key


class ServerSampler:
    """A `Sampler`. `journal`: where answers are kept (default: in educe's cache, a file for each model of a server). `caps` are for
    all that this object is asked, by earlier processes too; `spent` is what that was so far."""

    def __init__(
        self,
        server: Server,
        caps: Caps = Caps(),  # noqa: B008  (frozen)
        say: Callable[[str], None] = lambda line: None,
        journal: Path | None = None,
    ) -> None:
        self._server, self._caps, self._say = server, caps, say
        file = f"{hash_json([server.endpoint, server.model])[:24]}.jsonl"
        self._ids: set[str] = set()
        self.spent: Spent | None = None
        self._file = journal if journal is not None else cache_dir() / "asked" / file

    @property
    def kept_in(self) -> Path:
        """The file of its answers."""
        return self._file

    @property
    def name(self) -> str:
        return f"{self._server.model} at {self._server.endpoint}"

    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, progress: Callable[[int], None] | None = None
    ) -> list[Answer]:
        """Raises `SampleError`; what was answered until then is kept, and not asked again."""
        questions = [self._question(p, sampling) for p in prompts]
        self._ids |= {q.id for q in questions}
        with one_at_a_time(self._file.with_suffix(".lock"), self._waits):
            record = Record(self._file, self._caps, self._say, self._ids)
            todo = list({q.id: q for q in questions if q.id not in record.answers}.values())

            def count() -> None:
                if progress is not None:
                    progress(sum(q.id in record.answers for q in questions))

            count()
            try:
                if todo:
                    self._ask(todo, record, count)
            finally:
                self.spent = record.spent
            replies = [record.answers[q.id] for q in questions]
        if cut := sum(r.finish == "content_filter" for r in replies):
            self._say(f"warning: {self.name}: its content filter cut {cut} answers")
        return [Answer(text=r.text, num_tokens=r.tokens_out, stopped=r.stopped) for r in replies]

    def _ask(self, todo: list[Question], record: Record, count: Callable[[], None]) -> None:
        till = Till(self._caps, record, self.name)
        priced = self._caps.price_in is not None
        cost = f"; up to about {money(till.estimate(todo))}" if priced else ""
        self._say(f"{self.name}: asks {len(todo)} questions that are not answered yet{cost}")
        if lost := record.spent.maybe_twice:
            most = f", at most {money(record.spent.maybe_cost)}" if priced else ""
            what = "requests were sent before and their answers lost: they may be paid for twice"
            self._say(f"warning: {self.name}: {lost} {what}{most}")
        till.check(todo)
        server = self._server
        asking = Asking(server.endpoint, server.key(), server.how, record, till, self._say, count)
        proxies = not is_loopback(urlsplit(server.url).hostname or "")  # which know nothing of this machine
        _apart(lambda: asyncio.run(asking.all(todo, proxies=proxies)))

    def _question(self, prompt: Prompt, sampling: Sampling) -> Question:
        body = request_body(self._server.model, prompt, sampling)
        read = json.dumps([body["messages"], body.get("tools")], ensure_ascii=False)
        id = hash_json([self._server.endpoint, body])
        return Question(
            id=id, key=prompt.key, body=body, num_bytes=len(read.encode()), num_messages=len(prompt.messages)
        )

    def _waits(self) -> None:
        self._say(f"{self.name}: another process asks it; waiting for that to end")


def _apart(job: Callable[[], None]) -> None:
    """In a thread of its own where this one has a loop already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        job()
    else:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(job).result()
