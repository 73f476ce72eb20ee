"""What the terminal shows: progress, tables, verdicts. Plain lines where there is no terminal."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from educe.secrets import redacted

if TYPE_CHECKING:
    from educe.training.state import StepReport

console = Console(highlight=False, emoji=False)  # "grade.py:boom: it runs as you" holds no picture
_PLAIN_EVERY_S, _ANSWERS_EVERY_S = 10.0, 30.0
NAMES = {"untouched": "untouched", "few_shot": "untouched, best prompt", "tuned": "tuned"}


def say(line: str) -> None:
    """One line about what is going on."""
    console.print(f"[dim]·[/dim] {escape(redacted(line))}", soft_wrap=True)


def minutes(seconds: float) -> str:
    """40 s, 4 min 10 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"


def shown(path: Path) -> str:
    """A path as a person would type it from here."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


class Live:
    """One line about how far something is: in place on a terminal, a plain line every ten seconds elsewhere, nowhere if `silent`."""

    def __init__(self, *, silent: bool = False) -> None:
        self._silent, self._last = silent, time.monotonic()
        self._status = console.status("")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._status.stop()

    def show(self, line: str) -> None:
        if self._silent:
            return
        if console.is_terminal:
            self._status.start()
            self._status.update(line)
        elif time.monotonic() - self._last > _PLAIN_EVERY_S:
            self._last = time.monotonic()
            console.print(line, soft_wrap=True)

    def tell(self, line: str) -> None:
        """Something is done: a line that stays."""
        self._status.stop()
        if not self._silent:
            say(line)


class AnswerScreen:
    """Progress of answering: a live line on a terminal; elsewhere a line for each system and every half a minute."""

    def __init__(self) -> None:
        self._status, self._last = console.status(""), time.monotonic()

    def __enter__(self) -> AnswerScreen:
        if console.is_terminal:
            self._status.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._status.stop()

    def progress(self, system: str, done: int, total: int) -> None:
        line = f"{NAMES.get(system, system)}: {done} of {total} answered"
        if console.is_terminal:
            self._status.update(line)
        elif done == total or time.monotonic() - self._last > _ANSWERS_EVERY_S:
            self._last = time.monotonic()
            say(line if done < total else f"{NAMES.get(system, system)}: {total} answered")


class TrainScreen:
    """Progress of training: one live line on a terminal, a plain line every ten seconds elsewhere."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last = 0.0
        self._first: int | None = None  # what is compiled in the first step says nothing of the others

    def __enter__(self) -> TrainScreen:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, report: StepReport) -> None:
        self._first = report.step if self._first is None else self._first
        left = (report.total_steps - report.step) * report.tokens / report.tokens_per_s
        said = "" if report.step == self._first else f"{minutes(left)} left  "
        speed = f"{report.tokens_per_s:.0f} tokens/s"
        shown = f"loss {report.loss:.3f}  {speed}  {said}{gigabytes(report.peak_memory_bytes)}"
        if console.is_terminal:
            if self._bar is None:
                columns = (
                    TextColumn("step {task.completed}/{task.total}"),
                    BarColumn(24),
                    TextColumn("{task.fields[shown]}"),
                )
                self._bar = Progress(*columns, console=console)
                self._task = self._bar.add_task("", total=report.total_steps, shown="")
                self._bar.start()
            assert self._task is not None
            self._bar.update(self._task, completed=report.step, shown=shown)
        elif time.monotonic() - self._last > _PLAIN_EVERY_S or report.step == report.total_steps:
            self._last = time.monotonic()
            console.print(f"step {report.step}/{report.total_steps}  {shown}", soft_wrap=True)

    def dev(self, step: int, loss: float, warning: str, unit: str = "nats per token") -> None:
        console.print(f"held-out loss after step {step}: [bold]{loss:.3f}[/bold] {unit}")
        if warning:
            console.print(f"[yellow]! {warning}[/yellow]", soft_wrap=True)

    def samples(self, step: int, lines: list[dict[str, Any]]) -> None:
        when = "as it begins" if step == 0 else f"the same questions after step {step}"
        console.print(f"[bold]Held-out questions: {when}[/bold]")
        for line in lines:
            right = line["answer"].strip() == line["expected"].strip()
            if step == 0:
                console.print(
                    f"  [cyan]?[/cyan] {escape(_one_line(line['prompt'][-1]['content'], 160))}", soft_wrap=True
                )
            mark = "[green]=[/green]" if right else "[yellow]>[/yellow]"
            console.print(f"  {mark} {escape(_one_line(line['answer'], 160))}", soft_wrap=True)
        if step == 0:
            for line in lines:
                console.print(f"  [dim]expected: {escape(_one_line(line['expected'], 160))}[/dim]", soft_wrap=True)


