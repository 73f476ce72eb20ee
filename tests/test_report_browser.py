"""The report in a real browser: it fits a phone, follows light and dark, and runs nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
from html import unescape
from pathlib import Path

import pytest
from educe.report import build_report

from run_directory import make_run

pytestmark = pytest.mark.browser

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
# The probe needs a script, which the page's own policy forbids: it goes into a copy without that policy.
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
PROBE = """<script>
for (const d of document.querySelectorAll("details")) d.open = true;
const shown = [...document.querySelectorAll("svg")].filter(s => s.getBoundingClientRect().width > 0);
const sizes = shown.flatMap(s => [...s.querySelectorAll("text")].map(
  t => parseFloat(getComputedStyle(t).fontSize) * s.getBoundingClientRect().width / s.viewBox.baseVal.width));
const outside = [...document.querySelectorAll("main *")].filter(
  e => !e.closest(".scroll") && e.getBoundingClientRect().right > innerWidth + 1)
  .map(e => e.tagName + ": " + e.textContent.slice(0, 40));
const cells = r => [...r.children].slice(1, r.closest(".stack") ? 9 : 2);
const unseen = [...document.querySelectorAll("table.numbers tbody tr")].filter(
  r => cells(r).some(c => c.getBoundingClientRect().right > innerWidth)).map(r => r.textContent.slice(0, 40));
document.title = JSON.stringify({unseen, inner: innerWidth, scroll: document.documentElement.scrollWidth, charts: shown.length,
  font: Math.min(...sizes), paper: getComputedStyle(document.body).backgroundColor, outside});
parent.postMessage(document.title, "*");
</script>"""
# Headless Chromium has no window narrower than about 500 px: a frame has.
FRAME = """<!doctype html><meta name="color-scheme" content="light dark"><script>
onmessage = e => {{ document.title = e.data; }};
</script><iframe src="{name}" style="border:0;width:{width}px;height:900px"></iframe>"""


def find_chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not found:
        if os.environ.get("CI"):
            pytest.fail("no Chromium on PATH, and CI must have one")
        pytest.skip("no Chromium on PATH")
    return found


@pytest.fixture(scope="module")
def chromium() -> str:
    return find_chromium()


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_report(make_run(tmp_path_factory.mktemp("runs") / "orders"))


def browse(chromium: str, home: Path, *args: str) -> str:
    """Standard output of one headless run."""
    command = [chromium, *FLAGS, f"--user-data-dir={home / 'profile'}", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def probe(chromium: str, home: Path, html: str, width: int, dark: bool) -> dict[str, object]:
    """What the page measures of itself at `width` pixels, every <details> open."""
    copy, removed = POLICY.subn("", html)
    assert removed == 1
    (home / "page.html").write_text(copy.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    (home / "frame.html").write_text(FRAME.format(name="page.html", width=width), encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    dom = browse(chromium, home, scheme, "--window-size=1400,1000", "--virtual-time-budget=3000", "--dump-dom",
                 (home / "frame.html").as_uri())  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", dom)
    assert title, dom[:500]
    measured: dict[str, object] = json.loads(unescape(title[1]))
    return measured


@pytest.mark.parametrize(
    "width, dark", [(375, False), (375, True), (320, False), (720, False), (721, True), (961, False), (1280, False)]
)
def test_nothing_overflows_and_charts_are_legible(
    chromium: str, tmp_path: Path, html: str, width: int, dark: bool
) -> None:
    seen = probe(chromium, tmp_path, html, width, dark)
    assert seen["inner"] == width
    assert seen["scroll"] == width
    assert seen["outside"] == []
    assert seen["unseen"] == [], "rows whose first figure, or any of what was forgotten, is scrolled out of view"
    assert seen["charts"] == 4, "one drawing of each chart: scores, shifts, dev rows, loss"
    assert float(str(seen["font"])) >= 10
    assert seen["paper"] == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")


def test_hostile_text_neither_overflows_nor_runs(chromium: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    bad = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>" + "W" * 500 + "\u202e"
    for file in (run.ledger, run.samples, run.path / "answers" / "tuned.jsonl", run.resolved, run.scores):
        text = file.read_text(encoding="utf-8")
        for word in ("Good morning", "refund", "item: another value", "train.jsonl", "orders-135m", "worth"):
            text = text.replace(word, bad.replace("\\", "\\\\").replace('"', '\\"'))
        file.write_text(text, encoding="utf-8")
    html = build_report(run)
    assert "cannot be read as JSON" not in html
    assert html.count("onerror") > 20
    seen = probe(chromium, tmp_path, html, 375, False)
    assert seen["scroll"] == 375
    assert seen["outside"] == []


def test_page_with_its_own_policy_renders_and_runs_nothing(chromium: str, tmp_path: Path, html: str) -> None:
    file, picture = tmp_path / "page.html", tmp_path / "page.png"
    file.write_text(html.replace("</body>", "<script>document.title='ran'</script></body>"), encoding="utf-8")
    dom = browse(chromium, tmp_path, "--dump-dom", file.as_uri())
    assert "<title>orders-135m · educe</title>" in dom
    assert '<th scope="col"><button type="button">System</button></th>' in dom, "its own script runs"
    browse(chromium, tmp_path, "--window-size=1280,1400", f"--screenshot={picture}", file.as_uri())
    head = picture.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    assert struct.unpack(">II", head[16:24]) == (1280, 1400)
    assert picture.stat().st_size > 40_000, "a blank page is smaller"
