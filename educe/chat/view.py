"""A rendered row as spans to look at: which tokens are trained, which are context, which are control tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from educe.chat.tokens import ChatTokenizer
from educe.chat.weights import weigh
from educe.types import Rendered

Kind = Literal["template", "content", "trained"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One token as shown: the text it adds. Where a character takes several tokens, its last one shows it."""

    text: str
    token: int
    kind: Kind
    control: bool
    weight: float


def view(rendered: Rendered, tokenizer: ChatTokenizer) -> list[Span]:
    """Every token of a row, in order."""
    control = set(tokenizer.control.values())
    spans = []
    ids = rendered.ids_T.tolist()
    for token, segment, weight, text in zip(
        ids, rendered.segment_T.tolist(), weigh(rendered).tolist(), tokenizer.pieces(ids), strict=True
    ):
        owner = rendered.rendering.segments[segment]
        kind: Kind = "trained" if owner.trained else "content" if owner.from_data else "template"
        spans.append(Span(text=text, token=token, kind=kind, control=token in control, weight=weight))
    return spans


def joined(spans: Iterable[Span]) -> list[dict[str, object]]:
    """Neighbouring tokens of the same kind as one run, for reports: [{text, kind, control, tokens}]."""
    runs: list[dict[str, object]] = []
    for s in spans:
        if runs and (runs[-1]["kind"], runs[-1]["control"]) == (s.kind, s.control) and not s.control:
            runs[-1]["text"] = f"{runs[-1]['text']}{s.text}"
            runs[-1]["tokens"] = int(str(runs[-1]["tokens"])) + 1
        else:
            runs.append({"text": s.text, "kind": s.kind, "control": s.control, "tokens": 1})
    return runs
