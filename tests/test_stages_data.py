"""What stages read: recipes whose mistakes are told by their place, pairs that are never taken apart, texts that lose nothing."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from educe.chat.documents import document_made
from educe.chat.tokens import load_tokenizer
from educe.config import Recipe, StagedRecipe, load_any
from educe.config.recipe import NamedTemplate
from educe.data.reading import read_row
from educe.errors import EduceError, Refusal
from educe.files.jsonl import read_jsonl
from educe.model.describe import describe_model
from educe.pack.batch import build_batch, halved
from educe.pack.plan import both_of, plan_once, plan_pairs
from educe.recipes.mixing import draw, mixture_of
from educe.recipes.plan import plan_run
from educe.recipes.prepare import prepare
from educe.recipes.run import init, quiet
from educe.recipes.survey import survey
from educe.recipes.which import one_recipe, stage_of
from educe.types import Document, Example, Pair, Source
from hypothesis import given, settings
from hypothesis import strategies as st

few = settings(max_examples=50, deadline=None, derandomize=True)

WHOLE = """name: medic
model: tiny
stages:
  - kind: pretrain
    data: {train: texts.txt}
  - kind: sft
    data: {train: rows.jsonl}
  - kind: preference
    loss: {kind: dpo, beta: 0.2}
    data: {train: pairs.jsonl, max_tokens: 128}
    train: {batch_tokens: 1024, micro_batch_tokens: 256}
  - kind: preference
    name: direct
    start: base
    loss: ipo
    data: {train: pairs.jsonl}
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(tmp_path: Path, old: str, new: str) -> str:
    assert old in WHOLE
    with pytest.raises(EduceError) as e:
        load_any(written(tmp_path, WHOLE.replace(old, new, 1)))
    return str(e.value)


# The recipe


def test_a_stage_is_a_recipe_of_its_own(tmp_path: Path) -> None:
    path = written(tmp_path, WHOLE)
    staged = load_any(path)
    assert isinstance(staged, StagedRecipe)
    assert staged.names == ("pretrain", "sft", "preference", "direct")
    assert [staged.start_of(k) for k in range(4)] == [None, 0, 1, None]
    recipe = one_recipe(path.with_name("r.yaml#preference"))
    assert recipe.objective.kind == "preference"
    assert recipe.run_path() == tmp_path / "runs" / "medic" / "3-preference"
    assert recipe.model == "tiny"  # nothing is trained yet
    assert Recipe.model_validate(json.loads(json.dumps(recipe.model_dump(mode="json")))) == recipe
    before = staged.stage_path(0)
    before.mkdir(parents=True)
    (before / "provenance.json").write_text('{"finished": null}')
    assert stage_of(staged, 1).model == "tiny"  # begun alone
    with pytest.raises(EduceError, match="stage sft starts from stage pretrain, which is not trained to its end"):
        stage_of(staged, 1, to_train=True)
    (before / "provenance.json").write_text('{"finished": "2026-01-01"}')
    assert stage_of(staged, 1, to_train=True).model == str(before)
    assert stage_of(staged, 1, untrained=True).model == "tiny"
    assert stage_of(staged, 2).model == str(before)  # the nearest that is trained
    assert stage_of(staged, 3).model == "tiny"


@pytest.mark.parametrize(
    "new,rates",
    [
        ("start: base", (5e-5, 2e-5, 1e-6, 1e-6)),
        ("start: base\n    tuning: {kind: lora}", (5e-5, 2e-5, 1e-6, 1e-5)),
        ("start: base\n    tuning: {kind: lora}\n    train: {learning_rate: 1e-6}", (5e-5, 2e-5, 1e-6, 1e-6)),
    ],
)
def test_a_default_rate_is_that_of_kind_and_tuning(tmp_path: Path, new: str, rates: tuple[float, ...]) -> None:
    for model, first in (("tiny", 5e-5), ("{init: random}", 1e-3)):
        if model != "tiny" and "lora" in new:
            continue  # refused: what is frozen would stay random
        text = WHOLE.replace("start: base", new).replace("model: tiny", f"model: {model}")
        staged = load_any(written(tmp_path, text))
        assert isinstance(staged, StagedRecipe)
        made = [stage_of(staged, k).train.learning_rate for k in range(4)]
        assert made[:3] == pytest.approx([first, *rates[1:3]])
        if model == "tiny":
            assert made[3] == pytest.approx(rates[3])
    lora = load_any(written(tmp_path, "name: x\nmodel: tiny\ndata: {train: a.jsonl}\ntuning: {kind: lora}\n"))
    assert isinstance(lora, Recipe)
    assert lora.train.learning_rate == pytest.approx(2e-4)


