"""`educe blend`: exact at both ends, on the line between them, measured soberly, chosen on dev, exported as measured."""

from __future__ import annotations

import itertools
import json
import math
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import educe  # noqa: E402
from educe.chat.tokens import load_tokenizer  # noqa: E402
from educe.config import Full, Lora  # noqa: E402
from educe.errors import RunError, UsageError  # noqa: E402
from educe.evaluate.blends import Point, choose  # noqa: E402
from educe.evaluate.drift import Texts  # noqa: E402
from educe.evaluate.general import MOST_BYTES, own_passages, passage_examples, read_passages  # noqa: E402
from educe.model import blended as blended_model  # noqa: E402
from educe.model.blended import Blend, blended, read_packed  # noqa: E402
from educe.model.export import adapted, merged  # noqa: E402
from educe.model.load import CausalLM, load_model  # noqa: E402
from educe.recipes.answers import questions_of  # noqa: E402
from educe.recipes.eval import data_of  # noqa: E402
from educe.recipes.export_card import blend_lines  # noqa: E402
from educe.recipes.run import Run  # noqa: E402
from educe.report.blend_page import build_blend_page  # noqa: E402
from educe.seeds import derive, permute  # noqa: E402
from educe.training.sft import held_out_loss  # noqa: E402
from educe.types import Example, Interval  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from small_runs import recipe, small_place  # noqa: E402
from test_adapters import cpu  # noqa: E402
from test_export import command  # noqa: E402

Tensors = dict[str, torch.Tensor]
KINDS = ("full", "lora", "rslora", "dora")
NEW = (510, 511)  # ids that training added


def tuning(kind: str) -> Full | Lora:
    return Full(kind="full") if kind == "full" else Lora(kind="lora", rank=4, alpha=8.0, variant=kind)  # type: ignore[arg-type]


def numbers(model: CausalLM) -> Tensors:
    return {n: p.detach().clone() for n, p in model.network.named_parameters()}


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[n]) for n, t in a.items())


