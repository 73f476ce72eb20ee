"""A run of stages: each begins where another ended, stands where nothing changed, goes on where it was killed, and is compared."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import educe  # noqa: E402
from educe.errors import EduceError  # noqa: E402
from educe.evaluate.ifeval.examples import EXAMPLES  # noqa: E402
from educe.evaluate.ifeval.prompts import Instruction, Task  # noqa: E402
from educe.files.jsonl import read_jsonl  # noqa: E402
from educe.model.describe import describe_model  # noqa: E402
from educe.recipes import stage_scores  # noqa: E402
from educe.recipes.machine import chosen_device  # noqa: E402
from educe.recipes.run_stages import check_stages, eval_stages  # noqa: E402
from educe.sample import local  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from small_runs import Dying, final, same  # noqa: E402
from test_engine import _one_thread  # noqa: E402, F401
from test_export import command  # noqa: E402

pytestmark = pytest.mark.usefixtures("_one_thread")

WORDS = ("the", "user", "said", "hello", "model", "yes", "no", "one", "two", "three", "four", "order")
TRAIN = "batch_tokens: 256, micro_batch_tokens: 128"


def sentence(numbers: random.Random, least: int = 3) -> str:
    return " ".join(numbers.choices(WORDS, k=numbers.randint(least, least + 5)))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Path]:
    place, numbers = tmp_path_factory.mktemp("stages"), random.Random(3)
    texts = [{"text": sentence(numbers, 10)} for _ in range(40)]
    rows = [{"prompt": f"{sentence(numbers)} {k}", "response": numbers.choice(WORDS)} for k in range(40)]
    pairs = [
        {"prompt": f"{sentence(numbers)} {k}", "chosen": "yes yes", "rejected": sentence(numbers)} for k in range(40)
    ]
    for name, lines in (("texts", texts), ("rows", rows), ("pairs", pairs)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDUCE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.chdir(place)
        chosen_device.cache_clear()
        shutil.copytree(tiny_model, place / "tiny")
        yield place
    chosen_device.cache_clear()


def recipe(place: Path, name: str, rate: str = "5e-3", model: str = "./tiny", more: str = "") -> Path:
    path = place / f"{name}.yaml"
    path.write_text(
        f"""name: {name}
model: {model}
device: cpu
dtype: float32
stages:
  - kind: pretrain
    data: {{train: texts.jsonl, test: {{kind: share, share: 0.2}}, max_tokens: 64}}
    train: {{{TRAIN}, learning_rate: 1e-2, checkpoint_every_steps: 2}}
  - kind: sft
    data: {{train: rows.jsonl, test: {{kind: share, share: 0.2}}, max_tokens: 64}}
    train: {{{TRAIN}, learning_rate: {rate}, checkpoint_every_steps: 2}}
  - kind: preference
    loss: {{kind: dpo, beta: 0.5}}
    data: {{train: pairs.jsonl, test: {{kind: share, share: 0.2}}, max_tokens: 64}}
    train: {{{TRAIN}, learning_rate: 5e-3, checkpoint_every_steps: 2}}
{more}evaluation: {{metric: exact, max_new_tokens: 4}}
""",
        encoding="utf-8",
    )
    return path


DIRECT = """  - kind: preference
    name: direct
    start: base
    loss: orpo
    tuning: {kind: lora, rank: 4}
    data: {train: pairs.jsonl, test: {kind: share, share: 0.2}, max_tokens: 64}
    train: {batch_tokens: 256, micro_batch_tokens: 128, learning_rate: 1e-2}
