"""The recipes of stages that are shipped: each is valid, says its cost, and can be planned with a model's configs alone."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from educe.config import StagedRecipe, load_any  # noqa: E402
from educe.errors import EduceError  # noqa: E402
from educe.recipes.machine import chosen_device  # noqa: E402
from educe.recipes.run import check  # noqa: E402
from educe.recipes.run_stages import check_stages  # noqa: E402

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "docs" / "recipes").glob("*.yaml"))
SHARED = ROOT.parent / "shared" / "data" / "tokenizers" / "qwen3"
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288,
    "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "max_position_embeddings": 40960, "rope_theta": 1000000, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu",
}  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_are_valid_and_say_their_cost(path: Path) -> None:
    assert isinstance(load_any(path), StagedRecipe)
    head = path.read_text(encoding="utf-8").split("\nname:")[0]
    assert "Cost" in head
    assert f"recipes/{path.name}" in (ROOT / "docs" / "stages.md").read_text(encoding="utf-8")


@pytest.fixture
def place(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDUCE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    chosen_device.cache_clear()
    (tmp_path / "texts").mkdir()
    words = ("the", "user", "said", "hello", "model", "yes", "no", "one")
    texts = [f"{a} {b} {c}" for a in words for b in words for c in words[:3]]
    (tmp_path / "texts" / "a.txt").write_text("\n\n".join(texts), encoding="utf-8")
    (tmp_path / "general.txt").write_text("\n\n".join(f"{t} three" for t in texts), encoding="utf-8")
    rows = [{"prompt": t, "response": "yes"} for t in texts]
    pairs = [{"prompt": t, "chosen": "yes", "rejected": "no the"} for t in texts]
    for name, lines in (("answers", rows), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")
    shutil.copytree(tiny_model, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path


def test_a_model_is_planned_with_by_its_configs(place: Path, tiny_model: Path) -> None:
    text = "name: x\nmodel: {}\ndevice: cpu\ndtype: float32\ndata: {{train: answers.jsonl, max_tokens: 64}}\n"
    text += "train: {{micro_batch_tokens: 256}}\n"
    (place / "r.yaml").write_text(text.format("./bare"), encoding="utf-8")
    (place / "whole.yaml").write_text(text.format(tiny_model), encoding="utf-8")
    with pytest.raises(EduceError, match="has no weights"):
        check("r.yaml")
    found, whole = check("r.yaml", without_weights=True), check("whole.yaml")
    assert found.facts.num_parameters == whole.facts.num_parameters
    assert found.facts.name == "bare"
    assert found.plan.hash == whole.plan.hash
    with pytest.raises(EduceError, match="leaves no model"):
        check("r.yaml", without_weights=True, on_model=True)
    config = json.loads((place / "bare" / "config.json").read_text())
    (place / "bare" / "config.json").write_text(json.dumps(config | {"model_type": "nobody-knows"}))
    with pytest.raises(EduceError, match="describes no model that can be built"):
        check("r.yaml", without_weights=True)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs a real tokenizer beside the repository")
@pytest.mark.parametrize("name,devices", [("one-gpu", 1), ("eight-gpus", 8)])
def test_recipes_of_a_real_size_fit_the_machines_they_are_for(place: Path, name: str, devices: int) -> None:
    """Planned for GPUs that are not here, with configs alone; less would not do."""
    shutil.copytree(SHARED, place / "Qwen3-8B")
    (place / "Qwen3-8B" / "config.json").write_text(json.dumps(QWEN3_8B))
    text = (ROOT / "docs" / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    assert "model: Qwen/Qwen3-8B\n" in text
    (place / "r.yaml").write_text(text.replace("model: Qwen/Qwen3-8B\n", "model: ./Qwen3-8B\n"))
    stages = check_stages("r.yaml", without_weights=True, devices=devices, gpu="h100")
    assert list(stages) == ["pretrain", "sft", "preference"]
    for c in stages.values():
        assert c.facts.num_parameters == 8_190_735_360
        assert "h100, planned for" in c.device
        assert not [w for w in c.warnings if "train.learning_rate" in w]
        assert not [
            w for w in c.blockers if not re.search("P40 disk|of disk|E-SYS-002", w)
        ]  # the disk is this machine's
        assert c.memory.total < 80e9
        assert c.estimate.tokens_per_s > 2_000 * devices
    small = check_stages("r.yaml", without_weights=True, devices=devices, gpu="rtx-4090")
    assert all("GB of memory, 25.8 GB are there" in str(c.blockers) for c in small.values())
    with pytest.raises(EduceError, match=r"E-CLI-101 .*--gpu 'h10' is not known. Did you mean h100\?"):
        check_stages("r.yaml", without_weights=True, gpu="h10")
