"""`educe check` on bad recipes and model directories: an exit code, a coded message with its place, never a traceback."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from check_command import DATA, ROWS, Checker

pytest.importorskip("torch")


@pytest.fixture
def check(tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> Checker:
    return Checker(tmp_path, tiny_model, capsys)


# --- recipes -------------------------------------------------------------------------------------------------------------

# item: what stands below `name:` and `model:` (so it starts on line 3), the code, the place in recipe.yaml, words
RECIPES: dict[str, tuple[str, str, str, str]] = {
    "65 unknown key": (DATA + "trian: {}\n", "E-RECIPE-102", ":4:1", "Did you mean 'train'?"),
    "65 deeper": ("data:\n  train: rows.jsonl\n  sytem: x\n", "E-RECIPE-102", ":5:3", "data.sytem"),
    "65 in a union": (DATA + "tuning: {kind: lora, rnk: 3}\n", "E-RECIPE-102", ":4:22", "Did you mean 'rank'?"),
    "66 number as text": (DATA + "train: {learning_rate: '1e-5'}\n", "E-RECIPE-103", ":4:9", "learning_rate"),
    "67 duplicate key": (DATA + "data: {train: x}\n", "E-RECIPE-101", ":4:1", "duplicate key"),
    "67 duplicate below": (DATA + "train: {seed: 1, seed: 2}\n", "E-RECIPE-101", ":4:18", "duplicate key"),
    "68 alias bomb": ("a: &a [x, x]\nb: &b [*a, *a]\n" + DATA, "E-RECIPE-101", ":3:4", "anchor"),
    "68 merge key": (DATA + "train:\n  <<: {epochs: 1}\n", "E-RECIPE-101", ":5:3", "merge key"),
    "68 deep nesting": (DATA + "x: " + "[" * 20_000, "E-RECIPE-101", ":4:", "deeper"),
    "68 Python tag": (
        DATA + "device: !!python/object/apply:os.system ['id']\n",
        "E-RECIPE-101",
        ":4:9",
        "python/object",
    ),
    "68 tag on a block": ("data: !!python/object:x\n  train: rows.jsonl\n", "E-RECIPE-101", ":3:7", "tag"),
    "69 yes": (DATA + "train: {activation_checkpointing: yes}\n", "E-RECIPE-103", ":4:9", "'yes'"),
    "69 on": (DATA + "train: {activation_checkpointing: on}\n", "E-RECIPE-103", ":4:9", "'on'"),
    "69 sexagesimal": (DATA + "train: {seed: 1:30}\n", "E-RECIPE-103", ":4:9", "'1:30'"),
    "69 date": (DATA + "device: 2024-01-01\n", "E-RECIPE-103", ":4:1", "device"),
    "70 negative": (DATA + "train: {epochs: -1}\n", "E-RECIPE-103", ":4:9", "epochs is -1"),
    "70 zero": (DATA + "train: {batch_tokens: 0}\n", "E-RECIPE-103", ":4:9", "greater than or equal to 8"),
    "70 NaN": (DATA + "train: {learning_rate: .nan}\n", "E-RECIPE-103", ":4:9", "finite"),
    "70 infinity": (DATA + "train: {epochs: .inf}\n", "E-RECIPE-103", ":4:9", "epochs is inf"),
    "70 bool for int": (DATA + "train: {seed: true}\n", "E-RECIPE-103", ":4:9", "integer"),
    "70 bool for float": (DATA + "train: {epochs: true}\n", "E-RECIPE-103", ":4:9", "number"),
    "70 text for int": (DATA + "train: {seed: '4'}\n", "E-RECIPE-103", ":4:9", "integer"),
    "70 5000 digits": (DATA + f"train: {{seed: {'9' * 5000}}}\n", "E-RECIPE-101", "", "digits"),
    "72 more than the positions": ("data: {train: rows.jsonl, max_tokens: 1024}\n", "E-MODEL-201", "", "512 positions"),
    "73 contradiction": (DATA + "train: {batch_tokens: 64}\n", "E-RECIPE-201", "", "micro_batch_tokens"),
    "75 runs is a file": (DATA + "runs: recipe.yaml\n", "E-SYS-004", "", "cannot be written"),
    "no data": ("tuning: {kind: full}\n", "E-RECIPE-104", "", "data is missing"),
    "no kind": (DATA + "tuning: {rank: 3}\n", "E-RECIPE-104", ":4:1", "tuning.kind"),
    "a list": (DATA + "- 1\n", "E-RECIPE-101", ":4:1", "block end"),
    "a tab": ("data:\n\ttrain: x\n", "E-RECIPE-101", ":4:1", "cannot start any token"),
    "control character": (DATA + "# \x07\n", "E-RECIPE-101", "", "not allowed"),
    "a name that is a path": (DATA + "name: ../t\n", "E-RECIPE-101", ":4:1", "duplicate key"),
}


@pytest.mark.parametrize("item", RECIPES)
def test_bad_recipes_are_refused_with_the_place(check: Checker, item: str) -> None:
    recipe, code, place, words = RECIPES[item]
    outcome = check(ROWS, recipe)
    assert outcome.exit_code == 2
    assert outcome.told.startswith(code)
    assert words in outcome.told
    if code.startswith("E-RECIPE"):
        assert f"recipe.yaml{place}" in outcome.told


def test_numbers_of_yaml_1_2_are_numbers(check: Checker) -> None:
    """66, 69: 1e-5 is a number and 010 is ten."""
    outcome = check(ROWS, DATA + "train: {learning_rate: 1e-5, seed: 010, epochs: 2}\n")
    assert outcome.exit_code == 0, outcome.told
    assert "outside the usual" not in outcome.told


def test_paths_relative_to_home_and_upwards(check: Checker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """77: `~` and `..` are followed."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("~/rows.jsonl", f"../{tmp_path.name}/rows.jsonl"):
        assert check(ROWS, f"data: {{train: {path}, max_tokens: 256}}\n").exit_code == 0


