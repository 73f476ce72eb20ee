"""One row, token by token, on the terminal. `educe.cli.inspection_page` makes the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.text import Text

from educe.cli.screens import console
from educe.report.visible import is_unseen, name_of

if TYPE_CHECKING:
    from educe.chat.masks import OtherMask
    from educe.chat.view import Span
    from educe.recipes.inspect import Inspection, Shown

MOST_PROMPT = 2000
_WIDEST = 24  # of a token's text in a list; longer ones push their line
PARTS = {"content": "text", "eos": "appended", "tool_calls": "tool call"}
_STYLES = {
    "trained": "black on green",
    "unasked": "black on yellow",
    "control": "bold magenta",
    "template": "dim",
    "context": "",
}
# How a token of another mask stands in plain text, by (trained by us, trained by it).
_PLAIN = {(True, True): "[{}]", (False, True): "{{{}}}", (True, False): "({})", (False, False): "{}"}
_WHY_SEVERAL = ", because the later turns do not go on in the earlier one"
_DIFF = {(True, True): "black on green", (False, True): "black on red", (True, False): "black on yellow"}


# --- what both screens and pages show ------------------------------------------------------------------------------------


def shown(text: str, *, starts: bool = False, ends: bool = False) -> str:
    """Text with nothing invisible in it: ↵ → ⍽ ␀ ⟨U+200B⟩, and · for spaces at the ends of lines and, where it starts or ends
    a stretch, at its own."""
    lines = []
    pieces = text.split("\n")
    for k, line in enumerate(pieces):
        first, last = starts or k > 0, ends or k + 1 < len(pieces)
        kept = line.lstrip(" ") if first else line
        head = "·" * (len(line) - len(kept))
        kept, tail = (kept.rstrip(" "), len(kept) - len(kept.rstrip(" "))) if last else (kept, 0)
        lines.append(head + "".join(map(_visible, kept)) + "·" * tail)
    return "↵\n".join(lines)


def in_cell(text: str) -> str:
    """A token's text in one line. A byte of an unfinished character has none."""
    return (
        shown(text, starts=True, ends=True).replace("↵\n", "↵").replace("\t", "") if text else "(part of a character)"
    )


def _visible(char: str) -> str:
    if char == "\t":
        return "→\t"
    if char < " ":
        return chr(0x2400 + ord(char))
    if char == "\x7f":
        return "␡"
    if char == "\u00a0":
        return "⍽"
    return name_of(char) if is_unseen(char) or (char.isspace() and char != " ") else char


def kind_of(span: Span) -> str:
    """trained · unasked (of an answer, without weight) · control · context · template."""
    if span.weight > 0:
        return "trained"
    if span.kind == "trained":
        return "unasked"
    return "control" if span.control else "template" if span.kind == "template" else "context"


def flow(spans: Sequence[Span]) -> Iterator[tuple[str, Span]]:
    """Each token with its text to show, and after a stretch of other weight than 0 or 1 that weight."""
    for k, s in enumerate(spans):
        before, after = spans[k - 1] if k else None, spans[k + 1] if k + 1 < len(spans) else None
        starts = before is None or before.control or before.segment != s.segment or _blank(before.text, -1)
        ends = after is None or after.control or after.segment != s.segment or _blank(after.text, 0)
        text = shown(s.text, starts=starts and not s.control, ends=ends and not s.control)
        yield text, s


def _blank(text: str, end: int) -> bool:
    """Whether a line ends there, but for spaces."""
    return text.strip(" ")[end:][:1] in ("", "\n")


def weight_after(spans: Sequence[Span], k: int) -> str:
    """×0.5 behind the last token of a stretch with that weight; "" for 0 and 1."""
    w = spans[k].weight
    return f"×{w:g}" if w not in (0, 1) and (k + 1 == len(spans) or spans[k + 1].weight != w) else ""


def head_of(sequences: Sequence[Shown], k: int) -> str:
    """sequence 1 of 2: turn 1, 84 tokens, 12 trained"""
    s = sequences[k]
    if s.label:
        return f"{s.label}: {len(s.spans):,} tokens, {s.num_trained:,} trained"
    *first, last = map(str, s.turns)
    turns = f"turns {', '.join(first)} and {last}" if first else f"turn {last}"
    which = f"sequence {k + 1} of {len(sequences)}: " if len(sequences) > 1 else ""
    return f"{which}{turns}, {len(s.spans):,} tokens, {s.num_trained:,} trained"


def stop_of(s: Shown) -> str:
    """Which token ends the turns, and where."""
    words = dict.fromkeys(f"{s.spans[k].text or '(no text)'} (id {s.spans[k].token})" for k in s.stops)
    places = ", ".join(f"#{k}" for k in s.stops[:8]) + (" …" if len(s.stops) > 8 else "")
    return f"{' and '.join(words)}, token {places}"


def message_of(found: Inspection, span: Span) -> str:
    """2 assistant; "" for what belongs to no message."""
    return "" if span.message is None else f"{span.message} {found.messages[span.message].role}"


# --- the terminal --------------------------------------------------------------------------------------------------------


