"""`educe serve`: the right program, on this machine alone, healthy before it is announced, ended with us."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import educe  # noqa: E402
from educe.errors import MachineError, RunError, UsageError  # noqa: E402
from educe.recipes import serve as served  # noqa: E402
from educe.recipes.run import Run, quiet  # noqa: E402
from educe.recipes.serve import Served, how_to_ask, transformers_command, vllm_command  # noqa: E402

from small_runs import Dying, recipe, small_place  # noqa: E402
from test_export import command  # noqa: E402

SETTINGS = {"enable_thinking": False, "say": 'it\'s "so"'}
ONE = Served(directory=Path("/a b/$(x)"), name="orders", port=8123, settings=SETTINGS)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Path]:
    with small_place(tmp_path_factory, tiny_model) as made:
        yield made


@pytest.fixture(scope="module")
def run(place: Path) -> Run:
    return educe.train(recipe(place, "orders", epochs=6))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


# What is started


@pytest.mark.parametrize("make", [vllm_command, transformers_command])
@pytest.mark.parametrize("together", [1, 2])
def test_a_server_listens_here_alone_and_is_given_what_training_saw(make: Any, together: int) -> None:
    words = make(ONE, together)
    assert words[0] == sys.executable
    assert words[words.index("--host") + 1] == "127.0.0.1"
    assert words[words.index("--port") + 1] == "8123"
    assert "/a b/$(x)" in words  # one argument: no shell reads it
    (given,) = (words[k + 1] for k, w in enumerate(words) if w.endswith("chat-template-kwargs"))
    assert json.loads(given) == SETTINGS
    plain = Served(directory=ONE.directory, name=ONE.name, port=1, settings={})
    assert not any("kwargs" in w for w in make(plain, together))


def test_two_servers_share_a_gpu() -> None:
    words = vllm_command(ONE, 2)
    assert words[words.index("--gpu-memory-utilization") + 1] == "0.45"
    assert words[words.index("--served-model-name") + 1] == "orders"
    assert "--gpu-memory-utilization" not in vllm_command(ONE, 1)


def test_options_are_those_of_transformers_own_server() -> None:
    """Its source names each of them: an option that is gone would end the server before it begins."""
    from transformers.cli import serve as theirs

    source = Path(str(theirs.__file__)).read_text(encoding="utf-8")
    for word in (w for w in transformers_command(ONE, 1) if w.startswith("--")):
        assert re.search(rf"\b{word[2:].replace('-', '_')}: Annotated", source), word


def test_what_to_ask_is_a_command_that_a_shell_reads_so() -> None:
    line, settings = how_to_ask(ONE)
    words = shlex.split(line.removeprefix("ask it: "))
    assert words[:2] == ["curl", "http://127.0.0.1:8123/v1/chat/completions"]
    assert json.loads(words[-1])["model"] == "orders"
    assert json.dumps(SETTINGS) in settings


# What cannot be served


def test_without_a_server_it_is_said_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    hidden = {"vllm", *served.TRANSFORMERS_NEEDS}
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name in hidden else found(name, *a))
    with pytest.raises(MachineError, match=r"E-SYS-001 serve .*pip install vllm .*pip install fastapi uvicorn openai"):
        run.serve()


def test_an_unfinished_run_and_other_places_are_refused(place: Path, run: Run, tmp_path: Path) -> None:
    with pytest.raises(MemoryError):
        educe.train(recipe(place, "half", epochs=6), screen=Dying(step=3))
    with pytest.raises(RunError, match=r"E-RUN-002 .*not trained to its end"):
        served.serve(place / "runs" / "half", quiet)
    for other in (tmp_path, tmp_path / "absent", place / "tiny"):
        with pytest.raises(RunError, match=r"E-RUN-001 .*neither a run nor a directory"):
            served.serve(other, quiet)
    out = run.export(tmp_path / "out")
    with pytest.raises(UsageError, match="--with base an exported directory does not hold"):
        served.serve(out, quiet, base=True)
    (out / "config.json").write_text("{}")
    with pytest.raises(RunError, match=r"neither a run .*config\.json"):
        served.serve(out, quiet)
    with pytest.raises(RunError, match=r"E-RUN-001 .*is an export as gguf-f16, which other servers read"):
        served.serve(run.export(tmp_path / "file", form="gguf-f16"), quiet)


def test_exports_that_were_not_served_lately_are_removed(tmp_path: Path) -> None:
    """The four served last stay, however old; what was served within a day too."""
    said: list[str] = []
    now = time.time()
    for k, age in enumerate((0, 10, 20, *(90_000 + k for k in range(4)))):
        (tmp_path / f"k{k}" / "name").mkdir(parents=True)
        (tmp_path / f"k{k}" / "name" / "w").write_bytes(bytes(1000))
        os.utime(tmp_path / f"k{k}", (now - age, now - age))
    served._make_room(tmp_path, said.append)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["k0", "k1", "k2", "k3"]
    assert said == [f"removed 3 exports from {tmp_path}, 3.0 kB: not served for a day, and not among the last 4"]
    for k in range(4, 9):
        (tmp_path / f"k{k}").mkdir()
    served._make_room(tmp_path, said.append)
    assert len(list(tmp_path.iterdir())) == 8  # k3 alone was old


def test_what_is_served_for_days_is_marked_as_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDUCE_CACHE", str(tmp_path / "cache"))
    exports = [served.cache_dir() / "served" / f"k{k}" for k in range(6)]
    for k, export in enumerate(exports):
        (export / "name").mkdir(parents=True)
        os.utime(export, (1e9 - k, 1e9 - k))
    other = tmp_path / "own" / "name"
    other.mkdir(parents=True)
    os.utime(other.parent, (1e9, 1e9))
    for directory in (exports[5] / "name", other):
        served._mark_used([served.Served(directory=directory, name="n", port=1, settings={})])
    assert other.parent.stat().st_mtime == 1e9
    served._make_room(served.cache_dir() / "served", quiet)
    assert sorted(p.name for p in (served.cache_dir() / "served").iterdir()) == ["k0", "k1", "k2", "k5"]


def test_a_port_that_is_taken_is_said(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "find_server", lambda: ("vllm", vllm_command))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"E-CLI-101 --port {port} cannot be listened on"):
            run.serve(port=port)
        with pytest.raises(UsageError, match=f"--port {port} cannot"):
            run.serve(port=port - 1, base=True)  # the base model would have it


# Processes: any server that answers /health


SERVER = """
import http.server, json, os, signal, sys
port = int(sys.argv[sys.argv.index("--port") + 1])
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
        self.wfile.write(json.dumps(dict(os.environ)).encode())
    def log_message(self, *a): pass