# --- model directories ---------------------------------------------------------------------------------------------------

Break = Callable[[Path], object]


def _index(weight_map: Any) -> Break:
    return lambda d: (d / "model.safetensors.index.json").write_text(json.dumps(weight_map))


def _weights(change: Callable[[bytes], bytes]) -> Break:
    return lambda d: (d / "model.safetensors").write_bytes(change((d / "model.safetensors").read_bytes()))


def _header(change: Callable[[dict[str, Any]], Any]) -> Break:
    def changed(data: bytes) -> bytes:
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        text = json.dumps(change(header)).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]

    return _weights(changed)


def _first(**values: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A header whose first tensor is told otherwise."""

    def change(header: dict[str, Any]) -> dict[str, Any]:
        name = min(n for n in header if n != "__metadata__")
        return {**header, name: {**header[name], **values}}

    return change


def _twice(header: dict[str, Any]) -> dict[str, Any]:
    """Two tensors of one shape in the same bytes."""
    tensors = sorted(
        (n for n in header if n.endswith("input_layernorm.weight")), key=lambda n: header[n]["data_offsets"]
    )
    return {**header, tensors[0]: header[tensors[1]]}


def _config(**values: Any) -> Break:
    return lambda d: (d / "config.json").write_text(
        json.dumps({**json.loads((d / "config.json").read_text()), **values})
    )


def _file(name: str, data: bytes) -> Break:
    return lambda d: (d / name).write_bytes(data)


MODELS: dict[str, tuple[Break, str, str]] = {
    "81 upwards": (_index({"weight_map": {"a": "../x.safetensors"}}), "E-MODEL-002", "outside the directory"),
    "81 absolute": (_index({"weight_map": {"a": "/etc/passwd"}}), "E-MODEL-002", "outside the directory"),
    "81 missing shard": (_index({"weight_map": {"a": "model-2.safetensors"}}), "E-MODEL-002", "model-2.safetensors"),
    "81 no map": (_index({}), "E-MODEL-002", "index"),
    "81 a list": (_index([]), "E-MODEL-002", "index"),
    "82 cut off": (_weights(lambda b: b[:-100]), "E-MODEL-002", "cut off"),
    "82 cut in the header": (_weights(lambda b: b[:50]), "E-MODEL-002", "damaged header"),
    "82 empty": (_weights(lambda b: b""), "E-MODEL-002", "not a safetensors file"),
    "82 huge header": (_weights(lambda b: struct.pack("<Q", 2 * 10**8) + b[8:]), "E-MODEL-002", "not a safetensors"),
    "82 overlap": (_header(_twice), "E-MODEL-002", "overlaps"),
    "82 wrong shape": (_header(_first(shape=[3])), "E-MODEL-002", "wrong size"),
    "82 three offsets": (_header(_first(data_offsets=[0, 1, 2])), "E-MODEL-002", "damaged header"),
    "82 header a number": (_header(lambda h: 12), "E-MODEL-002", "damaged header"),
    "83 only a pickle": (lambda d: (d / "model.safetensors").rename(d / "model.bin"), "E-MODEL-101", "Convert it once"),
    "83 no weights": (lambda d: (d / "model.safetensors").unlink(), "E-MODEL-101", "no weights"),
    "84 code to run": (_config(auto_map={"AutoModel": "x.Y"}), "E-MODEL-102", "its own code"),
    "config not JSON": (_file("config.json", b"{"), "E-MODEL-002", "config.json"),
    "config too deep": (_file("config.json", b"[" * 100_000), "E-MODEL-002", "config.json"),
    "config of other types": (_config(vocab_size="many"), "E-MODEL-002", "config.json"),
    "79 smaller vocabulary": (_config(vocab_size=100), "E-MODEL-202", "knows 100 ids"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "E-MODEL-001", "tokenizer.json"),
    "tokenizer of nothing": (_file("tokenizer.json", b"{}"), "E-MODEL-002", "not a usable tokenizer"),
    "tokenizer_config not JSON": (_file("tokenizer_config.json", b"\xff"), "E-MODEL-002", "tokenizer_config.json"),
    "template does not parse": (_file("chat_template.jinja", b"{% for"), "E-CHAT-101", "does not parse"),
    "template not UTF-8": (_file("chat_template.jinja", b"\xff\xfe"), "E-CHAT-001", "chat_template.jinja"),
    "template runs code": (_file("chat_template.jinja", b"{{ ''.__class__.mro() }}"), "E-DATA-005", "E-CHAT-102"),
    "template never ends": (_file("chat_template.jinja", b"{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
                            "E-DATA-005", "E-CHAT-102"),
    "no such directory": (shutil.rmtree, "E-MODEL-001", "neither a directory nor a Hub id"),
}  # fmt: skip


@pytest.mark.parametrize("item", MODELS)
def test_bad_model_directories_are_refused(check: Checker, tiny_model: Path, tmp_path: Path, item: str) -> None:
    spoil, code, words = MODELS[item]
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    spoil(model)
    outcome = check(ROWS, model=model)
    assert outcome.exit_code == 2
    assert outcome.told.startswith(code)
    assert words in outcome.told
