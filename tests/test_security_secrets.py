"""Keys never reach what educe shows or keeps about a run, a recipe that holds one is refused, and recipes play no tricks."""

from __future__ import annotations

import base64
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from educe.config import load_recipe, parse_recipe
from educe.errors import RecipeError
from educe.secrets import find_secret, public_environment, redacted, redacted_values
from hypothesis import given, settings
from hypothesis import strategies as st

import forked
from security_job import END, write_job

# The core of each key: none of it may be found anywhere. Written in pieces, so that no scanner takes this file for a leak.
CORE = "Zq3" + "x7Kp" * 8
KEYS = {
    "Hub": "hf" + f"_{CORE}",
    "OpenAI": "sk" + f"-proj-{CORE}",
    "Anthropic": "sk" + f"-ant-api03-{CORE}",
    "AWS": "AKIA" + "ZQ3X7KPX7KPX7KPX",
    "GitHub": "gh" + f"p_{CORE}",
    "GitHub, fine": "github" + f"_pat_{CORE}",
    "Slack": "xox" + f"b-12345678-{CORE}",
    "Google": "AI" + f"za{CORE}",
    "Bearer": f"Bearer {CORE}",
    "basic auth": f"https://someone:{CORE}@example.org/x",
    "private key": f"-----BEGIN RSA PRIVATE KEY-----\n{CORE}\n{CORE}\n-----END RSA PRIVATE KEY-----",
    "JWT": "ey" + f"J{CORE}." + f"ey{CORE}.{CORE}",
}
PARTS = (CORE, "ZQ3X7KPX7KPX7KPX", base64.b64encode(CORE.encode()).decode()[:40])
PLAIN = (
    "task-learn-classification-model-v2", "sk-learn-pipeline-for-classification", "ssh://git@github.com/a/b",
    "hf://datasets/ORG/NAME@main/x.jsonl", "the bearer responsibilities-of-the-office", "HuggingFaceTB/SmolLM2-135M-Instruct",
    "https://huggingface.co/a/b", "meta-llama/Llama-3.2-1B", "1e-5", "hf_hub_download", "eyJ", "a1" * 32, "xoxo-hugs",
    "/home/ann/keys/id_rsa", "http://localhost:8000/v1", "ghp_short", "AKIA", "file: ../a:b@c", "C:\\a\\b",
)  # fmt: skip


def leaks(text: str) -> list[str]:
    return [part for part in PARTS if part in text]


@pytest.mark.parametrize("kind", KEYS)
def test_each_form_is_found_and_hidden(kind: str) -> None:
    for text in (KEYS[kind], f"before {KEYS[kind]} after", f'{{"a": "{KEYS[kind]}"}}', f"x={KEYS[kind]}\ny"):
        assert find_secret(text) is not None
        assert not leaks(redacted(text))
        assert not leaks(str(redacted_values({"a": [text, {text: 1}], "b": 1})))
        assert redacted(redacted(text)) == redacted(text)


@pytest.mark.parametrize("text", PLAIN)
def test_ordinary_words_stay(text: str) -> None:
    assert (find_secret(text), redacted(text)) == (None, text)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([*KEYS.values(), *PLAIN]), max_size=5), st.sampled_from(["\n", " ", "\t", '", "', " | "])
)
def test_whatever_stands_around_a_key_it_is_hidden(words: list[str], between: str) -> None:
    assert not leaks(redacted(between.join(words)))


def test_values_of_the_environment_are_hidden_in_any_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPANY_API_KEY", "a form that nobody knows")
    monkeypatch.setenv("KEY_FILE_TOKEN", "/run/secrets/token")  # where it lies, no key
    monkeypatch.setenv("SHORT_TOKEN", "true")
    assert redacted("it said: a form that nobody knows.") == "it said: ***(value of COMPANY_API_KEY)."
    assert redacted("true /run/secrets/token") == "true /run/secrets/token"
    assert "COMPANY_API_KEY" not in public_environment()


# --- recipes -------------------------------------------------------------------------------------------------------------

RECIPE = "name: t\nmodel: m\n{}data: {{train: rows.jsonl}}\n"


