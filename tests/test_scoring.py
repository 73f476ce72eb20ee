"""Dev rows graded while a run trains: the metric over steps, and nothing of the training is another for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import educe  # noqa: E402
from educe.chat.prompt import completion_tokens  # noqa: E402
from educe.chat.tokens import load_tokenizer  # noqa: E402
from educe.config import load_recipe  # noqa: E402
from educe.evaluate.metrics import Question  # noqa: E402
from educe.files.jsonl import read_jsonl, write_jsonl  # noqa: E402
from educe.files.run_dir import RunDir  # noqa: E402
from educe.model.load import CausalLM  # noqa: E402
from educe.recipes.answers import Asked  # noqa: E402
from educe.recipes.machine import chosen_device  # noqa: E402
from educe.recipes.prepare import prepare  # noqa: E402
from educe.recipes.run import Run, quiet  # noqa: E402
from educe.recipes.scoring import longest_answer  # noqa: E402
from educe.report import build_report  # noqa: E402
from educe.report.reading import read_run  # noqa: E402
from educe.sample.local import LocalSampler  # noqa: E402
from educe.types import Conversation, Message, Source  # noqa: E402

from small_runs import Dying, final, made, recipe, same, small_place, story  # noqa: E402
from test_engine import _one_thread, cpu  # noqa: E402, F401

QUICK = {"epochs": 8, "measure_every_share": 0.25, "checkpoint_every_steps": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Path]:
    with small_place(tmp_path_factory, tiny_model) as here:
        yield here


@pytest.fixture(scope="module")
def graded(place: Path) -> tuple[Run, list[str]]:
    said: list[str] = []
    return educe.train(recipe(place, "graded", "json", score_rows=9, **QUICK), say=said.append), said


def scores(run: Path) -> list[dict[str, Any]]:
    return [x for x in read_jsonl(run / "metrics.jsonl") if x["kind"] == "score"]


def test_dev_rows_are_graded_at_each_measurement(graded: tuple[Run, list[str]]) -> None:
    run, said = graded
    found, steps = scores(run.path), made(run.path)["steps"]
    at = [x["step"] for x in found]
    assert (at[0], at[-1]) == (0, steps)
    assert at == [x["step"] for x in read_jsonl(run.path / "metrics.jsonl") if x["kind"] == "dev"]
    assert all(x["rows"] == 9 and 0 <= x["right"] <= 9 and x["metric"] == "json" for x in found)
    assert sum("more times while it trains" in line for line in said) == 1
    assert [g.step for g in read_run(run.dir).graded] == at
    asked = sorted({x["step"] for x in read_jsonl(run.path / "samples.jsonl")})
    assert asked == [0, steps]  # so short a run would give the same answers again


def test_the_weights_are_the_same_bits_without_them(place: Path, graded: tuple[Run, list[str]]) -> None:
    plain = educe.train(recipe(place, "plain", "json", score_rows=0, **QUICK))
    assert not scores(plain.path)
    assert same(final(plain.path), final(graded[0].path))
    assert story(plain.path) == [x for x in story(graded[0].path) if x.get("kind") != "score"]


def test_a_killed_run_grades_each_measurement_once(place: Path, graded: tuple[Run, list[str]]) -> None:
    path = recipe(place, "killed", "json", score_rows=9, **QUICK)
    for death in (Dying(step=scores(graded[0].path)[1]["step"] + 1), Dying(dev=made(graded[0].path)["steps"])):
        with pytest.raises(MemoryError):
            educe.train(path, screen=death)
    run = educe.train(path)
    assert same(final(run.path), final(graded[0].path))
    assert story(run.path) == story(graded[0].path)


def test_free_text_is_not_graded(place: Path) -> None:
    assert not scores(educe.train(recipe(place, "text", epochs=2, measure_every_share=0.5)).path)


def asked_of(text: str, thought: str | None) -> Asked:
    said = (Message(role="user", content="hello"), Message(role="assistant", content=text, reasoning=thought))
    question = Question(row="a:1", prompt=({"role": "user", "content": "hello"},), expected=text)
    return Asked(question=question, row=Conversation(messages=said, source=Source(file="a", line=1)))


def test_an_answer_is_cut_where_it_can_be_right_no_more(place: Path) -> None:
    """To the letter: after twice the longest trained answer, its reasoning and the template's words in it. By any other metric a
    longer answer may be right, and the test's own limit holds."""
    asked = [asked_of("ab", None), asked_of("abc", None)]
    tokenizer = prepare(load_recipe(recipe(place, "asked")), quiet).tokenizer
    trained = max(completion_tokens(a.row, tokenizer) or 0 for a in asked)
    assert trained > len(tokenizer.encode_plain("abc"))
    assert longest_answer("exact", 500, asked, tokenizer) == 2 * trained + 32
    assert longest_answer("label", 40, asked, tokenizer) == min(40, 2 * trained + 32)
    assert longest_answer("exact", 500, [*asked, asked_of("a", "so long a thought")], tokenizer) == 500
    for metric in ("json", "json_fields", "tool_calls", "sql", "rouge_l", "custom"):
        assert longest_answer(metric, 500, asked, tokenizer) == 500


