"""`educe export` in each form: adapters, GGUF files, shards, the Hub; what is wrong is refused before work is done."""

from __future__ import annotations

import contextlib
import io
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import educe  # noqa: E402
from educe.chat.prompt import render_prompt  # noqa: E402
from educe.chat.tokens import load_tokenizer  # noqa: E402
from educe.cli.main import main  # noqa: E402
from educe.errors import MachineError, ModelError, UsageError  # noqa: E402
from educe.files.atomic import verify  # noqa: E402
from educe.model import export as written  # noqa: E402
from educe.model.load import quiet  # noqa: E402
from educe.recipes.export import FORMS  # noqa: E402
from educe.recipes.run import Run  # noqa: E402
from educe.types import Message  # noqa: E402
from peft import PeftModel  # noqa: E402
from safetensors import safe_open  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from small_runs import recipe, small_place  # noqa: E402

SHORT: dict[str, Any] = {"epochs": 6}
PROMPTS = [
    f"order {k} the user said {w}" for k, w in zip(range(20), ["cat", "mat", "hello", "track", "item"] * 4, strict=True)
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Path]:
    with small_place(tmp_path_factory, tiny_model) as made:
        yield made


@pytest.fixture(scope="module")
def full(place: Path) -> Run:
    return educe.train(recipe(place, "full", **SHORT))


@pytest.fixture(scope="module")
def lora(place: Path) -> Run:
    path = recipe(place, "lora", **SHORT)
    # a scale of 1.6: by a power of two, what is scaled first would make no difference to the rounding
    path.write_text(path.read_text() + "tuning: {kind: lora, rank: 20, alpha: 32}\n")
    return educe.train(path)


@pytest.fixture(scope="module")
def merged(place: Path, lora: Run) -> Path:
    return lora.export(place / "merged")


@pytest.fixture(scope="module")
def adapter(place: Path, lora: Run) -> tuple[Path, list[str]]:
    said: list[str] = []
    return lora.export(place / "adapter", form="adapter", say=said.append), said


def command(*words: object) -> tuple[int, str]:
    """`educe WORDS` in this process: exit code and everything it said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), pytest.raises(SystemExit) as ended:
        main([str(w) for w in words])
    return int(ended.value.code or 0), said.getvalue()


def ids_of(text: str, place: Path) -> torch.Tensor:
    return torch.tensor([render_prompt((Message(role="user", content=text),), load_tokenizer(place))])


def greedy(network: Any, ids: torch.Tensor) -> list[int]:
    return list(network.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :].tolist())


# Adapters


def test_adapters_answer_as_the_merged_model(place: Path, merged: Path, adapter: tuple[Path, list[str]]) -> None:
    base = AutoModelForCausalLM.from_pretrained(place / "tiny", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, adapter[0]).eval()
    whole = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    for text in PROMPTS:
        ids = ids_of(text, place / "tiny")
        with torch.no_grad():
            one, two = adapted(ids).logits, whole(ids).logits
        torch.testing.assert_close(one, two, atol=2e-5, rtol=0)
        assert greedy(adapted, ids) == greedy(whole, ids)


def test_an_adapters_directory_is_what_other_tools_expect(adapter: tuple[Path, list[str]]) -> None:
    directory, said = adapter
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"  # no path of this machine
    assert set(config["target_modules"]) == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    with safe_open(directory / "adapter_model.safetensors", "pt") as stored:
        names = list(stored.keys())
        assert {str(stored.get_tensor(n).dtype) for n in names} == {"torch.float32"}
    assert len(names) == 2 * 7 * 2
    assert all(re.fullmatch(r"base_model\.model\.model\.layers\.\d\.\w+\.\w+\.lora_[AB]\.weight", n) for n in names)
    assert isinstance(verify(directory), dict)
    card = (directory / "README.md").read_text()
    assert "--max-lora-rank 32" in card  # of rank 20, beyond what vLLM makes room for by itself
    assert any("--max-lora-rank 32" in line for line in said)
    assert any("peft gives the trained logits to the bit" in line for line in said)
    asked = [{"role": "user", "content": PROMPTS[0]}]
    served = AutoTokenizer.from_pretrained(directory).apply_chat_template(asked, add_generation_prompt=True)[
        "input_ids"
    ]
    assert served == ids_of(PROMPTS[0], directory)[0].tolist()


def test_a_run_that_tuned_all_weights_has_no_adapter(full: Run, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="E-CLI-101 --as adapter the run tuned all weights"):
        full.export(tmp_path / "out", form="adapter")
    assert not (tmp_path / "out").exists()


# GGUF


@pytest.mark.parametrize("form", ["gguf-f16", "gguf-bf16", "gguf-q8_0"])
def test_a_gguf_file_answers_as_the_merged_model(
    place: Path, lora: Run, merged: Path, tmp_path: Path, form: str
) -> None:
    said: list[str] = []
    out = lora.export(tmp_path / "out", form=form, say=said.append)
    (file,) = out.glob("*.gguf")
    with quiet():
        again = AutoModelForCausalLM.from_pretrained(out, gguf_file=file.name, dtype=torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    same = [greedy(again, ids) == greedy(whole, ids) for ids in (ids_of(t, place / "tiny") for t in PROMPTS)]
    assert sum(same) >= 17  # what it was to learn is random: two tokens are often nearly as likely
    assert any("15 held-out prompts as in training" in line for line in said)
    assert isinstance(verify(out), dict)


def test_ollama_gets_the_same_prompts(lora: Run, tmp_path: Path) -> None:
    out = lora.export(tmp_path / "out", form="gguf-q8_0")
    text = (out / "Modelfile").read_text()
    assert "FROM ./lora-q8_0.gguf\n" in text
    assert 'PARAMETER stop "<|im_end|>"\n' in text
    assert "PARAMETER num_ctx 512\n" in text
    assert (
        'TEMPLATE """{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        in text
    )


