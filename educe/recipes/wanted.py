"""Which rows an objective learns from."""

from __future__ import annotations

from educe.config import Recipe
from educe.config.recipe import Metric, PlainMetric
from educe.errors import Refusal, RunError
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


def refuse(recipe: Recipe, objective: str, why: str, fix: str) -> None:
    """Ends a verb that would say nothing true of a run with that objective. Raises `RunError`."""
    if recipe.objective.kind == objective:
        found = f"learns from {_LEARNS[objective]}, and {why}."
        raise RunError(4, recipe.name, found, fix.format(chain=recipe.runs, run=recipe.run_path()))


def metric_of(recipe: Recipe) -> Metric:
    """What answers of the run's rows are graded by: texts and pairs hold no answer that is the right one."""
    return recipe.evaluation.metric if recipe.objective.kind == "sft" else PlainMetric(kind="text")