def test_a_function_that_raises_ends_the_grading_and_nothing_else(place: Path) -> None:
    (place / "raising.py").write_text(
        "def mark(answer, expected, row):\n    if answer != expected:\n        raise KeyError('lost')\n    return 0.5\n"
    )
    said: list[str] = []
    file = recipe(place, "raising", metric="custom, function: 'raising:mark'", score_rows=9, **QUICK)
    run = educe.train(file, say=said.append)
    assert run.finished
    assert not scores(run.path)
    assert sum("graded no more" in line and "KeyError: 'lost'" in line for line in said) == 1


def test_a_mean_is_told_as_a_mean(place: Path) -> None:
    (place / "half.py").write_text("def mark(answer, expected, row):\n    return 0.5 if answer else 0.0\n")
    run = educe.train(recipe(place, "half", metric="custom, function: 'half:mark'", score_rows=9, **QUICK))
    assert all(x["right"] == 0 and x["score"]["value"] > 0 for x in scores(run.path))
    (last,) = read_run(run.dir).graded[-1:]
    assert (last.metric, last.value, last.right) == ("custom", scores(run.path)[-1]["score"]["value"], 0)
    assert "Mean score of answers to dev rows" in build_report(run.dir)


def test_the_best_weights_are_told_as_those_of_their_step(place: Path) -> None:
    """This run's held-out loss falls, then rises: the last line is of weights that are not the last step's."""
    run = educe.train(recipe(place, "best", "json", score_rows=9, keep_weights="best", checkpoint_every_steps=500))
    found = scores(run.path)
    kept = made(run.path)["weights_step"]
    assert kept < found[-1]["step"]
    assert [x["weights_step"] for x in found] == [*(x["step"] for x in found[:-1]), kept]
    there = {x["step"]: x["right"] for x in found[:-1]}
    assert there.get(kept, found[-1]["right"]) == found[-1]["right"]
    assert max(g.step for g in read_run(run.dir).graded) == found[-2]["step"]


def test_another_metric_begins_another_line(tmp_path: Path) -> None:
    def one(step: int, metric: str, rows: int) -> dict[str, Any]:
        score = {"value": 0.5, "low": 0.1, "high": 0.9}
        return {
            "kind": "score",
            "step": step,
            "weights_step": step,
            "metric": metric,
            "score": score,
            "right": 1,
            "rows": rows,
        }

    lines = [one(0, "exact", 9), one(4, "exact", 9), one(8, "json", 9), one(12, "json", 9)]
    for more, steps in (([], [8, 12]), ([one(16, "json", 3)], [16])):
        write_jsonl(tmp_path / "metrics.jsonl", [*lines, *more])
        assert [g.step for g in read_run(RunDir(tmp_path)).graded] == steps


def test_a_table_of_positions_is_not_read_past_its_end(tiny_tokenizer_dir: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=512, n_positions=24, n_embd=16, n_layer=1, n_head=2)
    model = CausalLM(GPT2LMHeadModel(config).eval(), chosen_device("cpu", "float32"), adapted=False)
    told = replace(load_tokenizer(tiny_tokenizer_dir), stop=frozenset())
    sampler = LocalSampler(model, told)
    prompts = [list(range(3, 3 + n)) for n in (5, 20, 23, 24, 30)]
    answers = sampler.answer(prompts, 8)
    assert [a.num_tokens for a in answers] == [8, 4, 1, 0, 0]
    assert [a.ids for a in answers[:3]] == [sampler.answer([p], 8)[0].ids for p in prompts[:3]]
    assert "".join(sampler.stream(prompts[1], 8)) == answers[1].text
    assert [a.num_tokens for a in sampler.answer(prompts[3:], 8)] == [0, 0]
