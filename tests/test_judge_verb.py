"""`educe judge` on a run directory, before judges that are functions of what they are asked."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from educe.cli.judge import show_judged
from educe.cli.main import cli
from educe.errors import EvalError, RunError, UsageError
from educe.evaluate.judge.mt_bench import MtQuestion
from educe.evaluate.judge.questions import read_mt_questions
from educe.files.run_dir import RunDir
from educe.recipes.judge import judge, regrade
from educe.recipes.judge_mt import answer_turns
from educe.recipes.judging import Wish
from educe.recipes.run import Run, train
from educe.report import build_report
from educe.sample.sampler import Sampler
from educe.types import Answer, Message, Prompt, Sampling

from run_directory import write_file
from servers import said, serving
from test_judge_pairs import better
from test_judging import Judge, honest, shown

NUM_ROWS = 12


def none(name: str) -> Sampler:
    raise AssertionError(f"{name} need not be loaded: its answers are stored")


def say(line: str) -> None: ...


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "run")
    for name in ("untouched", "tuned"):
        lines = [
            {
                "row": f"test.jsonl:{i}",
                "prompt": [{"role": "user", "content": f"Question {i}?"}],
                "expected": f"the right answer to {i}",
                "answer": f"well said about {i} indeed" if name == "tuned" else "no no no no",
            }
            for i in range(NUM_ROWS)
        ]
        write_file(made.answers / f"{name}.jsonl", lines)
    return made


def test_two_judges_are_not_asked_of_one_run_at_a_time(run: RunDir) -> None:
    """What each of them pays for would be paid for twice."""
    wish: dict[str, Any] = {"bench": "rows"}
    run.resolved.write_text("{}")
    for asked in ({"regrade": True}, {"url": "http://127.0.0.1:9/v1", "model": "m"}):
        with run.lock("judge"), pytest.raises(RunError, match=r"E-RUN-202.*`educe judge`, process \d+"):
            Run(run.path).judge(**asked, **wish)


def test_rows_are_judged_in_both_orders_and_can_be_read_again(run: RunDir) -> None:
    wish = Wish(bench="rows")
    scores = judge(run, wish, Judge(honest), none, say)
    assert scores["win_rate"]["value"] == 1.0
    assert scores["counts"] == {"questions": NUM_ROWS, "judged": NUM_ROWS, "unparsed": 0, "equal": 0, "split": 0}
    assert scores["mean_length"]["own"] > scores["mean_length"]["other"]
    assert scores["length_controlled"]["with_difficulty"] is False
    assert len(scores["canaries"]) == 4
    assert judge(run, Wish(bench="rows", most=2), Judge(honest), none, say)["canaries"] == scores["canaries"]
    assert judge(run, wish, Judge(honest), none, say) == scores
    lines = run.load(run.judged / "rows-untouched.jsonl")
    assert len(lines) == 2 * NUM_ROWS
    assert run.load(run.judged / "rows-untouched.json") == scores
    again = regrade(run, wish)
    assert json.dumps(again, sort_keys=True) == json.dumps(scores, sort_keys=True)


def test_a_fooled_judge_writes_nothing(run: RunDir) -> None:
    with pytest.raises(EvalError, match="E-EVAL-302"):
        judge(run, Wish(bench="rows"), Judge(lambda _: "m"), none, say)
    assert not run.judged.exists()


def test_verdicts_that_cannot_be_read_are_said(run: RunDir) -> None:
    def lazy(text: str) -> str:
        return "Both." if "Question 4?" in text and "well said" in text else honest(text)

    scores = judge(run, Wish(bench="rows"), Judge(lazy), none, say)
    assert scores["counts"]["unparsed"] == 2
    assert scores["counts"]["judged"] == NUM_ROWS - 1


def test_constant_answers_are_pointed_out(run: RunDir) -> None:
    lines = run.load(run.answers / "tuned.jsonl")
    write_file(run.answers / "tuned.jsonl", [{**x, "answer": "the one best answer of all of them"} for x in lines])
    assert "are the same" in judge(run, Wish(bench="rows"), Judge(honest), none, say)["lint"][0]


def test_instructions_are_answered_and_judged_against_a_file(run: RunDir, tmp_path: Path) -> None:
    instructions = [{"instruction": f"Tell me of {i}", "output": f"The baseline tells of {i}."} for i in range(8)]
    write_file(tmp_path / "set.json", instructions)
    (tmp_path / "hard.csv").write_text("," + "instruction_difficulty\n" + "".join(f"{i},{i / 4}\n" for i in range(8)))
    wish = Wish(
        bench="alpaca-eval",
        questions=tmp_path / "set.json",
        against=str(tmp_path / "set.json"),
        difficulty=tmp_path / "hard.csv",
    )
    longer = Judge(lambda text: f"I say so much more about {text[-1]} than anybody else would")
    scores = judge(run, wish, Judge(honest), lambda name: longer, say)
    assert scores["win_rate"]["value"] == 1.0
    assert scores["length_controlled"]["with_difficulty"] is True
    assert re.fullmatch(r"alpaca-eval-set-[0-9a-f]{6}", wish.name)
    assert (run.judged / f"{wish.name}.jsonl").is_file()
    (tmp_path / "set.json").unlink()
    again = regrade(run, Wish(bench="alpaca-eval", against=wish.against))  # reads verdicts alone
    assert again["win_rate"] == scores["win_rate"]


class Counting(Judge):
    """Remembers how many prompts it was asked."""

    asked = 0

    def sample(self, prompts: Any, sampling: Sampling, progress: Any = None) -> list[Answer]:
        self.asked += len(prompts)
        return super().sample(prompts, sampling, progress)


def test_a_judge_is_tried_before_hours_of_answering(run: RunDir, tmp_path: Path) -> None:
    write_file(tmp_path / "set.json", [f"Tell me of {i}" for i in range(40)])
    systems = {name: Counting(lambda text: f"some words on {text[-1]}") for name in ("untouched", "tuned")}
    wish = Wish(bench="alpaca-eval", questions=tmp_path / "set.json")
    with pytest.raises(EvalError, match="E-EVAL-302"):
        judge(run, wish, Judge(lambda _: "m"), lambda name: systems[name], say)
    assert (systems["untouched"].asked, systems["tuned"].asked) == (12, 0)
    judge(run, wish, Judge(honest), lambda name: systems[name], say)
    assert (systems["untouched"].asked, systems["tuned"].asked) == (12 + 40, 40)
    whole = judge(run, wish, Judge(honest), lambda name: systems[name], say)
    file = [{"instruction": f"Tell me of {i}", "output": f"some words on {i}"} for i in range(40)]
    write_file(tmp_path / "other.json", file)
    for against in ("untouched", str(tmp_path / "other.json")):
        one = judge(run, replace(wish, most=2, against=against), Judge(honest), lambda name: systems[name], say)
        assert one["counts"]["questions"] == 2
        assert {n: len(p) for n, p in one["canaries"].items()} == {n: len(p) for n, p in whole["canaries"].items()}


def test_a_row_with_two_answers_is_refused(run: RunDir) -> None:
    lines = run.load(run.answers / "untouched.jsonl")
    write_file(run.answers / "untouched.jsonl", [*lines, {**lines[0], "answer": "another"}])
    with pytest.raises(EvalError, match=r"E-EVAL-002 .*jsonl:13.*test.jsonl:0 is answered twice"):
        judge(run, Wish(), Judge(honest), none, say)


@pytest.mark.parametrize("content", [[{"instruction": "a", "output": "b"}], [{"row": "test.jsonl:1"}], {"row": 1}])
def test_a_file_of_other_things_is_no_file_of_answers(run: RunDir, tmp_path: Path, content: Any) -> None:
    file = tmp_path / ("a.json" if isinstance(content, dict) else "a.jsonl")
    write_file(file, content)
    with pytest.raises(EvalError, match="E-EVAL-002"):
        judge(run, Wish(against=str(file)), Judge(honest), none, say)


@pytest.mark.parametrize("choices", [[], [{"turns": ["one"]}], [{}], "no", [{"turns": [1, 2]}]])
def test_references_of_another_shape_are_said(tmp_path: Path, choices: Any) -> None:
    write_file(tmp_path / "q.jsonl", [{"question_id": 1, "category": "stem", "turns": ["a", "b"]}])
    write_file(tmp_path / "r.jsonl", [{"question_id": 1, "choices": choices}])
    with pytest.raises(EvalError, match="E-EVAL-003"):
        read_mt_questions(tmp_path / "q.jsonl", tmp_path / "r.jsonl")


class Talker:
    """Answers with what it was asked so far, and remembers how."""

    name = "talker"

    def __init__(self) -> None:
        self.asked: list[tuple[Prompt, Sampling]] = []

    def sample(self, prompts: Any, sampling: Sampling, progress: Any = None) -> list[Answer]:
        self.asked += [(p, sampling) for p in prompts]
        return [Answer(text=f"said {len(p.messages)}", num_tokens=2, stopped=True) for p in prompts]


def test_the_second_turn_follows_the_first_at_the_categorys_temperature() -> None:
    questions = [
        MtQuestion(name="1", category="writing", turns=("a", "b")),
        MtQuestion(name="2", category="math", turns=("c", "d"), reference=("x", "y")),
    ]
    talker = Talker()
    assert answer_turns(questions, talker, 64) == {"1": ["said 1", "said 3"], "2": ["said 1", "said 3"]}
    assert {(p.key, s.temperature) for p, s in talker.asked} == {("1/1", 0.7), ("1/2", 0.7), ("2/1", 0.0), ("2/2", 0.0)}
    second = next(p for p, _ in talker.asked if p.key == "2/2")
    assert [m.content for m in second.messages] == ["c", "said 1", "d"]


def test_mt_bench_rates_both_systems(run: RunDir, tmp_path: Path) -> None:
    questions = [{"question_id": i, "category": "math", "turns": [f"{i} + 1?", "And?"]} for i in range(4)]
    references = [{"question_id": i, "choices": [{"turns": [f"It is {i + 1}", f"It is {i + 2}"]}]} for i in range(4)]
    write_file(tmp_path / "q.jsonl", questions)
    write_file(tmp_path / "r.jsonl", references)

    def rates(text: str) -> str:
        if "[The Start of Assistant's Answer]\nIt is" in text or "tuned said" in text:
            return "Rating: [[8]]"
        return "no rating" if "untouched said 3" in text and "0 + 1?" in text else "Rating: [[1]]"

    wish = Wish(bench="mt-bench", questions=tmp_path / "q.jsonl", references=tmp_path / "r.jsonl")
    systems = {
        name: Judge(lambda text, n=name: f"{n} said {3 if text == 'And?' else 1}") for name in ("tuned", "untouched")
    }
    scores = judge(run, wish, Judge(rates), lambda name: systems[name], say)
    assert scores["systems"]["tuned"]["mean"] == 8.0
    assert scores["systems"]["untouched"]["unparsed"] == 1
    assert scores["systems"]["untouched"]["by_turn"] == {"1": 1.0, "2": 1.0}
    assert regrade(run, wish)["systems"] == scores["systems"]


def test_mt_bench_compares_both_systems(run: RunDir, tmp_path: Path) -> None:
    """The other models' answers are longer, and this judge likes that."""
    kinds = ("math", "stem") * 4
    questions = [{"question_id": i, "category": c, "turns": [f"{i}?", "And?"]} for i, c in enumerate(kinds)]
    references = [{"question_id": i, "choices": [{"turns": ["It is so and so"] * 2}]} for i in range(0, 8, 2)]
    write_file(tmp_path / "q.jsonl", questions)
    write_file(tmp_path / "r.jsonl", references)
    systems = {"tuned": Counting(lambda _: "well"), "untouched": Counting(lambda _: "well said by me")}
    wish = Wish(
        bench="mt-bench", pairwise=True, questions=tmp_path / "q.jsonl", references=tmp_path / "r.jsonl", most=7
    )
    with pytest.raises(EvalError, match="E-EVAL-302"):
        judge(run, wish, Judge(lambda _: "[[A]]"), lambda name: systems[name], say)
    assert (systems["untouched"].asked, systems["tuned"].asked) == (
        4,
        0,
    )  # two turns of the two that no reference is to
    scores = judge(run, wish, Judge(better), lambda name: systems[name], say)
    assert scores["win_rate"]["value"] == 0
    assert scores["verdict"] == "The judge prefers the other answers."
    assert regrade(run, Wish(bench="mt-bench", pairwise=True)) == scores
    assert "mt-bench: tuned against untouched" in build_report(run)
    show_judged(scores)