@pytest.mark.parametrize("kind", KEYS)
def test_a_recipe_that_holds_a_secret_is_refused_by_place_and_kind(kind: str) -> None:
    """Refused, not hidden: the file itself stays, is shared and versioned; the message does not repeat it."""
    comment = "".join(f"# {line}\n" for line in KEYS[kind].split("\n"))
    for text in (RECIPE.format(comment), RECIPE.format("").replace("model: m", f"model: '{KEYS[kind]}'")):
        with pytest.raises(RecipeError, match="E-RECIPE-105") as refused:
            parse_recipe(text, "recipe.yaml")
        assert refused.value.where.startswith(("recipe.yaml:3:", "recipe.yaml:2:"))
        assert not leaks(str(refused.value))


def test_nothing_of_the_environment_enters_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDUCE_TEST_X", "secret")
    for text in ("$EDUCE_TEST_X", "${EDUCE_TEST_X}", "{{ EDUCE_TEST_X }}", "%EDUCE_TEST_X%"):
        recipe = parse_recipe(RECIPE.format("").replace("model: m", f"model: '{text}'"), "recipe.yaml")
        assert recipe.model == text


TRICKS = {
    "a huge text": "device: " + "x" * 999_000 + "\n",
    "a huge name of a path": "template: {kind: file, file: " + "x" * 99_000 + "}\n",
    "larger than a recipe": "# " + "x" * 1_000_001 + "\n",
    "many keys": "".join(f"k{i}: 1\n" for i in range(50_000)),
    "many lists": "x: " + "[" * 19 + "]" * 19 + "\n",
    "deep blocks": "".join("  " * i + "a:\n" for i in range(300)),
    "deep mappings": "x: " + "{a: " * 5000 + "\n",
    "NUL": "runs: a\0b\n",
    "NUL, escaped": 'runs: "a\\0b"\n',
    "anchors": "x: &a [1]\ny: *a\n",
    "an anchor of itself": "x: &a [*a]\n",
    "an alias of nothing": "x: *a\n",
    "a merge": "x:\n  <<: {a: 1}\n",
    "a tag": "x: !!python/name:os.system\n",
    "a new object": "x: !!python/object/new:os.system [id]\n",
    "a module": "x: !!python/module:os\n",
    "binary": "x: !!binary aWQ=\n",
    "a local tag": "x: !include /etc/passwd\n",
    "two documents": "---\nx: 1\n---\ny: 2\n",
    "a twin": "name: other\n",
    "a directive": "%YAML 1.1\n---\nx: 1\n",
    "a huge number": f"train: {{seed: {'9' * 4000}}}\n",
    "a huge exponent": "train: {learning_rate: 1e999999999}\n",
    "octal and more": "train: {seed: 0o" + "7" * 4000 + "}\n",
    "half a character": 'runs: "\\ud800"\n',
    "bidi": "x: \u202e\n",
}


@pytest.mark.parametrize("what", TRICKS)
def test_tricks_of_a_recipe_end_in_a_message(tmp_path: Path, what: str) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(TRICKS[what]), encoding="utf-8", errors="surrogatepass")
    began = time.monotonic()
    with pytest.raises(RecipeError) as refused:
        load_recipe(tmp_path / "recipe.yaml")
    assert time.monotonic() - began < 10
    assert len(str(refused.value)) < 2000


@pytest.mark.skipif(os.name == "nt", reason="devices have no path there")
def test_a_recipe_is_read_no_further_than_a_recipe_goes() -> None:
    with pytest.raises(RecipeError, match="larger than"):
        load_recipe(Path("/dev/zero"))


