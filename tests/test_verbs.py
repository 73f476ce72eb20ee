"""The whole job on a tiny model, by command line and by Python: what each verb leaves behind, and that a stopped run loses nothing."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import educe  # noqa: E402
from educe.chat.prompt import render_prompt  # noqa: E402
from educe.chat.tokens import load_tokenizer  # noqa: E402
from educe.cli.main import main  # noqa: E402
from educe.errors import RunError  # noqa: E402
from educe.files.jsonl import read_jsonl  # noqa: E402
from educe.recipes.machine import chosen_device  # noqa: E402
from educe.recipes.run import Run  # noqa: E402
from educe.types import Message  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: E402

import forked  # noqa: E402
from small_runs import Dying  # noqa: E402

STOP = [0, 2]
Tensors = dict[str, torch.Tensor]


def command(*words: str | Path) -> tuple[int, str]:
    """`educe WORDS` in this process: exit code and everything it said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), pytest.raises(SystemExit) as ended:
        main([str(w) for w in words])
    return int(ended.value.code or 0), said.getvalue()


def row(i: int) -> dict[str, Any]:
    intent = ("refund", "track", "cancel")[i % 3]
    system = {"role": "system", "content": ("Write JSON.", "Write a list.")[i % 2]}
    asked = {"role": "user", "content": f"order {1000 + 7 * i}: the user said {intent} the item"}
    said = {"role": "assistant", "content": json.dumps([{"intent": intent}, [intent]][i % 2])}
    return {"messages": [system, asked, said]}


BAD = ["{not json", '{"messages": [{"role": "asistant", "content": "x"}]}', '{"text": "no format"}']


@dataclass(frozen=True)
class Job:
    """The directory the verbs worked in, the model, and what each verb said."""

    place: Path
    model: Path
    recipe: Path
    said: dict[str, tuple[int, str]]

    @property
    def run(self) -> Path:
        return self.place / "runs" / "orders"

    def other(self, name: str, **changes: str) -> Path:
        """A recipe of another name with some `key: value` lines changed or added to `train`."""
        text = re.sub(r"(?m)^name: .*$", f"name: {name}", self.recipe.read_text(encoding="utf-8"))
        for key, value in changes.items():
            line = re.compile(rf"(?m)^( *){key}: .*$")
            changed = line.sub(rf"\g<1>{key}: {value}", text)
            text = changed if line.search(text) else text.replace("\ntrain:\n", f"\ntrain:\n  {key}: {value}\n")
        path = self.place / f"{name}.yaml"
        path.write_text(text, encoding="utf-8")
        return path


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory, a cache of its own and one CPU (inherited by processes): tiny tensors are slower on more."""
    place = tmp_path_factory.mktemp("job")
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    cpus, threads = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None, torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDUCE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.chdir(place)
        if cpus:
            os.sched_setaffinity(0, {sorted(cpus)[worker % len(cpus)]})
            torch.set_num_threads(1)
        chosen_device.cache_clear()
        yield place
        if cpus:
            os.sched_setaffinity(0, cpus)
        chosen_device.cache_clear()
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def job(quick: Path, tiny_model: Path) -> Job:
    """init, check, train, eval, report and export by command line, once."""
    model = quick / "tiny"
    shutil.copytree(tiny_model, model)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": STOP}))
    long = row(0)
    long["messages"][1]["content"] += " and" * 150
    lines = [json.dumps(row(i)) for i in range(40)]
    (quick / "orders.jsonl").write_text("\n".join([*lines[:20], *BAD, json.dumps(long), *lines[20:]]) + "\n")
    recipe = quick / "recipe.yaml"
    said = {"init": command("init", "--data", "orders.jsonl", "--model", model)}
    text = recipe.read_text(encoding="utf-8")
    text = re.sub(r"max_tokens: \d+", "max_tokens: 160", text, count=1)
    text = re.sub(r"batch_tokens: \d+", "batch_tokens: 320", text)
    text = re.sub(r"micro_batch_tokens: \d+", "micro_batch_tokens: 160", text)
    text = re.sub(r"learning_rate: [\d.e-]+", "learning_rate: 1.5e-2", text.replace("epochs: 3.0", "epochs: 24.0"))
    recipe.write_text(text + "device: cpu\ndtype: float32\n", encoding="utf-8")
    run = quick / "runs" / "orders"
    for verb, *more in (["check", recipe], ["train", recipe], ["eval"], ["report"], ["export", run, quick / "out"]):
        said[str(verb)] = command(str(verb), *more)
    return Job(place=quick, model=model, recipe=recipe, said=said)


def logits(network: Any, messages: list[dict[str, str]], tokenizer: Any) -> torch.Tensor:
    ids = torch.tensor([render_prompt(tuple(Message(**m) for m in messages), tokenizer)])
    with torch.no_grad():
        return network(input_ids=ids, use_cache=False).logits


def by_transformers(network: Any, messages: list[dict[str, str]], tokenizer: Any, most: int) -> tuple[str, int]:
    """transformers' own greedy answer and its number of tokens."""
    ids = render_prompt(tuple(Message(**m) for m in messages), tokenizer)
    made = network.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=most)[0, len(ids) :].tolist()
    return tokenizer.decode(made[:-1] if made[-1] in STOP else made), len(made)