@pytest.mark.parametrize(
    "fields, told",
    [
        ({"bench": "mt-bench"}, "--questions"),
        ({"bench": "mt-bench", "questions": Path("q")}, "--references"),
        ({"bench": "alpaca-eval"}, "CC BY-NC"),
        ({"bench": "other"}, "--bench"),
        ({"pairwise": True}, "--pairwise"),
    ],
)
def test_what_is_missing_is_named_with_its_licence(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=re.escape(told)):
        judge(RunDir(Path("nowhere")), Wish(**fields), Judge(honest), none, say)


def test_the_shape_of_a_comparison_is_known_to_these_tests() -> None:
    assert shown("# Answer of model m\n\nx\n\n# Answer of model M\n\ny\n\n# Your task") == ("x", "y")


def test_another_machine_is_asked_over_http_where_that_is_wanted(run: RunDir) -> None:
    run.resolved.write_text("{}")
    asked = ["judge", str(run.path), "--judge", "http://203.0.113.1/v1", "--judge-model", "m", "--max-requests", "1"]
    found = CliRunner().invoke(cli, asked)
    assert "--plain-http" in str(found.exception)
    wish = {"against": str(run.path / "missing.jsonl"), "plain_http": True}  # nothing is sent
    with pytest.raises(EvalError, match=r"missing\.jsonl is not there"):
        Run(run.path).judge("http://203.0.113.1/v1", "m", **wish)


