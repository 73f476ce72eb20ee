"""The same numbers as Markdown: readable in a terminal, a table on GitHub. Text of the data is escaped: none of it is markup."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from educe.files.run_dir import RunDir
from educe.report import sections, wording
from educe.report.compare import headline
from educe.report.forgotten import read_forgotten, read_shift
from educe.report.judged import read_judged
from educe.report.numbers import Paired
from educe.report.suites import benchmarks, read_choices, read_harness, read_suites
from educe.report.visible import clamp, visible
from educe.types import Interval

_MARKUP = re.compile(r"([\\`*_\[\]<>#|~&$@])")


def plain(text: str | None, limit: int = 200) -> str:
    """Text on one line in which no character is markup."""
    kept, left = clamp(" ".join((text or "").split()), limit)
    return _MARKUP.sub(r"\\\1", visible(kept)) + ("…" if left else "")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded so that it reads without being rendered; the first to the left, numbers to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (c.ljust(w) if k == 0 else c.rjust(w) for k, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (w + 2) if k == 0 else "-" * (w + 1) + ":" for k, w in enumerate(widths))
    return "\n".join((line(head), f"|{rule}|", *map(line, rows)))


def run_markdown(run: dict[str, Any], place: RunDir) -> str:
    """A run, as `numbers_of` gives it, and what other verbs left in its directory."""
    return "\n\n".join((*_scores(run, place), *_besides(place), *_training(run))) + "\n"


def _besides(place: RunDir) -> Iterator[str]:
    for s in read_suites(place):
        names = (*s.systems, *(["difference"] if s.compared else []))
        yield "## Following instructions"
        yield plain(s.verdict, 400)
        yield table(
            ("Followed", *map(plain, names)), [(plain(title), *map(plain, cells)) for title, cells in s.measures]
        )
    for c in read_choices(place):
        yield f"## Multiple choice: {plain(c.name, 60)}"
        yield f"{c.num_rows:,} questions; by chance {wording.percent(c.chance)} are right."
        rules = [(plain(title), *map(plain, cells), wording.p_value(p)) for title, cells, p in c.rules[:12]]
        yield table(("Likeliest by", *map(plain, c.systems), "difference", "McNemar"), rules)
    for h in read_harness(place):
        yield f"## lm-eval: {plain(h.name, 60)}"
        yield f"{plain(h.about)}; after ± its standard error."
        measures = [
            (plain(title), *map(plain, cells), wording.p_value(p) if p is not None else "")
            for title, cells, p in h.measures[:80]
        ]
        yield table(("Measure", *map(plain, h.systems), "difference", "paired test"), measures)
    if (forgotten := read_forgotten(place)) is not None:
        yield "## What was forgotten"
        yield (
            "\n".join(f"- {plain(f)}" for f in forgotten.flags[:6])
            or "No general measure is worse by more than its interval."
        )
        rows = [tuple(plain(cell) for cell in (r.what, r.before, r.after, r.change)) for r in forgotten.rows[:40]]
        yield table(("What", "Before", "After", "Change (95 %)"), rows)
    if (shift := read_shift(place)) is not None:
        yield plain(shift.text, 600)
    if judged := read_judged(place):
        yield "## Judged by a model"
        rows = [tuple(map(plain, (j.what, j.judge, j.score, j.controlled, j.length))) for j in judged[:40]]
        yield table(("What", "Judge", "Score (95 %)", "Length-controlled", "Characters"), rows)


def _scores(run: dict[str, Any], place: RunDir) -> Iterator[str]:
    yield f"# {plain(run['name'])}"
    about = [plain(run["model"]), run["tuning"], plain((run["provenance"] or {}).get("device"))]
    yield " · ".join(a for a in about if a) or "no settings are recorded"
    if run["verdict"]:
        yield f"**{plain(run['verdict'], 8000)}**"
    elif run["headline"]:
        yield f"**{plain(run['headline'])}**"
    elif (run["provenance"] or {}).get("finished"):
        yield "Not evaluated yet: run `educe eval`."
    else:
        yield f"Not trained to its end yet: {plain(place.goes_on, 400)} goes on from the last checkpoint."
    if run["unreadable"]:
        yield f"These files are there but cannot be read as JSON: {', '.join(map(plain, run['unreadable'][:20]))}."
    if run["systems"]:
        words = wording.measure(run["measure"] == "mean")
        labels = {s["name"]: s["label"] for s in run["systems"]}
        yield table(
            ("System", words.right, words.column, "95 % interval", "Tokens per answer", "Time"),
            [_system(s) for s in run["systems"]],
        )
        if words.fully:
            yield words.fully
        yield "\n".join(f"- {_comparison(c, labels, words)}" for c in run["comparisons"]) or "No comparison."
        yield wording.ONE_TRAINING


def _training(run: dict[str, Any]) -> Iterator[str]:
    steps = _losses(run)
    if steps:
        yield "## Training"
        right = "Dev rows fully right" if run["measure"] == "mean" else "Dev rows right"
        loss = f"Held-out loss{', of a pair' if run['dev_pairs'] else ''}"
        yield table(("Step", loss, *([right] if run["dev_right"] else [])), steps)
    if run["dev_pairs"]:
        head = (
            "Step",
            "Dev pairs ranked right",
            "Margin above 0",
            "Margin",
            "Log-ratio of chosen",
            "of rejected",
            "KL on chosen answers",
        )
        yield table(head, [_pairs_line(p) for p in sections.spread(run["dev_pairs"], 20)])
    if run["data"]:
        yield "## Data"
        yield table(
            ("Rows", "Count", "Tokens"),
            [(plain(t["label"]), f"{t['rows']:,}", f"{t['tokens']:,}") for t in run["data"]["terms"]],
        )
    if run["checks"]:
        yield "## Checks to look at"
        yield "\n".join(
            f"- {plain(c['id'])} {plain(c['name'])}: {plain(c['verdict'])}. {plain(c['evidence'], 400)}"
            for c in run["checks"][:40]
        )
    yield "## Cost"
    yield table(("What", "How much"), _cost(run["cost"]))


def _system(s: dict[str, Any]) -> tuple[str, ...]:
    interval, took = wording.span(s["low"], s["high"]), wording.duration(s["seconds"])
    return (
        plain(s["label"], 60),
        f"{s['correct']:,}",
        wording.percent(s["value"]),
        interval,
        wording.number(s["mean_tokens"]),
        took,
    )


def _comparison(c: dict[str, Any], labels: dict[str, str], words: wording.Measure) -> str:
    d = Interval(**c["difference"])
    names = f"{plain(labels.get(c['after'], c['after']))} against {plain(labels.get(c['before'], c['before']))}"
    changed = f"{c['won']:,} rows won, {c['lost']:,} lost, {words.test} {wording.p_value(c['p'])}"
    changed += f", by Holm {wording.p_value(c['p_holm'])}" if c.get("p_holm") is not None else ""
    return f"{names}: {wording.points(d)} (95 %: {wording.points_span(d)}); {changed}"


def _pairs_line(p: dict[str, Any]) -> tuple[str, ...]:
    above = wording.percent(p["accuracy"]) if p["accuracy"] is not None else "-"
    numbers = (wording.number(p[k]) for k in ("margin", "chosen", "rejected", "kl"))
    return f"{p['step']:,}", wording.percent(p["ranked"]), above, *numbers


def _losses(run: dict[str, Any]) -> list[tuple[str, ...]]:
    loss = {p["step"]: p["loss"] for p in run["dev_loss"]}
    right = {g["step"]: f"{g['right']} of {g['rows']}" for g in run["dev_right"]}
    steps = sorted({*loss, *right})
    every = max(1, len(steps) // 20)
    return [
        (f"{s:,}", wording.number(loss.get(s)), *([right.get(s, wording.ABSENT)] if right else []))
        for s in steps
        if s in (*steps[::every], steps[-1])
    ]


def _cost(cost: dict[str, Any]) -> list[tuple[str, str]]:
    price = f"{wording.number(cost['price'])} {cost['currency']}" if cost["price"] is not None else wording.ABSENT
    rows = [
        ("Price of steps and answers", price),
        ("Time of steps", wording.duration(cost["training_s"])),
        ("Time of answers", wording.duration(cost["evaluation_s"])),
        ("Peak memory", wording.size(cost["peak_memory_bytes"])),
        ("Steps", wording.count(cost["steps"])),
        ("Tokens", wording.count(cost["tokens"])),
    ]
    return [r for r in rows if r[1] != wording.ABSENT]


def comparison_markdown(found: dict[str, Any], places: Sequence[RunDir]) -> str:
    """Several runs, as `comparison_of` gives them, and what their benchmarks say."""
    runs = found["runs"]
    names = [plain(r["name"], 80) for r in runs]
    paired = [_paired(p) for p in found["paired"]]
    parts = [f"# {len(runs)} runs compared", f"**{plain(headline([r['name'] for r in runs], paired), 400)}**"]
    mixed = len({r["metric"] for r in runs if r["systems"]}) > 1
    words = wording.MIXED if mixed else wording.measure(any(r["measure"] == "mean" for r in runs))
    head = ("Run", "System", words.right, words.column, "95 % interval", *(["Metric"] if mixed else []))
    rows = [
        (n, *_system(s)[:4], *([plain(sections.graded_as(r["metric"]), 60)] if mixed else []))
        for n, r in zip(names, runs, strict=True)
        for s in r["systems"]
    ]
    parts += filter(None, [table(head, rows), words.fully]) if rows else []
    parts.append("\n".join(f"- {_pair(p)}" for p in paired))
    measured = [
        (plain(title, 120), *(plain(c) or wording.ABSENT for c in cells)) for title, cells in benchmarks(places)
    ]
    parts += ["## Benchmarks, tuned models", table(("Measure", *names), measured[:80])] if measured else []
    differing = [
        (plain(d["setting"]), *(plain(v, 60) or "–" for v in d["values"])) for d in found["settings_that_differ"]
    ]
    parts += ["## Settings that differ", table(("Setting", *names), differing)] if differing else []
    costs = [(n, *(v for _, v in _all(r["cost"]))) for n, r in zip(names, runs, strict=True)]
    parts += ["## Cost", table(("Run", *(k for k, _ in _all(runs[0]["cost"]))), costs)]
    return "\n\n".join(parts) + "\n"


def _paired(p: dict[str, Any]) -> Paired:
    return Paired(**{**p, "difference": Interval(**p["difference"]) if p["difference"] else None})


def _all(cost: dict[str, Any]) -> list[tuple[str, str]]:
    known = dict(_cost(cost))
    keys = ("Price of steps and answers",) if cost["currency"] is not None else ()
    return [
        (k, known.get(k, wording.ABSENT))
        for k in (*keys, "Time of steps", "Time of answers", "Peak memory", "Steps", "Tokens")
    ]


def _pair(p: Paired) -> str:
    names = f"{plain(p.after, 80)} against {plain(p.before, 80)}"
    if p.difference is None or p.p is None or p.p_holm is None:
        return f"{names}: not tested, {plain(p.why, 200)}"
    d = p.difference
    rows = f"{p.won:,} rows won, {p.lost:,} lost of {p.rows:,} shared"
    tests = f"{rows}, {wording.measure(p.measure == 'mean').test} {wording.p_value(p.p)}, by Holm {wording.p_value(p.p_holm)}"
    return f"{names}: {wording.points(d)} (95 %: {wording.points_span(d)}); {tests}"
