"""Every knob of a recipe is read by something, says what it is, and there are few of them."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any, get_args

import educe
import pytest
from educe.config import Full, Lora, Recipe
from educe.config.data import Data, FileSplit, Rates, Replay, Rows, ShareSplit, Task, Temperature, Trees, Unimax
from educe.config.knobs import Knobs
from educe.config.objective import Dpo, Ipo, Orpo, SimPo
from educe.config.recipe import (
    CustomMetric,
    Decay,
    Evaluation,
    Even,
    FileTemplate,
    LayerWise,
    LoraPlus,
    NamedTemplate,
    OwnTemplate,
    PlainMetric,
    Train,
    Wsd,
)
from pydantic import BaseModel

PACKAGE = Path(educe.__file__).parent


def blocks_in(annotation: Any) -> set[type[BaseModel]]:
    """Blocks that a field of this type holds, itself or in a union or a dict."""
    inner = (annotation, *get_args(annotation))
    kinds = (*inner, *(k for i in inner for k in get_args(i)))
    return {k for k in kinds if isinstance(k, type) and issubclass(k, Knobs)}


def blocks(of: type[BaseModel] = Recipe) -> set[type[BaseModel]]:
    """Those of a tuning run: `objective` is said by recipes of stages alone, and refused elsewhere."""
    found: set[type[BaseModel]] = {of}
    for name, field in of.model_fields.items():
        if name == "objective":
            continue
        for kind in blocks_in(field.annotation):
            found |= blocks(kind)
    return found


def reads() -> set[str]:
    """`owner.name` of every attribute read in the package, the recipe's own validation aside."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path.parent.name == "config":
            tree.body = [
                n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name in ("run_path", "sources")
            ]  # type: ignore[misc]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                owner = node.value
                named = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
                found.add(f"{named.lstrip('_')}.{node.attr}")
    return found


OWNERS: dict[type[BaseModel], tuple[str, ...]] = {
    Recipe: ("recipe", "self"), Data: ("data", "self"), Train: ("train",), Evaluation: ("evaluation",), Lora: ("tuning",),
    Full: ("tuning",),
    PlainMetric: ("metric",), CustomMetric: ("metric",),
    FileSplit: ("held",), ShareSplit: ("s",), Task: ("task", "t", "rows"),
    Rows: ("rows",), Replay: ("replay", "rows"), Trees: ("trees",), Rates: ("rates",), Temperature: ("rates",), Unimax: ("rates",),
    Decay: ("schedule",), Wsd: ("schedule",), Even: ("rates",), LoraPlus: ("rates",), LayerWise: ("rates",),
    OwnTemplate: ("choice",), NamedTemplate: ("choice",), FileTemplate: ("choice",),
}  # fmt: skip


def test_every_knob_is_read() -> None:
    read = reads()
    assert blocks() == set(OWNERS)
    unions = (
        Full,
        Lora,
        FileSplit,
        ShareSplit,
        OwnTemplate,
        FileTemplate,
        Temperature,
        Unimax,
        Wsd,
        Even,
        LoraPlus,
        LayerWise,
        CustomMetric,
    )
    discriminators = {(k, "kind") for k in unions}  # read as the class
    unread = [
        f"{block.__name__}.{knob}"
        for block, owners in OWNERS.items()
        for knob in block.model_fields
        if (block, knob) not in discriminators and not any(f"{o}.{knob}" in read for o in owners)
    ]
    assert not unread


def test_there_are_at_most_80_knobs_and_each_says_what_it_is() -> None:
    fields: list[tuple[str, Any]] = [
        (n, f) for b in blocks() for n, f in b.model_fields.items() if n in b.__annotations__ and n != "objective"
    ]
    holds_others = [f for _, f in fields if len(blocks_in(f.annotation)) == 1]  # set by what is in it
    own = [n for n, f in fields if f not in holds_others and not (n == "kind" and f.is_required())]
    assert 20 < len(own) <= 80
    assert len({block.__name__ for block in blocks()}) == 25
    for name, field in fields:
        if name != "data" and not (name == "kind" and field.is_required() and not field.description):
            assert field.description, name
            assert not re.search(r"\buse_|\bno_", name)


def test_every_setting_of_a_preference_loss_is_read() -> None:
    """A loss is called with all that its block holds."""
    pytest.importorskip("torch")
    from educe.preference.losses import LOSSES

    for block in (Dpo, Ipo, SimPo, Orpo):
        (kind,) = get_args(block.model_fields["kind"].annotation)
        assert set(inspect.signature(LOSSES[kind]).parameters) == block.model_fields.keys() - {"kind"}
        assert all(f.description for n, f in block.model_fields.items() if n != "kind")
