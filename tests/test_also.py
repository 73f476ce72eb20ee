"""Another model as a row of the evaluation: asked once, graded like the others, with its price, on the terminal and the page."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import educe  # noqa: E402
from click.testing import CliRunner  # noqa: E402
from educe.cli import screens  # noqa: E402
from educe.cli.main import cli  # noqa: E402
from educe.cli.screens import AnswerScreen  # noqa: E402
from educe.errors import EduceError, RunError  # noqa: E402
from educe.evaluate.compare import score  # noqa: E402
from educe.files.hashes import cache_dir  # noqa: E402
from educe.files.jsonl import read_jsonl  # noqa: E402
from educe.recipes.run import Run  # noqa: E402
from educe.report import build_report  # noqa: E402
from educe.sample import local  # noqa: E402

from conftest import some  # noqa: E402
from report_payloads import PAYLOADS  # noqa: E402
from run_directory import Page, make_run, write_file  # noqa: E402
from servers import Seen, said, serving  # noqa: E402
from small_runs import recipe, small_place  # noqa: E402

PRICES = ("--price-in", "2", "--price-out", "8")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Path]:
    """A small run, graded by exact text, evaluated."""
    with small_place(tmp_path_factory, tiny_model) as place:
        file = recipe(place, "also", epochs=1)
        file.write_text(file.read_text().replace("kind: text", "kind: exact"))
        run = educe.train(file)
        run.eval()
        yield run.path


def eval_with(trained: Path, seen: Seen, *more: str, model: str = "lab/large|1") -> Any:
    return CliRunner().invoke(
        cli, ["eval", str(trained), "--also", seen.url, "--also-model", model, *more], standalone_mode=False
    )


def knowing(trained: Path) -> Callable[[dict[str, Any], int], Any]:
    """A server that knows the first and the last test row's answer."""
    lines = read_jsonl(trained / "answers" / "tuned.jsonl")
    known = {x["prompt"][-1]["content"]: x["expected"] for x in (lines[0], lines[-1])}
    return lambda body, times: said(known.get(body["messages"][-1]["content"], "?"), tokens_in=1000, tokens_out=500)


def test_a_row_with_its_price_and_nothing_asked_twice(trained: Path) -> None:
    before = json.loads((trained / "scores.json").read_text())
    own = {f.name: f.read_bytes() for f in (trained / "answers").iterdir()}
    with serving(knowing(trained)) as seen:
        out = eval_with(trained, seen, *PRICES, "--max-cost", "1")
        assert out.exception is None, out.output
        assert seen.times.total() == 3
        assert "stored, and not asked for again" in out.output
        assert "lab/large|1" in out.output
        assert "0.018 USD" in out.output
        scores = json.loads((trained / "scores.json").read_text())
        *names, name = scores["systems"]
        assert names == list(before["systems"])
        assert name.startswith("lab-large-1-")
        row = scores["systems"][name]
        assert (row["correct"], row["label"], row["mean_tokens"]) == (2, "lab/large|1", 500)
        assert row["cost"] == pytest.approx(3 * (1000 * 2 + 500 * 8) / 1e6)
        assert row["server"].startswith("http://127.0.0.1")
        assert scores["comparisons"][-1]["before"] == name
        assert "lab/large|1 reaches 66.7 % for 0.018 USD" in scores["verdict"]
        assert {f.name: f.read_bytes() for f in (trained / "answers").iterdir() if f.name in own} == own
        for again in (eval_with(trained, seen, *PRICES), eval_with(trained, seen, *PRICES)):
            assert again.exception is None
        assert seen.times.total() == 3
        assert Run(trained).eval(regrade=True)["systems"][name]["correct"] == 2
        assert Run(trained).eval(metric="label", regrade=True)["systems"][name]["cost"] == row["cost"]
        assert name in Run(trained).eval()["systems"]  # asking the run's own models again keeps the row
        assert seen.times.total() == 3
        other = eval_with(trained, seen, model="small")
        assert other.exception is None
        assert len(json.loads((trained / "scores.json").read_text())["systems"]) == len(names) + 2
        assert seen.times.total() == 6
    text = Page(build_report(Run(trained).dir)).text
    assert "against lab/large|1" in text
    assert "0.018" in text


class Killed(Exception):
    pass


