"""A rendered row as spans to look at: which tokens are trained, which are context, who wrote them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from educe.chat.tokens import ChatTokenizer
from educe.chat.weights import EVEN, Weighing, owners, weigh
from educe.types import Message, Part, Rendered

Kind = Literal["template", "content", "trained"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One token as shown: the text it adds. Where a character takes several tokens, its last one shows it.

    `segment` counts the stretches of the sequence; `message` is the row's message it belongs to, `part` which of its texts.
    """

    text: str
    token: int
    kind: Kind
    control: bool
    weight: float
    segment: int
    message: int | None
    part: Part


def view(
    rendered: Rendered, messages: Sequence[Message], tokenizer: ChatTokenizer, weighing: Weighing = EVEN
) -> list[Span]:
    """Every token of a sequence, in order."""
    spans = []
    ids = rendered.ids_T.tolist()
    owner_T, _ = owners(rendered, tokenizer)
    weights = weigh(rendered, messages, tokenizer, weighing).tolist()
    for token, segment, weight, text in zip(ids, owner_T.tolist(), weights, tokenizer.pieces(ids), strict=True):
        owner = rendered.rendering.segments[segment]
        kind: Kind = "trained" if owner.trained else "content" if owner.from_data else "template"
        spans.append(
            Span(
                text=text,
                token=token,
                kind=kind,
                control=token in tokenizer.control_ids,
                weight=weight,
                segment=segment,
                message=owner.message,
                part=owner.part,
            )
        )
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
