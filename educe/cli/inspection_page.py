"""One row, token by token, as a page: no network, no script, at home on a phone and in the dark."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from educe.cli.inspection import PARTS, flow, head_of, in_cell, kind_of, message_of, shown, stop_of, weight_after
from educe.errors import CODES
from educe.files.atomic import write_new

if TYPE_CHECKING:
    from educe.chat.masks import OtherMask
    from educe.recipes.inspect import Inspection, Shown

_CSS = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1a1e24;--soft:#57606b;--rule:#dde1e6;--panel:#f5f6f8;
--t:#bfe8c8;--u:#f6e3a1;--x:#f8c9c4;--c:#8a2a86}
@media(prefers-color-scheme:dark){:root{--paper:#14171b;--ink:#e7eaee;--soft:#a0aab6;--rule:#323942;--panel:#1c2026;
--t:#1d5b31;--u:#5f4d0c;--x:#6e2620;--c:#e59be1}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:1rem/1.6 system-ui,sans-serif;overflow-wrap:anywhere}
main{max-width:52rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.25rem;line-height:1.3;margin:0}
h2{font-size:1.0625rem;margin:2.5rem 0 .5rem;border-top:1px solid var(--rule);padding-top:.75rem}
p{margin:.4rem 0}.soft{color:var(--soft)}.note{background:var(--u);padding:.4rem .6rem;border-radius:4px}
.flow{line-height:1.95;white-space:pre-wrap;unicode-bidi:isolate;font-size:.9375rem}
.flow span,.key{border-radius:3px;box-shadow:inset 0 0 0 1px #8883;padding:.1em 0;unicode-bidi:isolate}
.key{padding:.1em .35em;display:inline-block}
.trained,.both{background:var(--t)}.unasked,.mine{background:var(--u)}.theirs{background:var(--x)}
.control{color:var(--c);font-weight:650}.template,.neither{color:var(--soft)}
.stop{outline:2px solid var(--c);outline-offset:-1px;font-weight:650}
.flow i{font-style:normal;font-size:.75em;color:var(--soft);vertical-align:super}
pre{white-space:pre-wrap;background:var(--panel);padding:.75rem;border-radius:4px;
font:.8125rem/1.5 ui-monospace,monospace;margin:.5rem 0}
details{margin:.75rem 0}summary{cursor:pointer;color:var(--soft);padding:.35rem 0}
table{border-collapse:collapse;width:100%;table-layout:fixed;font-size:.8125rem;line-height:1.4}
th,td{text-align:left;vertical-align:top;padding:.2rem .35rem .2rem 0;border-bottom:1px solid var(--rule)}
th{color:var(--soft);font-weight:500}.n{text-align:right;font-variant-numeric:tabular-nums}
td.text{white-space:pre-wrap;font-family:ui-monospace,monospace;unicode-bidi:isolate}
@media(max-width:30rem){table{font-size:.75rem}th,td{padding-right:.2rem}}
.bad{color:var(--ink);border-left:4px solid #b3261e;padding:.5rem .9rem;background:var(--panel)}
"""
_MARK = "<!doctype html><!-- educe inspect -->"
_PAGE = """{mark}<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title><style>{css}</style></head><body><main>
<h1>{title}</h1>
{body}
</main></body></html>
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_KEYS = (
    ("trained", "trained: carries loss"),
    ("trained stop", "the stop token, trained too"),
    ("unasked", "of an answer, but of weight 0"),
    ("context", "context: read, not trained"),
    ("control", "control token"),
    ("template", "written by the template"),
)
_COLUMNS = (("#", "8%"), ("id", "18%"), ("text", "24%"), ("weight", "13%"), ("segment", "19%"), ("message", "18%"))


def write_inspection(found: Inspection, target: Path) -> None:
    """Write the row, or why it is refused, as one page."""
    title = _e(f"{Path(found.place).name}{f' · {found.form}' if found.form else ''}")
    body = _refused(found) if found.refusal is not None else _row(found)
    write_new(target, _PAGE.format(mark=_MARK, title=title, policy=_POLICY, css=_CSS, body="\n".join(body)), over=_MARK)


def _e(text: str) -> str:
    return escape(shown(text))


def _row(found: Inspection) -> Iterable[str]:
    sequences = found.sequences
    tokens, trained = sum(len(s.spans) for s in sequences), sum(s.num_trained for s in sequences)
    one = len(sequences) == 1
    many = "1 sequence" if one else f"{len(sequences)} sequences"
    yield f"<p>{many}, {tokens:,} tokens, {trained:,} trained.</p>"
    if not one and not sequences[0].label:
        yield "<p class=soft>One row, several sequences: each later turn has a prompt that is not the text before it.</p>"
    for note in found.notes:
        yield f"<p class=note>{_e(note)}</p>"
    kinds = {kind_of(s) for q in sequences for s in q.spans}
    keys = [f'<span class="key {c}">{t}</span>' for c, t in _KEYS if c.split()[0] in kinds]
    yield f"<p>{' '.join(keys)}</p>"
    yield "<p class=soft>↵ line end, → tab, · space at an end, ×0.5 another weight than 0 or 1. " + (
        "“Turn” counts the row's messages from 0.</p>"
    )
    for k, s in enumerate(sequences):
        yield from _sequence(found, s, head_of(sequences, k))
    if found.other is not None:
        yield from _other(found.other)


def _sequence(found: Inspection, s: Shown, head: str) -> Iterable[str]:
    yield f"<section><h2>{escape(head[:1].upper() + head[1:])}</h2>"
    if s.apart:
        yield f"<p class=note>Split here: {_e(s.apart)}.</p>"
    if s.stops:
        yield f"<p class=soft>Stop token: {_e(stop_of(s))}.</p>"
    yield f"<div class=flow>{''.join(_flowing(s))}</div>"
    yield f"<details><summary>Every token: {len(s.spans):,}</summary>{_table(found, s)}</details>"
    if s.prompt:
        what = f"What a server sends before turn {s.turns[0]}: {s.num_prompt_tokens:,} tokens"
        yield f"<details><summary>{what}, as text</summary><pre>{escape(s.prompt)}</pre></details>"
    yield "</section>"


def _flowing(s: Shown) -> Iterable[str]:
    stops = frozenset(s.stops)
    for k, (text, span) in enumerate(flow(s.spans)):
        if text:
            stop = " stop" if k in stops else ""
            tip = f"#{k} id {span.token} weight {span.weight:g}"
            yield f'<span class="{kind_of(span)}{stop}" title="{tip}">{escape(text)}</span>'
        if weight := weight_after(s.spans, k):
            yield f"<i>{weight}</i>"


def _table(found: Inspection, s: Shown) -> str:
    head = "".join(f'<th style="width:{width}">{name}</th>' for name, width in _COLUMNS)
    stops = frozenset(s.stops)
    rows = (
        f"<tr><td>{k}</td><td>{span.token}</td>"
        f'<td class="text"><span class="{kind_of(span)}">{escape(in_cell(span.text))}</span></td>'
        f"<td>{span.weight:g}{' stop' if k in stops else ''}</td>"
        f"<td>{span.segment} {PARTS.get(span.part, span.part)}</td><td>{message_of(found, span)}</td></tr>"
        for k, span in enumerate(s.spans)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _other(other: OtherMask) -> Iterable[str]:
    yield f"<section><h2>Compared with {escape(other.name)}</h2>"
    for sentence in (other.says, *(other.in_words() if other.ids else ())):
        yield f"<p>{_e(sentence[:1].upper() + sentence[1:])}</p>"
    if other.ids:
        names = (
            ("both", "trained by both"),
            ("theirs", f"only by {other.name}"),
            ("mine", "only by educe"),
            ("neither", "by neither"),
        )
        kinds = [
            "both" if a and b else "mine" if a else "theirs" if b else "neither"
            for a, b in zip(other.ours, other.trained, strict=True)
        ]
        have = set(kinds)
        yield "<p>" + " ".join(f'<span class="key {c}">{t}</span>' for c, t in names if c in have) + "</p>"
        spans = (
            f'<span class="{kind}" title="#{k} id {i}">{escape(shown(text))}</span>'
            for k, (i, text, kind) in enumerate(zip(other.ids, other.texts, kinds, strict=True))
            if text
        )
        yield f"<div class=flow>{''.join(spans)}</div>"
    yield "</section>"


def _refused(found: Inspection) -> Iterable[str]:
    assert found.refusal is not None
    r = found.refusal
    yield "<p>This row is refused: nothing of it is trained.</p>"
    yield f"<div class=bad><p><b>{r.code}</b> {escape(CODES[r.code])}</p><p>{_e(r.found)}</p>"
    yield f"<p><b>What to do:</b> {_e(r.fix)}</p></div>"
    yield f"<p class=soft>{_e(r.where)}</p>"
    if found.messages:
        yield "<section><h2>The row</h2>"
    for k, m in enumerate(found.messages):
        yield f"<p class=soft>{k} {m.role}{' with reasoning' if m.reasoning else ''}{' with tool calls' if m.tool_calls else ''}</p>"
        yield f"<pre>{_e(m.content) or '(no text)'}</pre>"
    if found.messages:
        yield "</section>"