def test_an_evaluation_killed_again_and_again_gives_the_answers_of_one_that_was_not(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Draws with a seed, each system, the general questions: no batch is answered twice."""
    monkeypatch.setattr(local, "BATCH_TOKENS", 12)
    kept, run = cache_dir() / "answers", Run(trained)
    told, batches = list[str](), list[str]()

    def progress(system: str, done: int, total: int) -> None:
        batches.append(f"{system} {done} of {total}")
        if dies and len(batches) % 19 == 4:
            raise Killed

    def evaluated() -> list[dict[str, Any]]:
        run.eval(samples=2, say=told.append, progress=progress)
        return [run.dir.load(run.dir.answers / f"{n}.jsonl") for n in ("untouched", "tuned")]

    stored, dies = {f.name: f.read_bytes() for f in run.dir.answers.iterdir()}, False
    shutil.rmtree(kept)
    whole, all_batches = evaluated(), [*batches]
    shutil.rmtree(kept)
    batches.clear()
    dies = True
    for _ in range(3, len(all_batches), 19):
        with pytest.raises(Killed):
            evaluated()
    dies = False
    assert evaluated() == whole
    assert batches == all_batches
    assert "tuned: 6 of 6 answered before on this machine; taken from the cache" in told
    for name, content in stored.items():
        (run.dir.answers / name).write_bytes(content)


def test_a_run_has_one_evaluation_at_a_time_and_a_log_hears_of_it(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local, "BATCH_TOKENS", 12)
    monkeypatch.setattr(screens, "_ANSWERS_EVERY_S", 0.0)

    def second(*_: Any) -> None:
        with pytest.raises(RunError, match=f"E-RUN-202.*`educe eval`, process {os.getpid()} on .*since"):
            Run(trained).suite(file="prompts.jsonl")

    Run(trained).eval(say=second)
    shutil.rmtree(cache_dir() / "answers")
    Run(trained).eval(progress=AnswerScreen().progress)
    assert re.search(
        r"tuned: 1 of 3 answered\n.*tuned: 2 of 3 answered\n.*tuned: 3 answered\n", capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "options,says",
    [
        (["--also", "http://127.0.0.1:1"], "--also-model"),
        (["--price-in", "1"], "--also"),
        (["--also", "http://127.0.0.1:1", "--also-model", "m", "--max-cost", "1"], "E-SAMPLE-103"),
        (["--also", "http://example.org", "--also-model", "m"], "E-SAMPLE-301"),
        (["--also", "http://127.0.0.1:1", "--also-model", "m", "--regrade"], "--regrade"),
    ],
)
def test_wrong_use_is_told_before_anything_is_done(options: list[str], says: str) -> None:
    out = CliRunner().invoke(cli, ["eval", "no-such-run", *options], standalone_mode=False)
    assert isinstance(out.exception, EduceError)
    assert says in str(out.exception)


def test_a_cap_leaves_the_evaluation_as_it_was(trained: Path) -> None:
    before = (trained / "scores.json").read_bytes()
    with serving(knowing(trained)) as seen:
        out = eval_with(trained, seen, "--max-requests", "2", model="capped")
        assert isinstance(out.exception, EduceError)
        assert out.exception.code == "E-SAMPLE-201"
        assert not seen.bodies
    assert (trained / "scores.json").read_bytes() == before


def scored(correct: dict[str, int], about: dict[str, Any]) -> dict[str, Any]:
    line = {"answer": "a", "stopped": True, "num_tokens": 3}
    graded = {n: [{**line, "correct": i < k, "score": float(i < k)} for i in range(20)] for n, k in correct.items()}
    return score(graded, "exact", dict.fromkeys(correct, 1.0), None, about)


def test_each_other_system_is_compared_with_the_tuned_one() -> None:
    about = {"a-1": {"label": "A", "cost": 0.5}, "b-2": {"label": "B", "cost": None}}
    found = scored({"untouched": 2, "tuned": 18, "a-1": 19, "b-2": 3}, about)
    assert [(c["before"], c["after"]) for c in found["comparisons"]] == [
        (n, "tuned") for n in ("untouched", "a-1", "b-2")
    ]
    assert "A reaches 95 % for 0.5 USD; the tuned one is not shown to be better" in found["verdict"]
    assert "B reaches 15 %; the tuned one is better" in found["verdict"]


def with_other(place: Path, name: str, label: str, answer: str = "other said this") -> str:
    run = make_run(place)
    scores = json.loads(run.scores.read_text())
    scores["systems"][name] = {**scores["systems"]["tuned"], "label": label, "cost": 0.0421}
    scores["comparisons"].append({**scores["comparisons"][0], "before": name})
    write_file(run.scores, scores)
    lines = [{**line, "answer": answer} for line in read_jsonl(run.answers / "tuned.jsonl")]
    write_file(run.answers / "lab-1.jsonl", lines)
    return build_report(run)


def test_the_page_shows_it_in_every_table(tmp_path: Path) -> None:
    html = with_other(tmp_path, "lab-1", "A Lab/model-of-many-letters")
    text = Page(html).text
    assert not Page(html).open
    assert "Tuned against A Lab/model-of-many-letters" in text
    assert "0.0421" in text
    assert "other said this" in text
    assert "A Lab/model-o…" in text  # beside its bar
    assert 'class="bar other"' in html
    assert "USD" not in Page(build_report(make_run(tmp_path / "plain"))).text


@pytest.mark.parametrize("name", ["../../recipe", "/etc/passwd", ".hidden", "a/b", "", "x" * 200, "tuned\n"])
def test_a_name_that_is_no_name_of_a_file_is_not_read(tmp_path: Path, name: str) -> None:
    assert "A Lab" not in Page(with_other(tmp_path, name, "A Lab")).text.replace("Tuned against", "")


@pytest.mark.parametrize("payload", some(PAYLOADS[:12], 4))
def test_labels_and_answers_of_others_are_text(tmp_path: Path, payload: str) -> None:
    plain = Page(with_other(tmp_path / "plain", "lab-1", "x", "y"))
    assert Page(with_other(tmp_path / "bad", "lab-1", payload, payload)).shape == plain.shape
