"""`educe lr`: rates from the same weights on the same rows, compared fairly, judged soberly, and nothing left behind."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import educe  # noqa: E402
from educe.cli.main import main  # noqa: E402
from educe.config import load_recipe  # noqa: E402
from educe.errors import RecipeError, UsageError  # noqa: E402
from educe.evaluate.probe import Tried, judge_rates, outcomes_of  # noqa: E402
from educe.files.jsonl import read_jsonl  # noqa: E402
from educe.recipes.lr import Probe, is_lost, lr  # noqa: E402
from educe.recipes.machine import chosen_device  # noqa: E402
from educe.recipes.run import quiet  # noqa: E402
from educe.recipes.silent import SilentProbe  # noqa: E402
from educe.report.probe_page import what_to_do  # noqa: E402
from educe.stats import paired_means  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import forked  # noqa: E402
from test_engine import _one_thread  # noqa: E402, F401

some = settings(max_examples=150, deadline=None, derandomize=True)

# The interval


@some
@given(st.lists(st.tuples(st.floats(0, 9), st.floats(0, 9), st.floats(0.1, 50)), min_size=2, max_size=30))
def test_paired_means_are_means_paired(rows: list[tuple[float, float, float]]) -> None:
    before, after, weights = (list(x) for x in zip(*((a * w, b * w, w) for a, b, w in rows), strict=True))
    found, back = paired_means(before, after, weights), paired_means(after, before, weights)
    assert found.value == pytest.approx((sum(after) - sum(before)) / sum(weights), abs=1e-9)
    assert found.low <= found.value <= found.high
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low), abs=1e-9)
    same = paired_means(before, [b + 0.5 * w for b, w in zip(before, weights, strict=True)], weights)
    assert (same.low, same.high) == pytest.approx((0.5, 0.5), abs=1e-6)  # rows that all move alike leave no doubt
    four = paired_means(before * 4, after * 4, weights * 4)
    assert four.high - four.low <= found.high - found.low + 1e-12


def test_the_interval_of_equal_rows_is_students() -> None:
    """Against scipy's paired t interval, which is what it is where all rows weigh the same."""
    scipy = pytest.importorskip("scipy.stats")
    for n, near in ((4, 0.06), (10, 2e-3), (200, 1e-4)):
        a, b = np.random.default_rng(n).normal(size=(2, n))
        theirs = scipy.ttest_rel(b, a).confidence_interval()
        ours = paired_means(a.tolist(), b.tolist(), [1.0] * n)
        assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=near, abs=near)


def test_the_interval_holds_what_it_should() -> None:
    numbers = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        weights = numbers.integers(1, 40, 40).astype(float)
        apart = numbers.normal(0.3, 1.0, 40) * weights
        found = paired_means([0.0] * 40, apart.tolist(), weights.tolist())
        held += found.low <= 0.3 <= found.high
    assert 0.91 <= held / 400 <= 0.98


# The judgement

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)


def judged(losses: list[float | None], own: float = 1e-4, noise: float = 0.02, start: float = 3.0) -> Any:
    """Of 50 rows that differ among themselves, with a little noise of their own; None is a rate that diverged."""
    numbers = np.random.default_rng(3)
    base = numbers.normal(0, 0.5, 50)

    def rows(loss: float) -> tuple[float, ...]:
        moved = numbers.normal(0, noise, 50)
        return tuple((loss + base + moved - moved.mean() - base.mean()).tolist())

    tried = [
        Tried(rate=r, nll_R=rows(x) if x is not None else (), stopped="" if x is not None else "diverged")
        for r, x in zip(RATES, losses, strict=True)
    ]
    return judge_rates(outcomes_of(tried, rows(start), [1.0] * 50), own)


@pytest.mark.parametrize(
    "losses, kind, rate, says",
    [
        ([2.5, 2.2, 2.0, 2.1, 2.6], "best", 1e-4, "best rate is 0.0001"),
        ([2.5, 2.2, 2.0, 1.9, None], "best", 3e-4, "0.0003"),
        ([2.5, 2.4, 2.3, 2.2, 2.1], "higher", 1e-3, "highest that was tried"),
        ([2.0, 2.4, 2.5, 2.6, None], "lower", 1e-5, "lowest that was tried"),
        ([2.5, 2.1, 2.0, 2.003, 2.6], "flat", 1e-4, "between 0.0001 and 0.0003"),
        ([2.5, 2.4, 2.1, 2.004, 2.0], "flat", 3e-4, "Nothing higher than 0.001"),
        ([2.0, 2.001, 2.0, 2.001, 2.0], "flat", 1e-4, "between 1e-05 and 0.001"),
        ([3.0, 2.9999, 3.0, 3.1, None], "none", 1e-4, "beyond chance"),
        ([None] * 5, "diverged", 1e-5 / 9, "go lower"),
    ],
)
def test_judgements(losses: list[float | None], kind: str, rate: float, says: str) -> None:
    found = judged(losses)
    assert (found.kind, found.rate) == (kind, pytest.approx(rate, rel=0.02))
    assert says in found.text
    assert found.low <= found.high
    if kind == "higher":
        assert found.next_rates == pytest.approx((1e-3, 3e-3, 9e-3))
    if kind == "lower":
        assert found.next_rates == pytest.approx((1e-5 / 9, 1e-5 / 3, 1e-5), rel=0.02)