def final(run: Path) -> Tensors:
    (checkpoint,) = (run / "checkpoints").iterdir()
    return load_file(checkpoint / "weights.safetensors")


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[n]) for n, t in a.items())


def story(run: Path) -> list[Any]:
    """Every line of metrics.jsonl and samples.jsonl without what a clock measured."""
    clock = ("tokens_per_s", "elapsed_s", "peak_memory_bytes", "took_s")
    return [
        {k: v for k, v in line.items() if k not in clock}
        for f in ("metrics", "samples")
        for line in read_jsonl(run / f"{f}.jsonl")
    ]


# The job


@pytest.mark.parametrize(
    "verb,says",
    [
        ("init", "Written to recipe.yaml. Next: educe check recipe.yaml"),
        ("check", "44 in = 34 train + 2 dev + 4 test + 4 not used"),
        ("train", "Trained: "),
        ("eval", "of the test rows right"),
        ("report", "report.html"),
        ("export", "read back: logits are the same to the bit"),
    ],
)
def test_every_verb_ends_well_and_says_so(job: Job, verb: str, says: str) -> None:
    code, said = job.said[verb]
    assert code == 0, said
    assert says in said


def test_the_run_directory_is_complete(job: Job) -> None:
    scores = json.loads((job.run / "scores.json").read_text())
    assert scores["metric"] == "json"
    assert set(scores["systems"]) == {"untouched", "few_shot", "tuned"}
    for name in scores["systems"]:
        lines = read_jsonl(job.run / "answers" / f"{name}.jsonl")
        assert len(lines) == scores["num_rows"] == 4
        assert scores["systems"][name]["correct"] == sum(line["correct"] for line in lines)
    assert scores["verdict"].split(":")[0] in (job.run / "report.html").read_text(encoding="utf-8")
    assert (job.run / "recipe.yaml").read_text() == job.recipe.read_text()
    dev = [line["loss"] for line in read_jsonl(job.run / "metrics.jsonl") if line["kind"] == "dev"]
    assert 10 * dev[-1] < dev[0] == scores["dev_loss"][0]
    provenance = json.loads((job.run / "provenance.json").read_text())
    assert provenance["packed"] and provenance["finished"]  # noqa: PT018
    assert provenance["steps"] == max(line["step"] for line in read_jsonl(job.run / "metrics.jsonl"))


def test_every_row_is_in_the_ledger_once(job: Job) -> None:
    ledger = read_jsonl(job.run / "ledger.jsonl")
    assert [line["line"] for line in ledger] == list(range(1, 45))
    statuses = Counter(line["status"] for line in ledger)
    assert statuses == {"train": 34, "dev": 2, "test": 4, "refused": 3, "dropped": 1}
    codes = {line["line"]: line["code"] for line in ledger if line["code"]}
    assert codes == {21: "E-DATA-102", 22: "E-DATA-142", 23: "E-DATA-109", 24: "E-DATA-201"}


def test_the_export_is_the_trained_model(job: Job) -> None:
    ours = LlamaForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    missing = ours.load_state_dict(final(job.run), strict=False)
    assert missing.unexpected_keys == []
    assert missing.missing_keys in ([], ["lm_head.weight"])  # tied
    theirs = AutoModelForCausalLM.from_pretrained(job.place / "out")
    untouched = LlamaForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    tokenizer = load_tokenizer(job.model)
    for line in read_jsonl(job.run / "answers" / "tuned.jsonl"):
        found = logits(theirs, line["prompt"], tokenizer)
        assert torch.equal(found, logits(ours, line["prompt"], tokenizer))
        assert not torch.allclose(found, logits(untouched, line["prompt"], tokenizer), atol=1e-2)


