"""A real server of the OpenAI kind on this machine, that fails as it is told."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Sent:
    """What to send: a status, a body; `length` claims another one, `close` sends nothing at all."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    length: int | None = None
    close: bool = False
    after_s: float = 0.0


def said(text: str, finish: str = "stop", tokens_in: int = 10, tokens_out: int = 5, **more: Any) -> Sent:
    message = {"role": "assistant", "content": text} | more
    usage = {"prompt_tokens": tokens_in, "completion_tokens": tokens_out}
    return Sent(body=json.dumps({"choices": [{"message": message, "finish_reason": finish}], "usage": usage}).encode())


def upper(body: dict[str, Any], times: int) -> Sent:
    """Says the question in capitals."""
    return said(body["messages"][-1]["content"].upper())


@dataclass
class Seen:
    """`url` of the server, and what it was asked: bodies, headers, paths; how often each question, how many at once at most."""

    url: str
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)
    times: Counter[str] = field(default_factory=Counter)
    now: int = 0
    most: int = 0


@contextmanager
def serving(answer: Callable[[dict[str, Any], int], Sent] = upper) -> Iterator[Seen]:
    """`answer` gets a request's body and how often its question was asked before."""
    lock = threading.Lock()
    seen = Seen("")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked = body["messages"][-1]["content"]
            with lock:
                seen.bodies.append(body)
                seen.headers.append(dict(self.headers))
                seen.at_s.append(time.monotonic())
                before = seen.times[asked]
                seen.times[asked] += 1
                seen.now += 1
                seen.most = max(seen.most, seen.now)
            try:
                self._send(answer(body, before))
            except OSError:
                self.close_connection = True  # whoever asked is gone
            finally:
                with lock:
                    seen.now -= 1

        def _send(self, sent: Sent) -> None:
            time.sleep(sent.after_s)
            if sent.close or sent.length is not None:
                self.close_connection = True
            if sent.close:
                return
            self.send_response(sent.status)
            for name, value in sent.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(sent.body) if sent.length is None else sent.length))
            self.end_headers()
            self.wfile.write(sent.body)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    seen.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