@pytest.mark.parametrize(
    "old,new,said",
    [
        ("model: tiny\nstages:\n  - kind: pretrain", "model: {init: random}\nstages:\n  - kind: pretrain\n    tuning: {kind: lora}",
         "r.yaml:5:5 stage 1 of 4: adapters of random weights leave those random"),
        ("beta: 0.2", "bta: 0.2", "r.yaml:9:23 stage 3 of 4: loss.bta is not a known key. Did you mean 'beta'?"),
        ("kind: sft", "kind: stf", "r.yaml:6:5 stage 2 of 4: kind is 'stf'. Did you mean 'sft'?"),
        ("beta: 0.2", "beta: 0", "stage 3 of 4: loss.beta is 0. It must be above 0"),
        ("beta: 0.2", "nll_weight: 0.2", "stage 3 of 4: loss.nll_weight is not a known key. It stands beside `loss:`, not in it."),
        ("loss: ipo", "loss: ppo", "stage 4 of 4: loss is 'ppo'. Did you mean 'ipo'?"),
        ("name: direct", "name: sft", "r.yaml:13:5 stage 4 of 4: 'sft' is the name of another one. Give each its own"),
        ("start: base", "start: rlhf",
         "r.yaml:14:5 stage 4 of 4: start is 'rlhf', and before it there is base, pretrain, sft, preference. Name one of them."),
        ("kind: pretrain", "kind: pretrain\n    start: sft", "stage 1 of 4: start is 'sft', and before it there is base. Leave"),
        ("micro_batch_tokens: 256", "micro_batch_tokens: 255", "must hold two rows of data.max_tokens (128). Lower the second"),
        ("max_tokens: 128}", "max_tokens: 128, train_on: last}", "stage 3 of 4: data.train_on means nothing"),
        ("train: texts.txt}", "train: texts.txt, prompt_weight: 0.5}", "stage 1 of 4: data.prompt_weight means nothing"),
        ("batch_tokens: 1024,", "kl_to_base: 1.0, batch_tokens: 1024,", "train.kl_to_base means nothing"),
        ("model: tiny", "model: {init: random, layer: 2}", "r.yaml:2:23 model.layer is not a known key. Did you mean 'layers'?"),
        ("model: tiny", "model: {init: random, width: 30}", "width (30) must be a multiple"),
        ("model: tiny", "model: tiny\ntuning: {kind: lora}", "r.yaml:3:1 tuning is not a known key. Move it into the stages"),
        ("model: tiny", "model: tiny\ndata: {train: a.txt}", "r.yaml:3:1 data is not a known key. Move it into the stages"),
        ("stages:\n  - kind: pretrain\n    data: {train: texts.txt}\n", "stages: {}\nother:\n", "r.yaml:3:1 stages is {}, and"),
        ("kind: pretrain", "kind: sft\n    name: first", ""),
    ],
)  # fmt: skip
def test_mistakes_are_told_by_their_place(tmp_path: Path, old: str, new: str, said: str) -> None:
    if said:
        assert said in refused(tmp_path, old, new)
    else:
        load_any(written(tmp_path, WHOLE.replace(old, new, 1)))


def test_what_is_no_stage_is_said(tmp_path: Path) -> None:
    path = written(tmp_path, WHOLE)
    for name in ("r.yaml", "r.yaml#rlhf"):
        with pytest.raises(EduceError, match=r"has 4 stages, .* Name one: .*r\.yaml#pretrain, "):
            one_recipe(path.with_name(name))
    path = written(tmp_path, "name: x\nmodel: tiny\ndata: {train: a.jsonl}\n")
    with pytest.raises(EduceError, match="has no stages"):
        one_recipe(path.with_name("r.yaml#sft"))
    path = written(tmp_path, "name: x\nmodel: tiny\nobjective: pretrain\ndata: {train: a.jsonl}\n")
    with pytest.raises(EduceError, match=r"r.yaml:3:1 objective is not a known key. Write a stage"):
        one_recipe(path)
    text = WHOLE.replace("model: tiny", "model: {init: random}").replace("kind: pretrain", "kind: sft\n    name: first")
    with pytest.raises(
        EduceError, match=r"stage 1 of 4: model: \{init: random\} needs texts.*Begin with a stage of `kind: pretrain`"
    ):
        load_any(written(tmp_path, text))
    for stages in ("sft", "[]", "{kind: sft}", ""):
        with pytest.raises(EduceError, match=r"r.yaml:3:1 stages is .*, and must be a list of stages. Write one block"):
            load_any(written(tmp_path, f"name: x\nmodel: tiny\nstages: {stages}\n"))
    with pytest.raises(EduceError, match=r"r.yaml:2:1 model: \{init: random\} begins a recipe of stages"):
        load_any(written(tmp_path, "name: x\nmodel: {init: random}\ndata: {train: a.jsonl}\n"))