def show_inspection(found: Inspection, *, tokens: bool = False) -> None:
    """Colours on a terminal; where there are none, trained tokens stand in [brackets]."""
    if found.refusal is not None:
        r = found.refusal
        _line("Refused: ", "bold red", f"{r.code} {r.where} {r.found}")
        _line("  → ", "green", r.fix)
        return
    console.print(Text(f"{found.place}: {head_of(found.sequences, 0)}" if len(found.sequences) == 1 else (
        f"{found.place}: {len(found.sequences)} sequences{'' if found.sequences[0].label else _WHY_SEVERAL}"
    ), style="bold"), soft_wrap=True)  # fmt: skip
    for note in found.notes:
        _line("! ", "yellow", note)
    for k, s in enumerate(found.sequences):
        if len(found.sequences) > 1:
            console.print()
            console.print(Text(head_of(found.sequences, k), style="bold"), soft_wrap=True)
            if s.apart:
                _line("split here: ", "yellow", s.apart)
        console.print(_flowing(s.spans), soft_wrap=True)
        if s.stops:
            _line("stop token: ", "bold", stop_of(s))
        if tokens:
            console.print(_table(found, s), soft_wrap=True)
    _legend(found)
    first = found.sequences[0]
    if first.prompt:
        kept = first.prompt[:MOST_PROMPT]
        left = len(first.prompt) - len(kept)
        head = f"What a server sends before turn {first.turns[0]}: {first.num_prompt_tokens:,} tokens, as text"
        console.print(Text(f"\n{head}", style="bold"), soft_wrap=True)
        console.print(Text(shown(kept, starts=True, ends=not left), style="dim"), soft_wrap=True)
        if left:
            console.print(Text(f"… and {left:,} more characters", style="dim italic"), soft_wrap=True)
    if found.other is not None:
        _show_other(found.other)


def _line(label: str, style: str, text: str) -> None:
    console.print(Text.assemble((label, style), text), soft_wrap=True)


def _flowing(spans: Sequence[Span]) -> Text:
    text = Text()
    for k, (piece, s) in enumerate(flow(spans)):
        kind = kind_of(s)
        bare = kind == "trained" and not console.is_terminal
        text.append(_in("[{}]", piece) if bare else piece, style=_STYLES[kind])
        text.append(weight_after(spans, k), style="cyan")
    return text


def _in(shape: str, piece: str) -> str:
    """A token between marks, those of each of its lines on one line."""
    return "\n".join(shape.format(line) if line else "" for line in piece.split("\n"))


def _legend(found: Inspection) -> None:
    kinds = {kind_of(s) for q in found.sequences for s in q.spans}
    names = {
        "trained": "trained" if console.is_terminal else "[trained]",
        "unasked": "of an answer, weight 0",
        "context": "context",
        "control": "control token",
        "template": "written by the template",
    }
    shown_kinds = [(names[k], _STYLES[k]) for k in names if k in kinds]
    parts: list[str | tuple[str, str]] = []
    for k, pair in enumerate(shown_kinds):
        parts += [" · "] * (k > 0) + [pair]
    if any(s.weight not in (0, 1) for q in found.sequences for s in q.spans):
        parts += [" · ", ("×weight", "cyan")]
    console.print(Text.assemble(*parts))


def _table(found: Inspection, s: Shown) -> Text:
    """Every token in a line: #, id, text, weight, segment, message."""
    wide = max(len("text"), *(cell_len(in_cell(span.text)) for span in s.spans))
    wide = min(wide, _WIDEST)
    head = f"{'#':>5} {'id':>7}  {'text':<{wide}}  {'weight':<9} {'segment':<13} message\n"
    table = Text.assemble((head, "bold"))
    for k, span in enumerate(s.spans):
        text = in_cell(span.text)
        weight = f"{span.weight:g}{' stop' if k in s.stops else ''}"
        part = f"{span.segment} {PARTS.get(span.part, span.part)}"
        table.append(f"{k:>5} {span.token:>7}  ")
        table.append(text, style=_STYLES[kind_of(span)])
        table.append(f"{' ' * (wide - cell_len(text))}  {weight:<9} {part:<13} {message_of(found, span)}\n")
    return table


def _show_other(other: OtherMask) -> None:
    console.print(Text(f"\nCompared with {other.name}", style="bold"), soft_wrap=True)
    for sentence in (other.says, *(other.in_words() if other.ids else ())):
        console.print(Text(sentence), soft_wrap=True)
    if not other.ids:
        return
    text = Text()
    for piece, ours, theirs in zip(other.texts, other.ours, other.trained, strict=True):
        shape = "{}" if console.is_terminal else _PLAIN[ours, theirs]
        text.append(_in(shape, shown(piece)), style=_DIFF.get((ours, theirs), "dim"))
    console.print(text, soft_wrap=True)
    names = {(True, True): "trained by both", (False, True): f"only by {other.name}", (True, False): "only by educe"}
    shapes = [
        (n if console.is_terminal else _PLAIN[k].format(n), _DIFF[k])
        for k, n in names.items()
        if k in set(zip(other.ours, other.trained, strict=True))
    ]
    console.print(Text(" · ").join(Text(n, style=style) for n, style in shapes))