# --- the verbs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub() -> Iterator[str]:
    """A Hub that answers every question with an error that repeats what it was sent."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = f"{self.path} {self.headers}".encode()
            self.send_response(500, f"refused {self.headers.get('Authorization')}")
            self.send_header("X-Error-Message", f"no: {self.headers.get('Authorization')}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://someone:{CORE}@127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def environment(place: Path, **more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    planted = {f"PLANTED_{i}": key.replace("\n", " ") for i, key in enumerate(KEYS.values())}
    more = {"HF_TOKEN": KEYS["Hub"], "WANDB_API_KEY": CORE, "EDUCE_CACHE": str(place / "cache"), **more}
    return {**kept, **planted, "HF_HOME": str(place / "hub"), "PYTHONIOENCODING": "utf-8", **more}


def kept_bytes(place: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in place.rglob("*") if p.is_file()}


def test_no_byte_of_a_key_is_shown_or_kept(tiny_model: Path, tmp_path: Path) -> None:
    """Twelve forms in the environment of a whole job: none in what it says, and none in any file it leaves."""
    pytest.importorskip("torch")
    recipe = write_job(tmp_path / "job", tiny_model)
    run = tmp_path / "job" / "runs" / "t"
    out = tmp_path / "job" / "out"
    key = tmp_path / "key.yaml"
    key.write_text(recipe.read_text() + f"# {KEYS['Google']}\n")
    verbs = (("check", recipe), ("train", recipe), ("eval", run), ("report", run), ("export", run, out), ("train", key))
    process = forked.begin(
        "security_job:verbs",
        [[list(map(str, words)) for words in verbs]],
        cwd=tmp_path,
        env=environment(tmp_path, HF_HUB_OFFLINE="1"),
    )
    out, err = process.communicate(300)
    assert (process.returncode, json.loads(out.splitlines()[-1])) == (0, [0] * 5 + [2]), out + err
    said = out + err
    key.unlink()
    files = kept_bytes(tmp_path)
    assert any(name.endswith("provenance.json") for name in files)
    for name, data in {**files, "said": said.encode()}.items():
        assert not [part for part in PARTS if part.encode() in data], name


def test_no_byte_of_a_key_is_in_a_message(tiny_model: Path, tmp_path: Path, hub: str) -> None:
    """A Hub that repeats the token, a command line and a model's address with a key in them, a defect's traceback."""
    recipe = write_job(tmp_path / "job", tiny_model)
    text = recipe.read_text()
    (tmp_path / "job" / "hub.yaml").write_text(text.replace(str(tiny_model), "some/model"))
    (tmp_path / "job" / "url.yaml").write_text(text.replace(str(tiny_model), KEYS["basic auth"]))
    (tmp_path / "job" / "key.yaml").write_text(text + f"# {KEYS['Google']}\n")
    (tmp_path / "job" / "data.yaml").write_text(text.replace("rows.jsonl", "hf://datasets/some/rows"))
    tried = (
        (("check", "job/hub.yaml"), "E-MODEL-001"),
        (("check", "job/data.yaml"), "E-DATA-010"),
        (("check", "job/url.yaml"), "E-RECIPE-105"),
        (("check", "job/key.yaml"), "E-RECIPE-105"),
        (("check", "job/recipe.yaml", f"--token={KEYS['GitHub']}"), "No such option"),
        (("check", f"job/{KEYS['GitHub']}.yaml"), "E-RECIPE-001"),
        (("init", "--data", "job/rows.jsonl", "--model", KEYS["basic auth"]), "E-MODEL-001"),
        (("init", "--data", f"hf://datasets/a/{KEYS['Hub']}", "--model", str(tiny_model)), "E-DATA-010"),
    )
    script = "import sys, json; sys.path.insert(0, sys.argv[1]); from security_job import verbs; verbs(json.loads(sys.argv[2]))"
    command = [sys.executable, "-c", script, str(Path(__file__).parent), json.dumps([words for words, _ in tried])]
    given = environment(tmp_path, HF_ENDPOINT=hub)  # the Hub's address is read when its client is imported
    done = subprocess.run(command, cwd=tmp_path, env=given, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, leaks(done.stdout + done.stderr)) == (0, []), done.stderr
    *told, codes = done.stdout.split(END)
    assert json.loads(codes) == [2] * len(tried), done.stdout
    for (words, code), message in zip(tried, told, strict=True):
        assert code in message, (words, message)
    assert not (tmp_path / "job" / "runs").exists()
    defect = "from educe.cli.telling import hide_in_tracebacks\nhide_in_tracebacks()\nimport os\n"
    defect += "raise RuntimeError('asked with ' + os.environ['HF_TOKEN'])"
    done = subprocess.run(
        [sys.executable, "-c", defect], env=environment(tmp_path), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "RuntimeError: asked with ***" in done.stderr
    assert not leaks(done.stderr)