def test_the_export_prompts_and_answers_as_the_evaluation_did(job: Job) -> None:
    tokenizer, ours = AutoTokenizer.from_pretrained(job.place / "out"), load_tokenizer(job.model)
    network = AutoModelForCausalLM.from_pretrained(job.place / "out")
    assert sorted(network.generation_config.eos_token_id) == STOP == sorted(ours.stop)
    most = Run(job.run).recipe.evaluation.max_new_tokens
    lines = read_jsonl(job.run / "answers" / "tuned.jsonl")
    assert {line["answer"][0] for line in lines} == {"{", "["}  # as the system message asks
    for line in lines:
        ids = tokenizer.apply_chat_template(line["prompt"], add_generation_prompt=True, return_dict=False)
        assert ids == render_prompt(tuple(Message(**m) for m in line["prompt"]), ours)
        assert by_transformers(network, line["prompt"], ours, most) == (line["answer"], line["num_tokens"])


def test_an_export_never_goes_over_something(job: Job) -> None:
    before = sorted((job.place / "out").iterdir())
    code, said = command("export", job.run, job.place / "out")
    assert (code, "E-RUN-203" in said) == (2, True)
    assert sorted((job.place / "out").iterdir()) == before
    with pytest.raises(RunError, match="E-RUN-203"):
        Run(job.run).export(job.recipe)


def test_training_again_does_nothing(job: Job) -> None:
    before = {p: p.read_bytes() for p in (job.run / "checkpoints").rglob("*") if p.is_file()}
    code, said = command("train", job.recipe)
    assert (code, "nothing to do" in said) == (0, True)
    assert {p: p.read_bytes() for p in (job.run / "checkpoints").rglob("*") if p.is_file()} == before


def test_other_settings_under_the_same_name_are_refused(job: Job) -> None:  # 76: never a run of two recipes
    old = Run(job.run).recipe.train.learning_rate
    code, said = command("train", job.other("orders", learning_rate="0.00123"))
    assert code == 2
    for word in ("E-RUN-201", "train.learning_rate", f"was {old}", "now 0.00123"):
        assert word in said
    assert Run(job.run).recipe.train.learning_rate == old
    with pytest.raises(RunError, match=r"E-RUN-201 .*and \d+ more"):
        educe.train(job.other("orders", learning_rate="0.00123", seed="5"))


def test_settings_that_change_no_weight_may_change(job: Job) -> None:
    changed = job.other("orders", checkpoint_every_steps="3", max_new_tokens="9")
    assert "nothing to do" in command("train", changed)[1]
    assert educe.train(job.recipe).recipe.evaluation.max_new_tokens != 9


def test_answers_are_graded_again_without_a_model(job: Job) -> None:
    before = json.loads((job.run / "scores.json").read_text())
    assert Run(job.run).eval(regrade=True) == before
    assert command("eval", job.run, "--regrade")[0] == 0


def test_the_latest_run_is_meant_when_none_is_named(job: Job, lora: Run) -> None:
    for latest in (job.run, lora.path, job.run):
        moment = time.time() + 60
        os.utime(job.run / "metrics.jsonl", (moment - 200, moment - 200))
        os.utime(job.run / "recipe.resolved.json", (moment - 200, moment - 200))
        os.utime(latest / "metrics.jsonl", (moment, moment))
        assert str(Path("runs") / latest.name) in command("report")[1]
        assert Run().path.resolve() == latest
        os.utime(latest / "metrics.jsonl", (moment - 100, moment - 100))
    assert command("report", job.place)[0] == 2


