"""YAML 1.2 with positions → `Recipe`; every mistake is told at file:line:col, with the nearest valid name."""

from __future__ import annotations

import difflib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent

from educe.config.recipe import FileSplit, Full, Lora, Recipe, ShareSplit
from educe.errors import RecipeError

MAX_BYTES = 1_000_000
MAX_DEPTH = 20
_TAGGED = {"full": Full, "lora": Lora, "file": FileSplit, "share": ShareSplit}
_UNIONS = ("tuning", "dev", "test")


def load_recipe(path: Path) -> Recipe:
    """Read, validate and anchor a recipe: relative paths in it are relative to the file."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError(1, str(path), f"is larger than {MAX_BYTES} bytes.", "Give a recipe, not data.")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise RecipeError(1, str(path), "is not UTF-8 text.", "Save it as UTF-8.") from e
    except OSError as e:
        fix = "Write one with `educe init --data FILE`."
        raise RecipeError(1, str(path), f"cannot be read: {e.strerror}.", fix) from e
    recipe = parse_recipe(text, str(path))
    try:
        return anchored(recipe, path.resolve().parent)
    except (OSError, RuntimeError, ValueError) as e:  # a name too long, ~nobody, a NUL
        raise RecipeError(103, str(path), f"a path in it cannot be used: {e}.", "Mend model, runs or data.") from e


def parse_recipe(text: str, shown: str) -> Recipe:
    """Validate recipe text. `shown` names the file in messages. Paths stay as written."""
    tree = _parse(text, shown)
    if not isinstance(tree, Mapping):
        raise RecipeError(101, shown, "is not a mapping of keys.", "Start from `educe init --data FILE`.")
    try:
        return Recipe.model_validate(_plain(tree))
    except ValidationError as e:
        raise _told(e, tree, shown) from None


def anchored(recipe: Recipe, base: Path) -> Recipe:
    """The recipe with absolute paths. A model that names no existing directory is taken for a Hub id."""

    def absolute(p: str) -> str:
        return str((base / Path(p).expanduser()).resolve())

    def split(s: FileSplit | ShareSplit) -> FileSplit | ShareSplit:
        return FileSplit(kind="file", file=absolute(s.file)) if isinstance(s, FileSplit) else s

    data = recipe.data.model_copy(
        update={"train": absolute(recipe.data.train), "dev": split(recipe.data.dev), "test": split(recipe.data.test)}
    )
    local = recipe.model.startswith((".", "/", "~")) or (base / recipe.model).is_dir()
    model = absolute(recipe.model) if local else recipe.model
    return recipe.model_copy(update={"data": data, "model": model, "runs": absolute(recipe.runs)})


def _parse(text: str, shown: str) -> Any:
    yaml = YAML(typ="rt", pure=True)
    yaml.allow_duplicate_keys = False
    try:
        depth = 0
        for event in yaml.parse(io.StringIO(text)):
            _refuse_event(event, shown)
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
        return str(node)
    if isinstance(node, Sequence):
        return [_plain(v) for v in node]
    for kind in (bool, int, float):
        if isinstance(node, kind):
            return kind(node)
    return node


def _position(tree: Any, path: Sequence[str | int], shown: str) -> str:
    """file:line:col of the deepest key of `path` that the file really has."""
    where = shown
    for key in path:
        if isinstance(tree, Mapping) and key in tree:
            line, column = tree.lc.key(key)  # type: ignore[attr-defined]
            where = f"{shown}:{line + 1}:{column + 1}"
            tree = tree[key]
        elif isinstance(tree, Sequence) and isinstance(key, int) and not isinstance(tree, str) and key < len(tree):
            tree = tree[key]
    return where


def _keys_at(path: Sequence[str | int], tree: Any) -> list[str]:
    """Names that are valid in the block at `path`."""
    block: Any = Recipe
    for key in path:
        if isinstance(tree, Mapping):
            tree = tree.get(key, tree)
        found = block.model_fields.get(str(key))
        inner: Any = found.annotation if found else None
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            block = inner
        elif key in _TAGGED:
            block = _TAGGED[str(key)]
    return list(block.model_fields)


def _told(error: ValidationError, tree: Any, shown: str) -> RecipeError:
    first = min(error.errors(), key=lambda e: (e["type"] != "extra_forbidden", len(e["loc"])))
    path = list(first["loc"])
    written = [p for i, p in enumerate(path) if i == 0 or path[i - 1] not in _UNIONS]  # without pydantic's union tags
    dotted = ".".join(map(str, written))
    where = _position(tree, written, shown)
    if first["type"] == "extra_forbidden":
        names = _keys_at(path[:-1], tree)
        near = difflib.get_close_matches(str(path[-1]), names, 1, 0.5)
        fix = f"Did you mean {near[0]!r}?" if near else f"Valid here: {', '.join(names)}."
        return RecipeError(102, where, f"{dotted} is not a known key.", fix)
    if first["type"] in ("missing", "union_tag_not_found"):
        missing = dotted if first["type"] == "missing" else f"{dotted}.kind"
        return RecipeError(104, where, f"{missing} is missing.", "Add it, or start from `educe init --data FILE`.")
    if not path:
        return RecipeError(201, shown, first["msg"].removeprefix("Value error, ") + ".", "Change one of the two.")
    value = repr(first["input"])
    found = f"{dotted} is {value if len(value) <= 60 else value[:57] + '...'}."
    return RecipeError(103, where, found, f"{first['msg']}.")