# The plan of pairs


@few
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=60),
    st.integers(0, 3),
    st.sampled_from([1, 2]),
    st.booleans(),
)
def test_pairs_stay_together(pairs: list[tuple[int, int]], seed: int, ranks: int, packed: bool) -> None:
    lengths = np.array(pairs, np.int64).reshape(-1)
    order = both_of(np.array([k for k in range(len(pairs)) for _ in range(1 + (k + seed) % 2)]))
    plan = plan_pairs(lengths, order, batch_tokens=160, capacity_tokens=80, seed=seed, num_ranks=ranks, packed=packed)
    packs = [pack for s in range(plan.num_steps) for pack in plan.step(s)]
    assert Counter(i for pack in packs for i in pack) == Counter(order.tolist())
    for pack in packs:
        assert all(a % 2 == 0 and b == a + 1 for a, b in zip(pack[::2], pack[1::2], strict=True))
        assert sum(int(lengths[i]) for i in pack) <= 80
    assert plan.num_tokens == int(lengths[order].sum())
    once = plan_once(lengths, capacity_tokens=80, pairs=True)
    assert [i for group in once for i in group] == list(range(lengths.size))
    assert all(len(group) % 2 == 0 for group in once)


def answer(n: int, reference: float | None) -> Example:
    weights = np.r_[np.float32(0), np.ones(n - 1, np.float32)]
    return Example(ids_T=np.arange(n, dtype=np.int32), weights_T=weights, reference=reference)


@few
@given(st.lists(st.tuples(st.integers(2, 9), st.integers(2, 9)), min_size=1, max_size=7))
def test_a_batch_of_pairs_is_halved_between_them(sizes: list[tuple[int, int]]) -> None:
    examples = [answer(n, float(-n)) for pair in sizes for n in pair]
    batch = build_batch(examples)
    assert batch.denominator == len(sizes)
    pieces = halved(batch)
    assert sum(p.denominator for p in pieces) == len(sizes)
    assert all(p.lengths_D.size % 2 == 0 for p in pieces)
    assert len(pieces) == (2 if len(sizes) > 1 else 1)
    references = np.concatenate([p.reference_D for p in pieces if p.reference_D is not None])
    assert references.tolist() == [-float(e.ids_T.size) for e in examples]
    with pytest.raises(ValueError, match="two answers each"):
        build_batch([*examples, answer(3, None)])
    with pytest.raises(ValueError, match="two answers each"):
        build_batch(examples[:-1])


# Rows and what a stage learns from them

PAIR = {"prompt": "the user said hello", "chosen": "yes", "rejected": "no the"}


def lines(path: Path, *rows: object) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def place(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDUCE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tiny").symlink_to(tiny_model)
    talk = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]}
    for name in ("rows", "pairs"):
        lines(tmp_path / f"{name}.jsonl", talk, PAIR | {"prompt": "one"}, {"text": "the model"}, PAIR)
    lines(tmp_path / "texts.jsonl", talk, PAIR, {"text": "the model"}, {"text": "the user"})
    text = WHOLE.replace("texts.txt", "texts.jsonl")
    for name in ("texts", "rows", "pairs"):
        text = text.replace(f"train: {name}.jsonl", f"train: {{files: {name}.jsonl, format: mixed}}")
    shares = "dev: {kind: share, share: 0.000001}, test: {kind: share, share: 0.000001}, max_unused: 1.0, "
    written(tmp_path, text.replace("data: {", f"data: {{{shares}"))
    return tmp_path