def _judged(
    answer: Callable[[str], str], run: RunDir, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> tuple[Any, list[Any]]:
    """`educe judge` as a user calls it, before a server on this machine."""
    monkeypatch.setenv("EDUCE_CACHE", str(tmp_path / "cache"))
    run.resolved.write_text("{}")
    with serving(lambda body, _: said(answer(body["messages"][-1]["content"]))) as seen:
        found = CliRunner().invoke(cli, ["judge", str(run.path), "--judge", seen.url, "--judge-model", "referee"])
        return found, seen.bodies


def test_the_verb_asks_a_server_and_shows_the_figures_together(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found, bodies = _judged(honest, run, monkeypatch, tmp_path)
    assert found.exit_code == 0, found.output
    for figure in ("win rate            100.0 %", "length-controlled", "mean length", "0 verdicts could not be read"):
        assert figure in found.output
    assert len(bodies) == 2 * NUM_ROWS + 24  # 4 canaries, 3 questions, 2 orders
    assert all(b["model"] == "referee" and b["temperature"] == 0 for b in bodies)
    page = build_report(run)
    assert "rows: tuned against untouched" in page
    assert "100.0 % wins" in page


def test_a_fooled_judge_on_a_server_is_refused_with_the_numbers(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found, bodies = _judged(lambda _: "M", run, monkeypatch, tmp_path)
    assert isinstance(found.exception, EvalError)
    assert found.exception.code == "E-EVAL-302"
    assert "not beaten in 3 of 6" in found.exception.found
    assert len(bodies) == 24  # nothing is spent on a judge that is fooled
    assert not run.judged.exists()


def test_the_page_shows_a_hostile_judge_as_text(run: RunDir) -> None:
    judge(run, Wish(bench="rows"), Judge(honest), none, say)
    file = run.judged / "rows-untouched.json"
    write_file(file, {**run.load(file), "judge": "<img src=x onerror=alert(1)>", "lint": ["<script>1</script>"]})
    write_file(run.judged / "broken.json", ["no object"])
    page = build_report(run)
    assert "<img src=x" not in page
    assert "<script>1" not in page
    assert "&lt;img src=x" in page


@pytest.mark.slow
def test_a_real_runs_models_answer_both_turns(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tmp_path: Path
) -> None:
    """A trained run, its two models loaded one after the other, a judge on loopback, verdicts in the run."""
    small_runs = pytest.importorskip("small_runs")
    from educe.recipes.kept_samplers import samplers_of  # torch

    questions = [
        {"question_id": i, "category": c, "turns": [f"order {i}", "and?"]}
        for i, c in enumerate(("math", "stem", "writing"))
    ]
    write_file(tmp_path / "q.jsonl", questions)
    write_file(tmp_path / "r.jsonl", [{"question_id": 0, "choices": [{"turns": ["It is 2", "It is 3"]}]}])

    def rates(text: str) -> str:
        return "[[9]]" if "Assistant's Answer]\nIt is 2" in text else "[[1]]"

    with small_runs.small_place(tmp_path_factory, tiny_model) as place:
        trained = train(small_runs.recipe(place, "judged", epochs=1))
        with serving(lambda body, _: said(rates(body["messages"][-1]["content"]))) as seen:
            files = {"questions": tmp_path / "q.jsonl", "references": tmp_path / "r.jsonl"}
            told: list[str] = []
            for _ in range(2):
                scores = trained.judge(
                    seen.url, "referee", bench="mt-bench", max_new_tokens=4, say=told.append, **files
                )
        taken = [line for line in told if "taken from the cache" in line]
        prompt = Prompt(key="long", messages=(Message(role="user", content="order " * 300),))
        told.clear()
        samplers_of(trained.dir, told.append)("tuned").sample([prompt], Sampling(max_new_tokens=4000))
        assert any("answers are cut after" in line for line in told), told
    assert {name: s["rated"] for name, s in scores["systems"].items()} == {"untouched": 6, "tuned": 6}
    assert len(taken) == 12  # two systems, two turns, three temperatures: all of the second time
    lines = trained.dir.load(trained.dir.judged / "mt-bench.jsonl")
    assert any(x["answers"][0] for x in lines)
    assert [len(x["answers"]) for x in lines[:2]] == [1, 2]


def test_a_judge_that_could_not_be_read_is_asked_again_as_is_said(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EDUCE_CACHE", str(tmp_path / "cache"))
    run.resolved.write_text("{}")
    mended = False
    with serving(lambda body, _: said(honest(body["messages"][-1]["content"]) if mended else "Both are fine.")) as seen:
        asked = ["judge", str(run.path), "--judge", seen.url, "--judge-model", "referee"]
        found = CliRunner().invoke(cli, asked)
        assert isinstance(found.exception, EvalError)
        assert found.exception.code == "E-EVAL-301"
        (kept,) = re.findall(r"before (\S+) is deleted", found.exception.fix)
        mended = True
        Path(kept).unlink()
        found = CliRunner().invoke(cli, asked)
    assert found.exit_code == 0, found.output
