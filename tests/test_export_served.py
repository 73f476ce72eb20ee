"""An exported model behind transformers' own OpenAI-compatible server, on loopback: the prompt and the answer of the training."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import educe  # noqa: E402
from educe.chat.prompt import render_prompt  # noqa: E402
from educe.chat.tokens import load_tokenizer  # noqa: E402
from educe.model.device import Device  # noqa: E402
from educe.model.load import load_model  # noqa: E402
from educe.sample.local import LocalSampler  # noqa: E402
from educe.types import Message  # noqa: E402

from small_runs import recipe, small_place  # noqa: E402

NEEDED = ("fastapi", "uvicorn", "openai")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(m) is None for m in NEEDED),
        reason=f"transformers' server needs {', '.join(NEEDED)}",
    ),
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Path]:
    with small_place(tmp_path_factory, tiny_model) as place:
        yield educe.train(recipe(place, "served", epochs=6)).export(place / "out")


@pytest.fixture(scope="module")
def server(exported: Path) -> Iterator[str]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    words = [
        "serve",
        str(exported),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    code = "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"
    process = subprocess.Popen([sys.executable, "-c", code, *words], env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def asked(address: str, body: dict[str, Any]) -> dict[str, Any]:
    """The server's answer; it is asked again until it listens."""
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    until = time.monotonic() + 240
    while True:
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except urllib.error.HTTPError as e:
            raise AssertionError(e.read().decode()) from e
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)


def test_a_served_prompt_and_answer_are_those_of_training(exported: Path, server: str) -> None:
    tokenizer = load_tokenizer(exported)
    model = load_model(exported, Device(kind="cpu", dtype="float32", name="cpu", flops=1e9, why="a test"))
    for text in ("order 1003 the user said", "hello", " two  spaces\n"):
        ids = render_prompt((Message(role="user", content=text),), tokenizer)
        (ours,) = LocalSampler(model, tokenizer).answer([ids], 12)
        body = {
            "model": str(exported), "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 12,
            "stream": False,
        }  # fmt: skip
        theirs = asked(server, body)
        assert theirs["usage"]["prompt_tokens"] == len(ids)
        assert theirs["choices"][0]["message"]["content"] == ours.text
