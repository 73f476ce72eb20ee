"""What `educe check` shows: the verdict first, then what it rests on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from educe.cli.screens import console, gigabytes, minutes
from educe.cli.words import listed, num_rows
from educe.errors import CODES
from educe.files.hashes import cache_dir
from educe.files.run_dir import RunDir

if TYPE_CHECKING:
    from educe.recipes.check import Check

_VERDICTS = {
    "fail": "[bold red]✗[/bold red]",
    "warn": "[yellow]![/yellow]",
    "pass": "[green]✓[/green]",
    "unchecked": "[yellow]?[/yellow]",
    "skip": "[dim]-[/dim]",
}
_COLOURS = {"trained": "black on green", "content": "default", "template": "dim"}


def show_stage_checks(stages: dict[str, Check], recipe: Path, *, every: bool) -> None:
    """Each stage as a run, then what all of them cost. What is of the machine is said with the first."""
    for k, (name, c) in enumerate(stages.items()):
        console.rule(
            f"[bold]stage {k + 1} of {len(stages)}: {escape(name)}[/bold] ({c.recipe.objective.kind})", align="left"
        )
        show_check(c, recipe, every=every, alone=False, first=k == 0)
    from educe.recipes.run_stages import room_of_chain

    left = [c for c in stages.values() if not RunDir(c.recipe.run_path()).has_ended]
    total = sum(c.estimate.total_s for c in left)
    ready = all(c.ready for c in stages.values())
    console.rule("[bold]all stages[/bold]", align="left")
    bad = [name for name, c in stages.items() if not c.ready]
    word = "[bold green]Ready:[/bold green]" if ready else f"[bold red]Not ready[/bold red] ({', '.join(bad)}):"
    room = room_of_chain(recipe, stages)
    most = (
        f"{gigabytes(max(c.memory.total for c in stages.values()))} of memory, {gigabytes(room.both)} of disk at most"
    )
    if not left and ready:
        console.print("[bold green]Trained already:[/bold green] nothing is left to do. Next: educe eval")
        return
    done = (
        f" ({len(stages) - len(left)} of {len(stages)} stages are trained already)"
        if ready and len(left) < len(stages)
        else ""
    )
    console.print(f"{word} {minutes(total)}, {most}{done}")
    if room.models:
        of_them = f"{gigabytes(room.models)} of the disk in {cache_dir()}: the models that later stages begin with"
        console.print(f"  ({escape(of_them)})", soft_wrap=True)
    console.print(f"\nNext: educe train {escape(str(recipe))}" if ready else "")


def show_check(c: Check, recipe: Path, *, every: bool = False, alone: bool = True, first: bool = True) -> None:
    """The verdict, what to look at, a table of what the run is, the rows that are not used, three rows as they are trained, the
    checks (`every`: those that passed too). Only the `first` of several says what is of the machine."""
    s = c.prepared.summary
    unused = s["dropped"] + s["refused"]
    if c.ready:
        cost = f"{minutes(c.estimate.total_s)}, {gigabytes(c.memory.total)}, {num_rows(unused)} not used"
        console.print(f"[bold green]Ready:[/bold green] {cost}")
    else:
        console.print("[bold red]Not ready:[/bold red]")
        for line in c.blockers:
            console.print(f"  {escape(line)}", soft_wrap=True)
    for line in [*c.warnings, *(c.of_machine if first else [])]:
        console.print(f"[yellow]![/yellow] {escape(line)}", soft_wrap=True)
    console.print()
    table = Table.grid(padding=(0, 2))
    for name, value in [*_about_data(c), *_about_template(c), *_about_run(c)]:
        table.add_row(f"[bold]{name}[/bold]", escape(value))
    console.print(table)
    _show_tasks(c)
    _show_reasons(c)
    if c.odd:
        more = f"`educe data {recipe}` looks at all rows and names the places"
        console.print(f"\n[bold]Worth a look[/bold] (nothing is changed for it; {escape(more)})", soft_wrap=True)
        for line in c.odd:
            console.print(f"[yellow]![/yellow] {escape(line)}", soft_wrap=True)
    console.print("\n[bold]What is trained[/bold] (three rows; only the highlighted text carries loss)")
    for preview in c.prepared.previews():
        console.print(f"[dim]{escape(preview['row'])}[/dim]")
        console.print("".join(_run_markup(r) for r in preview["runs"]), soft_wrap=True)
    _show_findings(c, every=every)
    if alone:
        console.print(f"\nNext: educe train {escape(str(recipe))}" if c.ready else "")


def _about_data(c: Check) -> list[tuple[str, str]]:
    s = c.prepared.summary
    kept, unused, undrawn = s["rows"], s["dropped"] + s["refused"], c.num_undrawn
    terms = [f"{kept['train'] - undrawn:,} train", f"{kept['dev']:,} dev", f"{kept['test']:,} test"]
    terms += [f"{undrawn:,} not drawn"] if undrawn else []
    said = [("files", line) for line in _files(s["files"])]
    said.append(("rows", f"{s['rows_in']:,} in = {' + '.join(terms)} + {unused:,} not used"))
    if s["documents"]:
        said.append(("raw text", f"{num_rows(s['documents'])} of plain text, all of it to be trained"))
    if s["unread_keys"]:
        keys = [f"{key} ({num_rows(n)})" for key, n in s["unread_keys"].items()]
        said.append(("keys not read", listed(keys, 6)))
    if s["control_strings"]:
        what = f"{num_rows(s['control_strings'])} with the text of a control token"
        said.append(("control text", f"{what}: trained as text, where a server would make control tokens of it"))
    if s["unanswered_ends"]:
        said.append(
            ("cut ends", f"{num_rows(s['unanswered_ends'])} with turns after the last answer: they teach nothing")
        )
    if s["turn_splits"]:
        said.append(("split", f"{s['turn_splits']:,} times a row too long was split between turns"))
    if s["cut_rows"]:
        said.append(("cut", f"{num_rows(s['cut_rows'])} too long cut at the end"))
    trained = s["trained_tokens"]
    said.append(("tokens", f"{s['tokens']:,} an epoch, {trained:,} trained ({trained / s['tokens']:.0%})"))
    n = s["length"]
    said.append(("row length", f"median {n['median']}, 95 % under {n['p95'] + 1}, longest {n['max']} tokens"))
    return said


def _files(files: list[dict[str, Any]]) -> list[str]:
    """rows.jsonl: messages; files of one format on one line."""
    by: dict[str, list[str]] = {}
    for f in files:
        how = ", as the recipe says" if f["named"] else ""
        packed = f", {f['compression']}" if f["compression"] else ""
        what = f"{f['format'] or 'no known format'} ({f['container']}{packed}){how}"
        by.setdefault(what, []).append(Path(f["file"]).name)
    return [f"{listed(names, 3)}: {what}" for what, names in by.items()]


def _about_template(c: Check) -> list[tuple[str, str]]:
    """Template, stop token, and what the template does to rows; lines that say nothing are left out."""
    s = c.prepared.summary
    said = [("template", s["template"])]
    if s["template_settings"]:
        said = [("template", f"{s['template']}, with {json.dumps(s['template_settings'])}")]
    turns = s["trained_turns"]
    for word, count in s["stop"].items():
        said.append(("stop", f"{word}: ends {count:,} of {turns:,} trained turns ({count / turns:.0%})"))
    if s["split_rows"]:
        more, before = s["repeated_tokens"], s["tokens"] - s["repeated_tokens"]
        became = s["split_rows"] + s["examples"] - s["rows"]["train"]
        verb = "becomes" if s["split_rows"] == 1 else "become"
        what = f"{num_rows(s['split_rows'])} {verb} {became:,} sequences, +{more:,} tokens (+{more / before:.0%})"
        said.append(("split", f"{what}: prompts of later turns are not what stood before, in text or in ids"))
    if s["opening_turns"]:
        said.append(
            ("context only", f"{num_rows(s['opening_turns'])} with the assistant first: that turn has no prompt")
        )
    if s["trimmed_turns"]:
        said.append(
            ("trimmed", f"{s['trimmed_turns']:,} answers lose white space at their ends, as the template has it")
        )
    if s["engine"] != "tokenizers" and not s["engine_why"]:
        said.append(("tokenizer", s["engine"]))
    elif s["engine_why"]:
        said.append(("tokenizer", f"{s['engine']}: {s['engine_why']}"))
    return said


def _about_run(c: Check) -> list[tuple[str, str]]:
    how = "measured on this machine" if c.estimate.measured else "estimated from the matmul speed"
    packs = f"packs {c.plan.fill:.1%} full, no padding"
    return [
        ("steps", f"{c.plan.num_steps:,} of about {c.recipe.train.batch_tokens:,} tokens; {packs}"),
        ("model", f"{c.facts.name}, {c.facts.num_parameters / 1e6:.0f}M parameters, {c.recipe.tuning.kind}"),
        ("device", f"{c.device}; {c.device_why}"),
        ("speed", f"{c.estimate.tokens_per_s:.0f} tokens/s, {how}"),
        (
            "time",
            f"{minutes(c.estimate.start_s)} to start and check, {minutes(c.estimate.training_s)} for the steps, "
            f"{minutes(c.estimate.beside_s)} for held-out loss, sample answers and saving",
        ),
        ("compiled", c.compiling),
        ("memory", f"{c.memory.said().removeprefix('memory: ')}; {gigabytes(c.memory_bytes)} available"),
        ("disk", f"{gigabytes(c.estimate.disk_bytes)} at most, {gigabytes(c.free_disk_bytes)} free"),
    ]


def _show_tasks(c: Check) -> None:
    """The mixture, where there is one: what the run draws of each task."""
    if len(c.tasks) < 2:
        return
    console.print("\n[bold]The mixture[/bold] (what the whole run draws)")
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("task", "rows", "examples", "drawn", "epochs", "tokens", "trained", "λ", "share of the loss"):
        table.add_column(title, justify="left" if title == "task" else "right")
    for t in c.tasks:
        numbers = (
            f"{t.rows:,}",
            f"{t.examples:,}",
            f"{t.draws:,}",
            f"{t.epochs:.2f}",
            f"{t.tokens:,}",
            f"{t.trained:,}",
        )
        table.add_row(escape(t.name), *numbers, f"{t.loss_weight:g}", f"{t.share:.1%}")
    console.print(table)


def _show_reasons(c: Check) -> None:
    for reason in c.reasons:
        console.print(f"\n[yellow]{reason['code']}[/yellow] {num_rows(reason['count'])}: {CODES[reason['code']]}")
        for line in reason["first"]:
            console.print(f"  {escape(line['where'])} {escape(line['reason'])}", soft_wrap=True)


def _show_findings(c: Check, *, every: bool) -> None:
    """Failures and warnings in full, then how many passed."""
    from educe.recipes.preflight import passed_line, worst_first

    console.print(f"\n[bold]Checks[/bold]: {passed_line(c.findings)}{'' if every else '; --all lists them'}")
    for f in worst_first(c.findings):
        if every or f.verdict in ("fail", "warn", "unchecked"):
            mark = _VERDICTS[f.verdict]
            number = "" if f.number == "-" else f"{f.number}. "
            line = f"{f.id} {escape(f.name)}: {escape(number)}[dim]{escape(f.evidence)}[/dim]"
            console.print(f"{mark} {line}", soft_wrap=True)


def _run_markup(run: dict[str, Any]) -> str:
    text = escape(str(run["text"]).replace("\n", "↵"))
    style = "bold magenta" if run["control"] and run["kind"] != "trained" else _COLOURS[str(run["kind"])]
    return f"[{style}]{text}[/{style}]"
