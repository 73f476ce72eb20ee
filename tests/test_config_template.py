"""`template:` in a recipe: a name, a block or a file, and what is said of mistakes in it and in other choices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from educe.config import Recipe, load_recipe, parse_recipe
from educe.config.load import anchored
from educe.config.recipe import FileTemplate, NamedTemplate, OwnTemplate
from educe.errors import RecipeError

from test_config import BASE, refused


@pytest.mark.parametrize(
    "written, where, found, fix",
    [
        ("template: chatlm", "5:1", "template is 'chatlm'.", "Did you mean 'chatml'?"),
        ("template: {kind: plian}", "5:12", "template.kind is 'plian'.", "Did you mean 'plain'?"),
        ("template: {kind: zzz}", "5:12", "template.kind is 'zzz'.", "one of own, plain, chatml, alpaca, file."),
        ("template: {kind: [a]}", "5:12", "template.kind is ['a'].", "one of own, plain"),
        ("template: null", "5:1", "template is None.", "one of own, plain"),
        ("template: [plain]", "5:1", "template is ['plain'].", "one of own, plain"),
        (
            "template: x/chat.jinja",
            "5:1",
            "template is 'x/chat.jinja'.",
            "For a file write {kind: file, file: x/chat.jinja}.",
        ),
        ("template: {kind: file, file: 5}", "5:24", "template.file is 5.", "valid string"),
        ("template: {kind: plain, stop: x}", "5:25", "template.stop is 'x'.", "valid list"),
        ("template: {kind: plain, stop: null}", "5:25", "template.stop is None.", "valid list"),
        ("template:\n  kind: plain\n  stop:\n  - a\n  - 5", "9:5", "template.stop.1 is 5.", "valid string"),
        ("template: {kind: own, settings: [1]}", "5:23", "template.settings is [1].", "valid dictionary"),
        (
            "template: {kind: own, settings: {a: 1.5}}",
            "5:34",
            "template.settings.a is 1.5.",
            "a valid boolean or a valid",
        ),
        ("template: {kind: own, settings: {a: null}}", "5:34", "template.settings.a is None.", "valid string"),
        ("tuning: lora", "5:1", "tuning is 'lora'.", "Write {kind: lora}."),
        ("tuning: {kind: lra}", "5:10", "tuning.kind is 'lra'.", "Did you mean 'lora'?"),
    ],
)
def test_choices_teach_what_can_be_chosen(written: str, where: str, found: str, fix: str) -> None:
    error = refused(f"{BASE}{written}\n")
    assert (error.code, error.where, error.found) == ("E-RECIPE-103", f"r.yaml:{where}", found)
    assert fix in error.fix


def test_a_template_is_a_name_or_a_block() -> None:
    short, long = (parse_recipe(f"{BASE}template: {t}\n", "r.yaml") for t in ("chatml", "{kind: chatml}"))
    assert short == long
    assert short.template == NamedTemplate(kind="chatml")
    block = "{kind: own, stop: ['<|x|>'], settings: {enable_thinking: false, effort: low, n: 2}}"
    chosen = parse_recipe(f"{BASE}template: {block}\n", "r.yaml").template
    settings = {"enable_thinking": False, "effort": "low", "n": 2}
    assert chosen == OwnTemplate(kind="own", stop=("<|x|>",), settings=settings)


def test_a_template_file_is_anchored_and_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "r.yaml").write_text(f"{BASE}template:\n  kind: file\n  file: my/chat.jinja\n  stop: [x]\n")
    absent = tmp_path / "job" / "my" / "chat.jinja"
    with pytest.raises(RecipeError) as caught:
        load_recipe(Path("job/r.yaml"))
    assert (caught.value.code, caught.value.where) == ("E-RECIPE-103", "job/r.yaml:7:3")
    assert caught.value.found == f"template.file is 'my/chat.jinja', and {absent} is no file."
    absent.mkdir(parents=True)
    with pytest.raises(RecipeError, match="is no file"):
        anchored(parse_recipe(Path("job/r.yaml").read_text(), "r.yaml"), tmp_path / "job")
    absent.rmdir()
    absent.write_text("{{ messages }}")
    recipe = load_recipe(Path("job/r.yaml"))
    assert recipe.template == FileTemplate(kind="file", file=str(absent), stop=("x",))
    assert Recipe.model_validate(json.loads(json.dumps(recipe.model_dump()))) == recipe
