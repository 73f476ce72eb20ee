"""The whole job on a base model that has no template: `plain` by default, trained, asked and exported with its control tokens."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from educe.cli.main import main  # noqa: E402
from educe.files.jsonl import read_jsonl  # noqa: E402
from educe.model.load import load_model  # noqa: E402
from educe.model.loaded import prove_loaded  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM  # noqa: E402

from conftest import write_tokenizer  # noqa: E402
from test_adapters import cpu  # noqa: E402
from test_new_tokens import KNOWN, NEW, SIZES  # noqa: E402

SYSTEM = 'You say "one word".\n{{ no variable }} 😀 %}'
RECIPE = """name: NAME
model: base
device: cpu
dtype: float32
data:
  train: rows.jsonl
  dev: {kind: share, share: 0.1}
  test: {kind: share, share: 0.2}
  max_tokens: 96
train:
  epochs: 16.0
  batch_tokens: 192
  micro_batch_tokens: 96
  learning_rate: 1e-2
evaluation:
  metric: {kind: exact}
  max_new_tokens: 12
  few_shot: 0
"""


def command(*words: str | Path) -> tuple[int, str]:
    """`educe WORDS` in this process: exit code and everything it said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), pytest.raises(SystemExit) as ended:
        main([str(w) for w in words])
    return int(ended.value.code or 0), re.sub(r"\s+", " ", said.getvalue())


def row(i: int) -> str:
    intent = ("refund", "track", "cancel")[i % 3]
    asked = {"role": "user", "content": f"order {1000 + 7 * i}: the user said {intent} the item"}
    return json.dumps({"messages": [asked, {"role": "assistant", "content": intent}]})


