"""Which rows an objective learns from."""

from __future__ import annotations

from educe.errors import Refusal
from educe.recipes.items import Item
from educe.types import Conversation, Document, Pair

_WANTED: dict[str, tuple[type, ...]] = {
    "sft": (Conversation, Document),
    "pretrain": (Document,),
    "preference": (Pair,),
}
_CALLED: dict[type, str] = {Conversation: "a conversation", Document: "raw text", Pair: "a preference pair"}
_LEARNS = {"sft": "answers", "pretrain": "raw text", "preference": "pairs of answers"}
_FIX: dict[tuple[str, type], str] = {
    ("sft", Pair): "Map one of the two (columns), or put the file into a stage of `kind: preference`.",
    ("pretrain", Conversation): "Put it into a stage of `kind: sft`, or map one of its texts: columns: {text: ...}.",
    ("pretrain", Pair): "Put it into a stage of `kind: preference`.",
    ("preference", Conversation): "Put it into a stage of `kind: sft`; a pair has a chosen and a rejected answer.",
    ("preference", Document): "Put it into a stage of `kind: pretrain`.",
}


def wanted(item: Item, objective: str) -> Item | Refusal:
    """The row, or why this stage learns nothing from it."""
    if isinstance(item, _WANTED[objective]):
        return item
    found = f"the row is {_CALLED[type(item)]}, and this stage learns from {_LEARNS[objective]}."
    return Refusal(code="E-DATA-150", where=str(item.source), found=found, fix=_FIX[objective, type(item)])