def end(*_):
    raise SystemExit(7)
signal.signal(signal.SIGINT, end)
http.server.HTTPServer(("127.0.0.1", port), Health).serve_forever()
"""
FAILS = "raise SystemExit(3)"


def starts(code: str) -> Any:
    return lambda: ("stub", lambda s, together: [sys.executable, "-c", code, "--port", str(s.port)])


def test_a_server_that_ends_at_once_ends_us_with_its_code(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of a run, exported once, and of a directory that was exported before."""
    monkeypatch.setattr(served, "find_server", starts(FAILS))
    said: list[str] = []
    assert run.serve(port=free_port(), say=said.append) == 3
    assert run.serve(port=free_port(), say=said.append) == 3
    assert sum("was exported before" in line for line in said) >= 1
    assert served.serve(run.export(tmp_path / "out"), said.append, port=free_port()) == 3
    assert any("ended before it was ready (exit code 3)" in line for line in said)


@pytest.mark.parametrize("ready", [True, False])
def test_ctrl_c_reaches_the_servers_and_their_code_is_ours(
    run: Run, monkeypatch: pytest.MonkeyPatch, ready: bool
) -> None:
    """Once they serve; before that it ends us as it ends any command. Nothing goes on listening, no token gets there."""
    monkeypatch.setattr(served, "find_server", starts(SERVER))
    monkeypatch.setenv("HF_TOKEN", "hf_" + "k" * 34)
    port, seen = free_port(), {}

    def say(line: str) -> None:
        if line.startswith("tuned: "):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
                seen.update(json.load(answer))
            if not ready:
                signal.raise_signal(signal.SIGINT)
        if line == "Ctrl-C ends it":
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()

    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if ready:
            assert run.serve(port=port, base=True, say=say) == 7
        else:
            with pytest.raises(KeyboardInterrupt):
                run.serve(port=port, say=say)
    finally:
        signal.signal(signal.SIGINT, old)
    assert seen["HF_HUB_OFFLINE"] == "1"
    assert "HF_TOKEN" not in seen
    for k in range(2):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port + k)) != 0


