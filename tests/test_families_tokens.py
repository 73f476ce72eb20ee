"""New control tokens in families whose embeddings lie elsewhere or twice, full and LoRA: begun as the mean, trained, served."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from educe.config import Full, Lora  # noqa: E402
from educe.model.adapters import layer_embeddings  # noqa: E402
from educe.model.export import merged  # noqa: E402
from educe.model.load import load_model, quiet  # noqa: E402
from educe.model.proof import packs_are_blind, prove_head  # noqa: E402
from educe.pack.batch import build_batch  # noqa: E402
from educe.training.optim import Adam, AdamSettings  # noqa: E402
from educe.training.sft import sft_loss  # noqa: E402
from educe.types import Example  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from families import FAMILIES, VOCABULARY, make  # noqa: E402
from test_engine import FULL, LORA, _one_thread, apart, cpu  # noqa: E402, F401
from test_families import logits  # noqa: E402

NEW = [VOCABULARY, VOCABULARY + 1]  # beyond the stored rows


@pytest.mark.parametrize("tuning", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize(
    "name",
    ["Gemma 3 (multimodal)", "Gemma 4 (multimodal)", "gpt-oss", "Falcon-H1"],
)
def test_new_tokens_are_trained_and_served(name: str, tuning: Full | Lora, tmp_path: Path) -> None:
    with quiet():
        make(FAMILIES[name]).save_pretrained(tmp_path / "base")
    torch.manual_seed(5)
    model = load_model(tmp_path / "base", cpu(), tuning, new_ids=NEW)
    prove_head(model)
    assert packs_are_blind(model)
    ids = np.array([5, NEW[0], 9, 17, NEW[1], 30], np.int32)
    batch = build_batch([Example(ids_T=ids, weights_T=np.array([0, 1, 1, 1, 1, 1], np.float32))])
    before = model.base.get_input_embeddings()(torch.tensor(NEW)).detach().clone()
    optimizer = Adam(model.trainable(), AdamSettings())
    for _ in range(2):
        sft_loss(model, batch, 5.0).loss.backward()
        optimizer.step(1e-2)
    assert not torch.equal(model.base.get_input_embeddings()(torch.tensor(NEW)), before)
    for table in layer_embeddings(model.base).values():
        assert not torch.equal(*table(torch.tensor(NEW)))  # both began as the mean
    ids_P = torch.tensor(ids, dtype=torch.int64)
    tuned = logits(model.network, model.base, ids_P)

    save_file({n: m.detach().contiguous() for n, m in optimizer.masters.items()}, tmp_path / "weights.safetensors")
    torch.manual_seed(99)  # nothing of a served model may be random
    served = merged(tmp_path / "base", tmp_path / "weights.safetensors", tuning, cpu(), new_ids=NEW)
    assert apart(logits(served.network, served.base, ids_P), tuned) < 1e-5
    served.network.save_pretrained(tmp_path / "tuned")
    again = load_model(tmp_path / "tuned", cpu())
    assert torch.equal(logits(again.network, again.base, ids_P), logits(served.network, served.base, ids_P))
