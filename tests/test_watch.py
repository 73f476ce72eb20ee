"""`educe watch`: who may read the page, what it says before, while and after a run, and that a browser sees it grow."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import stat
import struct
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
from educe.recipes.live import leads_to
from educe.report import live
from educe.report.entrance import HERE, refusal
from educe.report.live import served
from hypothesis import given, settings
from hypothesis import strategies as st

from run_directory import Page, make_run, metric_records, write_file


@contextlib.contextmanager
def watching(run: Path) -> Iterator[tuple[int, str, list[str]]]:
    """Port and path of a run's page, served by a thread, and its links so far: the last one works."""
    links: list[str] = []
    with served(run, 0, lambda link: links.append(urlsplit(link).query)) as (link, serve):
        threading.Thread(target=serve, daemon=True).start()
        url = urlsplit(link)
        links.insert(0, url.query)
        yield int(url.port or 0), url.path, links


def ask(port: int, path: str = "/", method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
    made = http.client.HTTPConnection(HERE, port, timeout=10)
    given = {k.replace("_", "-"): v for k, v in headers.items()}
    made.request(method, path, headers={"Host": f"{HERE}:{port}", **given})
    found = made.getresponse()
    body = found.read().decode()
    made.close()
    return found.status, dict(found.getheaders()), body


def enter(port: int, path: str, links: list[str]) -> str:
    status, headers, _ = ask(port, f"{path}?{links[-1]}")
    assert (status, headers["Location"]) == (303, path)
    assert "HttpOnly" in headers["Set-Cookie"]
    assert headers["Set-Cookie"].endswith(f"; Path={path}")
    return headers["Set-Cookie"].split(";")[0]


def test_the_page_of_a_chain_follows_it_from_stage_to_stage(tmp_path: Path) -> None:
    chain = tmp_path / "chain"
    chain.mkdir()
    with watching(chain) as (port, page, links):
        cookie = enter(port, page, links)

        def shows(text: str) -> None:
            deadline = time.monotonic() + 10
            while text not in ask(port, page, Cookie=cookie)[2]:
                assert time.monotonic() < deadline, text
                time.sleep(0.05)

        assert "Waiting for the run to begin" in ask(port, page, Cookie=cookie)[2]
        (chain / "stages.resolved.json").write_text("[]")
        shows("stages.resolved.json is damaged")
        held = {"stages": {"tune": "1-tune", "prefer": "2-prefer"}}
        (chain / "stages.resolved.json").write_text(json.dumps(held))
        for k, name in enumerate(held["stages"], 1):
            run = make_run(chain / f"{k}-{name}")
            when = 1_800_000_000 + k
            for file in run.path.iterdir():
                os.utime(file, (when, when))
            shows(f"Stage {k} of 2: {name}. Live; as of")
        whole = (chain / "stages.resolved.json").read_text()  # damaged and mended while the stage stays the same
        (chain / "stages.resolved.json").write_text("{")
        shows("stages.resolved.json is damaged")
        (chain / "stages.resolved.json").write_text(whole)
        shows("Stage 2 of 2: prefer. Live; as of")


def test_the_link_becomes_a_cookie_and_shows_the_page(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    with watching(tmp_path / "run") as (port, page, links):
        cookie = enter(port, page, links)
        assert len(links[0]) >= len("token=") + 32
        assert len(page) > 16
        status, headers, html = ask(port, page, Cookie=cookie)
        assert status == 200
        assert "orders-135m" in Page(html).text
        assert "Live; as of" in Page(html).text
        assert not any(secret in html for secret in (*(x.removeprefix("token=") for x in links), cookie[6:]))
        assert "connect-src 'self'" in html
        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Frame-Options"] == "DENY"
        assert ask(port, page, Cookie=cookie, If_None_Match=headers["ETag"])[0] == 304
        for path in ("/recipe.yaml", "/../run/recipe.yaml", "//etc/passwd", "/report.html", "/", f"{page}x"):
            assert ask(port, path, Cookie=cookie)[0] == 404
        for method in ("POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"):
            assert ask(port, page, method, Cookie=cookie)[0] == 405
            assert ask(port, page, method)[0] == 403
            assert ask(port, f"{page}?{links[-1]}", method)[0] == 403  # and the link is as good as before
            assert ask(port, page, method, Cookie=cookie, Host="evil.test")[0] == 403
            assert ask(port, page, method, Cookie=cookie, Origin="http://evil.test")[0] == 403
        assert len(links) == 2


def test_a_link_works_once_and_the_next_one_is_told(tmp_path: Path) -> None:
    with watching(tmp_path / "run") as (port, page, links):
        cookie = enter(port, page, links)
        assert len(links) == 2
        status, headers, body = ask(port, f"{page}?{links[0]}")  # who read the first one somewhere
        assert (status, "Set-Cookie" in headers) == (403, False)
        assert "newest" in body
        status, headers, _ = ask(port, f"{page}?{links[0]}", Cookie=cookie)  # a browser that asks ahead, then again
        assert (status, headers["Location"], "Set-Cookie" in headers) == (303, page, False)
        assert links[1] not in cookie
        assert ask(port, page, Cookie=cookie.replace(cookie[6:], links[0][6:]))[0] == 403
        second = enter(port, page, links)
        assert ask(port, page, Cookie=second)[0] == ask(port, page, Cookie=cookie)[0] == 200
        assert len(set(links)) == 3


@pytest.mark.skipif(os.name == "nt", reason="modes of files")
def test_a_browser_is_opened_without_the_link_on_its_command_line() -> None:
    link = "http://127.0.0.1:7/p/?token=t&x"
    with leads_to(link) as page:
        assert "token" not in page.as_uri()
        assert stat.S_IMODE(page.stat().st_mode) == 0o600
        assert stat.S_IMODE(page.parent.stat().st_mode) == 0o700
        assert unescape(page.read_text()).count(link) == 1
    assert not page.parent.exists()


def test_strangers_get_403(tmp_path: Path) -> None:
    with watching(tmp_path / "run") as (port, page, links):
        cookie = enter(port, page, links)
        for path in ("/", page, f"{page}?token=wrong", f"/?{links[-1]}", f"{page}?token=%ff%00"):
            assert ask(port, path)[0] == 403, path
        assert ask(port, page, Cookie=cookie[:-1])[0] == 403
        assert ask(port, page, Cookie="educe=x; \x01=;;")[0] == 403
        for host in (
            "evil.test",
            f"evil.test:{port}",
            HERE,
            f"127.0.0.1.nip.io:{port}",
            "",
            f"[::1]:{port}",
            f"0.0.0.0:{port}",
        ):
            status, headers, body = ask(port, page, Cookie=cookie, Host=host)
            assert status == 403, host
            assert "Set-Cookie" not in headers
            assert links[-1] not in body
        assert ask(port, f"{page}?{links[-1]}", Host="evil.test")[0] == 403
        for origin in ("http://evil.test", "null", f"https://{HERE}:{port}", f"http://{HERE}:{port + 1}", "file://"):
            assert ask(port, page, Cookie=cookie, Origin=origin)[0] == 403, origin
        assert ask(port, page, Cookie=cookie, Origin=f"http://{HERE}:{port}")[0] == 200
        assert ask(port, page, Cookie=cookie, Host=f"localhost:{port}")[0] == 200
        assert len(links) == 2


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.text(), st.text())
def test_only_the_right_two_pass(host: str, origin: str) -> None:
    right = host in ("127.0.0.1:7", "localhost:7") and origin in ("", f"http://{host}")
    assert (refusal(host, origin, 7) == "") == right
    assert refusal("localhost:7", "http://127.0.0.1:7", 7) == ""


@pytest.mark.parametrize(
    "line", [b"GET http://[ HTTP/1.1", b"GET //[?token=% HTTP/1.1", b"GET \xff\xfe HTTP/1.1", b"\x00 \x00"]
)
def test_nonsense_and_clients_that_go_away_print_nothing(
    tmp_path: Path, line: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    with watching(tmp_path / "run") as (port, page, links):
        with socket.create_connection((HERE, port), timeout=10) as client:
            client.sendall(line + f"\r\nHost: {HERE}:{port}\r\nConnection: close\r\n\r\n".encode())
            assert re.match(rb"HTTP/1.1 40[03] |<!DOCTYPE HTML", client.recv(1000))
        with socket.create_connection((HERE, port), timeout=10) as client:  # reset in the middle of a request
            client.sendall(b"GET / HT")
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert ask(port, page, Cookie=enter(port, page, links))[0] == 200
    assert capfd.readouterr().err == ""


def test_it_waits_for_a_run_and_follows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "SHARE", 0)
    place = tmp_path / "later"
    with watching(place) as (port, page, links):
        cookie = enter(port, page, links)
        assert "Waiting: the run has not begun." in Page(ask(port, page, Cookie=cookie)[2]).text
        run = make_run(place)
        run.scores.unlink()
        lines = metric_records(125)
        write_file(run.metrics, lines[:40])
        run.provenance.unlink()
        first = Page(ask(port, page, Cookie=cookie)[2]).text
        assert re.search(r"Step \d+: training loss 0\.\d+", first)
        with run.metrics.open("a") as f:
            f.write(json.dumps(lines[40]) + "\n" + json.dumps(lines[41])[:20])  # half a line is not written yet
        assert Page(ask(port, page, Cookie=cookie)[2]).text != first


def test_a_taken_port_is_taught(tmp_path: Path) -> None:
    with watching(tmp_path) as (port, *_), pytest.raises(MachineError, match="E-SYS-008"), served(tmp_path, port):
        pass


def test_ctrl_c_ends_it_with_130(tmp_path: Path) -> None:
    code = "import sys; from educe.cli.main import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "watch", str(tmp_path / "none yet")]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})
    assert running.stdout is not None
    try:
        link = re.search(r"http://127\.0\.0\.1:(\d+)/[\w-]+/\?token=\S+", running.stdout.readline())
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
        if 5 <= len(asked) <= 8:
            raise ConnectionResetError  # unanswered, also when Chromium asks once more by itself
        return made(self)

    monkeypatch.setattr(live.LivePage, "get", get)
    with watching(run.path) as (port, page, links):
        dom = browse(
            find_chromium(),
            tmp_path,
            "--virtual-time-budget=20000",
            "--dump-dom",
            f"http://{HERE}:{port}{page}?{links[-1]}",
        )
    text = unescape(re.sub(r"<[^>]+>", "", dom[dom.index("<main>") : dom.index("</main>")]))
    assert "Step 125: training loss" in text
    assert len(asked) >= 10
    assert "Not updating" not in text