def test_chat_answers_as_the_export_does(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = row(1)["messages"][1]
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{asked['content']}\n/quit\n"))
    code, said = command("chat", job.run, "--max-new-tokens", "12")
    network, tokenizer = AutoModelForCausalLM.from_pretrained(job.place / "out"), load_tokenizer(job.model)
    assert (code, f"tuned > {by_transformers(network, [asked], tokenizer, 12)[0]}" in said) == (0, True)


# LoRA, through Python


@pytest.fixture(scope="module")
def lora(job: Job) -> Run:
    recipe = job.other("adapters", tuning="{kind: lora, rank: 4, alpha: 8.0, dropout: 0.1}", epochs="6")
    return educe.train(recipe)


def test_lora_goes_all_the_way(job: Job, lora: Run) -> None:
    said: list[str] = []
    scores = lora.eval(say=said.append)
    assert scores["num_rows"] == 4
    assert sum("taken from the cache" in line for line in said) == 11  # the untouched model was asked for the first run
    out = lora.export(job.place / "merged")
    adapters = final(lora.path)
    assert all("lora_" in n for n in adapters)
    by_hand = LlamaForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    merged = 0
    for name, weight in by_hand.named_parameters():
        path = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{path}.lora_A.default.weight" in adapters:
            a, b = (adapters[f"{path}.lora_{x}.default.weight"] for x in "AB")
            weight.data += (b @ a) * (8.0 / 4)
            merged += 2
    assert merged == len(adapters) == 2 * 7 * 2  # on every linear layer
    tokenizer = load_tokenizer(job.model)
    theirs = AutoModelForCausalLM.from_pretrained(out)
    untouched = LlamaForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    for line in read_jsonl(lora.path / "answers" / "tuned.jsonl"):
        found = logits(theirs, line["prompt"], tokenizer)
        assert torch.allclose(found, logits(by_hand, line["prompt"], tokenizer), atol=1e-5)
        assert not torch.allclose(found, logits(untouched, line["prompt"], tokenizer), atol=1e-3)


def test_a_lora_run_follows_from_its_recipe_alone(job: Job, lora: Run) -> None:
    """Its adapters begin at random numbers: those of the seed, not of what this process drew before."""
    torch.manual_seed(123)
    text = (job.place / "adapters.yaml").read_text().replace("runs: runs ", "runs: again ")
    again = job.place / "again.yaml"
    again.write_text(text)
    assert same(final(educe.train(again).path), final(lora.path))


def test_stored_answers_serve_only_where_answers_end_alike(job: Job, lora: Run) -> None:
    said: list[str] = []
    (job.model / "generation_config.json").write_text(json.dumps({"eos_token_id": [*STOP, 66]}))
    try:
        educe.train(job.other("ends", epochs="1")).eval(say=said.append)
    finally:
        (job.model / "generation_config.json").write_text(json.dumps({"eos_token_id": STOP}))
    again = [x for x in said if "taken from the cache" in x and not x.startswith("untouched, best prompt: ")]
    assert not again  # the best prompt may be none, and is asked as such


# Stopping


def test_a_run_that_broke_off_ends_as_if_it_had_not(job: Job) -> None:
    """Before its first checkpoint, and twice after the same one."""
    recipe = job.other("broken", checkpoint_every_steps="4")
    for step in (2, 5, 6):
        with pytest.raises(MemoryError):
            educe.train(recipe, screen=Dying(step=step))
    run = educe.train(recipe).path
    assert same(final(run), final(job.run))
    assert story(run) == story(job.run)


def started(recipe: Path, steps: int) -> forked.Forked:
    """`educe train RECIPE` as a process of its own, once it has written some steps."""
    metrics = recipe.parent / "runs" / recipe.stem / "metrics.jsonl"
    process = forked.educe("train", recipe)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.is_file() and metrics.read_text().count('"kind": "step"') >= steps:
            return process
        time.sleep(0.002)
    process.kill()
    pytest.fail(f"ended or hung before it was stopped: {process.communicate()}")


def test_ctrl_c_saves_and_the_same_command_goes_on_to_the_same_bits(job: Job) -> None:
    recipe = job.other("stopped", checkpoint_every_steps="40")
    run, total = job.place / "runs" / "stopped", json.loads((job.run / "provenance.json").read_text())["steps"]
    process = started(recipe, 3)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130, said
    saved = max(int(p.name.removeprefix("step-")) for p in (run / "checkpoints").iterdir())
    assert 3 <= saved < total
    assert f"Saved after step {saved}. The same command goes on from there." in said
    code, refused = command("eval", run)
    assert (code, "E-RUN-002" in refused) == (2, True)
    assert f"going on after step {saved} of {total}" in command("train", recipe)[1]
    assert same(final(run), final(job.run))
    assert story(run) == story(job.run)
