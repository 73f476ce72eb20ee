"""The page of a run served on this machine alone, made again when the run's files have changed. It reads, and answers GET only.

Who may read it: `entrance.py`. Everybody else gets 403.
"""

from __future__ import annotations

import contextlib
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

from educe.errors import MachineError, RunError
from educe.files.hashes import mark
from educe.files.run_dir import RunDir, is_staged, last_touched, stages_of
from educe.report.entrance import HERE, Entrance, refusal
from educe.report.opening import Kept
from educe.report.page import build_report, render_page
from educe.report.policy import PAGE_HEADERS
from educe.report.reading import read_run

SHARE = 20  # the page is made again after so many times as long as it took: training is slowed by a twentieth of a core
_SLOWEST_S = 10.0  # a client that sends nothing for so long is let go


class LivePage:
    """The page as of now, made at most once for each state of the files, whoever asks. Of a run of stages it is that of the stage
    that wrote last: it follows the training from one to the next."""

    def __init__(self, path: Path) -> None:
        self._path, self._run, self._kept, self._lock = path, RunDir(path), Kept(), threading.Lock()
        self._stage = ""
        self._state: object = None
        self._html, self._tag, self._next = "", "", 0.0
        self._name, self._count = secrets.token_hex(8), 0

    def get(self) -> tuple[str, str]:
        """HTML and its tag."""
        with self._lock:
            self._follow()
            state = (self._stage, self._marks())
            if state != self._state and time.monotonic() >= self._next:
                began = time.monotonic()
                self._count += 1
                self._tag = f'"{self._name}-{self._count}"'
                self._html = self._made().replace("<body>", f"<body data-tag={self._tag}>", 1)
                self._next = time.monotonic() + SHARE * (time.monotonic() - began)
                self._state = state
            return self._html, self._tag

    def _follow(self) -> None:
        """To the stage that wrote last. A damaged list of stages is said on the page."""
        if not is_staged(self._path):
            return
        try:
            named = stages_of(self._path)
        except RunError as e:
            self._stage = f"{e.where} {e.found} {e.fix} "
            return
        name = max(named, key=lambda n: last_touched(named[n].path), default="")
        if name:
            if named[name].path != self._run.path:
                self._run, self._kept, self._state, self._next = named[name], Kept(), None, 0.0
            self._stage = f"Stage {list(named).index(name) + 1} of {len(named)}: {name}. "

    def _marks(self) -> list[tuple[str, tuple[int, int, int]]]:
        found = []
        for file in sorted(
            (
                *self._run.path.glob("*.json*"),
                *self._run.answers.glob("*.jsonl"),
                *self._run.judged.glob("*.json"),
                *self._run.suites.glob("*.json"),
            )
        ):
            try:
                found.append((file.name, mark(file)))
            except OSError:  # replaced this moment
                continue
        return found

    def _made(self) -> str:
        at = time.strftime("%H:%M:%S")
        if not (self._run.resolved.is_file() or self._run.metrics.is_file()):
            return render_page(
                "waiting.html",
                title=self._run.path.name,
                live=f"{self._stage}Waiting for the run to begin.",
                where=str(self._run.path),
            )
        files = read_run(self._run, self._kept)
        done = bool(files.provenance and files.provenance.finished)
        return build_report(
            self._run,
            live=f"{self._stage}Live; as of {at}. {'Trained to its end.' if done else 'Updates itself.'}",
            kept=self._kept,
        )


def _handler(page: LivePage, entrance: Entrance) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version, protocol_version, timeout = "educe", "", "HTTP/1.1", _SLOWEST_S

        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            given = parse_qs(query).get("token", [""])[0] if path == entrance.path else ""
            why = refusal(self.headers.get("Host", ""), self.headers.get("Origin", ""), entrance.port)
            known = not why and entrance.knows(self.headers.get("Cookie", ""))
            if not why and not known and not (self.command == "GET" and given and entrance.takes(given)):
                why = "no link, or one that was used: open the newest that educe watch printed"
            if why:
                self._answer(403, f"403: {why}.\n", "text/plain")
            elif self.command != "GET":
                self.close_connection = True  # what it may have sent is not read
                self._answer(405, "405: it can only be read.\n", "text/plain", {"Allow": "GET", "Connection": "close"})
            elif path != entrance.path:
                self._answer(404, "404: there is one page here.\n", "text/plain")
            elif given:  # out of the address, so that it is in no history and no referrer
                more = {} if known else {"Set-Cookie": entrance.cookie}
                self._answer(303, "", "text/plain", {"Location": entrance.path, **more})
            else:
                html, tag = page.get()
                same = self.headers.get("If-None-Match") == tag
                self._answer(304 if same else 200, "" if same else html, "text/html", {"ETag": tag})

        do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_GET

        def _answer(self, status: int, text: str, kind: str, more: dict[str, str] | None = None) -> None:
            body = text.encode("utf-8", "backslashreplace")
            self.send_response(status)
            for key, value in {"Content-Type": f"{kind}; charset=utf-8", **PAGE_HEADERS, **(more or {})}.items():
                self.send_header(key, value)
            if status != 304:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Requests are not told: the first one holds the token."""

    return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no error of ours."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


@contextlib.contextmanager
def served(
    run: Path, port: int = 0, on_link: Callable[[str], None] = lambda link: None
) -> Iterator[tuple[str, Callable[[], None]]]:
    """The link with its token, and a function that serves until the process is told to end. Port 0: any that is free. Each link works
    once; `on_link` is told the next.

    Raises `MachineError` where the port is taken.
    """
    entrance = Entrance(on_link)
    try:
        server = _Server((HERE, port), _handler(LivePage(run), entrance))
    except OSError as e:
        raise MachineError(
            8, f"{HERE}:{port}", f"cannot be used: {e.strerror}.", "Give another --port, or none."
        ) from e
    entrance.port = server.server_port
    with server:
        yield entrance.link, lambda: server.serve_forever(poll_interval=0.1)
