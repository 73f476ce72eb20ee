"""`educe export --as adapter`, and `educe blend` of adapters: peft, given the published base, computes what was trained or blended."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
import educe  # noqa: E402
from educe.chat.tokens import load_tokenizer  # noqa: E402
from educe.errors import UsageError  # noqa: E402
from educe.recipes.run import Run  # noqa: E402
from peft import PeftModel  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from small_runs import recipe, small_place  # noqa: E402
from test_adapters import wide_model  # noqa: E402, F401
from test_export import ids_of  # noqa: E402

RANK, ALPHA = 20, 12.0  # a scale that no other formula gives: 12 / sqrt(20), not 12 / 20


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, wide_model: Path) -> Iterator[Path]:  # noqa: F811
    with small_place(tmp_path_factory, wide_model) as made:
        yield made


@pytest.fixture(scope="module", params=[16, 4])
def run(place: Path, request: pytest.FixtureRequest) -> Run:
    """rsLoRA, on a base in 16 bits and in 4."""
    if request.param == 4:
        pytest.importorskip("bitsandbytes")
    path = recipe(place, f"rs{request.param}", epochs=6, checkpoint_every_steps=3, keep_every_steps=3)
    how = f"{{kind: lora, rank: {RANK}, alpha: {ALPHA}, variant: rslora, base_bits: {request.param}}}"
    path.write_text(path.read_text() + f"tuning: {how}\n")
    return educe.train(path)


def by_hand(base: Path, weights: dict[str, torch.Tensor], share: float = 1.0) -> Any:
    """The published base + share * alpha / sqrt(rank) * B A, in float64: the formula of rsLoRA (arXiv 2312.03732)."""
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    for name, p in network.named_parameters():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (weights.get(f"{stem}.lora_{m}.weight") for m in "AB")
        if a is not None and b is not None:
            p.data += share * ALPHA / math.sqrt(RANK) * (b.double() @ a.double())
    return network.eval()


def through_peft(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()


def logits(network: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = network(ids).logits.double()
    return found


def masters(run: Run) -> dict[str, torch.Tensor]:
    file = max((run.path / "checkpoints").glob("step-*")) / "weights.safetensors"
    return {n.replace(".default", ""): t for n, t in load_file(file).items()}


def test_peft_scales_by_the_root_of_the_rank(run: Run, place: Path) -> None:
    said: list[str] = []
    out = run.export(place / f"{run.path.name}-adapter", form="adapter", say=said.append)
    assert json.loads((out / "adapter_config.json").read_text())["use_rslora"] is True
    ids = ids_of("order 1003 the user said", place / "tiny")
    base = logits(AutoModelForCausalLM.from_pretrained(place / "tiny", dtype=torch.float64), ids)
    found, expected = logits(through_peft(place / "tiny", out), ids), logits(by_hand(place / "tiny", masters(run)), ids)
    assert float((found - expected).abs().max()) < 2e-5
    assert float((base - expected).abs().max()) > 0.1
    assert any("peft gives the trained logits to the bit" in line for line in said)


def test_a_server_is_told_all_that_it_would_take_from_the_base_model(run: Run, place: Path) -> None:
    """vLLM reads template, tokenizer and stop tokens from the directory of the base model, unless told."""
    said: list[str] = []
    out = run.export(place / f"{run.path.name}-told", form="adapter", say=said.append)
    generation = json.loads((out / "generation_config.json").read_text())
    stops = generation["eos_token_id"]
    assert set(stops if isinstance(stops, list) else [stops]) == set(load_tokenizer(out).stop)
    line = next(s for s in said if s.startswith("vLLM serves it")).partition("by: ")[2]
    words = shlex.split(line)
    assert words[:4] == ["vllm", "serve", "tiny", "--enable-lora"]
    options = dict(zip(words[4::2], words[5::2], strict=True))
    assert options["--lora-modules"] == f"{run.recipe.name}={out}"
    assert options["--max-lora-rank"] == "32"
    assert options["--tokenizer"] == options["--generation-config"] == str(out)
    assert f"`{line.replace(str(out), '.')}`" in (out / "README.md").read_text()


def test_a_share_of_adapters_is_adapters(run: Run, place: Path) -> None:
    said: list[str] = []
    out = place / f"{run.path.name}-blend"
    run.blend(alphas=[0.3], rows=2, out=out, form="adapter", say=said.append)
    ids = ids_of("order 1003 the user said", place / "tiny")
    expected = logits(by_hand(place / "tiny", masters(run), 0.3), ids)
    assert float((logits(through_peft(place / "tiny", out), ids) - expected).abs().max()) < 2e-5
    assert any("peft gives the blended logits to the bit" in line for line in said)
    assert "A blend: base + 0.3 x (tuned - base)" in (out / "README.md").read_text()


def test_a_mean_of_adapters_is_whole_weights(run: Run, place: Path) -> None:
    with pytest.raises(UsageError, match="E-CLI-101 --as adapter a mean of adapters is no adapter of that rank"):
        run.blend(average="last:2", out=place / "mean", form="adapter")
    assert not (place / "mean").exists()
