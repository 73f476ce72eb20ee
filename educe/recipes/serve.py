"""`educe serve`: the tuned model behind an OpenAI-compatible server that is installed here, on this machine alone.

The server is another program (vLLM, else transformers' own): educe writes the model for it, starts it with the settings of
training, waits until it answers, and ends with it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from educe.errors import MachineError, RunError, UsageError
from educe.files.atomic import sized, verify
from educe.files.hashes import cache_dir, hash_json
from educe.files.locks import one_at_a_time
from educe.files.run_dir import RunDir
from educe.model.blended import Blend
from educe.model.source import Say
from educe.recipes.eval import final_manifest, final_weights, recipe_of
from educe.recipes.export import export

HOST = "127.0.0.1"
# What `transformers serve` imports beyond transformers itself.
TRANSFORMERS_NEEDS = ("fastapi", "uvicorn", "openai")
_VERSION = 1  # of what lies in the cache
# There the exports that were served last stay, and those of the last day, which a server may be reading.
_KEPT, _DAY_S = 4, 86400.0
_USED_EVERY_S = 3600.0
_TOLD_EVERY_S = 30.0
_GRACE_S = 20.0
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY")


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One model on one port; `name` is what requests call it, `settings` those of its chat template."""

    directory: Path
    name: str
    port: int
    settings: Mapping[str, Any]

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.port}"


Command = Callable[[Served, int], list[str]]


def vllm_command(served: Served, together: int) -> list[str]:
    """As argument list. `together` servers share the GPU: vLLM takes nine tenths of its memory unless told."""
    words = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(served.directory)]
    words += ["--host", HOST, "--port", str(served.port), "--served-model-name", served.name]
    words += ["--gpu-memory-utilization", f"{0.9 / together:.2f}"] if together > 1 else []
    words += ["--default-chat-template-kwargs", json.dumps(dict(served.settings))] if served.settings else []
    return words


def transformers_command(served: Served, together: int) -> list[str]:
    """As argument list. The model is loaded at once and no other: else the server would load whatever a request names."""
    code = "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"
    words = [sys.executable, "-c", code, "serve", str(served.directory), "--host", HOST, "--port", str(served.port)]
    words += ["--device", _device(), "--dtype", "auto"]
    words += ["--chat-template-kwargs", json.dumps(dict(served.settings))] if served.settings else []
    return words


def find_server() -> tuple[str, Command]:
    """The server to start, the fastest that is installed. Raises `MachineError` saying what to install."""
    if importlib.util.find_spec("vllm") is not None:
        return "vllm", vllm_command
    missing = [m for m in TRANSFORMERS_NEEDS if importlib.util.find_spec(m) is None]
    if missing:
        fix = (
            "On a machine with a GPU: pip install vllm (into an environment of its own if its torch differs). "
            f"Anywhere: pip install {' '.join(missing)}, and transformers' own server is used."
        )
        raise MachineError(
            1, "serve", f"neither vllm is installed nor {', '.join(missing)} for transformers serve.", fix
        )
    return "transformers", transformers_command


def serve(place: Path, say: Say, *, port: int = 8000, base: bool = False) -> int:
    """Serve a finished run, or a directory that `educe export` wrote, until Ctrl-C; returns the server's exit code.

    With `base` the base model, prompted in the same way, is on the port after: a second process. Raises `RunError`, `UsageError`,
    `MachineError` before anything is written.
    """
    run = RunDir(place)
    weights = final_weights(run, say) if run.resolved.is_file() else None
    served = _exported(place, port, base) if weights is None else []
    kind, command = find_server()
    refuse_ports(port, port + 1 if base else port)
    if weights is not None:
        served = _from_run(run, weights, port, base, say)
    if kind == "transformers":  # requests name the directory there
        served = [
            Served(directory=s.directory, name=str(s.directory), port=s.port, settings=s.settings) for s in served
        ]
    if kind == "vllm" and base:
        say("vllm: two processes, each with 45 % of the GPU's memory")
    _let_go()
    with _servers() as processes:
        for s in served:  # one after the other: a server looks how much of the GPU is free as it begins
            processes.append(_start(command(s, len(served))))
            code = _until_healthy(s, processes, say)
            if code is not None:
                return code
        for s, role in zip(served, ("tuned", "base"), strict=False):
            say(f"{role}: {s.address}/v1 (model {s.name!r})")
        for line in how_to_ask(served[0]):
            say(line)
        say("Ctrl-C ends it")
        return _watched(processes, served)


