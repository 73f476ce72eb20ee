"""A mistake in a recipe told at file:line:col, as the file has it, with the nearest valid name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from educe.config.hints import blocks_of, fix_of_bounds, fix_of_unknown, names_of_kinds
from educe.config.knobs import FORMS, Contradiction
from educe.config.recipe import Recipe
from educe.config.stages import StagedRecipe
from educe.errors import RecipeError

_Path = Sequence[str | int]
_OUT_OF_BOUNDS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")


def _found(tree: Any, path: _Path) -> list[tuple[Any, tuple[int, int]]]:
    """The values along `path`, each with the (line, column) of its key, from 0, as far as the file really has them."""
    found = []
    for key in path:
        if isinstance(tree, Mapping) and key in tree:
            at = tree.lc.key(key)  # type: ignore[attr-defined]
        elif isinstance(tree, Sequence) and isinstance(key, int) and not isinstance(tree, str) and key < len(tree):
            at = tree.lc.item(key)  # type: ignore[attr-defined]
        else:
            break
        tree = tree[key]
        found.append((tree, at))
    return found


def position(tree: Any, path: _Path, shown: str) -> str:
    """file:line:col of the deepest key of `path` that the file really has."""
    found = _found(tree, path)
    return f"{shown}:{found[-1][1][0] + 1}:{found[-1][1][1] + 1}" if found else shown


def _walked(
    path: _Path, root: type[BaseModel]
) -> tuple[list[str | int], type[BaseModel] | None, list[type[BaseModel]]]:
    """pydantic's path to a mistake as it is written, without the tags of unions; the block that its end is, if it is one; the
    kinds of block it may be, if it is a choice.
    """
    written: list[str | int] = []
    block: type[BaseModel] | None = root
    kinds: list[type[BaseModel]] = []
    named = False  # the next key is a name that the user gave to a block, or its place in a list
    for key in path:
        if named:
            written.append(key)
            named = False
            continue
        if kinds:
            block, kinds = next((k for k in kinds if key in (*names_of_kinds([k]), k.__name__)), None), []
            continue
        if str(key).startswith("function-"):  # a block that checks itself, where text may stand too
            continue
        written.append(key)
        field = block.model_fields.get(str(key)) if block is not None else None
        named = field is not None and (get_origin(field.annotation) is dict or get_args(field.annotation)[1:] == (...,))
        found = blocks_of(field.annotation) if field is not None else []
        block, kinds = (found[0], []) if len(found) == 1 else (None, found)
    return written, block, kinds


def told(error: ValidationError, tree: Any, shown: str, root: type[BaseModel]) -> RecipeError:
    found_at = [e["loc"] for e in error.errors()]

    def idle(e: ErrorDetails) -> bool:
        """A list that is too short where what stands in it is wrong; a block that is no text where it may be one and is wrong."""
        either = e["type"] == "string_type" and isinstance(e["input"], Mapping) and str(e["loc"][-1]).endswith("str")
        above = e["loc"][:-1] if either else e["loc"]
        return (either or e["type"] == "too_short") and any(
            at != e["loc"] and at[: len(above)] == above for at in found_at
        )

    errors = [e for e in error.errors() if not idle(e)]
    first = min(errors, key=lambda e: (e["type"] != "extra_forbidden", len(e["loc"])))
    written, _, kinds = _walked(first["loc"], root)
    spelled = _spelled(written, tree)
    where = position(tree, written, shown)
    if first["type"] == "extra_forbidden":
        block = _walked(first["loc"][:-1], root)[1] or root
        name = str(written[-1])
        fix = _beside(first["loc"], root) or fix_of_unknown(name, block, _walked(first["loc"][:-2], root)[2])
        if block is StagedRecipe and name in Recipe.model_fields:
            way = "its `kind:`" if name == "objective" else f"its own `{name}:`"
            fix = f"Move it into the stages, each of which has {way}."
        if written[:1] == ["stages"] and len(written) == 3 and name in StagedRecipe.model_fields:
            fix = f"It stands beside `stages:`, for the whole chain: {name}: ..."
        return RecipeError(102, where, f"{spelled} is not a known key.", fix)
    if first["type"] == "union_tag_not_found":
        fix = f"Add it: one of {', '.join(names_of_kinds(kinds))}."
        return RecipeError(104, where, f"{_spelled([*written, 'kind'], tree)} is missing.", fix)
    if first["type"] == "missing":
        return RecipeError(104, where, f"{spelled} is missing.", "Add it, or start from `educe init --data FILE`.")
    if first["type"] == "value_error":
        return _contradiction(first["ctx"]["error"], written, tree, shown)
    found = _found(tree, written)
    if kinds and found:
        return _no_kind(written, found[-1][0], names_of_kinds(kinds), tree, shown)
    written = written[: len(found)] or written  # one more key names one of several types that a value may have
    said = [
        e["msg"].removeprefix("Input should be ")
        for e in errors
        if _walked(e["loc"], root)[0][: len(written)] == written
    ]
    fix = f"It must be {' or '.join(said)}." if len(said) > 1 or said[0] != first["msg"] else f"{first['msg']}."
    if len(said) == 1 and first["type"] in _OUT_OF_BOUNDS:
        around = _walked(first["loc"][:-1], root)[1]
        fix = fix_of_bounds(around.model_fields.get(str(written[-1])) if around is not None else None) or fix
    if first["type"] in ("model_type", "dict_type") and (meant := _walked(first["loc"], root)[1]) is not None:
        keys = [n for n, f in meant.model_fields.items() if f.is_required()] or list(meant.model_fields)[:3]
        fix = f"It must be a block of settings: {{{', '.join(f'{n}: ...' for n in keys)}}}."
    if first["type"] == "string_pattern_mismatch":
        fix = FORMS[first["ctx"]["pattern"]]
    text = f"{_spelled(written, tree)} is {brief(first['input'])}."
    return RecipeError(103, where, text, fix.replace("valid tuple", "valid list"))


def _contradiction(given: Contradiction, written: _Path, tree: Any, shown: str) -> RecipeError:
    """Settings that do not go together: told at the first of them that the file has; those that it has not are defaults."""
    whole = [*written, *given.at]
    above = whole[:2] if whole[:1] == ["stages"] else []
    places: list[_Path] = []

    def told(match: re.Match[str]) -> str:
        path = [*above, *match[1].split(".")]
        if len(_found(tree, path)) < len(path):
            return f"{match[1]} ({match[2]} by default)"
        places.append(path)
        return match[0]

    text = re.sub(r"\b((?:data|train)(?:\.\w+)+) \((\d[^()]*)\)", told, given.found)
    block = ".".join(map(str, written[len(above) :]))
    text = text if text.startswith(block) else f"{block}: {text}"
    text = f"{_spelled(above, tree)}: {text}" if above else text
    return RecipeError(201, position(tree, places[0] if places else whole, shown), f"{text}.", given.fix)


def _spelled(written: _Path, tree: Any) -> str:
    """Keys with dots between; a stage is counted from 1, as everywhere."""
    if len(written) < 2 or written[0] != "stages":
        return ".".join(map(str, written))
    rest = ".".join(map(str, written[2:]))
    return f"stage {int(written[1]) + 1} of {len(tree['stages'])}{f': {rest}' if rest else ''}"


def _beside(at: _Path, root: type[BaseModel]) -> str:
    """Where an unknown key stands whose place is one block up; empty for others."""
    written = _walked(at, root)[0]
    for n in range(len(at) - 1, -1, -1):
        above, block, _ = _walked(at[:n], root)
        if block is not None and len(above) == len(written) - 2:
            return f"It stands beside `{written[-2]}:`, not in it." if written[-1] in block.model_fields else ""
    return ""


def _no_kind(written: _Path, value: Any, names: list[str], tree: Any, shown: str) -> RecipeError:
    """A choice whose `kind:` is none of `names`, or that is no block."""
    block = isinstance(value, Mapping)
    named, path = (value.get("kind"), [*written, "kind"]) if block else (value, written)
    near = difflib.get_close_matches(str(named), names, 1, 0.5)
    if isinstance(named, str) and not block and "file" in names and re.search(r"[./\\]", named):
        fix = f"For a file write {{kind: file, file: {named}}}."
    elif isinstance(named, str) and near:
        fix = f"Did you mean {near[0]!r}?" if near[0] != named else f"Write {{kind: {named}}}."
    else:
        fix = f"Give a block with `kind:`, one of {', '.join(names)}."
    return RecipeError(103, position(tree, path, shown), f"{_spelled(path, tree)} is {brief(named)}.", fix)


def brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