"""


@pytest.fixture(scope="module")
def chain(place: Path) -> Path:
    """All stages in one go."""
    made = educe.train(recipe(place, "chain", more=DIRECT))
    assert made.path == place / "runs" / "chain"
    return made.path


def losses(run: Path, kind: str = "step") -> list[dict[str, Any]]:
    return [x for x in read_jsonl(run / "metrics.jsonl") if x["kind"] == kind]


def test_each_stage_begins_where_another_ended(chain: Path, place: Path) -> None:
    names = ["1-pretrain", "2-sft", "3-preference", "4-direct"]
    assert sorted(p.name for p in chain.iterdir() if p.name[0].isdigit()) == names
    models = [json.loads((chain / n / "provenance.json").read_text())["model"]["name"] for n in names]
    assert models == [str(place / "tiny"), str(chain / names[0]), str(chain / names[1]), str(place / "tiny")]
    text = losses(chain / names[0], "dev")
    assert text[-1]["loss"] < text[0]["loss"]
    trained = losses(chain / names[0])[0]
    assert trained["trained_tokens"] > 0.9 * trained["tokens"]  # all but the first of each text


def test_pairs_start_at_their_reference_and_part(chain: Path) -> None:
    first, *_, last = losses(chain / "3-preference")
    assert first["loss"] == pytest.approx(0.6931472, abs=1e-5)
    assert first["pairs"]["margin"] == pytest.approx(0, abs=1e-4)
    assert last["loss"] < first["loss"]
    before, *_, after = losses(chain / "3-preference", "dev")
    assert before["loss"] == pytest.approx(0.6931472, abs=1e-5)
    assert after["loss"] < before["loss"]
    assert after["pairs"]["accuracy"] > 0.5
    assert before["pairs"]["ranked"] > 0.9  # the start's own ranking, where its loss sees nothing but ties
    assert before["kl"] == pytest.approx(0, abs=1e-6)
    assert after["kl"] > 1e-4
    assert not [x for x in read_jsonl(chain / "3-preference" / "metrics.jsonl") if x["kind"] == "score"]


def test_what_stands_is_passed_over(chain: Path, place: Path) -> None:
    before = {p: p.read_bytes() for p in chain.glob("*/metrics.jsonl")}
    said: list[str] = []
    educe.train(recipe(place, "chain", more=DIRECT), say=said.append)
    assert sum("is trained already" in line for line in said) == 4
    assert {p: p.read_bytes() for p in chain.glob("*/metrics.jsonl")} == before


def test_a_changed_stage_is_refused_and_made_anew_on_request(place: Path) -> None:
    path = recipe(place, "redone")
    run = educe.train(path).path
    first, second = final(run / "1-pretrain"), final(run / "2-sft")
    with pytest.raises(EduceError, match=r"train.learning_rate was 0.005, now 0.004.*--redo sft"):
        educe.train(recipe(place, "redone", rate="4e-3"))
    with pytest.raises(EduceError, match="'rlhf' is no stage"):
        educe.train(path, redo="rlhf")
    said: list[str] = []
    educe.train(recipe(place, "redone", rate="4e-3"), redo="sft", say=said.append)
    assert sum("is deleted, to be made anew" in line for line in said) == 2  # the stage after it starts from it
    assert same(final(run / "1-pretrain"), first)
    assert not same(final(run / "2-sft"), second)


@pytest.mark.parametrize(
    "stage,step", [("sft", 3), ("preference", 3), pytest.param("preference", 1, marks=pytest.mark.slow)]
)
def test_a_killed_run_goes_on_in_its_stage_to_the_same_bits(chain: Path, place: Path, stage: str, step: int) -> None:
    name = f"killed-{stage}-{step}"
    path, others = recipe(place, name), {"sft": ["pretrain"], "preference": ["pretrain", "sft"]}[stage]
    k = len(others)

    class Later(Dying):
        """Dies in the stage that is meant."""

        def step(self, report: Any) -> None:
            if (place / "runs" / name / f"{k + 1}-{stage}").is_dir():
                super().step(report)

    with pytest.raises(MemoryError):
        educe.train(path, screen=Later(step=step))
    said: list[str] = []
    run = educe.train(path, say=said.append).path
    assert sum("is trained already" in line for line in said) == k
    for n in ("1-pretrain", "2-sft", "3-preference"):
        assert same(final(run / n), final(chain / n)), n
        assert [x["loss"] for x in losses(run / n)] == [x["loss"] for x in losses(chain / n)]


def test_a_model_from_scratch(place: Path) -> None:
    path = recipe(
        place, "scratch", model="{init: random, vocabulary: 320, layers: 1, width: 32, heads: 2, kv_heads: 1}"
    )
    for words in (
        ("prepare", "scratch.yaml#sft"),
        ("inspect", "scratch.yaml#pretrain"),
        ("train", "scratch.yaml#pretrain"),
    ):
        shutil.rmtree(place / "runs" / "scratch", ignore_errors=True)
        assert command(*words)[0] == 0, words  # it is made for any verb on any stage
    text = path.read_text(encoding="utf-8")
    for rate, said in (("5e-3", None), ("5e-5", "is low")):  # of random weights, not of trained ones
        path.write_text(text.replace("1e-2", rate), encoding="utf-8")
        checked = check_stages(path)
        assert set(checked) == {"pretrain", "sft", "preference"}
        warned = [w for w in checked["pretrain"].warnings if "train.learning_rate" in w]
        assert bool(warned) is bool(said) is any("is low" in w for w in warned)
    path.write_text(text, encoding="utf-8")
    made = educe.train(path).path
    facts = describe_model(made / "0-random", "scratch")
    assert facts.hidden_size == 32
    assert len([*(made / "prepared").iterdir()]) == 3  # each stage's once: looked at ahead, and when it is reached
    assert 257 < facts.vocab_size <= 320  # few texts have few pairs of bytes to join
    weights = load_file(made / "0-random" / "model.safetensors")
    shutil.rmtree(made)
    again = educe.train(path).path
    assert same(load_file(again / "0-random" / "model.safetensors"), weights)
    dev = losses(again / "1-pretrain", "dev")
    assert dev[-1]["loss"] < dev[0]["loss"]
    path.write_text(path.read_text().replace("vocabulary: 320", "vocabulary: 310"))
    with pytest.raises(EduceError, match="was made of other texts, sizes or another seed"):
        educe.train(path)
    with pytest.raises(EduceError, match="or make all anew: --redo pretrain"):
        educe.train(path, redo="sft")
    text = path.read_text()
    path.write_text(text.replace("pairs.jsonl", "texts.jsonl"))
    with pytest.raises(EduceError, match=r"E-DATA-005 stage 3 of 3: preference"):
        educe.train(path, redo="pretrain")
    for n in ("1-pretrain", "2-sft", "3-preference"):
        assert (again / n / "provenance.json").is_file()  # nothing was deleted for either
    assert same(load_file(again / "0-random" / "model.safetensors"), weights)
    assert not (again / "0-random.new").exists()
    path.write_text(text)
    (again / "0-random.new").mkdir()  # of a process that was killed
    educe.train(path, redo="pretrain")
    assert not (again / "0-random.new").exists()
    assert describe_model(again / "0-random", "scratch").vocab_size <= 310


# What each stage gave and took


class Cells(HTMLParser):
    """Texts of a page, and whether anything in it would run."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.live: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "script" or any(name.startswith("on") for name, _ in attrs):
            self.live.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def scores(chain: Path) -> dict[str, Any]:
    return eval_stages(chain)