def refuse_ports(*ports: int) -> None:
    """Raises `UsageError` where one is taken or none."""
    for port in ports:
        if not 0 < port < 65536:
            raise UsageError(101, "--port", f"{port} is no port.", "Give one from 1024 to 65534.")
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was closed a moment ago is free
            try:
                probe.bind((HOST, port))
            except OSError as e:
                found = f"{port} cannot be listened on: {(e.strerror or 'refused').lower()}."
                raise UsageError(
                    101, "--port", found, f"Choose another, such as --port {min(port + 100, 65000)}."
                ) from e


def how_to_ask(served: Served) -> list[str]:
    """A command that works, and what the template is given."""
    body = json.dumps({"model": served.name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64})
    words = ["curl", f"{served.address}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body]
    lines = [f"ask it: {shlex.join(words)}"]
    if served.settings:
        given = json.dumps(dict(served.settings))
        lines.append(
            f"its chat template is given what it was trained with, chat_template_kwargs {given}, unless a request says else"
        )
    return lines


def _from_run(run: RunDir, weights: Path, port: int, base: bool, say: Say) -> list[Served]:
    """The run's model, and the base model, as directories in the cache; written where they are not there yet."""
    recipe, provenance = recipe_of(run), run.load(run.provenance)
    like = [_VERSION, provenance["model"]["sha256"], provenance["template_sha256"], provenance["template_settings"]]
    like += [recipe.data.system, *(provenance["device"][k] for k in ("kind", "dtype"))]
    keys = {
        "tuned": hash_json([*like, "tuned", final_manifest(run, say)])[:24],
        "base": hash_json([*like, "base"])[:24],
    }
    found = []
    for k, (role, key) in enumerate(keys.items() if base else [("tuned", keys["tuned"])]):
        name = recipe.name if role == "tuned" else f"{recipe.name}-base"
        directory = cache_dir() / "served" / key / (name if role == "tuned" else "base")  # runs share a base
        waits = partial(say, f"another process exports {name} for the server: waiting for it")
        with one_at_a_time(_lock(key), waits):
            _cached(run, directory, name, say, Blend(alpha=0, weights=(weights,)) if role == "base" else None)
            os.utime(directory.parent)  # used now
        found.append(Served(directory=directory, name=name, port=port + k, settings=provenance["template_settings"]))
    _make_room(cache_dir() / "served", say)
    return found


def _make_room(place: Path, say: Say) -> None:
    """Remove exports that were not served lately. A name that says so first: what is half gone must not look damaged."""
    there = sorted((p for p in place.iterdir() if not p.name.startswith(".")), key=_used, reverse=True)
    for p in there[_KEPT:]:
        with contextlib.suppress(OSError), one_at_a_time(_lock(p.name), lambda: None):  # or it is read (Windows)
            if time.time() - _used(p) > _DAY_S:  # nobody began to serve it since
                p.rename(p.with_name(f".gone-{p.name}"))
    gone = list(place.glob(".gone-*"))
    size = sum(_size(f) for p in gone for f in p.rglob("*"))
    for p in gone:
        shutil.rmtree(p, ignore_errors=True)
    if gone:
        what = "an export" if len(gone) == 1 else f"{len(gone)} exports"
        say(f"removed {what} from {place}, {sized(size)}: not served for a day, and not among the last {_KEPT}")


def _lock(key: str) -> Path:
    return cache_dir() / "locks" / f"served--{key}"


def _used(export: Path) -> float:
    """When it was served last; now, where another process has just removed it."""
    with contextlib.suppress(OSError):
        return export.stat().st_mtime
    return time.time()


def _size(file: Path) -> int:
    with contextlib.suppress(OSError):  # another process removes it too
        return file.stat().st_size if file.is_file() else 0
    return 0


def _cached(run: RunDir, directory: Path, name: str, say: Say, blend: Blend | None) -> None:
    """Export into the cache, where that was not done before. Raises `RunError` for what is damaged there."""
    fault = verify(directory)
    if not isinstance(fault, str):
        say(f"{name} was exported before: {directory}")
        return
    if directory.exists():
        raise RunError(203, str(directory), f"is damaged: {fault}", "Delete it.")
    say(f"exporting {name} for the server to {directory}")
    directory.parent.mkdir(parents=True, exist_ok=True)
    export(run, directory, say, blend=blend, asked=False)


def _let_go() -> None:
    """Give back what an export took: the servers need it."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _exported(place: Path, port: int, base: bool) -> list[Served]:
    manifest = verify(place) if place.is_dir() else "is no directory"
    if isinstance(manifest, dict) and manifest.get("stage") == "export" and "form" in manifest:
        found = f"is an export as {manifest['form']}, which other servers read: its README.md says how."
        raise RunError(1, str(place), found, "Give the run's directory, or an export --as merged.")
    if isinstance(manifest, str) or manifest.get("stage") != "export" or not (place / "config.json").is_file():
        why = f" ({manifest})" if isinstance(manifest, str) and (place / "manifest.json").exists() else ""
        found = f"is neither a run nor a directory that `educe export --as merged` wrote{why}."
        raise RunError(1, str(place), found, "Give the run's directory: educe serve RUN")
    if base:
        found = "an exported directory does not hold the base model."
        raise UsageError(101, "--with base", found, "Give the run's directory: educe serve RUN --with base")
    settings = manifest.get("template_settings", {})
    return [Served(directory=place.resolve(), name=str(manifest.get("run", place.name)), port=port, settings=settings)]


@contextlib.contextmanager
def _servers() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that the block puts here; none outlives it."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        yield processes
    finally:
        _stop(processes)


def _start(words: list[str]) -> subprocess.Popen[bytes]:
    """In a process group of its own, so that a Ctrl-C on the terminal reaches it once, through us."""
    environment = {k: v for k, v in os.environ.items() if k not in _SECRETS}
    environment |= {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "VLLM_NO_USAGE_STATS": "1"}
    return subprocess.Popen(words, env=environment, start_new_session=os.name != "nt")


def _until_healthy(served: Served, processes: Sequence[subprocess.Popen[bytes]], say: Say) -> int | None:
    """Wait until the last one answers; the exit code of any that ended first, or None."""
    began = told = time.monotonic()
    while not _healthy(served):
        ended = next((p for p in processes if p.poll() is not None), None)
        if ended is not None:
            say(f"a server ended before it was ready (exit code {_code(ended)}); what it said is above")
            return _code(ended)
        if time.monotonic() - told > _TOLD_EVERY_S:
            told = time.monotonic()
            say(f"{served.address} is not ready after {told - began:.0f} s")
        time.sleep(0.2)
    return None


def _healthy(served: Served) -> bool:
    with contextlib.suppress(OSError, ValueError):
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy knows nothing of this machine
        with opener.open(f"{served.address}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    return False


def _watched(processes: Sequence[subprocess.Popen[bytes]], served: Sequence[Served] = ()) -> int:
    """Until one ends by itself, or Ctrl-C, which all are passed; the first one's exit code, or that of the one that ended. Of what is
    `served` it is marked now and then that it is used."""
    told = time.monotonic()
    try:
        while True:
            ended = next((p for p in processes if p.poll() is not None), None)
            if ended is not None:
                return _code(ended)
            if time.monotonic() - told > _USED_EVERY_S:
                told = time.monotonic()
                _mark_used(served)
            time.sleep(0.1)
    except KeyboardInterrupt:
        _stop(processes)
        return _code(processes[0])


def _mark_used(served: Sequence[Served]) -> None:
    for s in served:
        if s.directory.is_relative_to(cache_dir() / "served"):
            with contextlib.suppress(OSError):
                os.utime(s.directory.parent)


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ctrl-C for each that runs; what has not ended after some seconds, or by the next Ctrl-C, is killed with all it started."""
    running = [p for p in processes if p.poll() is None]
    for p in running:
        _signal(p, signal.SIGINT if os.name != "nt" else signal.SIGTERM)
    until = time.monotonic() + _GRACE_S
    try:
        for p in running:
            p.wait(max(0.1, until - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        for p in running:
            if p.poll() is None:
                _kill(p)
                p.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(OSError):
        process.send_signal(number)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        if os.name != "nt":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def _code(process: subprocess.Popen[bytes]) -> int:
    """As a shell has it: 128 + N where signal N ended it."""
    code = process.wait()
    return 128 - code if code < 0 else code


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