@pytest.mark.parametrize("name,kept,refused", [("pretrain", 2, 2), ("sft", 2, 2), ("preference", 2, 2)])
def test_each_stage_learns_from_rows_of_its_kind(place: Path, name: str, kept: int, refused: int) -> None:
    prepared = prepare(one_recipe(place / f"r.yaml#{name}"), quiet)
    ledger = read_jsonl(prepared.path / "ledger.jsonl")
    assert Counter(line["code"] for line in ledger)["E-DATA-150"] == refused
    assert sum(line["status"] != "refused" for line in ledger) == kept
    told = next(line["reason"] for line in ledger if line["code"])
    assert "this stage learns from" in told
    assert "stage of `kind: " in told


def test_raw_text_alone_teaches_no_answer(place: Path) -> None:
    """Beside answers it is trained whole."""
    lines(place / "texts.jsonl", *({"text": f"the model {k}"} for k in range(9)))
    lines(place / "rows.jsonl", *({"prompt": f"the user {k}", "response": "yes"} for k in range(9)))
    text = "name: raw\nmodel: ./tiny\ndata:\n  tasks:\n    a: {files: texts.jsonl}\n"
    (place / "raw.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(EduceError, match=r"E-DATA-005 .*texts.jsonl holds raw text alone.*stages: \[\{kind: pretrain"):
        prepare(one_recipe(place / "raw.yaml"), quiet)
    (place / "raw.yaml").write_text(f"{text}    b: {{files: rows.jsonl}}\n", encoding="utf-8")
    assert prepare(one_recipe(place / "raw.yaml"), quiet).summary["documents"]


def test_a_pair_is_two_answers_behind_one_prompt(place: Path) -> None:
    other = {"chosen": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "yes"}],
             "rejected": [{"role": "user", "content": "two"}, {"role": "assistant", "content": "no"}]}  # fmt: skip
    words = ("the", "user", "said", "hello", "model", "yes", "no", "one", "two", "three")
    rows = [PAIR | {"prompt": f"{a} {b}"} for a in words for b in words]
    lines(place / "pairs.jsonl", PAIR | {"rejected": "yes"}, other, PAIR | {"rejected": " yes\n"}, *rows)
    recipe = one_recipe(place / "r.yaml#preference")
    prepared = prepare(recipe, quiet)
    ledger = read_jsonl(prepared.path / "ledger.jsonl")
    assert [line["code"] for line in ledger[:4]] == ["E-DATA-154", "E-DATA-153", "E-DATA-154", None]
    (found,) = survey([f"{place / 'r.yaml'}#preference"])
    assert [r.where.rpartition(":")[2] for r in found.problems["E-DATA-154"].first] == ["1", "3"]
    assert "differ in white space around them alone" in str(found.problems["E-DATA-154"].first[1])
    store = prepared.store("train")
    assert len(store) == 2 * prepared.summary["rows"]["train"]
    assert (store.rows[::2] == store.rows[1::2]).all()
    for k in range(0, len(store), 2):
        one, two = store[k], store[k + 1]
        starts = [int(np.argmax(e.weights_T > 0)) for e in (one, two)]
        assert starts[0] == starts[1]
        assert np.array_equal(one.ids_T[: starts[0]], two.ids_T[: starts[0]])
        said = [prepared.tokenizer.decode(e.ids_T[e.weights_T > 0].tolist()) for e in (one, two)]
        assert ["yes" in said[0], "no the" in said[1]] == [True, True]
    order_K = draw(recipe, prepared)
    assert (order_K[::2] % 2 == 0).all()
    assert (order_K[1::2] == order_K[::2] + 1).all()
    plan = plan_run(recipe, prepared, describe_model(prepared.model_dir, recipe.model), order_K)
    assert mixture_of(recipe, prepared, plan).tasks[0].draws == order_K.size // 2


@few
@given(st.text(alphabet=st.sampled_from("the user said\nαβ🙂 <|end|>."), max_size=200), st.integers(8, 40))
def test_a_long_document_loses_no_text(tiny_model: Path, text: str, room: int) -> None:
    tokenizer = load_tokenizer(tiny_model, NamedTemplate(kind="plain"))
    made = document_made(text, tokenizer, room)
    ids = [i for e in made.examples for i in e.ids_T.tolist()]
    bos = [tokenizer.control["<s>"]] if "<s>" in tokenizer.control else []
    heads = [i for i in ids if i in bos]
    kept = [i for i in ids if i not in bos]
    assert all(e.ids_T.size <= room for e in made.examples)
    whole = [*tokenizer.encode_plain(text), tokenizer.eos]
    assert kept == whole or (kept == whole[:-1] and len(whole) % (room - bool(heads)) == 1)
    for e in made.examples:
        assert (e.weights_T[1:] == 1).all()


# A recipe for them


@pytest.mark.parametrize(
    "rows,kind", [([{"text": "the user said"}, {"text": "the model"}] * 9, "pretrain"), ([PAIR] * 9, "preference")]
)
def test_init_writes_a_stage_for_texts_and_for_pairs(
    tmp_path: Path, tiny_model: Path, rows: list[dict[str, str]], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines(tmp_path / "data.jsonl", *rows)
    path = init("data.jsonl", model=str(tiny_model), out="r.yaml")
    staged = load_any(path)
    assert isinstance(staged, StagedRecipe)
    assert staged.names == (kind,)
    assert staged.recipe(0, "x").data.max_tokens <= 512
    with pytest.raises(EduceError, match=r"--dev is for conversations"):
        init("data.jsonl", model=str(tiny_model), out="other.yaml", dev="data.jsonl")


def test_questions_about_a_text_stand_behind_it() -> None:
    at = Source(file="a.jsonl", line=1)
    one = {"question": "Who?", "answer": "The user."}
    (made,) = read_row({"text": "the user said", "qa": [one, one]}, at)
    assert isinstance(made, Document)
    assert made.text == "the user said" + 2 * "\n\nQuestion: Who?\nAnswer: The user."
    for bad in ("Who?", [["Who?", "I"]], [{"question": "Who?"}], [{"question": "Who?", "answer": 3}]):
        (refused,) = read_row({"text": "the user said", "qa": bad}, at)
        assert isinstance(refused, Refusal)
        assert refused.code == "E-DATA-151"


def test_a_text_file_is_parted_or_one_document(place: Path) -> None:
    (place / "books").mkdir()
    (place / "books" / "a.txt").write_text("the user\n\n\nsaid   hello\n\nyes\n")
    (place / "books" / "b.txt").write_text("one<|endoftext|>two\n\nthree")
    text = WHOLE.replace(
        "train: texts.txt",
        "train: {files: books, format: FORMAT}, near_copies: keep, dev: {kind: share, share: 0.00001}",
    )
    found = {}
    for form in ("text", "document"):
        path = written(place, text.replace("FORMAT", form))
        prepared = prepare(one_recipe(path.with_name("r.yaml#pretrain")), quiet)
        stores = [prepared.store(split) for split in ("train", "dev", "test")]
        decode = prepared.tokenizer.decode
        found[form] = {
            decode(s[i].ids_T.tolist()).removeprefix("<s>").removesuffix("<|im_end|>")
            for s in stores
            for i in range(len(s))
        }
    assert found["document"] == {"the user\n\n\nsaid   hello\n\nyes", "one", "two\n\nthree"}
    assert found["text"] == {"the user", "said   hello", "yes", "one", "two\n\nthree"}


def pair_of(row: dict[str, object]) -> list[str]:
    """The chosen conversation as roles and texts, or the code of its refusal."""
    (item,) = read_row(row, Source(file="a.jsonl", line=1))
    if isinstance(item, Refusal):
        return [item.code]
    assert isinstance(item, Pair)
    return [f"{m.role}: {m.content}" for m in item.chosen.messages]


def test_a_pair_keeps_its_question_and_its_system_prompt() -> None:
    answers = {"chosen": "four", "rejected": "five"}
    talks = {
        k: [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": v}] for k, v in answers.items()
    }
    asked, full = ["user: 2 + 2?", "assistant: four"], ["system: Be brief.", "user: 2 + 2?", "assistant: four"]
    system = {"system": "Be brief."}
    assert pair_of({"question": "2 + 2?", **answers, **system}) == full
    assert pair_of({"prompt": "2 + 2?", **answers, **system}) == full
    assert pair_of({**talks, **system}) == full
    assert pair_of({**talks, "prompt": "2 + 2?"}) == asked
    texts = {k: f"\n\nHuman: 2 + 2?\n\nAssistant: {v}" for k, v in answers.items()}
    assert pair_of({**texts, **system}) == full
    assert pair_of(answers) == ["E-DATA-155"]
    assert pair_of({**answers, **system}) == ["E-DATA-155"]
    assert pair_of({**talks, "prompt": "3 + 3?"}) == ["E-DATA-153"]
