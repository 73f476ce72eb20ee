"""YAML 1.2 with positions → `Recipe`; every mistake is told at file:line:col, with the nearest valid name."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent

from educe.config.data import Data, FileSplit, Rows
from educe.config.mistakes import brief, position, told
from educe.config.recipe import CustomMetric, Evaluation, FileTemplate, Recipe
from educe.config.stages import StagedRecipe
from educe.errors import RecipeError
from educe.secrets import find_secret

MAX_BYTES = 1_000_000
MAX_DEPTH = 20
MAX_EVENTS = 20_000  # keys, values, and ends of blocks


def load_recipe(path: Path) -> Recipe:
    """Read, validate and anchor a recipe of one run; one of stages is refused, and its stages are named."""
    loaded = load_any(path)
    if isinstance(loaded, StagedRecipe):
        named = ", ".join(f"{path}#{n}" for n in loaded.names)
        found = f"has {len(loaded.names)} stages, and this takes one run."
        raise RecipeError(101, str(path), found, f"Name one: {named}.")
    return loaded


def load_any(path: Path) -> Recipe | StagedRecipe:
    """Read, validate and anchor a recipe: relative paths in it are relative to the file."""
    try:
        with path.open("rb") as f:  # no more than that, whatever its size is said to be: a device has none
            head = f.read(MAX_BYTES + 1)
        if len(head) > MAX_BYTES:
            raise RecipeError(1, str(path), f"is larger than {MAX_BYTES} bytes.", "Give a recipe, not data.")
        text = io.TextIOWrapper(io.BytesIO(head), encoding="utf-8").read()  # line ends as in a text file
    except UnicodeDecodeError as e:
        raise RecipeError(1, str(path), "is not UTF-8 text.", "Save it as UTF-8.") from e
    except OSError as e:
        fix = "Write one with `educe init --data FILE`."
        raise RecipeError(1, str(path), f"cannot be read: {e.strerror}.", fix) from e
    recipe = parse_recipe(text, str(path))
    try:
        where = position(_parse(text, str(path)), ("template", "file"), str(path))
        base = path.resolve().parent
        return (
            anchored_stages(recipe, base, where) if isinstance(recipe, StagedRecipe) else anchored(recipe, base, where)
        )
    except (OSError, RuntimeError, ValueError) as e:  # a name too long, ~nobody, a NUL
        fix = "Mend model, runs, template or data."
        raise RecipeError(103, str(path), f"a path in it cannot be used: {str(e)[:200]}.", fix) from e


def parse_recipe(text: str, shown: str) -> Recipe | StagedRecipe:
    """Validate recipe text. `shown` names the file in messages. Paths stay as written. With `stages` it is one of several runs."""
    _refuse_secret(text, shown)
    tree = _parse(text, shown)
    if not isinstance(tree, Mapping):
        raise RecipeError(101, shown, "is not a mapping of keys.", "Start from `educe init --data FILE`.")
    root: type[Recipe | StagedRecipe] = StagedRecipe if "stages" in tree else Recipe
    if root is Recipe and tree.get("objective", "sft") not in ("sft", {"kind": "sft"}):
        at = position(tree, ("objective",), shown)
        raise RecipeError(
            102, at, "objective is not a known key.", "Write a stage: stages: [{kind: preference, data: ...}]."
        )
    if root is Recipe and isinstance(tree.get("model"), Mapping):
        at = position(tree, ("model",), shown)
        fix = "Write stages, the first of `kind: pretrain`, whose texts teach it: docs/stages.md."
        raise RecipeError(201, at, "model: {init: random} begins a recipe of stages, and this one has none.", fix)
    if root is StagedRecipe and not (isinstance(tree["stages"], list) and tree["stages"]):
        at, fix = position(tree, ("stages",), shown), "Write one block for each: stages: [{kind: sft, data: ...}]."
        raise RecipeError(103, at, f"stages is {brief(_plain(tree['stages']))}, and must be a list of stages.", fix)
    try:
        return root.model_validate(_plain(tree))
    except ValidationError as e:
        raise told(e, tree, shown, root) from None


def _refuse_secret(text: str, shown: str) -> None:
    """A recipe is copied into every run, shared and versioned: a key in it, a comment included, is told and never repeated.

    Hiding it instead would leave it in the file, and change what the recipe says.
    """
    found = find_secret(text)
    if found is not None:
        kind, at = found
        line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
        fix = "Take it out of the file and keep it in the environment (HF_TOKEN); revoke it if the file was shared."
        raise RecipeError(105, f"{shown}:{line}:{column}", f"holds a secret ({kind}).", fix)


def anchored(recipe: Recipe, base: Path, where: str = "template.file") -> Recipe:
    """The recipe with absolute paths. A model that names no existing directory is taken for a Hub id.

    `where` is said of a template file that does not exist.
    """

    data = _anchored_data(recipe.data, base)
    return recipe.model_copy(update={"data": data, **_anchored_rest(recipe, recipe.model, base, where)})


def anchored_stages(recipe: StagedRecipe, base: Path, where: str = "template.file") -> StagedRecipe:
    """The same of a recipe of stages."""
    stages = tuple(s.model_copy(update={"data": _anchored_data(s.data, base)}) for s in recipe.stages)
    model = recipe.model if isinstance(recipe.model, str) else None
    return recipe.model_copy(update={"stages": stages, **_anchored_rest(recipe, model, base, where)})


def _anchored_rest(recipe: Recipe | StagedRecipe, model: str | None, base: Path, where: str) -> dict[str, Any]:
    """All paths but those of data; no model where it is none of a name."""

    def absolute(p: str) -> str:
        return str((base / Path(p).expanduser()).resolve())

    template = recipe.template
    if isinstance(template, FileTemplate):
        file = absolute(template.file)
        if not Path(file).is_file():
            fix = "Give the path of a Jinja template, relative to the recipe."
            raise RecipeError(103, where, f"template.file is {template.file!r}, and {file} is no file.", fix)
        template = template.model_copy(update={"file": file})
    local = model is not None and (model.startswith((".", "/", "~")) or (base / model).is_dir())
    return {
        **({"model": absolute(model)} if local and model is not None else {}),
        "runs": absolute(recipe.runs),
        "template": template,
        "evaluation": _anchored_metric(recipe.evaluation, base),
    }


def _anchored_metric(evaluation: Evaluation, base: Path) -> Evaluation:
    """A function of the user's by its file: a module is one beside the recipe."""
    metric = evaluation.metric
    if not isinstance(metric, CustomMetric):
        return evaluation
    module, _, name = metric.function.rpartition(":")
    file = module if module.endswith(".py") else f"{module.replace('.', '/')}.py"
    entry = f"{(base / Path(file).expanduser()).resolve()}:{name}"
    return evaluation.model_copy(update={"metric": metric.model_copy(update={"function": entry})})


