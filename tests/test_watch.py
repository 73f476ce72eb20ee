"""`educe watch`: who may read the page, what it says before, while and after a run, and that a browser sees it grow."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from educe.errors import MachineError
from educe.report import live
from educe.report.live import HERE, refusal, served
from hypothesis import given, settings
from hypothesis import strategies as st

from run_directory import Page, make_run, metric_records, write_file


@contextlib.contextmanager
def watching(run: Path) -> Iterator[tuple[int, str]]:
    """Port and token of a run's page, served by a thread."""
    with served(run) as (link, serve):
        threading.Thread(target=serve, daemon=True).start()
        url = urlsplit(link)
        yield int(url.port or 0), url.query.removeprefix("token=")


def ask(port: int, path: str = "/", method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
    made = http.client.HTTPConnection(HERE, port, timeout=10)
    given = {k.replace("_", "-"): v for k, v in headers.items()}
    made.request(method, path, headers={"Host": f"{HERE}:{port}", **given})
    found = made.getresponse()
    body = found.read().decode()
    made.close()
    return found.status, dict(found.getheaders()), body


def enter(port: int, token: str) -> str:
    status, headers, _ = ask(port, f"/?token={token}")
    assert (status, headers["Location"]) == (303, "/")
    assert "HttpOnly" in headers["Set-Cookie"]
    return headers["Set-Cookie"].split(";")[0]


def test_the_link_becomes_a_cookie_and_shows_the_page(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    with watching(tmp_path / "run") as (port, token):
        cookie = enter(port, token)
        assert len(token) >= 32
        status, headers, html = ask(port, Cookie=cookie)
        assert status == 200
        assert "orders-135m" in Page(html).text
        assert "Live; as of" in Page(html).text
        assert token not in html
        assert "connect-src 'self'" in html
        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Frame-Options"] == "DENY"
        assert ask(port, Cookie=cookie, If_None_Match=headers["ETag"])[0] == 304
        for path in ("/recipe.yaml", "/../run/recipe.yaml", "//etc/passwd", "/report.html"):
            assert ask(port, path, Cookie=cookie)[0] == 404
        for method in ("POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"):
            assert ask(port, "/", method, Cookie=cookie)[0] == 405
            assert ask(port, "/", method)[0] == 403
            assert ask(port, "/", method, Cookie=cookie, Host="evil.test")[0] == 403
            assert ask(port, "/", method, Cookie=cookie, Origin="http://evil.test")[0] == 403


def test_strangers_get_403(tmp_path: Path) -> None:
    with watching(tmp_path / "run") as (port, token):
        cookie = enter(port, token)
        assert ask(port)[0] == 403
        assert ask(port, "/?token=wrong")[0] == 403
        assert ask(port, Cookie=cookie[:-1])[0] == 403
        assert ask(port, Cookie="educe-1=x; \x01=;;")[0] == 403
        for host in (
            "evil.test",
            f"evil.test:{port}",
            HERE,
            f"127.0.0.1.nip.io:{port}",
            "",
            f"[::1]:{port}",
            f"0.0.0.0:{port}",
        ):
            status, headers, body = ask(port, Cookie=cookie, Host=host)
            assert status == 403, host
            assert "Set-Cookie" not in headers
            assert token not in body
        assert ask(port, f"/?token={token}", Host="evil.test")[0] == 403
        for origin in ("http://evil.test", "null", f"https://{HERE}:{port}", f"http://{HERE}:{port + 1}", "file://"):
            assert ask(port, Cookie=cookie, Origin=origin)[0] == 403, origin
        assert ask(port, Cookie=cookie, Origin=f"http://{HERE}:{port}")[0] == 200
        assert ask(port, Cookie=cookie, Host=f"localhost:{port}")[0] == 200


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.text(), st.text(), st.text())
def test_only_the_right_three_pass(host: str, origin: str, token: str) -> None:
    right = host in ("127.0.0.1:7", "localhost:7") and origin in ("", f"http://{host}") and token == "t" * 32
    assert (
        refusal(host.encode().decode("latin-1"), origin, token.encode("utf-8", "replace").decode(), "t" * 32, 7) == ""
    ) == right
    assert refusal("localhost:7", "http://127.0.0.1:7", "t" * 32, "t" * 32, 7) == ""


def test_it_waits_for_a_run_and_follows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "SHARE", 0)
    place = tmp_path / "later"
    with watching(place) as (port, token):
        cookie = enter(port, token)
        assert "Waiting: the run has not begun." in Page(ask(port, Cookie=cookie)[2]).text
        run = make_run(place)
        run.scores.unlink()
        lines = metric_records(125)
        write_file(run.metrics, lines[:40])
        run.provenance.unlink()
        first = Page(ask(port, Cookie=cookie)[2]).text
        assert re.search(r"Step \d+: training loss 0\.\d+", first)
        with run.metrics.open("a") as f:
            f.write(json.dumps(lines[40]) + "\n" + json.dumps(lines[41])[:20])  # half a line is not written yet
        assert Page(ask(port, Cookie=cookie)[2]).text != first


def test_a_taken_port_is_taught(tmp_path: Path) -> None:
    with watching(tmp_path) as (port, _), pytest.raises(MachineError, match="E-SYS-008"), served(tmp_path, port):
        pass


def test_ctrl_c_ends_it_with_130(tmp_path: Path) -> None:
    code = "import sys; from educe.cli.main import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "watch", str(tmp_path / "none yet")]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})
    assert running.stdout is not None
    try:
        link = re.search(r"http://127\.0\.0\.1:(\d+)/\?token=\S+", running.stdout.readline())
        assert link
        assert ask(int(link[1]))[0] == 403
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=20)
    finally:
        running.kill()
    assert running.returncode == 130, (out, err)
    assert "Traceback" not in err
    assert not (tmp_path / "none yet").exists()


@pytest.mark.browser
def test_a_browser_sees_the_page_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chromium opens the link; while it looks, the run writes: what it shows at the end is what was written last."""
    from test_report_browser import browse, find_chromium

    monkeypatch.setattr(live, "SHARE", 0)
    run = make_run(tmp_path / "run")
    run.scores.unlink()
    run.provenance.unlink()
    lines = metric_records(125)
    write_file(run.metrics, lines[:12])
    asked: list[float] = []
    made = live.LivePage.get

    def get(self: live.LivePage) -> tuple[str, str]:
        asked.append(time.monotonic())
        if len(asked) == 3:  # the page as opened, and once more to begin with
            write_file(run.metrics, lines)
        return made(self)

    monkeypatch.setattr(live.LivePage, "get", get)
    with watching(run.path) as (port, token):
        dom = browse(
            find_chromium(),
            tmp_path,
            "--virtual-time-budget=20000",
            "--dump-dom",
            f"http://{HERE}:{port}/?token={token}",
        )
    text = unescape(re.sub(r"<[^>]+>", "", dom[dom.index("<main>") : dom.index("</main>")]))
    assert "Step 125: training loss" in text
    assert len(asked) >= 3
    assert "Not updating" not in text