# What is written


def test_an_export_says_what_it_is_and_names_no_path(
    place: Path, adapter: tuple[Path, list[str]], merged: Path
) -> None:
    for directory in (merged, adapter[0]):
        card = (directory / "README.md").read_text()
        assert str(place) not in card
        for words in ("base_model: tiny", "license: unknown", "train.jsonl", '"rank": 20', "data's is not known"):
            assert words in card, words


def test_weights_of_many_gigabytes_come_in_files(
    full: Run, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(written, "MAX_SHARD_BYTES", 40_000)
    out = full.export(tmp_path / "out")
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2
    assert all(f.stat().st_size < 60_000 + 32 * 512 * 4 for f in files)
    named = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(named.values()) == {f.name for f in files}
    assert "lm_head.weight" not in named  # tied
    whole = full.export(tmp_path / "whole")  # in one file or in many, the same
    one, two = (AutoModelForCausalLM.from_pretrained(d).state_dict() for d in (out, whole))
    assert all(torch.equal(t, two[n]) for n, t in one.items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_numbers_on_disk_are_those_planned_and_stop_tokens_all_there(
    full: Run, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    from educe.model.device import Device
    from educe.recipes import export as recipes

    device = Device(kind="cpu", dtype=dtype, name="cpu", flops=1e9, why="a test")
    monkeypatch.setattr(recipes, "answering_device", lambda *_: device)
    out = full.export(tmp_path / "out")
    with safe_open(out / "model.safetensors", "pt") as stored:
        assert {str(stored.get_tensor(n).dtype) for n in stored.keys()} == {f"torch.{dtype}"}  # noqa: SIM118
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    stops = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert ({stops} if isinstance(stops, int) else set(stops)) == load_tokenizer(place / "tiny").stop
    assert (out / "chat_template.jinja").read_text() == (place / "tiny" / "chat_template.jinja").read_text()


# Wrong use


@pytest.mark.parametrize(
    "inner, words",
    [
        ("kept_answers.LocalSampler", ["eval"]),
        ("export.merged", ["export"]),
        ("blend.blended", ["blend"]),
        ("export.merged", ["serve", "--port", "8765"]),
        ("chat.merged", ["chat"]),
    ],
)
def test_memory_that_ends_is_said(
    full: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inner: str, words: list[str]
) -> None:
    def ends(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(f"educe.recipes.{inner}", ends)
    monkeypatch.setattr("educe.recipes.serve.find_server", lambda: ("vllm", None))
    code, said = command(*words, full.path, *([tmp_path / "out"] if words == ["export"] else []))
    assert code == 2
    assert "E-SYS-003" in said
    assert "more memory" in said


def test_the_wrong_way_round_gets_a_hint(full: Run, tmp_path: Path) -> None:
    code, said = command("export", tmp_path / "out", full.path)
    assert code == 2
    assert "RUN comes first" in said
    code, said = command("export", full.path)
    assert code == 2
    assert "DIR is missing" in said


def test_an_unknown_form_gets_the_nearest(full: Run, tmp_path: Path) -> None:
    code, said = command("export", full.path, tmp_path / "out", "--as", "gguf-q8")
    assert (code, "Did you mean gguf-q8_0?" in " ".join(said.split())) == (2, True)
    assert all(f in FORMS for f in ("merged", "adapter", "gguf-f16", "gguf-q4_k_m"))


def test_k_quants_need_llama_cpp(full: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("educe.model.gguf_llama.has_llama_cpp", lambda: False)
    with pytest.raises(MachineError, match="E-SYS-001 llama-cpp-python is needed for gguf-q4_k_m"):
        full.export(tmp_path / "out", form="gguf-q4_k_m")


def test_a_tokenizer_that_gguf_cannot_say_leaves_nothing(
    full: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("educe.model.gguf_vocabulary._SPLITS", {})
    with pytest.raises(ModelError, match=r"E-MODEL-206 tokenizer\.json"):
        full.export(tmp_path / "out", form="gguf-f16")
    assert not list(tmp_path.iterdir())


# The Hub: a server on loopback that speaks as much of its protocol as an upload needs

TOKEN = "hf_" + "k" * 34


class Hub(BaseHTTPRequestHandler):
    """Keeps what it is sent; large files go to addresses that it names."""

    seen: list[tuple[str, str, bytes]]
    tokens: set[str]
    refuses: bool

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append(("POST", self.path, body))  # type: ignore[attr-defined]
        self.server.tokens.add(self.headers.get("Authorization", ""))  # type: ignore[attr-defined]
        if self.server.refuses:  # type: ignore[attr-defined]
            self._answer({"error": f"no right for {self.headers['Authorization']}"}, 403)
        elif self.path == "/api/repos/create":
            self._answer({"url": f"http://{self.headers['Host']}/ann/tuned", "id": "ann/tuned"})
        elif "/preupload/" in self.path:
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            asked = json.loads(body)
            host = self.headers["Host"]
            self._answer({"transfer": "basic", "objects": [
                {**o, "actions": {"upload": {"href": f"http://{host}/put/{o['oid']}"}}} for o in asked["objects"]
            ]})  # fmt: skip
        else:
            self._answer(
                {
                    "commitUrl": f"http://{self.headers['Host']}/ann/tuned/commit/1",
                    "commitOid": "1" * 40,
                    "success": True,
                }
            )

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append(("PUT", self.path, body))  # type: ignore[attr-defined]
        self._answer({})

    def do_GET(self) -> None:
        self._answer({"id": "ann/tuned", "sha": "1" * 40, "siblings": [], "tags": [], "private": True})

    def _answer(self, value: Any, code: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen, server.tokens, server.refuses = [], set(), False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", f"http://127.0.0.1:{server.server_port}", raising=False)
    yield server
    server.shutdown()


def test_an_export_is_uploaded_whole_and_private(full: Run, tmp_path: Path, hub: Any) -> None:
    said: list[str] = []
    out = full.export(tmp_path / "out", push="ann/tuned", say=said.append)
    made = next(json.loads(body) for _, path, body in hub.seen if path == "/api/repos/create")
    assert made.get("private") is True or made.get("visibility") == "private"
    commit = next(body for _, path, body in hub.seen if "/commit/" in path)
    sent = [json.loads(line)["value"]["path"] for line in commit.splitlines() if json.loads(line)["key"] != "header"]
    assert set(sent) == {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    (weights,) = (body for kind, _, body in hub.seen if kind == "PUT")
    assert weights == (out / "model.safetensors").read_bytes()
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in "\n".join(said)
    assert not any(TOKEN.encode() in p.read_bytes() for p in out.rglob("*") if p.is_file())


def test_a_refused_upload_shows_no_token_and_keeps_the_export(full: Run, tmp_path: Path, hub: Any) -> None:
    hub.refuses = True
    code, said = command("export", full.path, tmp_path / "out", "--push", "ann/tuned")
    assert code == 2
    assert "E-SYS-006" in said
    assert TOKEN not in said
    assert (tmp_path / "out" / "manifest.json").is_file()


@pytest.mark.parametrize(
    "name, token, says", [("ann", TOKEN, "ORG/NAME"), ("../x", TOKEN, "ORG/NAME"), ("ann/x", "", "HF_TOKEN")]
)
def test_what_cannot_be_uploaded_is_refused_before_work(
    full: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, token: str, says: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UsageError, match=f"E-CLI-101 --push .*{says}"):
        full.export(tmp_path / "out", push=name)
    assert not list(tmp_path.iterdir())
