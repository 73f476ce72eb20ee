"""One row, token by token: on the terminal or as a page."""

from __future__ import annotations

import html as escaping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from educe.cli.screens import console
from educe.files.atomic import write_text

if TYPE_CHECKING:
    from educe.chat.view import Span
    from educe.recipes.inspect import Inspection

_STYLES = {"trained": "black on green", "content": "", "template": "dim"}

_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title><style>
:root{{color-scheme:light dark;--t:#bfe8c8;--m:#777}}@media(prefers-color-scheme:dark){{:root{{--t:#1d5b31;--m:#999}}}}
body{{font:16px/1.9 system-ui,sans-serif;max-width:46rem;margin:2rem auto;padding:0 1rem;overflow-wrap:anywhere}}
span{{border-radius:3px;box-shadow:inset 0 0 0 1px #8883;padding:.1em 0;white-space:pre-wrap;unicode-bidi:isolate}}
.trained{{background:var(--t)}}.template{{color:var(--m)}}.control{{font-weight:700}}</style>
<h1>{title}</h1><p>{summary}</p>{rows}</html>
"""


def _shown(span: Span) -> str:
    return span.text.replace("\n", "↵\n")


def _counts(found: Inspection) -> str:
    spans = [s for sequence in found.sequences for s in sequence]
    trained = sum(s.weight > 0 for s in spans)
    return f"{len(spans)} tokens, {trained} trained; inference sends the first {found.num_prompt_tokens} as the prompt"


def show_inspection(found: Inspection) -> None:
    """Colours on a terminal; where there are none, trained tokens stand in [brackets]."""
    if found.refusal is not None:
        console.print(Text(f"Refused: {found.refusal}"), soft_wrap=True)
        return
    console.print(Text(f"{found.place}: {_counts(found)}", style="bold"), soft_wrap=True)
    for sequence in found.sequences:
        text = Text()
        for span in sequence:
            style = "bold magenta" if span.control and span.kind != "trained" else _STYLES[span.kind]
            plain = f"[{_shown(span)}]" if span.weight > 0 and not console.is_terminal else _shown(span)
            text.append(plain, style=style)
        console.print(text, soft_wrap=True)
    console.print(Text.assemble(("trained", _STYLES["trained"]), " · context · ", ("written by the template", "dim")))
    ids = " ".join(str(s.token) for s in found.sequences[0])
    console.print(Text(f"ids: {ids}", style="dim"), soft_wrap=True)


def write_inspection(found: Inspection, target: Path) -> None:
    """The row as one page without scripts; each token's id and weight are its tooltip."""
    rows = []
    for sequence in found.sequences:
        spans = [
            f'<span class="{s.kind}{" control" if s.control else ""}" title="id {s.token}, weight {s.weight:g}">'
            f"{escaping.escape(_shown(s))}</span>"
            for s in sequence
        ]
        rows.append(f"<p>{''.join(spans)}</p>")
    title = escaping.escape(Path(found.place).name)
    write_text(target, _PAGE.format(title=title, summary=escaping.escape(_counts(found)), rows="".join(rows)))
