"""What to do about a key that is none, or a number out of its bounds."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from educe.config.elsewhere import ELSEWHERE
from educe.config.recipe import Recipe

_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
_MIN_CLOSE, _CLOSE = 0.5, 0.8


def names_of_kinds(kinds: Sequence[type[BaseModel]]) -> list[str]:
    """The values of `kind:` that choose one of these blocks."""
    return [name for k in kinds for name in get_args(k.model_fields["kind"].annotation)]


def fix_of_unknown(name: str, block: type[BaseModel], kinds: Sequence[type[BaseModel]]) -> str:
    """For a key that `block` has not; `kinds` are the blocks that stand where it stands, if it is one of a choice."""
    names = list(block.model_fields)
    if near := difflib.get_close_matches(name, names, 1, _CLOSE):
        return f"Did you mean {near[0]!r}?"
    if owners := [k for k in kinds if name in k.model_fields]:
        return f"It belongs to `kind: {' or '.join(names_of_kinds(owners))}`."
    if told := hint_of(name):
        return told
    near = difflib.get_close_matches(name, names, 1, _MIN_CLOSE)
    return f"Did you mean {near[0]!r}?" if near else f"Valid here: {', '.join(names)}."


def hint_of(name: str) -> str:
    """Which knob a name is in educe, by what other trainers call it or where it stands in a recipe; empty where that is not known."""
    knob, note = ELSEWHERE.get(name.lower().replace("-", "_"), ("", ""))
    if note and not knob:
        return f"There is no such setting: {note}."
    places = [knob] if knob else [place for place, _ in knobs_of(Recipe) if _is_place_of(place, name)]
    return f"Here it is `{places[0]}`{f': {note}' if note else ''}." if len(places) == 1 else ""


def _is_place_of(place: str, name: str) -> bool:
    """`objective` is none: recipes of stages say it in their own words."""
    return place.rpartition(".")[2] == name and not place.startswith("objective")


def knobs_of(block: type[BaseModel], above: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every knob with its dotted place; what a user names, such as a task, is left out, and a place is told once."""
    told = set[str]()
    for name, field in block.model_fields.items():
        place = f"{above}{name}"
        yield place, field
        for inner in blocks_of(field.annotation) if get_origin(field.annotation) is not dict else ():
            for found in knobs_of(inner, f"{place}."):
                if found[0] not in told and not found[0].endswith(".kind"):
                    told.add(found[0])
                    yield found


def blocks_of(annotation: Any) -> list[type[BaseModel]]:
    """The blocks that a value of this type may be, or hold in a list or by name."""
    inner = (annotation, *get_args(annotation), *(k for a in get_args(annotation) for k in get_args(a)))
    inner = (*inner, *(k for a in inner for k in get_args(a)))
    return list(dict.fromkeys(k for k in inner if isinstance(k, type) and issubclass(k, BaseModel)))


def fix_of_bounds(field: FieldInfo | None) -> str:
    """The bounds of a number and what it is; empty for a knob that has none."""
    at = [
        (word, getattr(m, sign))
        for m in (field.metadata if field else ())
        for sign, word in _BOUNDS.items()
        if hasattr(m, sign)
    ]
    if field is None or not at:
        return ""
    return f"It must be {' and '.join(f'{word} {value:,}' for word, value in at)}: {field.description}."