@pytest.fixture(scope="module")
def checkpoints(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Two files of masters for each kind of tuning, away from where it begins."""
    place, made = tmp_path_factory.mktemp("masters"), {}
    for kind in KINDS:
        torch.manual_seed(0)
        start = load_model(tiny_model, cpu(), tuning(kind), new_ids=NEW).trainable()
        made[kind] = [place / f"{kind}-{k}.safetensors" for k in range(2)]
        for file in made[kind]:
            save_file({n: (p.detach() + 0.05 * torch.randn(p.shape)).contiguous() for n, p in start.items()}, file)
    return made


# The weights


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_ends_are_exact(tiny_model: Path, checkpoints: dict[str, list[Path]], kind: str, dtype: Any) -> None:
    files = (checkpoints[kind][0],)
    for alpha, end in (
        (0.0, load_model(tiny_model, cpu(dtype), new_ids=NEW)),
        (1.0, merged(tiny_model, files[0], tuning(kind), cpu(dtype), new_ids=NEW)),
    ):
        made = blended(tiny_model, Blend(alpha=alpha, weights=files), tuning(kind), cpu(dtype), new_ids=NEW)
        assert same(numbers(made), numbers(end))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num", [1, 2])
def test_between_the_ends_is_the_line(
    tiny_model: Path, checkpoints: dict[str, list[Path]], kind: str, num: int
) -> None:
    """Against θ0 + α (mean θ - θ0) in float64, of merged weights: of DoRA and of means no line of what is trained."""
    files = tuple(checkpoints[kind][:num])
    starts = {d: numbers(load_model(tiny_model, cpu(d), new_ids=NEW)) for d in ("float32", "bfloat16")}
    ends = [numbers(merged(tiny_model, f, tuning(kind), cpu(), new_ids=NEW)) for f in files]
    for alpha, dtype, rounding in ((0.3, "float32", 1e-6), (1.0, "float32", 1e-6), (0.3, "bfloat16", 2**-8)):
        # All weights of a run in bf16 began as bf16 ones; adapters are merged into what was published.
        start = starts[dtype if kind == "full" else "float32"]
        found = numbers(blended(tiny_model, Blend(alpha=alpha, weights=files), tuning(kind), cpu(dtype), new_ids=NEW))
        moved = 0
        for name, t in found.items():
            mean = sum(e[name].double() for e in ends) / num
            want = start[name].double() + alpha * (mean - start[name].double())
            assert torch.allclose(t.double(), want, rtol=rounding, atol=1e-7), name
            moved += not torch.equal(t, start[name])
        assert moved >= 14


def test_a_mean_of_one_is_itself_and_the_same_twice_too(tiny_model: Path, checkpoints: dict[str, list[Path]]) -> None:
    for kind in ("full", "lora"):
        (file, _), t = checkpoints[kind], tuning(kind)
        alone = numbers(merged(tiny_model, file, t, cpu(), new_ids=NEW))
        twice = blended(tiny_model, Blend(alpha=1, weights=(file, file)), t, cpu(), new_ids=NEW)
        assert same(numbers(twice), alone)


def test_a_mean_of_adapters_is_no_mean_of_their_matrices(
    tiny_model: Path, checkpoints: dict[str, list[Path]], tmp_path: Path
) -> None:
    """What averaging the stored matrices would give is another model: the oracle above can tell."""
    one, two = (load_file(f) for f in checkpoints["lora"])
    save_file({n: (t + two[n]) / 2 for n, t in one.items()}, tmp_path / "mean.safetensors")
    naive = numbers(merged(tiny_model, tmp_path / "mean.safetensors", tuning("lora"), cpu(), new_ids=NEW))
    right = Blend(alpha=1, weights=tuple(checkpoints["lora"]))
    found = numbers(blended(tiny_model, right, tuning("lora"), cpu(), new_ids=NEW))
    assert max(float((t - naive[n]).abs().max()) for n, t in found.items()) > 1e-4


def test_a_mean_holds_one_checkpoints_model_beside_the_sum(
    tiny_model: Path, checkpoints: dict[str, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[Any] = []

    def counted(*args: Any, **kwargs: Any) -> CausalLM:
        assert not [p for p in (ref() for ref in alive) if p is not None]
        model = adapted(*args, **kwargs)
        alive.append(weakref.ref(model.base.get_decoder()))
        return model

    monkeypatch.setattr(blended_model, "adapted", counted)
    files = tuple(checkpoints["lora"] * 2)
    blended(tiny_model, Blend(alpha=0.5, weights=files), tuning("lora"), cpu(), new_ids=NEW)
    assert len(alive) == 4


def test_weights_of_another_kind_are_no_blend(tiny_model: Path, checkpoints: dict[str, list[Path]]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        blended(tiny_model, Blend(alpha=0.5, weights=(checkpoints["lora"][0],)), Full(kind="full"), cpu())
    for alpha in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="alpha"):
            Blend(alpha=alpha, weights=(Path("x"),))


# What is measured


def examples(count: int) -> list[Example]:
    made, generator = [], np.random.default_rng(0)
    for _ in range(count):
        size = int(generator.integers(4, 30))
        weights = np.r_[np.zeros(2), generator.choice([0.5, 1.0], size - 2)].astype(np.float32)
        made.append(Example(ids_T=generator.integers(5, 500, size).astype(np.int32), weights_T=weights))
    return made


@pytest.mark.parametrize("capacity", [1, 64])
def test_drift_is_the_loss_and_the_kl_by_row(
    tiny_model: Path, checkpoints: dict[str, list[Path]], capacity: int
) -> None:
    """Against transformers' own logits, in float64: the loss, and the KL of 64 tokens and all others, less than the whole."""
    rows, given_rows = [0, 0, 1, 2, 3, 3], examples(6)
    texts = Texts(given_rows, rows, capacity)
    base, other = load_model(tiny_model, cpu()), merged(tiny_model, checkpoints["full"][0], Full(kind="full"), cpu())
    wanted = np.zeros((4, 4))  # nll, KL of 64 and the rest, weight, full KL
    for row, e in zip(rows, given_rows, strict=True):
        ids = torch.tensor(e.ids_T.astype(np.int64))
        with torch.no_grad():
            p, q = (m.network(input_ids=ids[None]).logits[0, :-1].double().log_softmax(-1) for m in (base, other))
        weights = torch.tensor(e.weights_T[1:]).double()
        wanted[0, row] -= float((weights * q.gather(1, ids[1:, None])[:, 0]).sum())
        kept = p.topk(64).indices
        coarse_p, coarse_q = (
            torch.cat([m.exp().gather(1, kept), 1 - m.exp().gather(1, kept).sum(1, keepdim=True)], 1) for m in (p, q)
        )
        wanted[1, row] += float((weights * (coarse_p * (coarse_p / coarse_q).log()).sum(1)).sum())
        wanted[3, row] += float((weights * (p.exp() * (p - q)).sum(1)).sum())
        wanted[2, row] += float(weights.sum())
    for model in (base, other):
        read_packed(model, packs=True)
    texts.remember(base)
    found, none = texts.drift(other), texts.drift(base)
    assert texts.weights_R == pytest.approx(wanted[2])
    assert found.nll_R == pytest.approx(wanted[0], rel=1e-5)
    assert found.kl_R == pytest.approx(wanted[1], rel=1e-4)
    assert all(0 < kl < full for kl, full in zip(found.kl_R, wanted[3], strict=True))
    assert none.kl_R == pytest.approx([0] * 4, abs=1e-6)
    assert held_out_loss(other, texts._batches).mean == pytest.approx(sum(found.nll_R) / sum(texts.weights_R), rel=1e-5)


def test_general_text_is_counted_once_and_ends_nowhere(tiny_model: Path) -> None:
    tokenizer, passages = load_tokenizer(tiny_model), own_passages()
    made, rows = passage_examples(passages, tokenizer, 32)
    assert len(passages) == 36
    assert sorted(set(rows)) == list(range(36))
    assert max(e.ids_T.size for e in made) <= 32
    for row, passage in enumerate(passages):
        ids = [i for e, r in zip(made, rows, strict=True) if r == row for i in e.ids_T.tolist()]
        assert tokenizer.decode(ids) == passage or passage.startswith(
            tokenizer.decode(ids)
        )  # a last lone token is left out
        assert ids[-1] != tokenizer.eos


def test_a_general_file_is_read_in_passages_up_to_a_size(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("one two\n\nthree four\nfive\n \n" + "\n\n".join(["word " * 2000] * 60), encoding="utf-8")
    found = read_passages(file)
    assert found[:2] == ["one two", "three four\nfive"]
    assert MOST_BYTES - 20_000 < sum(len(p) for p in found) <= MOST_BYTES
    for content, says in ((b"\xff\xfe a b", "is not UTF-8"), (b"only one passage", "holds 1 passages")):
        file.write_bytes(content)
        with pytest.raises(UsageError, match=f"--general .*{says}"):
            read_passages(file)
    with pytest.raises(UsageError, match="cannot be read"):
        read_passages(tmp_path / "absent.txt")


# The choice


def point(alpha: float, loss: float, right: int | None = None, start: float = 4.0) -> Point:
    some = Interval(value=start - loss, low=start - loss - 0.1, high=start - loss + 0.1)
    none = Interval(value=0.1 * alpha, low=0, high=0.2 * alpha)
    return Point(
        alpha=alpha, steps=(), loss=loss, gained=some, kl=alpha, right=right, asked=100, general=1 + 0.1 * alpha, lost=none,
        general_kl=alpha, seconds=1.0,
    )  # fmt: skip


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.floats(0.1, 8), min_size=1, max_size=6), st.booleans())
def test_the_choice_keeps_95_percent_and_nothing_nearer_does(losses: list[float], by_score: bool) -> None:
    points = [point(0.0, 4.0, 20 if by_score else None)]
    points += [point((k + 1) / len(losses), x, int(10 * x) if by_score else None) for k, x in enumerate(losses)]
    gains = [p.right - 20 if p.right is not None else p.gained.value for p in points]
    if by_score and all(p.right == 20 for p in points):
        gains = [p.gained.value for p in points]
    chosen = choose(points).point
    if max(gains) <= 0:
        assert chosen is None
        return
    assert chosen is not None
    at = points.index(chosen)
    assert gains[at] >= 0.95 * max(gains)
    assert all(g < 0.95 * max(gains) for g in gains[1:at])