def test_every_model_is_measured_on_the_same_sets(chain: Path, scores: dict[str, Any]) -> None:
    names = ["base", "pretrain", "sft", "preference", "direct"]
    by = {line["key"]: line for line in scores["measures"]}
    assert set(by) == {"domain", "general", "task", "ends", "questions", "questions_end", "pairs", "kl"}
    assert all(list(line["values"]) == names for line in by.values())
    for values in (line["values"][n] for line in by.values() for n in names):
        assert values["low"] <= values["value"] <= values["high"]
    assert by["kl"]["values"]["base"]["value"] == pytest.approx(0, abs=1e-6)
    assert by["domain"]["changes"]["pretrain"]["high"] < 0
    assert set(by["domain"]["changes"]) == set(names[1:])
    assert scores["stages"]["direct"]["start"] == "base"
    assert scores["stages"]["direct"]["tuning"] == "lora"
    assert any(said.startswith("domain text better by") for said in scores["stages"]["pretrain"]["said"])
    change = by["domain"]["changes"]["direct"]["value"]
    assert change == pytest.approx(by["domain"]["values"]["direct"]["value"] - by["domain"]["values"]["base"]["value"])


def test_nothing_is_measured_twice(chain: Path, scores: dict[str, Any]) -> None:
    said: list[str] = []
    assert eval_stages(chain, say=said.append) == scores
    assert not [line for line in said if "measured on" in line]
    answers = [read_jsonl(p) for p in (chain / "measured").glob("*/answers.jsonl")]
    assert len(answers) == 5
    assert {line["set"] for line in answers[0]} == {"task", "general"}


