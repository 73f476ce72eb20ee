"""What `educe data`, `educe ledger` and `educe rows` show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from educe.cli.screens import console
from educe.cli.words import listed, num_rows
from educe.errors import CODES

if TYPE_CHECKING:
    from educe.recipes.ledger import Totals
    from educe.recipes.step_rows import StepRow
    from educe.recipes.survey import FileSurvey, Lengths

_MOST_ODD = 12


def show_survey(found: FileSurvey) -> None:
    """One file: what it is, what is wrong with it, what looks odd."""
    console.print(f"[bold]{escape(found.file)}[/bold]", soft_wrap=True)
    if not found.rows:
        console.print("[yellow]![/yellow] It is empty: not read beside files that hold rows.\n")
        return
    table = Table.grid(padding=(0, 2))
    for name, value in _about(found):
        table.add_row(f"[bold]{name}[/bold]", escape(value))
    console.print(table)
    for code, problem in found.problems.items():
        console.print(f"\n[red]{code}[/red] {num_rows(problem.rows)}: {CODES[code]}")
        for r in problem.first:
            console.print(f"  {escape(r.where)} {escape(r.found)} {escape(r.fix)}", soft_wrap=True)
        if problem.rows > len(problem.first):
            console.print(f"  [dim]… and {problem.rows - len(problem.first):,} more[/dim]")
    if found.oddities:
        console.print("\n[bold]Worth a look[/bold] (nothing is changed or left out for it)")
    for o in found.oddities[:_MOST_ODD]:
        console.print(
            f"[yellow]![/yellow] {o.count:,} of {o.of:,} {escape(o.what)}. {escape(o.advice)}", soft_wrap=True
        )
        console.print(f"  [dim]{escape(listed([_short(p) for p in o.places], 5))}[/dim]", soft_wrap=True)
    if len(found.oddities) > _MOST_ODD:
        console.print(f"  [dim]… and {len(found.oddities) - _MOST_ODD} more kinds; --json has them all[/dim]")
    console.print()


def _about(found: FileSurvey) -> Iterator[tuple[str, str]]:
    packed = f", {found.compression}" if found.compression else ""
    by = f" (its rows have {' and '.join(found.evidence)})" if found.evidence else ""
    yield "is", f"{found.format or 'in no known format'}{by}, in {_CONTAINERS[found.container]}{packed}"
    read = found.rows - found.num_refused
    bad = f", {found.num_refused:,} refused" if found.num_refused else ""
    held = ", ".join(f"{n:,} {kind}{'s' * (n != 1)}" for kind, n in found.kinds.most_common())
    yield "rows", f"{found.rows:,}: {held or 'none'}{bad}" if read or bad else "0"
    if found.roles:
        yield "turns", ", ".join(f"{n:,} {role}" for role, n in found.roles.most_common())
    some = [
        (found.with_tools, "tools"),
        (found.with_reasoning, "reasoning"),
        (found.with_weights, "weights of their own"),
    ]
    if any(n for n, _ in some):
        yield "with", ", ".join(f"{what} ({num_rows(n)})" for n, what in some if n)
    if found.prompts is not None:
        yield "prompts", _lengths(found.prompts)
    if found.answers is not None:
        yield "answers" if found.prompts is not None else "texts", _lengths(found.answers)
    if found.answer_form:
        yield "answers are", found.answer_form
    if found.copies or found.repeated:
        yield "repeated", f"{num_rows(found.copies)} to the letter, {found.repeated:,} with the prompt of another row"
    if found.unread_keys:
        keys = [f"{key} ({num_rows(n)})" for key, n in found.unread_keys.most_common()]
        yield "keys not read", listed(keys, 8)


_CONTAINERS = {
    **{"lines": "lines of JSON", "array": "a JSON array", "object": "one JSON object", "parquet": "Parquet"},
    **{"csv": "a table with commas (CSV)", "tsv": "a table with tabs (TSV)", "text": "plain text"},
}


def _lengths(n: Lengths) -> str:
    return f"median {n.median:,} characters, 95 % at most {n.p95:,}, longest {n.longest:,}"


def _short(place: str) -> str:
    return place.rsplit("/", 1)[-1]


# --- the ledger ----------------------------------------------------------------------------------------------------------


def show_totals(totals: Totals) -> None:
    """The sum of all rows, by task where there are several, and the codes."""
    said = [f"{n:,} {status}" for status in _ORDER if (n := totals.rows[status])]
    console.print(f"[bold]{totals.read:,} rows read[/bold] = {' + '.join(said)}")
    if len(totals.tasks) > 1:
        shown = [s for s in _ORDER if totals.rows[s]]
        table = Table(box=None, padding=(0, 2, 0, 0))
        for title in ("task", "rows", *shown):
            table.add_column(title, justify="left" if title == "task" else "right")
        for name, counts in totals.tasks.items():
            table.add_row(escape(name), f"{counts.total():,}", *(f"{counts[s]:,}" for s in shown))
        console.print(table)
    for code, (number, first) in sorted(totals.codes.items(), key=lambda kv: -kv[1][0]):
        console.print(f"\n[yellow]{code}[/yellow] {num_rows(number)}: {CODES.get(code, '')}")
        for line in first:
            console.print(f"  {escape(line['where'])} {escape(line['reason'])}", soft_wrap=True)


_ORDER = ("train", "dev", "test", "not drawn", "dropped", "refused")


def show_lines(lines: Sequence[dict[str, Any]], num_left: int) -> None:
    """Rows one by one: place, fate, why."""
    for line in lines:
        item = f"[{line['item']}]" if line["item"] is not None else ""
        drawn = f", drawn {line['draws']}×, {line['tokens']:,} tokens" if line["status"] == "train" else ""
        why = f": {line['code']} {line['reason']}" if line["code"] else ""
        text = f"{line['file']}:{line['line']}{item} {line['status']}{drawn}{why}"
        console.print(escape(text), soft_wrap=True)
    if num_left:
        console.print(f"[dim]… and {num_left:,} more; --json gives all[/dim]")


def show_step(rows: Sequence[StepRow], step: int) -> None:
    """The rows of a step, pack by pack."""
    packs = max(r.pack for r in rows)
    tokens = sum(r.tokens for r in rows)
    console.print(
        f"[bold]Step {step}[/bold]: {len(rows):,} examples in {packs} micro-batch{'es' * (packs != 1)}, {tokens:,} tokens"
    )
    several = len({r.task for r in rows}) > 1
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("pack", "row", *(["task"] if several else []), "tokens", "weight"):
        table.add_column(title, justify="left" if title in ("row", "task") else "right", overflow="fold")
    for r in rows:
        table.add_row(
            str(r.pack), escape(r.place), *([escape(r.task)] if several else []), f"{r.tokens:,}", f"{r.weight:g}"
        )
    console.print(table)
