"""`educe eval` with graded metrics, programs, a user's function and multiple choice, on a small run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import educe  # noqa: E402
from click.testing import CliRunner  # noqa: E402
from educe.cli.main import cli  # noqa: E402
from educe.errors import EvalError, UsageError  # noqa: E402
from educe.files.jsonl import read_jsonl  # noqa: E402
from educe.recipes import eval as recipes_eval  # noqa: E402
from educe.recipes.export_card import _scores  # noqa: E402
from educe.recipes.run import Run  # noqa: E402
from educe.report import build_report  # noqa: E402

from run_directory import Page  # noqa: E402
from small_runs import recipe, small_place  # noqa: E402

CLOCKS = dict.fromkeys(("general", "shift", "systems"))  # they hold seconds
MINE = (
    "def mark(answer, expected, row):\n    assert row['prompt'][-1]['role'] == 'user'\n    return len(answer) % 2 / 2\n"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Path]:
    """A small run whose recipe names a function, evaluated."""
    with small_place(tmp_path_factory, tiny_model) as place:
        (place / "mine.py").write_text(MINE)
        file = recipe(place, "graded", metric="custom, function: 'mine:mark'", epochs=1)
        run = educe.train(file)
        said: list[str] = []
        run.eval(say=said.append)
        assert any("grading by your own function" in line for line in said)
        yield run.path


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Path]:
    """A small run whose test rows expect tests of programs."""
    with small_place(tmp_path_factory, tiny_model) as place:
        ask = [f"order {i} the user said" for i in range(3)]
        say = [f"assert order({i}) == {i}" for i in range(3)]
        rows = [
            {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
            for a, b in zip(ask, say, strict=True)
        ]
        (place / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        yield educe.train(recipe(place, "programs", epochs=1)).path


def eval_with(trained: Path, *more: str) -> Any:
    return CliRunner().invoke(cli, ["eval", str(trained), *more], standalone_mode=False)


def scores_in(trained: Path) -> dict[str, Any]:
    scores: dict[str, Any] = json.loads((trained / "scores.json").read_text())
    return scores


def test_a_users_function_grades_and_its_error_keeps_the_answers(trained: Path) -> None:
    scores = scores_in(trained)
    lines = read_jsonl(trained / "answers" / "tuned.jsonl")
    assert scores["metric"] == "custom"
    assert [line["score"] for line in lines] == [len(line["answer"]) % 2 / 2 for line in lines]
    assert scores["systems"]["tuned"]["value"] == pytest.approx(sum(line["score"] for line in lines) / len(lines))
    mine = trained.parents[1] / "mine.py"
    mine.write_text("def mark(answer, expected, row):\n    raise KeyError('lost')\n")
    out = eval_with(trained, "--regrade")
    assert isinstance(out.exception, EvalError)
    assert "test.jsonl:1" in str(out.exception)
    assert "KeyError: 'lost'" in str(out.exception)
    assert read_jsonl(trained / "answers" / "tuned.jsonl") == lines
    mine.write_text(MINE)
    assert eval_with(trained, "--regrade").exception is None


def test_answers_that_no_grader_has_seen_are_called_so(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grader fails, or the process is killed between the answers and their scores: nothing is told of other answers."""
    before, mine = scores_in(trained), trained.parents[1] / "mine.py"
    mine.write_text(
        "def mark(answer, expected, row):\n    return {expected: 1}[answer]\n"
    )  # right of expected answers alone
    assert isinstance(eval_with(trained).exception, EvalError)
    mine.write_text(MINE)

    def waits() -> None:
        waiting = scores_in(trained)
        assert (waiting["metric"], waiting["comparisons"]) == ("none", [])
        assert waiting["general"]["text"] == before["general"]["text"]
        page = build_report(Run(trained).dir)
        assert "No grader has seen these answers yet" in page
        assert "Still wrong" not in page
        assert "Tuning helped" not in page
        assert "Not graded" in "".join(_scores(Run(trained).dir))

    waits()
    assert eval_with(trained, "--regrade").exception is None
    assert {**scores_in(trained), **CLOCKS} == {**before, **CLOCKS}

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recipes_eval, "_keep", killed)
        assert eval_with(trained, "--regrade", "--metric", "label").exception is not None
    waits()
    assert eval_with(trained, "--regrade").exception is None


def test_a_graded_metric_is_a_mean_on_the_terminal_and_the_page(trained: Path) -> None:
    out = eval_with(trained, "--regrade", "--metric", "json_fields")
    assert out.exception is None, out.output
    assert "valid" in out.output
    assert "recall" in out.output
    assert "general text (36 passages): " in out.output
    assert "46 general questions: " in out.output
    scores = scores_in(trained)
    assert scores["metric"] == "json_fields"
    assert set(scores["systems"]["tuned"]["parts"]) >= {"valid", "recall"}
    page = build_report(Run(trained).dir)
    assert "F1 of JSON&#39;s fields" in page or "F1 of JSON's fields" in page


