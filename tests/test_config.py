"""The recipe: what YAML 1.2 makes of it, what is refused and where, and that no knob is read by nothing."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import educe
import pytest
from educe.config import Full, Lora, Recipe, load_recipe, parse_recipe
from educe.config.data import Data, FileSplit, Rows, ShareSplit
from educe.config.recipe import (
    Evaluation,
    FileTemplate,
    NamedTemplate,
    OwnTemplate,
    PlainMetric,
    Train,
)
from educe.errors import RecipeError
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

PACKAGE = Path(educe.__file__).parent
BASE = "name: a\nmodel: m\ndata:\n  train: t.jsonl\n"
few = settings(max_examples=40, deadline=None, derandomize=True)


def refused(text: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml")
    return caught.value


def test_a_short_recipe_has_every_default() -> None:
    recipe = parse_recipe(BASE, "r.yaml")
    assert (recipe.name, recipe.model, recipe.data.train) == ("a", "m", Rows(files="t.jsonl"))
    assert recipe.tuning == Full(kind="full")
    assert recipe.template == OwnTemplate(kind="own")
    assert recipe.train == Train()
    assert recipe.evaluation == Evaluation()


# YAML 1.2


@pytest.mark.parametrize(
    "written, value", [("1e-5", 1e-5), ("1E-5", 1e-5), ("2.5e-5", 2.5e-5), (".5e-3", 5e-4), ("5e-1", 0.5)]
)
def test_floats_without_a_dot_are_floats(written: str, value: float) -> None:
    assert parse_recipe(f"{BASE}train:\n  learning_rate: {written}\n", "r.yaml").train.learning_rate == value


@pytest.mark.parametrize("word", ["no", "on", "off", "yes", "y", "NO", "1:30", "1e", "2020-1", "a & b"])
def test_words_are_words(word: str) -> None:
    assert parse_recipe(f"{BASE}  system: {word}\n", "r.yaml").data.system == word


@pytest.mark.parametrize("written, value", [("010", 10), ("0o10", 8), ("0x10", 16), ("7", 7)])
def test_numbers_follow_yaml_1_2(written: str, value: int) -> None:
    assert parse_recipe(f"{BASE}train: {{seed: {written}}}\n", "r.yaml").train.seed == value


@pytest.mark.parametrize(
    "text, where, found",
    [
        (BASE + "name: b\n", "r.yaml:5:1", 'duplicate key "name"'),
        (BASE + "  train: b\n", "r.yaml:5:3", 'duplicate key "train"'),
        (BASE + "train: &x\n  seed: 1\n", "r.yaml:5:8", "anchor"),
        (BASE + "train: *x\n", "r.yaml:5:8", "alias"),
        (BASE + "  system: !!python/name:os.system x\n", "r.yaml:5:11", "tag"),
        (BASE + "  system: !!python/object/apply:os.system [ls]\n", "r.yaml:5:11", "tag"),
        (BASE + "tuning: !!python/object:x {kind: full}\n", "r.yaml:5:9", "tag"),
        (BASE + "tuning: !x {kind: full}\n", "r.yaml:5:9", "!x"),
        (BASE + '  system: !!binary "aGk="\n', "r.yaml:5:11", "tag"),
        (BASE + "train:\n\tseed: 1\n", "r.yaml:6:1", "character"),
        (BASE + "train: {seed: 1\n", "r.yaml:6:1", "expected"),
        (BASE + "---\n" + BASE, "r.yaml:5:1", "document"),
        ("%YAML 1.1\n---\n" + BASE, "r.yaml:2:1", "version"),
        (BASE + "  system: a\x07b\n", "r.yaml", "special characters"),
        (BASE + "train: {seed: " + "9" * 5000 + "}\n", "r.yaml", "digits"),
        ("- a\n", "r.yaml", "mapping"),
        ("", "r.yaml", "mapping"),
        ("just text", "r.yaml", "mapping"),
    ],
)
def test_yaml_that_is_refused(text: str, where: str, found: str) -> None:
    error = refused(text)
    assert (error.code, error.where) == ("E-RECIPE-101", where)
    assert found in error.found


def test_an_alias_bomb_is_refused_unexpanded() -> None:
    bomb = "a: &a [x, x]\n" + "".join(f"b{i}: &b{i} [*{'a' if not i else f'b{i - 1}'}, *a]\n" for i in range(50))
    assert refused(bomb + BASE).code == "E-RECIPE-101"


@few
@given(st.text("0123456789xobeE_.:-+~[]{}()<=>,#&*!|'\"%@`?/\\ \n\ty", max_size=12))
def test_any_value_is_read_or_refused_with_a_code(value: str) -> None:
    with contextlib.suppress(RecipeError):
        parse_recipe(f"{BASE}train:\n  seed: {value}", "r.yaml")


@pytest.mark.parametrize("value", ["0x_", "0b", "2020-13-45", "9" * 5000, "?", "-", "<<"])
def test_values_that_yaml_readers_stumble_over(value: str) -> None:
    assert refused(f"{BASE}train:\n  seed: {value}\n").code.startswith("E-RECIPE-10")


@pytest.mark.parametrize("depth", [50, 300, 800, 20_000])
@pytest.mark.parametrize("opening, closing", ["[]", ("{a: ", "}")])
def test_nesting_never_overflows(depth: int, opening: str, closing: str) -> None:
    assert refused(f"{BASE}tuning: {opening * depth}{closing * depth}\n").code.startswith("E-RECIPE-10")


# keys and values


@pytest.mark.parametrize(
    "text, where, key, fix",
    [
        (BASE + "nme: b\n", "r.yaml:5:1", "nme", "Did you mean 'name'?"),
        (BASE + "train:\n  seed: 1\n  lerning_rate: 3\n", "r.yaml:7:3", "train.lerning_rate", "'learning_rate'?"),
        (BASE + "train: {seed: 1, epoch: 3}\n", "r.yaml:5:18", "train.epoch", "'epochs'?"),
        (BASE + "  max_token: 9\n", "r.yaml:5:3", "data.max_token", "'max_tokens'?"),
        (BASE + "tuning:\n  kind: lora\n  rnk: 3\n", "r.yaml:7:3", "tuning.rnk", "'rank'?"),
        (BASE + "tuning: {kind: full, rank: 3}\n", "r.yaml:5:22", "tuning.rank", "belongs to `kind: lora`."),
        (
            BASE + "  dev: {kind: share, share: 0.1, file: x}\n",
            "r.yaml:5:34",
            "data.dev.file",
            "belongs to `kind: file`.",
        ),
        (BASE + "  test: {kind: file, file: x, fil: x}\n", "r.yaml:5:31", "data.test.fil", "'file'?"),
        (BASE + "evaluation:\n  metric: {kind: exact, kimd: 2}\n", "r.yaml:6:25", "evaluation.metric.kimd", "'kind'?"),
        (BASE + "zzz: 1\n", "r.yaml:5:1", "zzz", "Valid here: name, model"),
        (BASE + "template: {kind: plain, stp: [x]}\n", "r.yaml:5:25", "template.stp", "'stop'?"),
        (BASE + "template: {kind: own, file: x}\n", "r.yaml:5:23", "template.file", "belongs to `kind: file`."),
        (BASE + "template:\n  kind: file\n  file: x\n  fil: y\n", "r.yaml:8:3", "template.fil", "'file'?"),
        (BASE + "templat: plain\n", "r.yaml:5:1", "templat", "'template'?"),
    ],
)
def test_an_unknown_key_is_placed_and_the_nearest_named(text: str, where: str, key: str, fix: str) -> None:
    error = refused(text)
    assert (error.code, error.where) == ("E-RECIPE-102", where)
    assert error.found == f"{key} is not a known key."
    assert fix in error.fix


@pytest.mark.parametrize(
    "text, where, key",
    [
        ("name: a\nmodel: m\n", "r.yaml", "data"),
        ("model: m\ndata: {train: t}\n", "r.yaml", "name"),
        (BASE + "tuning:\n  rank: 3\n", "r.yaml:5:1", "tuning.kind"),
        (BASE + "  dev: {share: 0.1}\n", "r.yaml:5:3", "data.dev.kind"),
        (BASE + "  dev: {kind: file}\n", "r.yaml:5:3", "data.dev.file"),
        (BASE + "  test: {kind: share}\n", "r.yaml:5:3", "data.test.share"),
        (BASE + "evaluation: {metric: {}}\n", "r.yaml:5:14", "evaluation.metric.kind"),
        (BASE + "template: {stop: [x]}\n", "r.yaml:5:1", "template.kind"),
        (BASE + "template: {kind: file}\n", "r.yaml:5:1", "template.file"),
        (BASE + "template: file\n", "r.yaml:5:1", "template.file"),
    ],
)
def test_a_missing_key_is_named(text: str, where: str, key: str) -> None:
    error = refused(text)
    assert (error.code, error.where, error.found) == ("E-RECIPE-104", where, f"{key} is missing.")


@pytest.mark.parametrize(
    "key, value",
    [
        ("train.seed", '"4"'), ("train.seed", "true"), ("train.seed", "4.0"), ("train.seed", "-1"), ("train.seed", "null"),
        ("train.seed", "9223372036854775808"), ("train.seed", "1:30"), ("train.epochs", "true"), ("train.epochs", ".nan"),
        ("train.epochs", ".inf"), ("train.epochs", "-1"), ("train.epochs", "0"), ("train.epochs", '"2"'),
        ("train.learning_rate", "-1e-5"), ("train.learning_rate", "1"), ("train.learning_rate", "1e-5x"),
        ("train.schedule", "cosin"), ("train.activations", "yes"), ("train.activations", "1"),
        ("train.batch_tokens", "0"), ("data.system", "5"), ("data.system", "true"), ("data.max_tokens", "7"),
        ("data.train", "[a, b]"), ("data.train", "2020-01-01"), ("data.dev", "0.1"), ("evaluation.metric", "exactly"),
        ("evaluation.max_rows", "0"), ("train.clip_norm", ".inf"), ("train.clip_norm", ".nan"),
        ("data.train_on", "flaged"), ("data.prompt_weight", "1.5"), ("data.reasoning_weight", "-1"),
    ],
)  # fmt: skip
def test_wrong_values_are_placed_and_shown(key: str, value: str) -> None:
    block, knob = key.split(".")
    text = f"{BASE}  {knob}: {value}\n" if block == "data" else f"{BASE}{block}:\n  {knob}: {value}\n"
    if key == "data.train":
        text = f"name: a\nmodel: m\ndata:\n  train: {value}\n"
    error = refused(text)
    assert error.code == "E-RECIPE-103"
    line = next(n for n, t in enumerate(text.split("\n"), 1) if t.endswith(f"{knob}: {value}"))
    assert error.where == f"r.yaml:{line}:3"
    assert error.found.startswith(f"{key} is ")


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "x" * 101, "a\\n"])
def test_a_name_is_one_safe_directory_name(name: str) -> None:
    assert refused(BASE.replace("name: a", f'name: "{name}"')).where == "r.yaml:1:1"


def test_settings_that_contradict_each_other_are_refused() -> None:
    for train in ("batch_tokens: 100", "micro_batch_tokens: 9000", "micro_batch_tokens: 100"):
        error = refused(f"{BASE}train: {{{train}}}\n")
        assert error.code == "E-RECIPE-201"
        assert error.found.count("train.") + error.found.count("data.") >= 2
    for data in ("system: x", "tasks: {}", "train: t, tasks: {a: {files: b}}", "train: t, hold_out: [a]",
                 "tasks: {a: {files: b, rate: 2.0}}", "tasks: {a: {files: b}}, rates: {kind: explicit}"):  # fmt: skip
        assert refused(f"name: a\nmodel: m\ndata: {{{data}}}\n").code == "E-RECIPE-201"
    parse_recipe(f"{BASE}  max_tokens: 100\ntrain: {{batch_tokens: 100, micro_batch_tokens: 100}}\n", "r.yaml")


def test_what_a_file_does_not_say_is_called_a_default() -> None:
    """And the place is that of what it says."""
    error = refused(f"{BASE}train:\n  epochs: 1\n  batch_tokens: 1024\n")
    assert error.found.startswith("train.micro_batch_tokens (2048 by default) exceeds train.batch_tokens (1024)")
    line = f"{BASE}train:\n  epochs: 1\n".count("\n") + 1
    assert error.where == f"r.yaml:{line}:3"


def test_a_form_is_told_in_words() -> None:
    assert refused(BASE.replace("name: a", "name: my run!")).fix.startswith("Take letters, digits")
    metric = "evaluation: {metric: {kind: custom, function: grade}}\n"
    assert refused(f"{BASE}{metric}").fix == "Write file.py:function."


def test_a_block_that_may_be_a_name_is_told_by_its_key() -> None:
    stages = "stages:\n  - kind: pretrain\n    data: {train: t}\n"
    error = refused(f"name: a\nmodel: {{init: random, width: 100, heads: 3}}\n{stages}")
    assert (error.code, error.where) == ("E-RECIPE-201", "r.yaml:2:1")
    assert error.found.startswith("model: width (100) must be a multiple")
    assert refused(f"name: a\nmodel: {{init: random, heads: a}}\n{stages}").found == "model.heads is 'a'."


def test_several_blocks_where_texts_belong_are_told() -> None:
    for more in ("runs: {c: d}", "train: {epochs: -1}"):
        error = refused(f"name: {{a: b}}\nmodel: m\ndata: {{train: t}}\n{more}\n")
        assert (error.code, error.where) == ("E-RECIPE-103", "r.yaml:1:1"), more


def test_recipes_are_frozen() -> None:
    recipe = parse_recipe(BASE, "r.yaml")
    for value in (recipe, recipe.data, recipe.train, recipe.tuning):
        with pytest.raises(ValidationError, match="frozen"):
            value.seed = 1  # type: ignore[union-attr]


# files


def test_paths_are_anchored_at_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    (tmp_path / "job" / "local").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    rest = "  dev: {kind: file, file: ~/dev.jsonl}\n  test: {kind: share, share: 0.2}\nruns: ../runs\n"
    (tmp_path / "job" / "r.yaml").write_text(BASE.replace("t.jsonl", "rows/t.jsonl") + rest)
    recipe = load_recipe(Path("job/r.yaml"))
    assert recipe.data.sources["train"].files == str(tmp_path / "job" / "rows" / "t.jsonl")
    assert recipe.data.dev == FileSplit(kind="file", file=str(home / "dev.jsonl"))
    assert recipe.data.test == ShareSplit(kind="share", share=0.2)
    assert recipe.run_path() == tmp_path / "runs" / "a"
    for model, found in (
        ("org/name", "org/name"),
        ("local", str(tmp_path / "job" / "local")),
        ("./absent", str(tmp_path / "job" / "absent")),
        ("~/m", str(home / "m")),
    ):
        (tmp_path / "job" / "r.yaml").write_text(BASE.replace("model: m", f"model: {model}"))
        assert load_recipe(tmp_path / "job" / "r.yaml").model == found


@pytest.mark.parametrize(
    "old, new", [("t.jsonl", '"a\\0b"'), ("t.jsonl", "~no-such-user/x"), ("model: m", f"model: {'x' * 300}")]
)
def test_a_path_that_cannot_be_is_no_traceback(tmp_path: Path, old: str, new: str) -> None:
    (tmp_path / "r.yaml").write_text(BASE.replace(old, new))
    with contextlib.suppress(RecipeError):  # a later Python may read such a path
        load_recipe(tmp_path / "r.yaml")


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    cases = [
        (tmp_path, None),
        (file, None),
        (file, b"name: \xe9"),
        (file, b"#" * 1_000_001),
        (file, BASE.encode("utf-16")),
    ]
    for path, content in cases:
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        assert caught.value.code == "E-RECIPE-001"
    file.write_bytes(b"\xef\xbb\xbf" + BASE.replace("\n", "\r\n").encode() + b"nme: 1\r\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert caught.value.where == f"{file}:5:1"


# round trip

text = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), max_size=9)
splits = st.one_of(
    st.builds(FileSplit, kind=st.just("file"), file=text),
    st.builds(ShareSplit, kind=st.just("share"), share=st.floats(0, 1, exclude_min=True, exclude_max=True)),
)
positive = st.floats(1e-9, 0.9)
given_to_template = {
    "stop": st.tuples() | st.tuples(text, text),
    "settings": st.none() | st.dictionaries(text, st.booleans() | st.integers(-9, 9) | text, max_size=3),
}
templates = st.one_of(
    st.builds(OwnTemplate, kind=st.just("own"), **given_to_template),
    st.builds(NamedTemplate, kind=st.sampled_from(["plain", "chatml", "alpaca"]), **given_to_template),
    st.builds(FileTemplate, kind=st.just("file"), file=text, **given_to_template),
)
recipes = st.builds(
    Recipe,
    name=st.from_regex(r"\A[a-z][a-z.0-9]{0,9}\Z"),
    model=text.filter(bool),
    device=st.sampled_from(["auto", "cpu"]),
    template=templates,
    data=st.builds(
        Data,
        train=text.filter(bool).map(lambda files: Rows(files=files)),
        dev=splits,
        test=splits,
        system=st.none() | text,
        train_on=st.sampled_from(["all", "last", "flagged"]),
        prompt_weight=st.floats(0, 1),
        max_tokens=st.integers(8, 2048),
    ),
    tuning=st.builds(Full, kind=st.just("full"))
    | st.builds(Lora, kind=st.just("lora"), rank=st.integers(1, 9), alpha=positive),
    train=st.builds(Train, epochs=st.floats(1, 100), learning_rate=positive, seed=st.integers(0, 2**63 - 1)),
    evaluation=st.builds(Evaluation, metric=st.builds(PlainMetric, kind=st.sampled_from(["json", "text"]))),
)


@few
@given(recipes)
def test_a_dump_is_the_recipe(recipe: Recipe) -> None:
    assert Recipe.model_validate(recipe.model_dump()) == recipe
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe  # as recipe.resolved.json has it: no tuples
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert parse_recipe(recipe.model_dump_json(), "r.json") == recipe  # JSON is YAML 1.2


def test_characters_that_json_writes_in_halves_are_whole() -> None:
    recipe = parse_recipe('{"name": "a", "model": "m", "data": {"train": "t", "system": "\\ud83d\\ude00"}}', "r.json")
    assert recipe.data.system == "😀"
    assert refused('{"name": "a", "model": "m", "data": {"train": "t", "system": "\\ud83d"}}').code == "E-RECIPE-103"


def test_a_function_is_named_after_the_last_colon_and_a_client_once(tmp_path: Path) -> None:
    """A finished run reads its resolved recipe again: the path before the function may have colons."""
    place = tmp_path / "a:b"
    place.mkdir()
    metric = "evaluation: {metric: {kind: custom, function: 'mine:mark'}}\n"
    (place / "r.yaml").write_text(BASE + metric)
    resolved = load_recipe(place / "r.yaml")
    assert Recipe.model_validate(resolved.model_dump(mode="json")) == resolved
    for wrong in ("mark", ":mark", "a::mark", "mine:1"):
        assert "function" in str(refused(BASE + metric.replace("mine:mark", wrong)))
    assert "names a client twice" in str(refused(BASE + "train: {log_to: [wandb, tensorboard, wandb]}\n"))
    assert "train.log_to" in str(refused(BASE + "train: {report_to: wandb}\n"))


def test_the_default_rate_is_that_of_the_tuning_however_it_is_given() -> None:
    base: dict[str, Any] = {"name": "x", "model": "m", "data": {"train": "a.jsonl"}}
    lora, train = Lora(kind="lora"), Train(epochs=3.0)
    ways: list[dict[str, Any]] = [
        {"tuning": lora},
        {"tuning": lora, "train": train},
        {"tuning": {"kind": "lora"}, "train": {"epochs": 3.0}},
    ]
    assert {Recipe(**base, **g).train.learning_rate for g in ways} == {10 * Train().learning_rate}
    assert Recipe(**base, tuning=lora, train=Train(learning_rate=3e-5)).train.learning_rate == 3e-5
    assert Recipe(**base, train=train).train.learning_rate == Train().learning_rate
