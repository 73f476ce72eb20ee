"""`educe curve`: parts that lie within each other, points that are plain runs, nothing trained twice, words with intervals."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import educe  # noqa: E402
from educe.config import load_recipe  # noqa: E402
from educe.data.near import Tokens  # noqa: E402
from educe.data.nested import near_groups, nested_rows  # noqa: E402
from educe.errors import RecipeError, UsageError  # noqa: E402
from educe.evaluate.curves import Measured, gained, judge, level  # noqa: E402
from educe.files.jsonl import read_jsonl  # noqa: E402
from educe.model.describe import describe_model  # noqa: E402
from educe.recipes.curve import _Scale  # noqa: E402
from educe.recipes.curve_plan import Wish, parts_of, runs_of  # noqa: E402
from educe.recipes.machine import chosen_device  # noqa: E402
from educe.recipes.mixing import draw  # noqa: E402
from educe.recipes.prepare import prepare  # noqa: E402
from educe.recipes.run import quiet  # noqa: E402
from educe.recipes.silent import SilentCurve  # noqa: E402
from educe.recipes.subset import subset_of  # noqa: E402
from educe.report.curve_page import build_curve_page  # noqa: E402
from educe.stats import clustered_mean  # noqa: E402
from educe.stats.crossed import crossed_mean  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from small_runs import final, line, recipe, same, small_place  # noqa: E402
from test_engine import _one_thread  # noqa: E402, F401
from test_export import command  # noqa: E402

some = settings(max_examples=50, deadline=None, derandomize=True)

# The parts


@some
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2)), min_size=1, max_size=40),
    st.lists(st.floats(0.01, 1), min_size=1, max_size=5, unique=True),
    st.integers(0, 9),
)
def test_parts_lie_within_each_other(rows: list[tuple[int, int]], shares: list[float], seed: int) -> None:
    labels, tasks = (np.array(x, np.int64) for x in zip(*rows, strict=True))
    parts = nested_rows(labels, tasks, [*sorted(shares), 1.0], seed)
    assert parts[-1].all()
    assert all(p.any() for p in parts)
    for smaller, larger in itertools.pairwise(parts):
        assert not (smaller & ~larger).any()
    largest = np.bincount(labels).max()
    for share, p in zip(sorted(shares), parts, strict=False):
        for label in set(labels.tolist()):
            assert p[labels == label].all() or not p[labels == label].any()
        if len(set(tasks.tolist())) == 1:
            asked = max(1, round(share * labels.size))
            assert asked <= p.sum() < asked + largest
    again = nested_rows(labels, tasks, [*sorted(shares), 1.0], seed)
    assert all((a == b).all() for a, b in zip(parts, again, strict=True))


def test_another_seed_gives_another_part() -> None:
    labels, tasks = np.arange(40), np.zeros(40, np.int64)
    one, two = (nested_rows(labels, tasks, [0.25], seed)[0] for seed in (0, 1))
    assert one.sum() == two.sum() == 10
    assert (one != two).any()


def test_rows_that_nearly_repeat_each_other_have_one_label() -> None:
    numbers = np.random.default_rng(0)
    texts = [numbers.integers(0, 5000, 60) for _ in range(30)]
    near = texts[3].copy()
    near[57] = 5001  # in three of its shingles
    half = np.concatenate([texts[5][:30], numbers.integers(0, 5000, 30)])
    wording = numbers.integers(0, 5000, 40)  # of a task: in all rows, and no reason to keep them together
    texts = [np.concatenate([wording, t]) for t in [*texts, near, half, texts[7][:4], texts[7][:4]]]
    tokens = Tokens(np.concatenate(texts), np.cumsum([0, *map(len, texts)]))
    rows = np.arange(34)
    rows[9] = 8  # two examples of one row
    labels = near_groups(tokens, rows)
    pairs = {(int(label), i) for i, label in enumerate(labels) if label != i}
    assert pairs == {(3, 30), (8, 9), (32, 33)}


# The numbers


def test_one_seed_is_the_interval_over_rows() -> None:
    numbers = np.random.default_rng(1)
    values, weights = numbers.normal(size=30).tolist(), numbers.uniform(1, 5, 30).tolist()
    found = crossed_mean([values], weights)
    assert (found.rows, found.both) == (clustered_mean(values, weights), None)
    same_twice = crossed_mean([values, values], weights)
    assert same_twice.spread == 0
    assert same_twice.both is not None
    assert same_twice.both.high == pytest.approx(same_twice.rows.high)


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("between", [0.0, 0.02, 0.3])
def test_the_interval_with_seeds_holds_what_it_should(seeds: int, between: float) -> None:
    """Rows and seeds drawn anew each time, with a part that belongs to the pair; the truth is 0.3. Where seeds matter the interval
    over rows alone holds it far too seldom."""
    numbers = np.random.default_rng(seeds)
    both = rows = 0
    for _ in range(500):
        rest = numbers.normal(0, between, (seeds, 1)) + numbers.normal(0, 0.3, (seeds, 60))
        seen = 0.3 + numbers.normal(0, 0.5, 60) + rest
        found = crossed_mean(seen.tolist(), [1.0] * 60)
        assert found.both is not None
        both += found.both.low <= 0.3 <= found.both.high
        rows += found.rows.low <= 0.3 <= found.rows.high
    assert 0.93 <= both / 500 <= 1
    assert rows <= both
    if between == 0.3:
        assert rows / 500 < 0.8


def measured(label: str, mean: float, right: int | None = None, seed: int = 0) -> Measured:
    numbers = np.random.default_rng(seed)
    base = np.random.default_rng(99).normal(0, 0.5, 50)
    scores = tuple(float(i < right) for i in range(50)) if right is not None else ()
    nll = tuple((mean + base + numbers.normal(0, 0.05, 50)).tolist())
    return Measured(label=label, nll_SR=(nll,), scores_SQ=(scores,) if scores else ())


@pytest.mark.parametrize(
    "first, last, kind, by, says",
    [
        (measured("50", 2.0), measured("100", 1.8, seed=1), "helps", "loss", "dev loss fell by 0."),
        (measured("50", 1.8), measured("100", 2.0, seed=1), "hurts", "loss", "dev loss rose by 0."),
        (measured("50", 2.0), measured("100", 2.002, seed=1), "open", "loss", "dev rows"),
        (measured("50", 2.0), measured("100", 1.9999), "level", "loss", "gave nothing at the last"),
        (measured("50", 2.0, 20), measured("100", 2.5, 40), "helps", "score", "score rose by 40.0 points"),
        (measured("50", 2.0, 40), measured("100", 2.5, 41), "open", "score", "dev rows"),
        (measured("50", 2.0, 40), measured("100", 1.5, 40), "helps", "loss", "dev loss fell"),
    ],
)
def test_what_the_last_step_says(first: Measured, last: Measured, kind: str, by: str, says: str) -> None:
    found = judge([first, last], [1.0] * 50, "rows")
    assert (found.kind, found.by) == (kind, by)
    assert says in found.text
    assert "50 to 100" in found.text
    assert (found.needed is not None) == (kind == "open")
    if kind == "open":
        assert found.needed is not None
        assert found.needed > 50


def test_gains_are_better_when_positive_and_the_untouched_model_has_one_seed() -> None:
    a, b = measured("0", 3.0, 10), measured("9", 2.0, 30, seed=1)
    assert gained(a, b, [1.0] * 50, "loss").rows.value == pytest.approx(1.0, abs=0.05)
    assert gained(a, b, [1.0] * 50, "score").rows.value == pytest.approx(0.4)
    twice = Measured(label="9", nll_SR=b.nll_SR * 2, scores_SQ=b.scores_SQ * 2)
    found = gained(a, twice, [1.0] * 50, "loss")
    assert found.both is not None
    assert found.rows.value == pytest.approx(gained(a, b, [1.0] * 50, "loss").rows.value)
    assert level(b.scores_SQ, [1.0] * 50, "score").rows.value == 0.6


# The curve


class Told(SilentCurve):
    """Which runs made steps, and which points were there."""

    def __init__(self, die_at: int | None = None) -> None:
        self.steps, self.points, self._die = 0, [], die_at  # type: ignore[var-annotated]

    def step(self, report: Any) -> None:
        self.steps += 1
        if self.steps == self._die:
            raise MemoryError

    def measured(self, label: str, point: dict[str, Any], kept: bool) -> None:
        self.points.append((label, kept))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Path]:
    with small_place(tmp_path_factory, tiny_model) as place:
        yield place


def made(place: Path, name: str, **train: Any) -> Path:
    return recipe(place, name, train.pop("metric", "exact"), epochs=train.pop("epochs", 4), learning_rate=3e-3, **train)


@pytest.fixture(scope="module")
def found(place: Path) -> tuple[Any, list[str]]:
    said: list[str] = []
    return educe.curve(made(place, "a"), shares=(0.5, 1.0), keep=True, say=said.append), said


def test_what_is_found_and_said(found: tuple[Any, list[str]], place: Path) -> None:
    curve, said = found
    (line,) = curve.found["lines"]
    assert [p["count"] for p in line["points"]] == [6, 12]
    assert [p["runs"][0]["tokens"] for p in line["points"]] == sorted(p["runs"][0]["tokens"] for p in line["points"])
    assert curve.found["dev_rows"] == curve.found["answered"] == 12
    assert line["points"][1]["loss"]["rows"]["value"] < curve.found["untouched"]["loss"]["rows"]["value"]
    text = "\n".join(said)
    for words in (
        "2 runs, each 4 epochs of its own rows",
        "  6 rows: about",
        "together about",
        "no test row is read",
    ):
        assert words in text, text
    assert len(said) == len(set(said))
    page = (curve.path / "curve.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2
    assert page.count("<circle") == 6
    assert not re.search(r"<script|https?://|nan|inf\b", page)
    numbers = [float(x) for x in re.findall(r' (?:[xy][12]?|c[xy])="([^"]*)"', page)]
    assert all(0 <= x <= 800 for x in numbers)


def test_the_points_are_the_runs_that_train_makes_of_the_same_rows(found: tuple[Any, list[str]], place: Path) -> None:
    """To the bit: `educe train` on a file with these rows, and nothing else changed."""
    runs = sorted((place / "runs").glob("a.curve-*"), key=lambda r: len(rows_of(r)))
    text = (place / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert [len(rows_of(r)) for r in runs] == [6, 12]
    assert set(rows_of(runs[0])) < set(rows_of(runs[1]))
    (place / "part.jsonl").write_text("\n".join(text[i - 1] for i in rows_of(runs[0])) + "\n", encoding="utf-8")
    plain = made(place, "plain")
    plain.write_text(plain.read_text().replace("train: train.jsonl", "train: part.jsonl"))
    assert same(final(educe.train(plain).path), final(runs[0]))
    failed = [f for f in json.loads((runs[0] / "preflight.json").read_text())["before"] if f["verdict"] == "fail"]
    assert not failed


def rows_of(run: Path) -> list[int]:
    """Lines of the file that a run trained on."""
    return [x["line"] for x in read_jsonl(run / "ledger.jsonl") if x["status"] == "train"]


def test_what_was_kept_stays_and_a_part_has_no_numbers_of_the_whole(place: Path, found: tuple[Any, list[str]]) -> None:
    """A later curve, without --keep, over the same runs: measured before, and measured on fewer rows."""
    runs = sorted((place / "runs").glob("a.curve-*"))
    for rows in (200, 5):
        educe.curve(place / "a.yaml", shares=(0.5, 1.0), rows=rows)
        assert sorted((place / "runs").glob("a.curve-*")) == runs
    smaller = min(runs, key=lambda r: len(rows_of(r)))
    checks = {f["id"]: f["verdict"] for f in json.loads((smaller / "preflight.json").read_text())["before"]}
    assert (checks["P13"], checks["P16"]) == ("skip", "skip")
    prepared = prepare(load_recipe(place / "a.yaml"), quiet)
    with pytest.raises(ValueError, match="none of these rows"):
        subset_of(prepared, np.zeros(0, np.int64))


def test_points_are_measured_anew_where_the_metrics_code_changed(place: Path) -> None:
    file = place / "mine.py"
    file.write_text("def mark(answer, expected, row):\n    return 0.5\n")
    loaded = load_recipe(recipe(place, "by-mine", "custom, function: 'mine:mark'"))
    prepared, device = prepare(loaded, quiet), chosen_device("cpu", "float32")
    scale = _Scale(recipe=loaded, prepared=prepared, device=device, rows=[1], asked=[], grading=None)
    before = scale.key
    assert scale.key == before
    file.write_text("def mark(answer, expected, row):\n    return 0.25\n")
    assert scale.key != before


def test_nothing_is_trained_twice_and_a_killed_curve_goes_on(place: Path, found: tuple[Any, list[str]]) -> None:
    again = Told()
    same_curve = educe.curve(place / "a.yaml", shares=(0.5, 1.0), keep=True, screen=again)
    assert again.steps == 0
    assert all(kept for _, kept in again.points)
    assert same_curve.found["lines"] == found[0].found["lines"]
    for point in (place / "runs" / "probes" / "points").iterdir():
        point.rename(point.with_name(f"not-{point.name}"))
    straight = found[0].found["lines"][0]["points"]
    first, second = (p["runs"][0]["steps"] for p in straight)
    path = made(place, "killed", checkpoint_every_steps=2)
    with pytest.raises(MemoryError):
        educe.curve(path, shares=(0.5, 1.0), screen=Told(die_at=first + 4))
    rest = Told()
    done = educe.curve(path, shares=(0.5, 1.0), screen=rest)
    assert 0 < rest.steps < second  # the first point is done, the second one had a checkpoint
    assert rest.points == [("untouched", True), ("6 rows", True), ("12 rows", False)]
    for a, b in zip(done.found["lines"][0]["points"], straight, strict=True):
        assert (a["loss"], a["score"]) == (b["loss"], b["score"])
    assert not list((place / "runs").glob("killed.curve-*"))  # their numbers alone stay


def test_seeds_and_masks_are_lines_and_intervals(place: Path) -> None:
    told = Told()
    path = made(place, "both", metric="text", epochs=1)
    curve = educe.curve(path, screen=told, shares=(1.0,), seeds=2, against=("unmasked",))
    own, unmasked = curve.found["lines"]
    assert unmasked["name"] == "unmasked"
    assert len(told.points) == 1 + 2 * 2
    for p in (*own["points"], *unmasked["points"]):
        assert len({r["loss"] for r in p["runs"]}) == 2  # another order, other weights
        rows, both = p["loss"]["rows"], p["loss"]["both"]
        assert both["low"] <= rows["low"] < rows["high"] <= both["high"]
        assert rows["value"] == pytest.approx(sum(r["loss"] for r in p["runs"]) / 2)
    assert own["points"][0]["runs"][0]["loss"] != unmasked["points"][0]["runs"][0]["loss"]
    page = build_curve_page(curve.found)
    assert page.count("<circle") == 2
    assert page.count("<rect") == 1
    for words in (
        "Thin bars: over dev rows and training seeds",
        "Trained on prompts too",
        "The seed alone moves this run",
    ):
        assert words in page


def test_equal_steps_are_more_epochs_of_fewer_rows(place: Path) -> None:
    r = load_recipe(made(place, "steps"))
    prepared = prepare(r, quiet)
    facts = describe_model(prepared.model_dir, r.model)
    wish = Wish(shares=(0.25, 1.0), same_steps=True)
    parts, _ = parts_of(r, prepared, wish, quiet)
    runs = runs_of(r, prepared, facts, parts, wish, quiet)
    assert [run.recipe.train.epochs for run in runs] == [16.0, 4.0]
    assert [draw(run.recipe, run.prepared).size for run in runs] == [48, 48]
    with pytest.raises(UsageError, match="would come 120 times"):
        runs_of(
            r.model_copy(update={"train": r.train.model_copy(update={"epochs": 30.0})}),
            prepared,
            facts,
            parts,
            wish,
            quiet,
        )


def test_tasks_are_added_and_others_scored(place: Path) -> None:
    numbers = random.Random(3)
    for k, name in enumerate("pqrs"):
        rows = "\n".join(line(1000 * k + i, numbers).replace("order", f"{name} order") for i in range(12))
        (place / f"{name}.jsonl").write_text(rows + "\n", encoding="utf-8")
    path = made(place, "tasks", metric="exact", epochs=1)
    tasks = ", ".join(f"{n}: {{files: {n}.jsonl}}" for n in "pqrs")
    text = path.read_text().replace("  train: train.jsonl\n", f"  tasks: {{{tasks}}}\n")
    path.write_text(text.replace("dev: {kind: file, file: dev.jsonl}", "dev: {kind: share, share: 0.4}"))
    said: list[str] = []
    curve = educe.curve(path, by="tasks", shares=(0.3, 1.0), say=said.append)
    (held,) = curve.found["held_out_tasks"]
    first, last = (p["tasks"] for p in curve.found["lines"][0]["points"])
    assert (len(first), len(last)) == (1, 3)
    assert set(first) < set(last) == set("pqrs") - {held}
    prepared = prepare(load_recipe(path), quiet)
    dev = prepared.store("dev")
    assert curve.found["dev_rows"] == np.unique(dev.rows[dev.tasks == prepared.tasks.index(held)]).size
    assert any(x.startswith(f"held out of every point, and scored on: {held}") for x in said)
    named, _ = parts_of(load_recipe(path), prepared, Wish(by="tasks", held=("q",)), quiet)
    assert all("q" not in p.tasks for p in named)
    with pytest.raises(UsageError, match="no task with two dev rows"):
        educe.curve(path, by="tasks", held=("x",))


def test_what_no_curve_can_be_made_of(place: Path) -> None:
    path = made(place, "bad")
    for wish in (
        {"shares": (1.0,)},
        {"shares": (0.5, 0.5)},
        {"shares": (0.0, 1.0)},
        {"against": ("x",)},
        {"held": ("a",)},
    ):
        with pytest.raises(UsageError):
            educe.curve(path, **wish)
    with pytest.raises(UsageError, match="come to the same 1 rows"):
        educe.curve(path, shares=(0.01, 0.02))
    with pytest.raises(UsageError, match="needs three"):
        educe.curve(path, by="tasks")
    path.write_text(path.read_text().replace("  max_tokens: 128", "  max_tokens: 128\n  prompt_weight: 1.0"))
    with pytest.raises(RecipeError, match="unmasked already"):
        educe.curve(path, against=("unmasked",))


def test_the_command(place: Path, found: tuple[Any, list[str]]) -> None:
    code, said = command("curve", place / "a.yaml", "--shares", "1/2,1", "--keep")
    assert code == 0, said
    for words in ("done before", "dev loss", "curve.html", "One training seed", "untouched"):
        assert words in said, said
    assert command("curve", place / "a.yaml", "--shares", "1/0,1")[0] == 2