def test_the_second_server_starts_when_the_first_is_healthy(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def command_of(s: Served, together: int) -> list[str]:
        seen.append(served._healthy(Served(directory=s.directory, name=s.name, port=port, settings={})))
        return [sys.executable, "-c", SERVER if not seen[-1] else FAILS, "--port", str(s.port)]

    monkeypatch.setattr(served, "find_server", lambda: ("stub", command_of))
    port = free_port()
    assert run.serve(port=port, base=True) == 3
    assert seen == [False, True]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="signals")
def test_a_terminal_that_is_closed_ends_the_servers(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "find_server", starts(SERVER))
    monkeypatch.setattr(served, "_watched", lambda *_: signal.raise_signal(signal.SIGHUP))
    port = free_port()
    old = signal.signal(signal.SIGHUP, signal.default_int_handler)  # without ours, this ends the block too, as Ctrl-C
    try:
        code, _ = command("serve", run.path, "--port", port)
    finally:
        signal.signal(signal.SIGHUP, old)
    assert code == 128 + signal.SIGHUP
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.slow
def test_runs_share_a_base_and_two_at_once_export_it_once(
    place: Path, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is exported for a server is no export that the run keeps a proof of."""
    other = educe.train(recipe(place, "others", epochs=2))
    before = run.dir.preflight.read_bytes()
    monkeypatch.setattr(served, "cache_dir", lambda: tmp_path / "cache")
    said: list[str] = []
    made: list[list[Served]] = []

    def first(of: Run) -> None:
        made.append(served._from_run(of.dir, served.final_weights(of.dir, quiet), 8000, True, said.append))

    beside = threading.Thread(target=first, args=(run,))
    written, begun = served.export, []

    def slowly(*args: Any, **kwargs: Any) -> Path:
        """As another `serve` of the run comes to where this one is."""
        begun.append(args[1])
        if len(begun) == 1:
            beside.start()
            until = time.monotonic() + 5
            while not any("waiting for it" in line for line in said) and time.monotonic() < until:
                time.sleep(0.02)
        return written(*args, **kwargs)

    monkeypatch.setattr(served, "export", slowly)
    first(run)
    beside.join()
    first(other)
    assert len(begun) == len(set(begun)) == 3  # two tuned models and a base
    assert [len({m[k].directory for m in made}) for k in range(2)] == [2, 1]
    assert {m[1].name for m in made} == {"orders-base", "others-base"}
    assert run.dir.preflight.read_bytes() == before


# transformers' own server


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(m) is None for m in served.TRANSFORMERS_NEEDS),
    reason=f"transformers' server needs {', '.join(served.TRANSFORMERS_NEEDS)}",
)
@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_base_and_tuned_side_by_side(run: Run) -> None:
    port = free_port()
    words = [sys.executable, "-m", "educe", "serve", str(run.path), "--port", str(port), "--with", "base"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, restore_signals=True)
    lines, until = [], time.monotonic() + 300
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if "Ctrl-C ends it" in line or time.monotonic() > until:
            break
    names = [re.search(r"\((?:model) '(.*)'\)", x)[1] for x in lines if "/v1 (model" in x]  # type: ignore[index]
    answers = []
    for k, name in enumerate(names):
        body = {
            "model": name,
            "messages": [{"role": "user", "content": "order 1003 the user said"}],
            "max_tokens": 8,
            "temperature": 0,
        }
        request = urllib.request.Request(
            f"http://127.0.0.1:{port + k}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            answers.append(json.load(answer)["choices"][0]["message"]["content"])
    process.send_signal(signal.SIGINT)
    process.wait(60)
    assert len(set(answers)) == 2
    assert answers[0].startswith('{"')
    for k in range(2):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port + k)) != 0


def test_the_verb_parses(place: Path) -> None:
    code, said = command("serve", "--port", "70000")
    assert code == 2
    assert "70000" in said
