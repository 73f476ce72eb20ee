"""lm-evaluation-harness on educe's models: the numbers of its own class for transformers' models, and of educe's multiple choice;
tasks from files, run before and after. Needs lm-eval (`educe[lm-eval]`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'educe[lm-eval]'")

from educe.chat.prompt import render_prompt  # noqa: E402
from educe.chat.tokens import ChatTokenizer, load_tokenizer  # noqa: E402
from educe.cli.main import cli  # noqa: E402
from educe.config import parse_recipe  # noqa: E402
from educe.errors import EvalError  # noqa: E402
from educe.evaluate.choices import Item, read_items, score_options  # noqa: E402
from educe.evaluate.harness import HarnessModel, before, ending  # noqa: E402
from educe.files.jsonl import read_jsonl  # noqa: E402
from educe.model.blended import read_packed  # noqa: E402
from educe.model.device import Device  # noqa: E402
from educe.model.load import load_model  # noqa: E402
from educe.recipes import both  # noqa: E402
from educe.recipes.run import Run, train  # noqa: E402
from educe.report import build_report  # noqa: E402
from educe.sample.draw import likeliest  # noqa: E402
from educe.types import Message  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from run_directory import Page  # noqa: E402
from small_runs import recipe, small_place  # noqa: E402

CACHED = Path("~/.cache/educe/models/HuggingFaceTB--SmolLM2-135M-Instruct--b179c9523d0e").expanduser()
OWN = parse_recipe("name: a\nmodel: m\ndata: {train: t.jsonl}\n", "r.yaml").template
CPU = Device(kind="cpu", dtype="float32", flops=1e9, why="", name="cpu")
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the cat sat on the <|im_end|> mat"}]
TASKS = {
    "tiny_choice": {
        "output_type": "multiple_choice", "doc_to_text": "{{query}}", "doc_to_choice": "choices", "doc_to_target": "gold",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
    },
    "tiny_answers": {
        "output_type": "generate_until", "doc_to_text": "{{query}}\n", "doc_to_target": "{{choices[gold]}}",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "tiny_text": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{query}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}  # fmt: skip


def asked(kind: str, *args: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=args, idx=0, metadata=("t", 0, 1))


def harness(directory: Path, **more: Any) -> tuple[HarnessModel, ChatTokenizer]:
    model, tokenizer = load_model(directory, CPU), load_tokenizer(directory, OWN)
    read_packed(model, True)
    settings = {"capacity_tokens": 512, "positions": 512, "seed": 0, **more}
    return HarnessModel(lambda: model, tokenizer, **settings), tokenizer


def compared(ours: HarnessModel, theirs: HFLM, requests: list[Instance]) -> None:
    for mine, other, r in zip(
        ours.loglikelihood(requests), theirs.loglikelihood(requests, True), requests, strict=True
    ):
        assert mine[0] == pytest.approx(other[0], abs=1e-4), r.args
        assert mine[1] == other[1], r.args


def questions(shared: Path, num: int) -> list[Item]:
    files = (shared / "eval" / "multiple_choice" / f"{name}.jsonl" for name in ("openbook_qa", "winogrande"))
    return [item for file in files for item in read_items(file)[:num]]


@pytest.fixture(scope="module")
def theirs(tiny_model: Path) -> HFLM:
    return HFLM(pretrained=str(tiny_model), device="cpu", dtype="float32", batch_size=4)


def test_log_probabilities_are_those_of_lm_eval_and_of_choices(shared: Path, tiny_model: Path, theirs: HFLM) -> None:
    ours, tokenizer = harness(tiny_model)
    items = questions(shared, 4)
    requests = [asked("loglikelihood", c.rstrip(), f" {o}") for item in items for c, o in item.texts]
    compared(ours, theirs, requests)
    options = [o for of in score_options(ours._model(), items, tokenizer, 512) for o in of]
    assert [p for p, _ in ours.loglikelihood(requests)] == [o.log_p for o in options]
    edges = [("", "hello"), ("a b\n\n ", "c"), ("the cat", " sat\n"), ("é", " 漢字"), ("x" * 900, " the end")]
    compared(ours, theirs, [asked("loglikelihood", *e) for e in edges])
    assert ours.shortened == 1


def test_what_the_model_would_say_is_greedy(tiny_model: Path, theirs: HFLM) -> None:
    ours, _ = harness(tiny_model)
    asks = [
        asked("generate_until", text, {"max_gen_toks": n, "until": []})
        for text, n in (("hello the", 3), ("user said", 5))
    ]
    said = ours.generate_until(asks)
    assert said == theirs.generate_until(asks, True)
    requests = [
        asked("loglikelihood", r.args[0], text + more) for r, text in zip(asks, said, strict=True) for more in ("", "q")
    ]
    compared(ours, theirs, requests)
    assert {greedy for _, greedy in ours.loglikelihood(requests)} == {True, False}


def test_whole_texts_are_those_of_lm_eval(shared: Path, tiny_model: Path, theirs: HFLM) -> None:
    ours, _ = harness(tiny_model)
    texts = ["hello", *(item.texts[0][0] for item in questions(shared, 3))]
    requests = [asked("loglikelihood_rolling", text) for text in texts]
    assert ours.loglikelihood_rolling(requests) == pytest.approx(theirs.loglikelihood_rolling(requests, True), abs=1e-3)
    (long,) = ours.loglikelihood_rolling([asked("loglikelihood_rolling", "the cat sat " * 300)])  # several windows
    assert long < -1000


def test_answers_end_where_the_task_wants(tiny_model: Path, theirs: HFLM) -> None:
    ours, tokenizer = harness(tiny_model)
    settings = [{"max_gen_toks": 12, "until": until} for until in ([], ["e"], ["t", "ing"], "s")]
    requests = [asked("generate_until", text, dict(s)) for text in ("hello the", "order item intent") for s in settings]
    assert ours.generate_until(requests) == theirs.generate_until(requests, True)
    drawn = asked("generate_until", "hello", {"max_gen_toks": 8, "do_sample": True, "temperature": 1.0})
    twice = ours.generate_until([drawn, drawn])
    assert twice[0] != twice[1]
    assert twice == ours.generate_until([drawn, drawn])
    with pytest.raises(EvalError, match="top_k"):
        ours.generate_until([asked("generate_until", "a", {"top_k": 3})])
    with pytest.raises(EvalError, match="fewer max_gen_toks"):
        ours.generate_until([asked("generate_until", "a", {"max_gen_toks": 600})])
    assert before("a b\nc d", ["\n", "b"]) == "a "
    logits = torch.zeros(1, 512)
    logits[0, tokenizer.encode_plain("e")[0]] = 9.0
    choose = ending(likeliest, ["ee"], tokenizer)
    made = [choose(logits, [4], place)[0] for place in range(3)]
    assert made[2] == tokenizer.eos != made[1]


def test_chat_prompts_are_the_ids_of_training(tiny_model: Path, theirs: HFLM) -> None:
    ours, tokenizer = harness(tiny_model)
    messages = tuple(Message(role=m["role"], content=m["content"]) for m in CHAT)  # type: ignore[arg-type]
    text = ours.apply_chat_template(CHAT)
    ids = render_prompt(messages, tokenizer)
    made = ours._continued(text, "hello")
    assert made.ids_T.tolist() == [*ids, *tokenizer.encode_plain("hello")]
    assert made.weights_T.tolist() == [0.0] * len(ids) + [1.0] * (len(made.ids_T) - len(ids))
    begun = ours.apply_chat_template([*CHAT, {"role": "assistant", "content": "It is"}], add_generation_prompt=False)
    assert begun == f"{text}It is"
    assert ours._continued(begun, " so").ids_T.tolist()[: len(ids)] == ids
    tame = ours.apply_chat_template([{"role": "user", "content": "the cat"}])
    # lm-eval counts the template's last line break to the continuation; educe to the prompt, as a server does.
    (mine,), (other,) = (m.loglikelihood([asked("loglikelihood", tame, "hello")]) for m in (ours, theirs))
    (newline,) = theirs.loglikelihood([asked("loglikelihood", tame.rstrip(), "\n")], True)
    assert mine[0] == pytest.approx(other[0] - newline[0], abs=1e-4)
    with pytest.raises(EvalError, match="Leave --chat out"):
        ours.loglikelihood([asked("loglikelihood", f"{tame} more", "x")])
    with pytest.raises(EvalError, match="a choice is empty"):
        ours.loglikelihood([asked("loglikelihood", tame, "")])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Path]:
    datasets = pytest.importorskip("datasets")
    with small_place(tmp_path_factory, tiny_model) as made, pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(made / "datasets"))
        yield made


@pytest.fixture(scope="module")
def trained(place: Path) -> Run:
    return train(recipe(place, "harnessed", epochs=4))


@pytest.fixture(scope="module")
def tasks(place: Path, shared: Path) -> Path:
    lines = (shared / "eval" / "multiple_choice" / "openbook_qa.jsonl").read_text(encoding="utf-8").splitlines()[:12]
    (place / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (place / "tasks").mkdir()
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(place / "rows.jsonl")}},
        "test_split": "test",
    }
    for name, task in TASKS.items():
        made = {"task": name, **data, **task, "metadata": {"version": 1}}
        (place / "tasks" / f"{name}.yaml").write_text(json.dumps(made), encoding="utf-8")  # JSON is YAML
    return place / "tasks"


def run_tasks(run: Run, tasks: Path, *more: str) -> list[dict[str, Any]]:
    names = [*TASKS][: 1 if "--chat" in more else None]
    cli.main(
        ["eval", str(run.path), "--lm-eval", ",".join(names), "--lm-eval-dir", str(tasks), *more], standalone_mode=False
    )
    return [json.loads((run.dir.suites / f"lm-eval-{n}.json").read_text()) for n in names]


def test_tasks_of_files_are_run_before_and_after(trained: Run, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    choice, answers, text = run_tasks(trained, tasks, "--suite-rows", "8")
    assert "lm-eval 0.4" in capsys.readouterr().out
    assert [m["measure"] for m in choice["measures"]] == ["acc", "acc_norm"]
    lines = {n: read_jsonl(trained.dir.suites / "lm-eval-tiny_choice" / f"{n}.jsonl") for n in ("untouched", "tuned")}
    assert [x["doc_id"] for x in lines["tuned"]] == [x["doc_id"] for x in lines["untouched"]]
    assert len(lines["tuned"]) == 8 == len({x["doc_id"] for x in lines["tuned"]})
    assert lines["tuned"] != lines["untouched"]
    acc = choice["measures"][0]
    for name in lines:
        assert acc["systems"][name]["value"] == sum(x["scores"]["acc"] for x in lines[name]) / 8
    assert acc["difference"]["value"] == pytest.approx(
        acc["systems"]["tuned"]["value"] - acc["systems"]["untouched"]["value"]
    )
    assert (acc["num_rows"], acc["num_in_task"], acc["won"] is not None) == (8, 12, True)
    assert [m["measure"] for m in answers["measures"]] == ["exact_match"]
    assert all(m["difference"] is None and m["why"] for m in text["measures"])
    assert text["measures"][0]["systems"]["tuned"]["value"] > 1
    page = Page(build_report(trained.dir)).text
    assert "lm-eval: tiny_choice" in page
    assert "tiny_choice: acc, 8 rows, higher is better" in page
    with pytest.MonkeyPatch.context() as patch:  # asked again, no model is loaded
        patch.setattr(both, "load_model", None)
        patch.setattr(both, "merged", None)
        assert run_tasks(trained, tasks, "--suite-rows", "8") == [choice, answers, text]
    assert "untouched: 32 of 32 answered before on this machine" in capsys.readouterr().out
    (chatted,) = run_tasks(trained, tasks, "--chat", "--suite-rows", "8")
    assert chatted["chat"] is True
    said = read_jsonl(trained.dir.suites / "lm-eval-tiny_choice" / "tuned.jsonl")
    assert said[0]["arguments"][0][0].endswith("<|im_start|>assistant\n")
    assert [x["doc_id"] for x in said] == [x["doc_id"] for x in lines["tuned"]]


def test_the_same_rows_are_those_of_choices(trained: Run, tasks: Path, place: Path) -> None:
    """`--choices` and lm-eval's task over the same file choose alike."""
    (choice, *_) = run_tasks(trained, tasks)
    ranked = trained.choices(place / "rows.jsonl")
    for name, by in (("acc", "sum"), ("acc_norm", "per_byte")):
        found = next(m for m in choice["measures"] if m["measure"] == name)
        for system in ("untouched", "tuned"):
            assert found["systems"][system]["value"] == pytest.approx(ranked["systems"][system][by]["value"]), (
                name,
                system,
            )