def test_instructions_are_measured_where_they_are_asked_for(
    chain: Path, scores: dict[str, Any], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verdicts are those of the answers kept; an evaluation without the suite keeps them, of other weights they are left out."""
    pytest.importorskip("langdetect")
    pytest.importorskip("nltk")
    asked = [
        Instruction(kind=kind, arguments=EXAMPLES[kind].arguments)
        for kind in ("punctuation:no_comma", "change_case:english_lowercase")
    ]
    monkeypatch.setattr(local, "BATCH_TOKENS", 100)
    tasks = [Task(key=str(k), prompt=f"say hello {k}", instructions=(asked[k % 2],)) for k in range(40)]
    (place / "prompts.jsonl").write_text("".join(json.dumps(t.as_json()) + "\n" for t in tasks))
    more = ("--suite", "ifeval", "--suite-file", "prompts.jsonl", "--suite-rows", "36", "--suite-tokens", "2")
    loaded: list[Path] = []
    load = stage_scores.load_model
    monkeypatch.setattr(
        stage_scores, "load_model", lambda place, *a, **k: (loaded.append(place), load(place, *a, **k))[1]
    )
    code, out = command("eval", "runs/chain", *more)
    assert code == 0, out
    assert len(loaded) == len({*loaded}) == 5  # each model once, for more prompts than are kept at a time
    assert "instructions followed" in out
    found = json.loads((chain / "stage_scores.json").read_text())
    (line,) = (m for m in found["measures"] if m["key"] == "instructions")
    for name, value in line["values"].items():
        kept = read_jsonl(chain / "suites" / "ifeval" / f"{name}.jsonl")
        assert len(kept) == line["rows"] == 36
        wanted = [all(i.followed_by(x["answer"]) for i in tasks[int(x["key"])].instructions) for x in kept]
        assert value["value"] == pytest.approx(sum(wanted) / len(wanted))
    told: list[str] = []
    assert eval_stages(chain, say=told.append) == found
    assert command("report", "runs/chain")[0] == 0
    assert "36 of 40 prompts, answers cut after 2 tokens" in (chain / "report.html").read_text()
    (chain / "suites" / "ifeval" / "sft.jsonl").write_text("")
    assert eval_stages(chain, say=told.append)["measures"] == scores["measures"]
    assert "warning: instructions (IFEval) cannot be read" in told[-1]
    shutil.rmtree(chain / "suites")
    assert eval_stages(chain, say=told.append) == scores


def test_a_stage_that_is_not_trained_is_named(place: Path) -> None:
    path = recipe(place, "half")
    with pytest.raises(MemoryError):
        educe.train(path, screen=Dying(step=1))
    with pytest.raises(EduceError, match=r"1-pretrain.*is not trained to its end"):
        eval_stages(place / "runs" / "half")


def test_the_verbs_end_well(chain: Path, scores: dict[str, Any], place: Path) -> None:
    code, out = command("eval", "runs/chain")
    assert code == 0
    assert "domain text, bits/byte" in out
    assert "Next: educe report runs/chain" in out
    assert "runs/chain/report.html" in command("report", "runs/chain")[1]
    page = Cells()
    page.feed((chain / "report.html").read_text(encoding="utf-8"))
    assert not page.live
    assert "What each stage gave and took" in page.texts
    html = (chain / "report.html").read_text(encoding="utf-8")
    for name in ("1-pretrain", "2-sft", "3-preference", "4-direct"):  # each leads to the other
        assert f'href="{name}/report.html"' in html
        assert 'href="../report.html"' in (chain / name / "report.html").read_text(encoding="utf-8")
    assert " min</td>" not in html  # seconds are said as such
    assert command("report", "runs/chain", "--format", "md")[1].startswith("# chain: its stages")
    assert json.loads(command("report", "runs/chain", "--format", "json")[1])["measures"] == scores["measures"]
    code, said = command("check", "chain.yaml")
    assert code == 0, said
    assert "stage 4 of 4: direct (preference)" in said
    assert "all stages" in said
    code, said = command("check", "chain.yaml", "--without-weights")
    assert code == 0, said  # the weights that it began with are not there to be compared
    code, said = command("check", "chain.yaml#sft", "--without-weights")
    assert code == 0, said


def test_the_loop_alone_goes_backward() -> None:
    """Every objective is trained by one loop; the probe of compiled layers makes a pass of its own and no step."""
    root = Path(educe.__file__).parent
    callers = {
        p.relative_to(root).as_posix() for p in root.rglob("*.py") if ".backward(" in p.read_text(encoding="utf-8")
    }
    assert callers == {"training/loop.py", "model/compiled.py"}
