"""The pages in a real browser, deeper: forty attacks in one sitting, accessibility by axe-core, keyboard, sorting, speed, print."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import threading
from collections.abc import Callable
from html import unescape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from educe.report import build_report
from educe.report.compare import build_comparison

from conftest import some
from report_payloads import PAYLOADS, poisoned
from run_directory import make_run
from test_report_browser import POLICY, browse, find_chromium

pytestmark = pytest.mark.browser

# Runs in the copy of a page whose policy is taken out, so that whatever lives may live.
COUNT = """<script>
const nodes = [...document.querySelectorAll("*")], kinds = {};
for (const n of nodes) kinds[n.localName] = (kinds[n.localName] ?? 0) + 1;
const live = nodes.filter((n) => [...n.attributes].some((a) => a.name.startsWith("on") || a.name === "srcdoc"
  || (["href", "src", "action", "data", "xlink:href"].includes(a.name) && !a.value.startsWith("#"))));
for (const kind of ["span", "ins", "del"]) delete kinds[kind];
parent.postMessage(JSON.stringify({ page: PAGE, kinds, live: live.map((n) => n.outerHTML.slice(0, 80)), owned: window.owned }), "*");
</script>"""
ALARM = "<script>window.owned = []; window.alert = (x) => window.owned.push(x); window.print = window.alert;</script>"
COLLECT = """<!doctype html><title>none</title><script>
const found = [];
onmessage = (e) => {{ found.push(e.data); if (found.length === {n}) document.title = JSON.stringify(found); }};
</script>"""


def told(dom: str) -> Any:
    title = re.search(r"<title>(.*?)</title>", dom, flags=re.S)
    assert title, dom[:300]
    return json.loads(unescape(title[1]))


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["run", "comparison"])
def test_forty_attacks_on_every_field_leave_no_live_node(tmp_path: Path, form: str, every: int) -> None:
    """Texts, and everything, of every file: each a frame of one page; node counts equal those of harmless words."""

    def page(word: str, how: str, name: str) -> str:
        run = poisoned(tmp_path / name, word, how)
        return (
            build_report(run) if form == "run" else build_comparison([run, poisoned(tmp_path / f"{name}-b", word, how)])
        )

    hows = ("texts", "everything") if form == "run" else ("texts",)
    words = [(w, how) for how in hows for w in ("plain words", *PAYLOADS[::every])]
    frames = []
    for k, (word, how) in enumerate(words):
        html, gone = POLICY.subn(lambda _: ALARM, page(word, how, f"p{k}"))
        assert gone == 1
        counted = COUNT.replace("PAGE", str(k))
        (tmp_path / f"{k}.html").write_text(html.replace("</body>", f"{counted}</body>"), encoding="utf-8")
        frames.append(f'<iframe src="{k}.html" width="600" height="300"></iframe>')
    (tmp_path / "all.html").write_text(COLLECT.format(n=len(words)) + "".join(frames), encoding="utf-8")
    dom = browse(
        find_chromium(), tmp_path, "--virtual-time-budget=120000", "--dump-dom", (tmp_path / "all.html").as_uri()
    )
    found = {(x := json.loads(line))["page"]: x for line in told(dom)}
    assert len(found) == len(words)
    for k, (word, how) in enumerate(words):
        harmless = found[words.index(("plain words", how))]
        assert found[k]["live"] == [], word
        assert found[k]["owned"] == [], word
        assert found[k]["kinds"] == harmless["kinds"], word


def axe_source() -> str:
    """axe.min.js of a file that EDUCE_AXE names, or of the package axe-core-python."""
    if given := os.environ.get("EDUCE_AXE"):
        return Path(given).read_text(encoding="utf-8")
    spec = importlib.util.find_spec("axe_core_python")
    if spec is None or spec.origin is None:
        pytest.skip("axe-core-python is not installed (educe[dev])")
    return (Path(spec.origin).parent / "axe.min.js").read_text(encoding="utf-8")


AXE = """<script>
addEventListener("load", async () => {
  for (const d of document.querySelectorAll("details")) d.open = true;
  const r = await axe.run(document, { resultTypes: ["violations"] });
  const said = r.violations.map((v) => [v.id, v.impact, v.nodes.length, v.nodes.slice(0, 3).map((n) => n.html.slice(0, 120))]);
  parent.postMessage(JSON.stringify({ rules: r.passes.length, said, width: innerWidth }), "*");
});
</script>"""
FRAME = """<!doctype html><meta name="color-scheme" content="light dark"><title>none</title><script>
onmessage = e => {{ document.title = e.data; }};
</script><iframe src="page.html" style="border:0;width:{width}px;height:900px"></iframe>"""


def seen(home: Path, html: str, script: str, *, width: int = 1280, dark: bool = False) -> Any:
    """What a script says that is put at the end of a copy of the page without its policy."""
    (home / "page.html").write_text(POLICY.sub("", html).replace("</body>", f"{script}</body>"), encoding="utf-8")
    (home / "frame.html").write_text(FRAME.format(width=width), encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    at = (home / "frame.html").as_uri()
    return told(
        browse(
            find_chromium(), home, scheme, "--window-size=1400,1000", "--virtual-time-budget=60000", "--dump-dom", at
        )
    )


def run_page(place: Path) -> str:
    return build_report(make_run(place / "a"))


def live_page(place: Path) -> str:
    run = make_run(place / "a")
    run.scores.unlink()
    return build_report(run, live="Live; as of 12:00:00.")


def compared(place: Path) -> str:
    return build_comparison([make_run(place / "a"), make_run(place / "b", steps=60)])


@pytest.mark.parametrize(
    "make, dark, width", some(itertools.product([run_page, live_page, compared], [False, True], [1280, 390]), 5)
)
def test_axe_finds_nothing(tmp_path: Path, make: Callable[[Path], str], dark: bool, width: int) -> None:
    axe = axe_source().replace("</script", "<\\/script")
    found = seen(tmp_path, make(tmp_path), f"<script>{axe}</script>{AXE}", width=width, dark=dark)
    assert found["width"] == width
    assert found["said"] == []
    assert found["rules"] > 20


USE = """<script>
addEventListener("load", () => {
  const said = {}, key = (k) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key: k, bubbles: true }));
  const shown = [...document.querySelectorAll("svg.chart")].filter((s) => s.getBoundingClientRect().width > 0);
  said.charts = shown.map((svg) => {
    const stops = [...svg.querySelectorAll('[tabindex="0"]')], at = svg.closest("figure").querySelector(".readout");
    const read = () => at.textContent;
    stops[0].focus(); const first = read(); key("ArrowRight"); const second = read(); key("End"); const last = read();
    return [stops.length, first, second, last];
  });
  const table = document.querySelector('[aria-label="Scores in numbers"] table'), heads = [...table.tHead.rows[0].cells];
  const column = (k) => [...table.tBodies[0].rows].map((r) => r.cells[k].textContent);
  heads[1].querySelector("button").click(); said.up = [heads[1].getAttribute("aria-sort"), column(1)];
  heads[1].querySelector("button").click(); said.down = [heads[1].getAttribute("aria-sort"), column(1)];
  heads[6].querySelector("button").click(); said.time = column(6);
  document.title = JSON.stringify(said);
  parent.postMessage(document.title, "*");
});
</script>"""


def test_values_are_read_by_keyboard_and_tables_sort(tmp_path: Path) -> None:
    found = seen(tmp_path, run_page(tmp_path), USE)
    assert len(found["charts"]) == 4  # scores, shifts, dev rows, loss
    for stops, first, second, last in found["charts"]:
        assert stops == 1, "one stop for Tab, arrow keys from there"
        assert all((first, second, last))
        assert len({first, second, last}) == 3
    assert found["charts"][0][3].startswith("Tuned: 80.0")
    assert found["charts"][2][3] == "Step 125: 26 of 32 right, 81.2\u202f% (64.7–91.1\u202f%)"
    assert found["up"] == ["ascending", ["4", "80", "192"]]
    assert found["down"] == ["descending", ["192", "80", "4"]]
    assert found["time"] == ["16.6 s", "20.1 s", "31 s"]


# The picture holds the page's load back until the paint was told: headless Chromium ends there.
PAINT = """<script>
new PerformanceObserver((list) => {
  for (const e of list.getEntries()) if (e.name === "first-contentful-paint") fetch(`/told?${e.startTime}`);
}).observe({ type: "paint", buffered: true });
</script><img src="/wait" alt="">"""


def test_first_paint_within_a_second(tmp_path: Path) -> None:
    """Of a run of 5,000 steps and 1,000 test rows, by the real clock."""
    html = build_report(make_run(tmp_path / "big", steps=5_000, rows=1_000))
    page = POLICY.sub("", html).replace("</body>", f"{PAINT}</body>").encode()
    paints: list[float] = []
    told_it = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/told?"):
                paints.append(float(self.path.removeprefix("/told?")))
                told_it.set()
            if self.path == "/wait":
                told_it.wait(20)
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(page if self.path == "/" else b"")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browse(find_chromium(), tmp_path, "--dump-dom", f"http://127.0.0.1:{server.server_port}/")
        server.shutdown()
    print(f"first contentful paint {paints[0]:.0f} ms, page {len(html) / 1e3:.0f} kB")
    assert paints[0] <= 1_000


def test_it_prints_in_light_colours_with_all_details(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(run_page(tmp_path), encoding="utf-8")
    paper = tmp_path / "page.pdf"
    dark = "--blink-settings=preferredColorScheme=0"
    browse(
        find_chromium(),
        tmp_path,
        dark,
        f"--print-to-pdf={paper}",
        "--no-pdf-header-footer",
        (tmp_path / "page.html").as_uri(),
    )
    assert paper.read_bytes().startswith(b"%PDF")
    assert paper.stat().st_size > 30_000