@pytest.mark.parametrize("name,change,word", [
    pytest.param("unknown", None, "is no task", marks=pytest.mark.slow), ("broken", {"output_type": "nonsense"}, "nonsense"),
    ("unsafe", {**TASKS["tiny_choice"], "unsafe_code": True}, "--allow-code"),
    ("away", {**TASKS["tiny_choice"], "dataset_path": "nobody/nothing", "dataset_kwargs": {}}, "Go online once"),
])  # fmt: skip
def test_tasks_that_cannot_be_used_say_why(
    trained: Run, tasks: Path, tmp_path: Path, name: str, change: dict[str, Any] | None, word: str
) -> None:
    if change is not None:
        base = json.loads((tasks / "tiny_choice.yaml").read_text())
        (tmp_path / "t.yaml").write_text(json.dumps({**base, **change, "task": "tiny_own"}))
    with pytest.raises(EvalError, match=word):
        trained.lm_eval("tiny_own", directory=tmp_path)


@pytest.mark.slow
def test_smollm2_has_the_numbers_of_lm_eval(shared: Path) -> None:
    if not CACHED.is_dir():
        pytest.skip("needs SmolLM2-135M-Instruct in the cache")
    theirs = HFLM(pretrained=str(CACHED), device="cpu", dtype="float32", batch_size=4)
    ours, _ = harness(CACHED, positions=2048)
    compared(
        ours, theirs, [asked("loglikelihood", c.rstrip(), f" {o}") for i in questions(shared, 10) for c, o in i.texts]
    )
    asks = [
        asked("generate_until", f"Question: {i.texts[0][0]}\nAnswer:", {"until": ["\n"], "max_gen_toks": 24})
        for i in questions(shared, 3)
    ]
    assert ours.generate_until(asks) == theirs.generate_until(asks, True)