@some
@given(st.lists(st.none() | st.floats(0.5, 4), min_size=5, max_size=5), st.sampled_from(RATES))
def test_a_judgement_is_of_the_rates_tried(losses: list[float | None], own: float) -> None:
    found = judged(losses, own)
    if found.kind in ("best", "flat", "higher", "lower"):
        ended = [r for r, x in zip(RATES, losses, strict=True) if x is not None]
        best = min(ended, key=lambda r: losses[RATES.index(r)] or 0)
        assert found.low <= best * 1.0001
        assert best <= found.high * 1.0001
        assert {found.low, found.high} <= set(ended)
        assert found.low <= found.rate <= found.high


@some
@given(st.lists(st.floats(0.1, 12), min_size=1, max_size=20), st.floats(0.1, 12))
def test_a_run_is_lost_when_its_loss_stays_far_above_where_it_began(losses: list[float], start: float) -> None:
    lost = is_lost(losses, start)
    assert not lost or min(losses[-3:]) > start + 0.5
    assert not is_lost([start * 0.9] * 5, start)
    assert is_lost([start, *[3 * start + 1] * 3], start)


# The probe


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("lr")
    intents = ("refund", "track", "cancel")
    rows = [
        {"messages": [{"role": "user", "content": f"order {100 + i} the user said {intents[i % 3]}"},
                      {"role": "assistant", "content": json.dumps({"intent": intents[i % 3]})}]}
        for i in range(60)
    ]  # fmt: skip
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    (place / "more.jsonl").write_text("\n".join(map(json.dumps, rows[:20])).replace("order", "item") + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDUCE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.chdir(place)
        chosen_device.cache_clear()
        yield place
    chosen_device.cache_clear()


def recipe(
    place: Path, model: Path, name: str = "a", more: str = "", train: str = "", data: str = "", epochs: int = 4
) -> Path:
    path = place / f"{name}.yaml"
    path.write_text(
        f"name: {name}\nmodel: {model}\ndevice: cpu\ndtype: float32\n{more}"
        f"data: {{{data or 'train: rows.jsonl'}, dev: {{kind: share, share: 0.2}}, max_tokens: 128}}\n"
        f"train: {{epochs: {epochs}, batch_tokens: 256, micro_batch_tokens: 128, learning_rate: 3e-3{train}}}\n",
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="module")
def probe(place: Path, tiny_model: Path) -> Probe:
    return educe.lr(recipe(place, tiny_model), rates=[1e-5, 1e-3, 1e-2, 0.9], steps=12)


def test_the_best_rate_is_found_and_a_lost_one_stopped(probe: Probe) -> None:
    losses = [o.loss for o in probe.outcomes]
    assert probe.judgement.kind in ("best", "flat")
    assert probe.judgement.rate == pytest.approx(1e-2)
    assert losses[0] == pytest.approx(probe.start_loss, abs=0.05)  # next to nothing at 1e-5
    assert losses[2] == min(x for x in losses if x is not None) < probe.start_loss - 1
    gains = [o.gain.value for o in probe.outcomes if o.gain is not None]
    assert gains[:3] == pytest.approx([probe.start_loss - x for x in losses[:3] if x is not None])
    last = probe.outcomes[3]
    assert last.loss is None or last.behind.low > 0  # type: ignore[union-attr]


def test_what_is_written(probe: Probe, place: Path) -> None:
    assert probe.path.parent == place / "runs" / "probes"
    assert sorted(p.name for p in probe.path.iterdir()) == ["lr.html", "lr.json", "manifest.json"]
    found = json.loads((probe.path / "lr.json").read_text())
    assert found["advice"]["rate"] == probe.judgement.rate
    assert [len(r["train_losses"]) for r in found["rates"][:3]] == [12, 12, 12]
    page = (probe.path / "lr.html").read_text(encoding="utf-8")
    assert page.count("<circle") == sum(r["stopped"] is None for r in found["rates"])
    assert page.count("× diverged") == sum(r["stopped"] is not None for r in found["rates"])
    assert not re.search(r"<script|https?://|nan|inf\b", page)
    numbers = [float(x) for x in re.findall(r' (?:[xy][12]?|c[xy])="([^"]*)"', page)]
    assert all(0 <= x <= 800 for x in numbers)


def test_a_rate_alone_is_a_rate_among_others_and_a_probe_is_repeatable(
    place: Path, tiny_model: Path, probe: Probe
) -> None:
    """Nothing of one rate's run is left for the next: no weight, no moment, no order."""
    again = lr(load_recipe(recipe(place, tiny_model)), quiet, SilentProbe(), rates=[1e-2, 2e-2], steps=12)
    alone, among = again.outcomes[0].tried, probe.outcomes[2].tried
    assert (alone.rate, alone.train_losses) == (among.rate, among.train_losses)
    assert alone.nll_R == among.nll_R
    assert again.start_loss == probe.start_loss


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_probe_as_long_as_the_run_is_the_run(place: Path, tiny_model: Path, dtype: str) -> None:
    """Same rows, same order, same schedule: the losses of every step, and the held-out loss before and after."""
    lora = "tuning: {kind: lora, rank: 4}\n"
    path = recipe(place, tiny_model, f"whole-{dtype}", more=lora, train=", schedule: wsd", epochs=2)
    path.write_text(path.read_text().replace("dtype: float32", f"dtype: {dtype}"))
    found = educe.lr(path, rates=[1e-3, 3e-3], steps=10_000)
    assert found.steps == found.run_steps
    run = educe.train(path)
    lines = read_jsonl(run.path / "metrics.jsonl")
    losses = [x["loss"] for x in lines if x["kind"] == "step"]
    dev = [x["loss"] for x in lines if x["kind"] == "dev"]
    assert list(found.outcomes[1].tried.train_losses) == losses
    assert found.outcomes[1].loss == pytest.approx(dev[-1], rel=1e-6)
    assert found.start_loss == pytest.approx(dev[0], rel=1e-6)
    assert not list((place / "runs" / "probes").glob("*/checkpoints"))


def test_mixtures_are_probed_too(place: Path, tiny_model: Path) -> None:
    data = "tasks: {a: {files: rows.jsonl, loss_weight: 2.0}, b: {files: more.jsonl}}, loss_mean: task"
    said: list[str] = []
    found = educe.lr(recipe(place, tiny_model, "mixed", data=data), rates=[1e-3, 1e-2], steps=8, say=said.append)
    assert found.judgement.kind in ("higher", "flat")
    assert any("probing 2 rates (0.001, 0.01) with 8 of the run's" in x and "held-out rows: about" in x for x in said)


def test_the_extent_follows_the_time(place: Path, tiny_model: Path) -> None:
    told: dict[float, str] = {}
    path = recipe(place, tiny_model, "extent", train=", schedule: cosine", epochs=1)
    for minutes in (10.0, 1e-6):
        said: list[str] = []
        found = educe.lr(path, minutes=minutes, say=said.append)
        told[minutes] = next(x for x in said if x.startswith("probing"))
        rates = [o.tried.rate for o in found.outcomes]
        assert rates[len(rates) // 2] == 3e-3
        assert all(b / a == pytest.approx(3, rel=0.03) for a, b in itertools.pairwise(rates))
    assert "probing 5 rates" in told[10.0]
    assert "probing 3 rates" in told[1e-6]


def test_what_cannot_be_probed_is_refused(place: Path, tiny_model: Path) -> None:
    path = recipe(place, tiny_model, "bad")
    for wrong in (
        {"rates": [1e-3]},
        {"rates": [0.0, 1e-3]},
        {"rates": [1.0, 2.0]},
        {"steps": 0},
        {"minutes": math.nan},
    ):
        with pytest.raises(UsageError):
            educe.lr(path, **wrong)  # type: ignore[arg-type]
    path.write_text(path.read_text().replace("{kind: share, share: 0.2}", "{kind: file, file: none.jsonl}"))
    (place / "none.jsonl").write_text((place / "rows.jsonl").read_text().split("\n")[0].replace("order", "one") + "\n")
    with pytest.raises(RecipeError, match="fewer than 2 rows"):
        educe.lr(path)


def command(*words: str | Path) -> tuple[int, str]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), pytest.raises(SystemExit) as ended:
        main([str(w) for w in words])
    return int(ended.value.code or 0), said.getvalue()


def test_what_is_cited_is_said_of_adapters_only(probe: Probe) -> None:
    found = json.loads((probe.path / "lr.json").read_text())
    said = "\n".join(what_to_do(found))
    assert "The probe had 12 steps" in said
    assert "Regret" not in said
    found["tuning"] = {"kind": "lora"}
    assert "Regret" in "\n".join(what_to_do(found))
    found["run_steps"] = found["steps"]
    assert "The probe had" not in "\n".join(what_to_do(found))


def test_the_command_says_what_to_write(place: Path, tiny_model: Path) -> None:
    path = recipe(place, tiny_model, "said")
    code, said = command("lr", path, "--rates", "1e-4,3e-3,1e-2,0.9", "--steps", "12")
    assert code == 0, said
    for words in ("train.learning_rate", "untouched: ", "0.003*", "lr.html", "held-out loss 6."):
        assert words in said, said
    assert command("lr", path, "--rates", "1e-4,x")[0] == 2


def test_ctrl_c_leaves_nothing(place: Path, tiny_model: Path) -> None:
    path = recipe(place, tiny_model, "stopped", train=", seed: 4")
    before = sorted((place / "runs" / "probes").rglob("*"))
    process = forked.educe("lr", path, "--steps", "10000")
    deadline = time.monotonic() + 90
    while "held-out loss" not in process.said() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = "".join(process.communicate(60))
    assert process.returncode == 130, said
    assert "Interrupted." in said
    assert "Traceback" not in said
    assert sorted((place / "runs" / "probes").rglob("*")) == before
    assert not (place / "runs" / "stopped").exists()
