"""What the terminal shows of a public benchmark that a run answered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from educe.cli.screens import NAMES, console

MEASURES = {
    "prompt_strict": "prompts strict",
    "prompt_loose": "prompts loose",
    "instruction_strict": "instructions strict",
    "instruction_loose": "instructions loose",
}


def show_suite(scores: dict[str, Any]) -> None:
    """The verdict, each measure with its interval and paired difference, the types of instruction that changed."""
    console.print(f"[bold]{escape(scores['verdict'])}[/bold]\n", soft_wrap=True)
    differences = {c["measure"]: c["difference"] for c in scores["comparisons"]}
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("followed", *(NAMES[name] for name in scores["systems"]), *(["difference"] if differences else [])):
        table.add_column(title)
    for measure, title in MEASURES.items():
        cells = [_span(s[measure]) for s in scores["systems"].values()]
        table.add_row(title, *cells, *([_span(differences[measure], "+")] if differences else []))
    console.print(table)
    for name, s in scores["systems"].items():
        if s["stopped"] < 1:
            cut = f"{1 - s['stopped']:.0%} of the answers were cut after {scores['max_new_tokens']} tokens"
            console.print(f"{NAMES[name]}: {cut}")
    for k in scores["kinds"]:
        if k.get("p_holm", 1.0) < 0.05:
            console.print(
                f"{k['kind']}: {k['won']} won, {k['lost']} lost of {k['total']} (p = {k['p_holm']:.2g}, Holm)"
            )
    console.print(
        f"{scores['num_prompts']} prompts, {scores['num_instructions']} instructions; 95 % intervals over prompts"
    )


def show_choices(scores: dict[str, Any]) -> None:
    """Accuracy of both models under each rule, with the paired comparison."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("likeliest by", *(NAMES[name] for name in scores["systems"]), "difference", "p"):
        table.add_column(title)
    for c in scores["comparisons"]:
        cells = [_span(s[c["measure"]]) for s in scores["systems"].values()]
        table.add_row(c["measure"].replace("_", " "), *cells, _span(c["difference"], "+"), _p(c["p"]))
    console.print(table)
    console.print(f"{scores['num_rows']} questions, by chance {scores['chance']:.1%} right; exact McNemar tests")


def show_harness(found: Sequence[dict[str, Any]]) -> None:
    """Each measure of each task as lm-eval gives it, with its standard error, and the paired difference."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("task", "measure", "rows", *(NAMES[name] for name in found[0]["systems"]), "difference", "p"):
        table.add_column(title)
    for m in (m for scores in found for m in scores["measures"]):
        name = m["measure"] if m["filter"] == "none" else f"{m['measure']}, {m['filter']}"
        d = m["difference"]
        apart = (
            ("not paired", "")
            if d is None
            else (f"{d['value']:+.4g} ({d['low']:+.4g} to {d['high']:+.4g})", _p(m["p"]))
        )
        values = [_with_error(s) for s in m["systems"].values()]
        table.add_row(escape(m["task"]), escape(name), str(m["num_rows"] or ""), *values, *apart)
    console.print(table)
    how = "prompted through the chat template" if found[0]["chat"] else "prompted by bare text"
    console.print(f"lm-eval {found[0]['lm_eval']}, {how}; ± is its standard error, in brackets 95 % over paired rows")


def _with_error(s: dict[str, Any]) -> str:
    if s["value"] is None:
        return "not finite"
    return f"{s['value']:.4g}" + (f" ± {s['stderr']:.2g}" if s["stderr"] is not None else "")


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def _span(i: dict[str, Any], sign: str = "") -> str:
    return f"{i['value']:{sign}.1%} ({i['low']:{sign}.1%} to {i['high']:{sign}.1%})"
