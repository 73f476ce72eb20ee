"""A chat template's report on one screen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table
from rich.text import Text

from educe.cli.inspection import shown
from educe.cli.screens import console
from educe.errors import UsageError
from educe.files.atomic import write_new

if TYPE_CHECKING:
    from educe.recipes.template import TemplateReport
    from educe.recipes.template_fix import Fix

MOST = 220
OTHER = "other variables it reads"
_DIFF_LINES = 14


def show_template(found: TemplateReport, what: str, fixed: Path | None) -> None:
    """The verdict, then one line for each thing there is to say."""
    if found.usable:
        only = f" where the row has {found.facts.needs}" if found.facts.needs else ""
        proved = f"an answer is proved to follow the prompt that inference sends{only}"
        console.print(Text.assemble(("Usable: ", "bold green"), proved), soft_wrap=True)
    else:
        console.print(
            Text.assemble(("Not usable: ", "bold red"), f"{found.code} {_cut(found.problem)}"), soft_wrap=True
        )
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _lines(found):
        table.add_row(Text(name, style="bold"), Text(value))
    console.print(table)
    if found.fix is not None:
        _show_fix(found.fix, what, fixed)
    elif not found.usable and found.facts.stop:
        console.print("\nNo corrected template could be proved: give another one (template: {kind: file, file: …}).")


def write_fixed(found: TemplateReport, target: Path) -> None:
    """Write the corrected template. Raises `UsageError` where there is none."""
    if found.fix is None:
        why = "the template is usable as it is" if found.usable else "no correction could be proved"
        raise UsageError(101, "--fixed", f"there is nothing to write: {why}.", "Leave --fixed out.")
    write_new(target, found.fix.template)
    click.echo(f"Written to {target}. Use it: template: {{kind: file, file: {target}}}", err=True)


def _lines(found: TemplateReport) -> Iterator[tuple[str, str]]:
    f = found.facts
    yield "template", f"{found.source} ({found.kind})" if found.kind != "model" else found.source
    if found.kind != "model":
        yield "tokenizer", found.tokenizer
    if f.stop:
        by = f", written by {f.stop_by}" if f.stop_by != "the template" else ""
        yield "stop token", f"{f.stop}{by}{f'; after a tool call {f.stop_of_calls}' if f.stop_of_calls else ''}"
    if f.generation:
        block = f"; {f.generation['block']}" if "block" in f.generation else ""
        yield "before an answer", f"{_cut(_one_line(f.generation['text'])) or '(nothing)'}{block}"
    if f.system:
        yield "system", f.system
    if f.default_system:
        yield "injects", f"“{_cut(_one_line(f.default_system))}” where the row has no system prompt"
    if f.date:
        yield "prints a date", f.date
    if found.usable:
        yield from _more(found)
    said: dict[str, list[str]] = {}
    for case, message in f.refuses.items():
        said.setdefault(message, []).append(case)
    for message, cases in said.items():
        yield "refuses", f"{', '.join(cases)}: “{_cut(_one_line(message), 120)}”"


def _more(found: TemplateReport) -> Iterator[tuple[str, str]]:
    f = found.facts
    yield from _grouped("turns", f.turns)
    yield from _grouped("tools", f.tools)
    if f.reasoning:
        yield "reasoning", _said(f.reasoning)
    for kind, where in f.history.items():
        rewritten = where.removeprefix("the template rewrites history: ")
        yield "splits turns" if rewritten == where else "rewrites history", f"{kind}: {_cut(rewritten)}"
    if f.trims:
        yield "trims", "; ".join(f"{role} {where}" for role, where in f.trims.items())
    tried = {k: v for k, v in f.settings.items() if k != OTHER}
    yield from _grouped("settings", tried)
    if OTHER in f.settings:
        yield "reads too", f.settings[OTHER]
    if f.forms:
        yield "takes", _said(f.forms)


def _grouped(name: str, facts: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """What is the same for several cases, said once."""
    if facts:
        by: dict[str, list[str]] = {}
        for case, said in facts.items():
            by.setdefault(_cut(said, 110), []).append(case)
        yield name, "; ".join(f"{', '.join(cases)}: {said}" for said, cases in by.items())


def _said(facts: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {said}" for name, said in facts.items())


def _one_line(text: str) -> str:
    return shown(text, starts=True, ends=True).replace("↵\n", "↵")


def _cut(text: str, most: int = MOST) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _show_fix(fix: Fix, what: str, fixed: Path | None) -> None:
    console.print(Text.assemble(("\nCorrected, and proved: ", "bold green"), fix.how), soft_wrap=True)
    table = Table.grid(padding=(0, 2))
    for name, sent in (("inference sends now", fix.sent_before), ("corrected", fix.sent_now)):
        table.add_row(Text(name, style="dim"), Text(_one_line(sent)))
    console.print(table)
    console.print(Text("\nWhat it writes for two turns, the question of the second included:", style="dim"))
    for line in fix.diff[:_DIFF_LINES]:
        style = {"-": "red", "+": "green"}.get(line[0], "dim")
        console.print(Text(f"{line[0]} {_one_line(line[1:])}", style=style), soft_wrap=True)
    if len(fix.diff) > _DIFF_LINES:
        console.print(Text(f"… and {len(fix.diff) - _DIFF_LINES} more lines", style="dim"))
    if fixed is None:
        console.print(f"\nNext: educe template {what} --fixed fixed.jinja")
