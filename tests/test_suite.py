"""`educe eval --suite ifeval` on a tiny model: answered, kept, graded, shown, graded again."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("langdetect")
pytest.importorskip("nltk")

from click.testing import CliRunner  # noqa: E402
from educe.cli.main import cli  # noqa: E402
from educe.errors import EvalError, UsageError  # noqa: E402
from educe.evaluate.ifeval.examples import EXAMPLES  # noqa: E402
from educe.evaluate.ifeval.prompts import Instruction, Task  # noqa: E402
from educe.evaluate.ifeval.scores import line_of, score  # noqa: E402
from educe.files.jsonl import read_jsonl  # noqa: E402
from educe.files.locks import one_at_a_time  # noqa: E402
from educe.recipes import both  # noqa: E402
from educe.recipes.kept_samplers import samplers_of  # noqa: E402
from educe.recipes.run import Run, train  # noqa: E402
from educe.sample import local  # noqa: E402
from educe.types import Answer, Message, Prompt, Sampling  # noqa: E402

from small_runs import recipe, small_place  # noqa: E402

KINDS = ("punctuation:no_comma", "change_case:english_lowercase", "keywords:frequency", "startend:quotation")


def task(k: int) -> Task:
    kinds = KINDS[: 1 + k % 3]
    made = tuple(Instruction(kind=n, arguments=EXAMPLES[n].arguments) for n in kinds)
    return Task(key=str(k), prompt=f"say order {k} to the user", instructions=made)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Path]:
    with small_place(tmp_path_factory, tiny_model) as made:
        lines = "".join(json.dumps(task(k).as_json()) + "\n" for k in range(40))
        (made / "prompts.jsonl").write_text(lines, encoding="utf-8")
        yield made


@pytest.fixture(scope="module")
def run(place: Path) -> Run:
    return train(recipe(place, "suited", epochs=4))


def test_a_suite_is_answered_kept_and_graded_again(place: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    done: list[tuple[str, int, int]] = []
    scores = run.suite(
        file=place / "prompts.jsonl", rows=36, max_new_tokens=6, say=said.append, progress=lambda *x: done.append(x)
    )
    assert (scores["num_prompts"], scores["num_in_file"], scores["max_new_tokens"]) == (36, 40, 6)
    assert {x[0] for x in done} == {"untouched", "tuned"}
    assert [x for x in done if x[1] == 36] == [("untouched", 36, 36), ("tuned", 36, 36)]
    stored = run.dir.suites / "ifeval"
    lines = {n: read_jsonl(stored / f"{n}.jsonl") for n in ("untouched", "tuned")}
    assert [x["key"] for x in lines["tuned"]] == [x["key"] for x in lines["untouched"]]
    assert json.loads((run.dir.suites / "ifeval.json").read_text()) == scores

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(both, "load_model", never)
    monkeypatch.setattr(both, "merged", never)
    assert run.suite(regrade=True) == scores
    assert {n: read_jsonl(stored / f"{n}.jsonl") for n in lines} == lines
    again = run.suite(file=place / "prompts.jsonl", rows=36, max_new_tokens=6, say=said.append)
    assert again == scores
    assert [x for x in said if "taken from the cache" in x] == [
        f"{n}: 36 of 36 answered before on this machine; taken from the cache" for n in ("untouched", "tuned")
    ]


def test_a_killed_process_goes_on_where_it_was(place: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "BATCH_TOKENS", 200)

    class Killed(Exception):
        pass

    def dies(system: str, done: int, total: int) -> None:
        if done >= 32:
            raise Killed

    told: list[str] = []
    with pytest.raises(Killed):
        run.suite(file=place / "prompts.jsonl", max_new_tokens=5, progress=dies)
    scores = run.suite(file=place / "prompts.jsonl", max_new_tokens=5, say=told.append)
    assert "untouched: 33 of 40 answered before on this machine; taken from the cache" in told
    assert scores["num_prompts"] == 40


def test_two_processes_that_ask_the_same_take_turns(run: Run) -> None:
    """The second one has the answers of the first, and computes none."""
    said: list[str] = []
    prompts = [Prompt(key=str(k), messages=(Message(role="user", content=f"say {k}"),)) for k in range(3)]
    how = Sampling(max_new_tokens=3)
    first = samplers_of(run.dir, said.append)("tuned")
    given = first.sample(prompts, how)
    file = first.kept.replies.file
    *before, last = file.read_text().splitlines(keepends=True)
    turn = first.kept.replies.turn([json.loads(line)["key"] for line in (*before[-2:], last)])

    def never() -> Any:
        raise AssertionError("a model was loaded, or a lock waited for")

    with ThreadPoolExecutor(1) as pool:
        with one_at_a_time(turn, never):
            file.write_text("".join(before))
            second = samplers_of(run.dir, said.append)("tuned")
            second.kept._model = never
            said.clear()
            asked = pool.submit(second.sample, prompts, how)
            while not said:
                time.sleep(0.01)
            assert not asked.done()
            with file.open("a") as f:
                f.write(last)
        assert [a.text for a in asked.result(30)] == [a.text for a in given]
    assert "another process" in said[0]
    assert file.read_text() == "".join([*before, last])
    assert second.seconds == pytest.approx(first.seconds)


def test_the_command_shows_it_and_the_report_has_it(place: Path, run: Run) -> None:
    shown = CliRunner().invoke(
        cli, ["eval", str(run.path), "--suite", "ifeval", "--suite-file", "prompts.jsonl", "--suite-tokens", "6"]
    )
    assert shown.exit_code == 0, shown.output
    assert "IFEval" in shown.output
    assert all(word in shown.output for word in ("prompts", "instructions", "strict", "loose", "difference"))
    assert "answers were cut after 6 tokens" in shown.output
    page = run.report().read_text(encoding="utf-8")
    assert "Following instructions" in page
    assert "no comma" in page


def test_a_damaged_file_of_a_suite_does_not_stop_the_report(run: Run) -> None:
    file = run.dir.suites / "ifeval.json"
    whole = file.read_text(encoding="utf-8")
    for damage in (
        "{",
        "[]",
        "{}",
        whole.replace('"p_holm"', '"x"'),
        whole.replace('"total": ', '"total": 1e999, "x": '),
    ):
        file.write_text(damage, encoding="utf-8")
        assert "<html" in run.report().read_text(encoding="utf-8")
    file.write_text(whole.replace("punctuation:no_comma", "<script>alert(1)</script>"), encoding="utf-8")
    assert "<script>alert(1)" not in run.report().read_text(encoding="utf-8")
    file.write_text(whole, encoding="utf-8")


def test_wrong_use_is_told(place: Path, run: Run) -> None:
    with pytest.raises(UsageError, match="is not a suite"):
        run.suite("ifeval2")
    with pytest.raises(UsageError, match="Give --suite"):
        CliRunner().invoke(
            cli, ["eval", str(run.path), "--suite-rows", "5"], catch_exceptions=False, standalone_mode=False
        )
    with pytest.raises(EvalError, match="--suite-file") as e:
        run.suite()  # tests are offline
    assert e.value.code == "E-EVAL-003"
    (place / "one.jsonl").write_text(json.dumps(task(0).as_json()), encoding="utf-8")
    with pytest.raises(EvalError, match="one prompt"):
        run.suite(file=place / "one.jsonl")


def lines(rates: tuple[float, float], seed: int) -> list[dict[str, Any]]:
    """Answers that meet each instruction at their system's rate, by the types' own examples."""
    numbers = random.Random(seed)
    made = []
    for k in range(60):
        kind = KINDS[k % 4]
        one = Task(key=str(k), prompt="p", instructions=(Instruction(kind=kind, arguments=EXAMPLES[kind].arguments),))
        text = EXAMPLES[kind].follows if numbers.random() < rates[kind == KINDS[0]] else EXAMPLES[kind].fails
        made.append(line_of(one, Answer(text=text, num_tokens=3, stopped=True)))
    return made


def test_scores_say_what_changed_and_no_more() -> None:
    found = score({"untouched": lines((0.2, 0.2), 1), "tuned": lines((0.2, 1.0), 1)}, {})
    (changed,) = [k for k in found["kinds"] if k["p_holm"] < 0.05]
    assert changed["kind"] == "punctuation:no_comma"
    assert (changed["total"], changed["lost"]) == (15, 0)
    assert found["verdict"].startswith("Instructions are followed better")
    same = score({"untouched": lines((0.5, 0.5), 1), "tuned": lines((0.5, 0.5), 2)}, {})
    assert same["verdict"].startswith("No difference")
    assert "60 prompts show a difference of" in same["verdict"]
    few = lines((0.5, 0.5), 1)[:12]
    assert "12 prompts show a difference of 57.8 points" in score({"untouched": few, "tuned": few}, {})["verdict"]
    said = score({"untouched": few[:5], "tuned": few[:5]}, {})["verdict"]
    assert said.endswith("5 prompts cannot show one: the paired test needs 6 that change.")
    alone = score({"untouched": lines((0.5, 0.5), 1)}, {})
    assert alone["comparisons"] == []
    for system in found["systems"].values():
        for measure in ("prompt_strict", "instruction_strict"):  # one instruction a prompt: the same share
            assert system[measure]["value"] == system["prompt_strict"]["value"]
            assert 0 <= system[measure]["low"] <= system[measure]["value"] <= system[measure]["high"] <= 1