def test_the_score_decides_where_it_tells_blends_apart_and_a_name_decides_over_all() -> None:
    points = [point(0, 4.0, 10), point(0.5, 3.0, 40), point(1, 2.0, 30)]
    assert choose(points).by == "score"
    assert choose(points).point == points[1]
    alike = [point(0, 4.0, 10), point(0.5, 3.0, 10), point(1, 2.0, 10)]
    assert (choose(alike).by, choose(alike).point) == ("loss", alike[2])
    assert "all answer as many dev rows right" in choose(alike).text
    assert (choose(points, points[2]).by, choose(points, points[2]).point) == ("you", points[2])


# The verb


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Path]:
    with small_place(tmp_path_factory, tiny_model) as made:
        yield made


@pytest.fixture(scope="module")
def run(place: Path) -> Run:
    """Trained until it knows its training rows too well: some blend is better on dev."""
    path = recipe(place, "blends", epochs=20, checkpoint_every_steps=20, keep_every_steps=20)
    path.write_text(path.read_text().replace("{kind: text}", "{kind: exact}"))
    return educe.train(path)


def test_what_is_chosen_on_dev_is_what_is_exported(run: Run, place: Path, tiny_model: Path) -> None:
    code, said = command("blend", run.path, "--out", place / "out")
    assert code == 0, said
    found = json.loads((run.dir.blend / "blend.json").read_text())
    points, chosen = found["points"], found["points"][found["choice"]["point"]]
    assert [p["alpha"] for p in points] == [0, 0.3, 0.5, 0.7, 1]
    assert [p["steps"] for p in points] == [[]] * 5
    measured = {line["step"]: line["loss"] for line in run.metrics if line["kind"] == "dev"}
    assert points[0]["loss"] == pytest.approx(measured[0], rel=1e-5)
    assert points[-1]["loss"] == pytest.approx(measured[max(measured)], rel=1e-5)
    assert points[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert all(a["kl"] < b["kl"] for a, b in itertools.pairwise(points))
    assert {p["asked"] for p in points} == {12}
    assert found["choice"]["text"].startswith(f"α = {chosen['alpha']:g}")
    base = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    assert found["choice"]["text"] in said.replace("\n", " ")
    written = AutoModelForCausalLM.from_pretrained(place / "out").state_dict()
    if chosen["alpha"] < 1:
        assert "not of this blend" in (place / "out" / "README.md").read_text()
    last = run.path / "checkpoints" / f"step-{max(measured):06d}" / "weights.safetensors"
    tuned = load_file(last)
    for name, t in tuned.items():
        want = base[name].double() + chosen["alpha"] * (t.double() - base[name].double())
        assert torch.allclose(written[name].double(), want, rtol=1e-6, atol=1e-7), name
    page = (run.dir.blend / "blend.html").read_text()
    assert page == build_blend_page(found)
    assert page.count("<circle cx=") == 5
    assert str(place) not in page
    assert "<script" not in page


def test_checkpoints_are_averaged_and_those_that_are_gone_are_said(run: Run, tmp_path: Path) -> None:
    said: list[str] = []
    choice = run.blend(average="last:2", rows=4, out=tmp_path / "out", alphas=[1.0], say=said.append)
    assert any("measured on 4 dev rows, 4 dev rows, drawn apart, to answer" in line for line in said)
    assert choice.point is not None
    assert len(choice.point.steps) == 2
    files = [run.path / "checkpoints" / f"step-{s:06d}" / "weights.safetensors" for s in choice.point.steps]
    one, two = (load_file(f) for f in files)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, t in one.items():
        assert torch.allclose(written[name].double(), (t.double() + two[name].double()) / 2, rtol=1e-6, atol=1e-7)
    assert files[0].parent.name in (tmp_path / "out" / "README.md").read_text()
    alphas = [(p["alpha"], len(p["steps"])) for p in json.loads((run.dir.blend / "blend.json").read_text())["points"]]
    assert alphas == [(0, 0), (1, 2), (1, 0)]  # the mean, and the run's own weights beside it
    with pytest.raises(RunError, match=r"E-RUN-002 .*not there.*keep_every_steps"):
        run.blend(average="7,20")
    with pytest.raises(UsageError, match="--average 'all' names no checkpoints"):
        run.blend(average="all")


def test_one_checkpoint_is_named_and_rows_to_answer_are_drawn(run: Run) -> None:
    card = " ".join(blend_lines(Blend(alpha=1, weights=(Path("step-000020/weights.safetensors"),))))
    assert "where tuned is step-000020 (" in card
    said: list[str] = []
    prepared, order = data_of(run.dir, run.recipe, said.append), permute(12, derive(run.recipe.train.seed, "dev"))
    rows = [f"dev.jsonl:{i + 1}" for i in sorted(order[:4].tolist())]
    assert [a.question.row for a in questions_of(prepared, run.recipe, "dev", 4)] == rows
    assert rows != [f"dev.jsonl:{i + 1}" for i in sorted(order.tolist())[:4]]


@pytest.mark.parametrize(
    "words, says",
    [
        (["--alpha", "0,1.5"], "E-CLI-101 --alpha\n  1.5 is not between"),
        (["--alpha", "half"], "is no list of numbers"),
        (["--alpha", "0", "--out", "new"], "0 is the base model itself"),
        (["--out", "."], "E-RUN-203"),
        (["--out", "new", "--as", "adapter"], "E-CLI-101 --as adapter"),
        (["--general", "absent.txt"], "cannot be read"),
    ],
)
def test_what_cannot_be_blended_is_said_before_work(run: Run, words: list[str], says: str) -> None:
    code, said = command("blend", run.path, *words)
    assert code == 2
    assert says in said


def test_a_share_of_dora_is_whole_weights(place: Path) -> None:
    path = recipe(place, "thin", epochs=1)
    path.write_text(path.read_text() + "tuning: {kind: lora, rank: 4, variant: dora}\n")
    made = educe.train(path)
    with pytest.raises(UsageError, match="a share of DoRA's change is no adapter of that rank"):
        made.blend(alphas=[0.5], out=place / "thin-out", form="adapter")
    out = made.blend(alphas=[0.5], out=place / "thin-out")
    assert out.by == "you"
    written = AutoModelForCausalLM.from_pretrained(place / "thin-out").state_dict()
    last = max((made.path / "checkpoints").glob("step-*")) / "weights.safetensors"
    base = AutoModelForCausalLM.from_pretrained(place / "tiny").state_dict()
    whole = adapted(place / "tiny", last, made.recipe.tuning, cpu()).network.merge_and_unload().state_dict()  # type: ignore[arg-type]
    for name, t in whole.items():
        want = (base[name].double() + t.double()) / 2
        assert torch.allclose(written[name].double(), want, rtol=1e-6, atol=1e-7), name
