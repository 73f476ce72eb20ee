"""`educe judge`: which answers, which judge; the figures side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from educe.cli.screens import NAMES
from educe.errors import UsageError

_FILE = click.Path(path_type=Path)


@click.command()
@click.argument("run", type=_FILE, required=False)
@click.option(
    "--bench",
    type=click.Choice(["rows", "alpaca-eval", "mt-bench"]),
    default="rows",
    show_default=True,
    help="Which questions.",
)
@click.option("--judge", "url", metavar="URL", help="Base address of the judge's server, OpenAI-compatible.")
@click.option("--judge-model", "model", metavar="NAME", help="The judge, as its server calls it.")
@click.option(
    "--key-variable",
    default="",
    help="The variable with the key (default: OPENAI_API_KEY at OpenAI, else EDUCE_API_KEY).",
)
@click.option("--plain-http", is_flag=True, help="Ask it over http, though it is another machine.")
@click.option(
    "--against",
    default="untouched",
    show_default=True,
    help="untouched, few_shot (its best prompt; rows alone), or a file.",
)
@click.option("--questions", type=_FILE, help="The benchmark's questions.")
@click.option("--references", type=_FILE, help="MT-Bench's reference answers.")
@click.option("--difficulty", type=_FILE, help="AlpacaEval's instruction_difficulty.csv.")
@click.option("--gamed", type=_FILE, help="AlpacaEval's df_gamed.csv.")
@click.option("--most", type=click.IntRange(2), help="The first so many questions alone.")
@click.option("--pairwise", is_flag=True, help="MT-Bench: compare tuned and untouched in both orders, do not rate.")
@click.option("--price-in", type=float, help="USD for a million tokens the judge reads.")
@click.option("--price-out", type=float, help="USD for a million tokens the judge writes.")
@click.option("--max-cost", type=float, help="Stop before this many USD are spent.")
@click.option("--max-requests", type=click.IntRange(1), help="Stop after so many requests.")
@click.option("--regrade", is_flag=True, help="Read the stored verdicts again; no judge is asked.")
def judge(run: Path | None, url: str | None, model: str | None, regrade: bool, **options: Any) -> None:
    """Let another model judge: answers tuned against untouched, AlpacaEval, MT-Bench. A judge that can be fooled is refused."""
    from educe.cli.screens import say
    from educe.recipes.run import Run

    found = Run(run)
    asked = {
        k: options.pop(k) for k in ("key_variable", "plain_http", "price_in", "price_out", "max_cost", "max_requests")
    }
    if not regrade and not (url and model):
        lacks = " and ".join(o for o, given in (("--judge URL", url), ("--judge-model NAME", model)) if not given)
        raise UsageError(101, "judge", "no judge is named whole.", f"Give {lacks}.")
    scores = found.judge(url or "", model or "", regrade=regrade, say=say, **asked, **options)
    show_judged(scores)


def show_judged(scores: dict[str, Any]) -> None:
    """Raw, length-controlled and lengths side by side: none of them stands alone."""
    click.echo(f"Judged by {scores['judge']}; canaries at the floor.")
    for name, s in scores.get("systems", {}).items():
        i, turns = s["interval"], ", ".join(f"turn {t} {_mark(m)}" for t, m in s["by_turn"].items())
        click.echo(
            f"{NAMES.get(name, name):10} {i['value']:.2f} of 10 ({i['low']:.2f} to {i['high']:.2f}); {turns}; {_unread(s['unparsed'])}"
        )
        click.echo("           " + ", ".join(f"{c} {_mark(m)}" for c, m in s["by_category"].items()))
        _warn(s["lint"])
    if "systems" not in scores:
        _show_compared(scores)


def _show_compared(scores: dict[str, Any]) -> None:
    i, lengths, counts = (scores[k] for k in ("win_rate", "mean_length", "counts"))
    click.echo(f"tuned against {NAMES.get(scores['against'], scores['against'])}: {scores['verdict']}")
    click.echo(f"  win rate            {_share(i['value'])} ({_range(i)})")
    if controlled := scores.get("length_controlled"):
        published = controlled["with_difficulty"] and controlled["with_gamed_baselines"]
        how = "" if published else ", own fit: not the leaderboard's figure"
        click.echo(f"  length-controlled   {_share(controlled['win_rate'])} ({_range(controlled['interval'])}{how})")
    for part in ("by_turn", "by_category"):
        if means := scores.get(part):
            said = ", ".join(f"{k} {_share(m)}" for k, m in means.items())
            click.echo(f"  {part.replace('_', ' '):18}  {said}")
    click.echo(f"  mean length         {lengths['own']:.0f} characters against {lengths['other']:.0f}")
    equal = f", {counts['equal']} were of equal answers (ties, not asked)" if "equal" in counts else ""
    click.echo(
        f"  {counts['judged']} of {counts['questions']} questions judged in both orders; the order decided {counts['split']}{equal}; "
        f"{_unread(counts['unparsed'])}"
    )
    _warn(scores["lint"])


def _share(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _range(i: dict[str, float] | None) -> str:
    return f"{100 * i['low']:.1f} to {100 * i['high']:.1f}" if i is not None else "interval not known"


def _mark(mean: float | None) -> str:
    return "-" if mean is None else f"{mean:.2f}"


def _unread(num: int) -> str:
    return f"{num} verdicts could not be read" + (" and are in no mean" if num else "")


def _warn(lines: list[str]) -> None:
    for line in lines:
        click.echo(f"warning: {line}")