def _one_line(text: str, most: int) -> str:
    flat = text.replace("\n", "↵")
    return flat if len(flat) <= most else flat[: most - 1] + "…"


def _called(name: str, system: dict[str, Any]) -> str:
    return NAMES.get(name) or str(system.get("label", name))


def show_scores(scores: dict[str, Any]) -> None:
    """The verdict, each system with its interval, the paired tests, what was forgotten."""
    console.print(f"[bold]{escape(scores['verdict'])}[/bold]\n", soft_wrap=True)
    _show_systems(scores)
    if scores.get("general"):
        _show_general(scores["general"])


def _show_general(general: dict[str, Any]) -> None:
    text, asked = general["text"], general["prompts"]
    d = text["change"]
    console.print(
        f"general text ({text['passages']} passages): {text['before']:.3f} → {text['after']:.3f} bits per byte; "
        f"difference {d['value']:+.3f}, 95 % interval {d['low']:+.3f} to {d['high']:+.3f}",
        soft_wrap=True,
    )
    right, endless, empty = (f"{asked[k][0]} → {asked[k][1]}" for k in ("right", "endless", "empty"))
    d = asked["right_change"]
    console.print(
        f"{asked['questions']} general questions: {right} right (difference {d['value']:+.1%}, 95 % interval {d['low']:+.1%} to "
        f"{d['high']:+.1%}), {endless} do not end, {empty} empty",
        soft_wrap=True,
    )


def _show_systems(scores: dict[str, Any]) -> None:
    if scores["metric"] == "text":
        console.print("Free text is not graded right or wrong: `educe report` shows the answers side by side.")
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    mean = scores.get("measure") == "mean"
    for title, side in (
        ("system", "left"),
        ("rows fully right" if mean else "right", "right"),
        ("mean score" if mean else "%", "right"),
        ("95 % interval", "left"),
        ("time", "right"),
    ):
        table.add_column(title, justify="right" if side == "right" else "left")
    costs = {n: s["cost"] for n, s in scores["systems"].items() if s.get("cost") is not None}
    if costs:
        table.add_column("cost", justify="right")
    for name, s in scores["systems"].items():
        took = minutes(s["seconds"]) if s["seconds"] is not None else ""
        right = f"{s['correct']}/{scores['num_rows']}"
        cost = [f"{costs[name]:.2g} USD" if name in costs else ""] if costs else []
        table.add_row(
            escape(_called(name, s)), right, f"{s['value']:.1%}", f"{s['low']:.1%} to {s['high']:.1%}", took, *cost
        )
    console.print(table)
    if mean:
        about = "fully right: the score is whole (of several answers or fields, all are right); the mean counts parts"
        console.print(about, soft_wrap=True)
    for name, s in scores["systems"].items():
        told = (
            f"{part} {p['value']:.1%} ({p['low']:.1%} to {p['high']:.1%})" for part, p in s.get("parts", {}).items()
        )
        if s.get("parts"):
            console.print(f"{escape(_called(name, s))}: {', '.join(told)}", soft_wrap=True)
    test = "paired randomisation," if mean else "McNemar"
    for c in scores["comparisons"]:
        p = "p < 0.001" if c["p"] < 0.001 else f"p = {c['p']:.2g}"
        p += f", by Holm {c['p_holm']:.2g}" if "p_holm" in c else ""
        d = c["difference"]
        before = _called(c["before"], scores["systems"][c["before"]])
        console.print(
            f"{escape(before)} → tuned: {c['won']} rows won, {c['lost']} lost ({test} {p}); "
            f"difference {d['value']:+.1%}, 95 % interval {d['low']:+.1%} to {d['high']:+.1%}",
            soft_wrap=True,
        )
    console.print(
        "[dim]intervals and tests are over test rows, of one training: not over training seeds[/dim]", soft_wrap=True
    )