@dataclass(frozen=True)
class Job:
    place: Path
    said: dict[str, str]

    def recipe(self, name: str, more: str = "", old: str = "", new: str = "") -> Path:
        path = self.place / f"{name}.yaml"
        text = RECIPE.replace("NAME", name) + more
        path.write_text(text.replace(old, new) if old else text)
        return path


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """check, train, eval and export of a full tuning; train and export of adapters, and with a setting of the template."""
    place = tmp_path_factory.mktemp("base-model")
    write_tokenizer(place / "base")
    own = (place / "base" / "chat_template.jinja").read_text()
    (place / "base" / "chat_template.jinja").unlink()
    (place / "own.jinja").write_text(own + "{% if enable_thinking is defined and enable_thinking %}think{% endif %}")
    torch.manual_seed(2)
    config = LlamaConfig(vocab_size=KNOWN, tie_word_embeddings=True, **SIZES)
    LlamaForCausalLM(config).save_pretrained(place / "base")
    (place / "rows.jsonl").write_text("\n".join(map(row, range(40))) + "\n")
    made = Job(place=place, said={})
    whole = made.recipe("whole")
    adapters = made.recipe("adapters", "tuning: {kind: lora, rank: 4}\ntemplate: plain\n")
    given = "template: {kind: file, file: own.jinja, settings: {enable_thinking: false}}\n"
    set_ = made.recipe("set", given, "epochs: 16.0", "epochs: 1.0")
    set_.write_text(
        set_.read_text().replace("  max_tokens: 96\n", f"  max_tokens: 160\n  system: {json.dumps(SYSTEM)}\n", 1)
    )
    set_.write_text(set_.read_text().replace("micro_batch_tokens: 96", "micro_batch_tokens: 192"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDUCE_CACHE", str(place / "cache"))
        for words in (
            ["check", whole],
            ["train", whole],
            ["eval", place / "runs" / "whole"],
            ["export", place / "runs" / "whole", place / "out-whole"],
            ["train", adapters],
            ["export", place / "runs" / "adapters", place / "out-adapters"],
            ["train", set_],
            ["export", place / "runs" / "set", place / "out-set"],
        ):
            code, said = command(*words)
            assert code == 0, said
            made.said[f"{words[0]} {Path(words[1]).stem}"] = said
    return made


def weights(run: Path) -> dict[str, Any]:
    (checkpoint,) = (run / "checkpoints").iterdir()
    return load_file(checkpoint / "weights.safetensors")


def test_new_control_tokens_are_said_and_written_down(job: Job) -> None:
    for said in ("check whole", "train whole", "train adapters"):
        assert "<|user|>" in job.said[said]
    assert "token ids and template are those of the training" in job.said["export whole"]
    provenance = json.loads((job.place / "runs" / "whole" / "provenance.json").read_text())
    assert sorted(provenance["new_tokens"].values()) == NEW
    assert provenance["template"] == "plain"


def test_rows_of_the_new_tokens_are_in_the_checkpoint(job: Job) -> None:
    whole, adapters = (weights(job.place / "runs" / n) for n in ("whole", "adapters"))
    assert whole["model.embed_tokens.weight"].shape[0] == NEW[-1] + 1
    (rows,) = [t for n, t in adapters.items() if "lora_" not in n]
    assert rows.shape[0] == len(NEW)


@pytest.mark.parametrize("name", ["whole", "adapters"])
def test_the_export_loads_with_its_tokens_and_stops_at_them(job: Job, name: str) -> None:
    target = job.place / f"out-{name}"
    tokenizer, network = AutoTokenizer.from_pretrained(target), AutoModelForCausalLM.from_pretrained(target)
    assert network.config.vocab_size == NEW[-1] + 1
    assert NEW[-1] in network.generation_config.eos_token_id
    asked = json.loads(row(3))["messages"][:1]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert ids[0] == NEW[1]
    assert ids[-1] == NEW[2]
    text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    assert text == f"<|user|>{asked[0]['content']}<|end|>\n<|assistant|>"


def test_the_export_answers_as_the_evaluation_did(job: Job) -> None:
    target = job.place / "out-whole"
    tokenizer, network = AutoTokenizer.from_pretrained(target), AutoModelForCausalLM.from_pretrained(target)
    lines = read_jsonl(job.place / "runs" / "whole" / "answers" / "tuned.jsonl")
    assert lines
    for line in lines:
        ids = tokenizer.apply_chat_template(line["prompt"], add_generation_prompt=True, return_dict=False)
        made = network.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12)[0, len(ids) :].tolist()
        assert tokenizer.decode(made, skip_special_tokens=True) == line["answer"]
        assert (made[-1] in (2, NEW[-1])) == line["stopped"]
    assert sum(line["stopped"] for line in lines) > len(lines) / 2


def test_settings_of_the_template_are_handed_to_the_server(job: Job) -> None:
    serve = "--default-chat-template-kwargs '{\"enable_thinking\": false}'"
    assert f"vllm serve {job.place / 'out-set'} {serve}" in job.said["export set"]
    assert f"vllm serve . {serve}" in (job.place / "out-set" / "README.md").read_text()
    assert "chat-template-kwargs" not in (job.place / "out-whole" / "README.md").read_text()
    assert "chat-template-kwargs" not in job.said["export whole"]


def test_the_recipes_system_prompt_is_in_the_exported_template(job: Job) -> None:
    assert "puts the recipe's system prompt before a conversation" in job.said["export set"]
    tokenizer = AutoTokenizer.from_pretrained(job.place / "out-set")
    asked, other = {"role": "user", "content": "hi"}, {"role": "system", "content": "be brief"}
    prompts = [
        tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
        for talk in ([asked], [{"role": "system", "content": SYSTEM}, asked], [other, asked])
    ]
    assert prompts[0] == prompts[1]
    assert SYSTEM in prompts[0]
    assert SYSTEM not in prompts[2]


@pytest.mark.parametrize(
    "more,old,new,names",
    [
        ("template: chatml\n", "", "", "template.kind was 'own', now 'chatml'"),
        ("template: {kind: own, stop: ['<|endoftext|>']}\n", "", "", "template.stop was [], now ['<|endoftext|>']"),
        ("", "max_tokens: 96\n", "max_tokens: 96\n  prompt_weight: 0.5\n", "data.prompt_weight was 0.0, now 0.5"),
        ("", "share: 0.1}", "share: 0.15}", "data.dev was"),
    ],
)
def test_what_decides_the_weights_cannot_change_under_a_run(
    job: Job, more: str, old: str, new: str, names: str
) -> None:
    path = job.recipe("whole", more, old, new)
    code, said = command("train", path)
    job.recipe("whole")
    assert code == 2
    assert "E-RUN-201" in said
    assert names in said


def test_the_same_recipe_is_the_same_run(job: Job) -> None:
    code, said = command("train", job.recipe("whole"))
    assert code == 0
    assert "nothing to do" in said


def test_a_template_that_appears_later_is_not_that_of_the_training(job: Job, tmp_path: Path) -> None:
    run = job.place / "runs" / "whole"
    template = job.place / "base" / "chat_template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    try:
        for words in (["eval", run], ["export", run, tmp_path / "out"]):
            code, said = command(*words)
            assert code == 2
            assert "E-EVAL-002" in said
            assert "another template" in said
    finally:
        template.unlink()


def test_a_tokenizer_with_more_ids_than_the_model_is_refused_for_all_new_tokens(job: Job) -> None:
    shutil.copytree(job.place / "base", job.place / "short")
    config = LlamaConfig(vocab_size=KNOWN - 3, tie_word_embeddings=True, **SIZES)
    LlamaForCausalLM(config).save_pretrained(job.place / "short")
    code, said = command("check", job.recipe("short", old="model: base", new="model: short"))
    assert code == 2
    assert "E-MODEL-202" in said


def test_weights_beside_the_model_are_not_judged(tiny_model: Path, tmp_path: Path) -> None:
    """They are not loaded: another layout of the same model, often."""
    shutil.copytree(tiny_model, directory := tmp_path / "model")
    other = {"lm_head.weight": torch.full((512, 32), math.nan)}
    save_file(other, directory / "consolidated.safetensors")
    network = load_model(directory, cpu()).network
    assert network.config.tie_word_embeddings
    prove_loaded(network, (), directory, packed=True)
