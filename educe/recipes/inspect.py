"""`educe inspect`: the tokens of one row, as they will be trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from educe.chat.render import render_prompt
from educe.chat.tokens import load_tokenizer
from educe.chat.view import Span, view
from educe.chat.weights import build_rendered
from educe.config import Recipe
from educe.data.formats import to_conversation
from educe.data.sources import read_rows
from educe.errors import Refusal, UsageError
from educe.model.source import Say, find_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """One training row: each of its sequences token by token, or why it is refused. `prompt_ids` is what inference sends."""

    place: str
    sequences: list[list[Span]]
    refusal: Refusal | None
    num_prompt_tokens: int


def inspect(recipe: Recipe, row: int, say: Say) -> Inspection:
    """Render the training file's row number `row` (its line, from 1) and prove it."""
    tokenizer = load_tokenizer(find_model(recipe.model, say))
    last = 0
    for source, value in read_rows(Path(recipe.data.train)):
        last = source.line
        if source.line != row:
            continue
        made = value if isinstance(value, Refusal) else to_conversation(value, source, recipe.data.system)
        built = made if isinstance(made, Refusal) else build_rendered(made, tokenizer, recipe.data.train_on == "last")
        if isinstance(built, Refusal) or isinstance(made, Refusal):
            refusal = built if isinstance(built, Refusal) else None
            return Inspection(place=str(source), sequences=[], refusal=refusal, num_prompt_tokens=0)
        first = next(i for i, m in enumerate(made.messages) if m.role == "assistant")
        prompt = render_prompt(made.messages[:first], tokenizer)
        sequences = [view(r, tokenizer) for r in built]
        return Inspection(place=str(source), sequences=sequences, refusal=None, num_prompt_tokens=len(prompt))
    found = f"there is no row at line {row}; the last is at line {last}."
    raise UsageError(101, "--row", found, "Give the line of a row in the training file.")