# A data set on the Hub, where no such path exists: ORG/NAME, without a suffix that a file would have.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w-]*/[A-Za-z0-9][\w.-]*")
_SUFFIX = re.compile(r"\.(jsonl?|parquet|csv|tsv|txt|gz|zst)$")


def _anchored_data(data: Data, base: Path) -> Data:
    def absolute(files: str) -> str:
        if files == "-" or files.startswith("hf://"):
            return files
        path = base / Path(files).expanduser()
        on_hub = _HUB_ID.fullmatch(files) and not _SUFFIX.search(files) and not path.exists()
        return files if on_hub else str(path.resolve())

    def rows(r: Rows | None) -> Any:
        return r.model_copy(update={"files": absolute(r.files)}) if r is not None else None

    def split(s: Any) -> Any:
        return s.model_copy(update={"file": absolute(s.file)}) if isinstance(s, FileSplit) else s

    update = {"tasks": {name: rows(task) for name, task in data.tasks.items()}, "replay": rows(data.replay)}
    return data.model_copy(
        update={**update, "train": rows(data.train), "dev": split(data.dev), "test": split(data.test)}
    )


def _parse(text: str, shown: str) -> Any:
    yaml = YAML(typ="rt", pure=True)
    yaml.allow_duplicate_keys = False
    try:
        depth = 0
        for number, event in enumerate(yaml.parse(io.StringIO(text))):
            _refuse_event(event, shown)
            if number > MAX_EVENTS:
                found = f"has more than {MAX_EVENTS // 2:,} keys and values."
                raise RecipeError(101, _at(shown, event.start_mark), found, "Give a recipe, not data.")
            depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
            if depth > MAX_DEPTH:
                found = f"nests deeper than {MAX_DEPTH}."
                raise RecipeError(101, _at(shown, event.start_mark), found, "Start from `educe init --data FILE`.")
        return yaml.load(text)
    except DuplicateKeyError as e:
        mark = e.problem_mark
        problem = str(e.problem).split("with value")[0].strip()
        raise RecipeError(101, _at(shown, mark), f"{problem}.", "Keep one of them.") from None
    except MarkedYAMLError as e:
        raise RecipeError(101, _at(shown, e.problem_mark), f"{e.problem}.", "Mind indentation and quotes.") from None
    except (YAMLError, RecursionError, ValueError, IndexError) as e:  # IndexError: ruamel on `0x_`
        raise RecipeError(101, shown, f"{str(e).splitlines()[0]}.", "Mind indentation and quotes.") from None


def _refuse_event(event: Any, shown: str) -> None:
    """What YAML can do and a recipe does not need: anchors, tags, the rules of another YAML version."""
    found = ""
    if getattr(event, "anchor", None):
        found, fix = "uses a YAML anchor or alias.", "Write the value out where it is used."
    elif getattr(event, "tag", None):
        found, fix = f"uses the YAML tag {event.tag}.", "Write plain values."
    elif getattr(event, "value", None) == "<<" and event.style is None:
        found, fix = "uses a YAML merge key.", "Write the values out where they are used."
    elif getattr(event, "version", None) not in (None, (1, 2)):
        found, fix = "asks for another YAML version.", "Remove the %YAML line: recipes are YAML 1.2."
    if found:
        raise RecipeError(101, _at(shown, event.start_mark), found, fix)


def _at(shown: str, mark: Any) -> str:
    return f"{shown}:{mark.line + 1}:{mark.column + 1}" if mark is not None else shown


def _plain(node: Any) -> Any:
    """ruamel's round-trip values as plain ones."""
    if isinstance(node, Mapping):
        return {str(k): _plain(v) for k, v in node.items()}
    if isinstance(node, str):
        return _whole_characters(str(node))
    if isinstance(node, Sequence):
        return [_plain(v) for v in node]
    for kind in (bool, int, float):
        if isinstance(node, kind):
            return kind(node)
    return node


def _whole_characters(text: str) -> str:
    """JSON writes a character beyond U+FFFF as two halves, which YAML does not join."""
    if not any("\ud800" <= c <= "\udfff" for c in text):
        return text
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError as e:
        found = f"{brief(text)} holds half of a character."
        raise RecipeError(103, "recipe", found, "Write the character itself, as UTF-8.") from e