def test_programs_run_with_consent_and_several_answers_give_pass_at_k(programs: Path) -> None:
    trained = programs
    out = eval_with(trained, "--metric", "pass_at_k", "--samples", "3")
    assert isinstance(out.exception, EvalError)
    assert "E-EVAL-303" in str(out.exception)
    out = eval_with(trained, "--metric", "pass_at_k", "--samples", "3", "--allow-code")
    assert out.exception is None, out.output
    lines = read_jsonl(trained / "answers" / "tuned.jsonl")
    assert [len(line["others"]) for line in lines] == [2, 2, 2]
    assert (
        len({text for line in lines for text in (line["answer"], *line["others"])}) > 3
    )  # drawn, not the likeliest thrice
    assert set(lines[0]["parts"]) == {"pass@2", "pass@3"}
    again = eval_with(trained, "--metric", "pass_at_k", "--samples", "3", "--allow-code")
    assert again.exception is None
    assert "taken from the cache" in again.output
    assert read_jsonl(trained / "answers" / "tuned.jsonl") == lines  # the draws are the seed's
    (trained / "scores.json").unlink()  # answers are matched by their rows
    assert eval_with(trained, "--regrade", "--metric", "pass_at_k", "--allow-code").exception is None
    assert read_jsonl(trained / "answers" / "tuned.jsonl") == lines
    once = eval_with(trained)
    assert "stored answers were 3 to each row, and are asked for again: `--samples 3` brings them back" in once.output
    refused = eval_with(trained, "--samples", "2", "--also", "http://127.0.0.1:9/v1", "--also-model", "m")
    assert isinstance(refused.exception, UsageError)


def test_a_metric_that_does_not_fit_leaves_the_scores(trained: Path) -> None:
    """Graded again by one that fits they change, and that is said."""
    assert eval_with(trained, "--regrade").exception is None
    before = (trained / "scores.json").read_bytes()
    for metric, says in (("tool_calls", "calls no tool"), ("pass_at_k", "is no test")):
        out = eval_with(trained, "--regrade", "--metric", metric, *(["--allow-code"] if metric == "pass_at_k" else []))
        assert isinstance(out.exception, EvalError)
        assert (out.exception.code, out.exception.where) == ("E-EVAL-201", "test.jsonl:1")
        assert says in out.exception.found
        assert (trained / "scores.json").read_bytes() == before
    out = eval_with(trained, "--regrade", "--metric", "sql")
    value = 100 * json.loads(before)["systems"]["tuned"]["value"]
    assert f"is replaced: the tuned model had {value:.1f} % by custom, and has 0.0 % by sql" in out.output
    assert eval_with(trained, "--regrade").exception is None


def test_what_only_the_scores_knew_is_said_to_be_gone(trained: Path) -> None:
    """Answers are matched by their rows, whatever scores.json knew of them."""
    assert eval_with(trained, "--regrade").exception is None
    before, kept = scores_in(trained), trained / "answers" / "lab-large.jsonl"
    kept.write_bytes((trained / "answers" / "untouched.jsonl").read_bytes())
    (trained / "answers" / "elsewhere.jsonl").write_text('{"row": "other.jsonl:1"}\n')
    (trained / "scores.json").unlink()
    out = eval_with(trained, "--regrade")
    assert out.exception is None
    said = out.output.replace("\n", " ")
    assert "is gone" in said
    assert f"`educe eval {trained}` measures them again" in said
    assert "answers of elsewhere are left out: they are to other rows" in said
    after = scores_in(trained)
    assert list(after["systems"]) == [*before["systems"], "lab-large"]
    assert "Whether it forgot is not known" in after["verdict"]
    assert kept.is_file()
    kept.unlink()
    (trained / "scores.json").write_text(json.dumps(before))


def test_choices_are_ranked_by_both_models(trained: Path, tmp_path: Path) -> None:
    rows = [{"query": f"order {i}", "choices": ["the user said", "hello", "x"], "gold": i % 3} for i in range(6)]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = eval_with(trained, "--choices", str(file), "--suite-rows", "5")
    assert out.exception is None, out.output
    assert "5 questions, by chance 33.3% right" in out.output
    found = json.loads((trained / "suites" / "choices-mine.json").read_text())
    assert set(found["systems"]) == {"untouched", "tuned"}
    lines = {n: read_jsonl(trained / "suites" / "choices-mine" / f"{n}.jsonl") for n in found["systems"]}
    assert lines["untouched"] != lines["tuned"]
    assert len(lines["tuned"]) == found["num_rows"] == 5
    page = Page(build_report(Run(trained).dir)).text
    assert "Multiple choice: mine" in page
    assert "Its mean byte" in page
    assert "By chance 33.3 % are right" in page


SERVED = ("--also-model", "--also-key", "--plain-http", "--price-in", "--price-out", "--max-requests", "--max-cost")
OTHERS = (*SERVED, "--general", "--also", "--metric", "--samples", "--allow-code")
IGNORED = [("--suite", o) for o in OTHERS]
IGNORED += [("--choices", o) for o in (*OTHERS, "--suite-file", "--suite-tokens", "--regrade")]


@pytest.mark.parametrize("path,option", IGNORED)
def test_what_would_be_ignored_is_refused(path: str, option: str) -> None:
    """Before a run is looked for."""
    value = () if option in ("--allow-code", "--regrade", "--plain-http") else ("1",)
    out = eval_with(Path("nowhere"), path, "ifeval", option, *value)
    assert isinstance(out.exception, UsageError), out
    assert option in out.exception.found


@pytest.mark.parametrize("more", [("--suite", "ifeval", "--suite-rows", "5"), ("--samples", "3")])
def test_what_asks_a_model_is_refused_beside_regrade(more: tuple[str, ...]) -> None:
    out = eval_with(Path("nowhere"), "--regrade", *more)
    assert isinstance(out.exception, UsageError), out
    assert more[-2] in out.exception.found
