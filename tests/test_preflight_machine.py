"""Checks of the model's files, the seed and the watchdog: each is made to fail."""

# ruff: noqa: F811 - a fixture of another file
from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")
from educe.model.device import deterministic
from educe.recipes import mixing, preflight_machine
from educe.recipes.estimate import checkpoint_bytes
from educe.recipes.memory import num_trained
from educe.training.saver import SPARE_BYTES

from test_preflight import Bench, bench, found, lines  # noqa: F401


def test_p20_weights_beside_the_model_are_said(bench: Bench) -> None:
    """transformers reads model.safetensors, else what the index names: nothing else is counted, and what is not read is named."""
    b = bench.before(bench.recipe(lines(12)))
    number = found(b, "P20").number
    weights, index = bench.model / "model.safetensors", bench.model / "model.safetensors.index.json"
    shutil.copy(weights, bench.model / "consolidated.safetensors")
    f = found(b, "P20")
    assert (f.verdict, f.number) == ("warn", number)
    assert "consolidated.safetensors beside them" in f.evidence
    (bench.model / "consolidated.safetensors").rename(bench.model / "model-00001-of-00002.safetensors")
    shard = {"model.embed_tokens.weight": "model-00001-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": shard}))
    assert "model-00001-of-00002.safetensors beside them" in found(b, "P20").evidence  # the index is not looked at
    weights.rename(bench.model / "model-00002-of-00002.safetensors")
    assert "model-00002-of-00002.safetensors beside them" in found(b, "P20").evidence
    index.write_text(json.dumps({"weight_map": {**shard, "lm_head.weight": "model-00003-of-00002.safetensors"}}))
    f = found(b, "P20")
    assert f.number == "E-MODEL-002"
    assert (
        "model-00003-of-00002.safetensors is missing; model.safetensors.index.json says that it holds 1" in f.evidence
    )


def test_p40_leaves_free_what_the_writer_leaves_free(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    b = bench.before(bench.recipe(lines(12)))
    each = checkpoint_bytes(b.recipe, num_trained(b.facts, b.recipe.tuning))
    keep = b.recipe.train.keep_checkpoints
    for more, verdict in ((SPARE_BYTES - 1, "fail"), (SPARE_BYTES, "warn"), (SPARE_BYTES + each, "pass")):
        usage = shutil.disk_usage(bench.place)._replace(free=(keep + 1) * each + more)
        monkeypatch.setattr(preflight_machine.shutil, "disk_usage", lambda _, usage=usage: usage)
        assert found(b, "P40").verdict == verdict


def test_p44_an_order_that_does_not_follow_from_the_seed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    b = bench.before(bench.recipe(lines(40)))
    assert found(b, "P44").verdict == "pass"
    numbers, right = np.random.default_rng(), mixing.order_of
    with monkeypatch.context() as patch:
        patch.setattr(mixing, "order_of", lambda *a: numbers.permutation(right(*a)))
        assert found(b, "P44").verdict == "fail"
    sure = b.recipe.model_copy(update={"train": b.recipe.train.model_copy(update={"deterministic": True})})
    run = replace(b, recipe=sure, settings={})
    assert "kernels are not deterministic" in found(run, "P44").evidence
    with deterministic(True):
        assert found(run, "P44").verdict == "pass"


def test_p46_goes_by_the_limit_that_was_given(bench: Bench) -> None:
    b = bench.before(bench.recipe(lines(12)))
    assert (found(b, "P46").verdict, found(b, "P46").number) == ("pass", "60 s")
    slow = replace(b, tokens_per_s=b.plan.capacity_tokens / 40)  # a micro-batch takes 40 s
    assert [found(replace(slow, hang_after_s=s), "P46").verdict for s in (20, 60, 300)] == ["fail", "warn", "pass"]
    shared = replace(
        slow, ranks=2, tokens_per_s=2 * slow.tokens_per_s
    )  # two are twice as fast, a rank's micro-batch is not
    assert [found(replace(shared, hang_after_s=s), "P46").verdict for s in (20, 60, 300)] == ["fail", "warn", "pass"]
    assert [found(replace(b, hang_after_s=None, ranks=r), "P46").verdict for r in (1, 2)] == ["skip", "warn"]
