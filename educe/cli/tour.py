"""`educe quickstart`: the public verbs in order, each printed so that a person can run it alone; what is done is skipped."""

from __future__ import annotations

import shutil
import sys
import time
from importlib.resources import files
from pathlib import Path

import click

from educe.cli.screens import console, minutes, say, shown
from educe.model.source import DEFAULT_MODEL
from educe.recipes.machine import need_torch

DATA = ("train.jsonl", "dev.jsonl", "test.jsonl")


def tour(place: Path) -> None:
    """Run the whole job in `place`."""
    need_torch()
    from educe.cli.main import cli

    began = time.monotonic()
    place.mkdir(parents=True, exist_ok=True)
    for name in DATA:
        if not (place / name).is_file():
            shutil.copyfile(str(files("educe.quickstart") / name), place / name)
    say(f"data: {place}/train.jsonl, dev.jsonl, test.jsonl (customer messages → JSON tickets; CC0)")
    recipe, run, out = place / "recipe.yaml", place / "runs" / "tickets", place / "tickets-model"
    train, dev, test = (place / name for name in DATA)
    held = ["--data", train, "--dev", dev, "--test", test]
    jobs = [
        (recipe, ["init", "--model", DEFAULT_MODEL, *held, "--name", "tickets", "--out", recipe]),
        (None, ["check", recipe]),
        (None, ["inspect", recipe, "--row", "1"]),
        (None, ["train", recipe]),
        (run / "scores.json", ["eval", run]),
        (None, ["report", run]),
        (out / "manifest.json", ["export", run, out]),
    ]
    for made, words in jobs:
        args = [str(w) for w in words]
        console.print(f"\n[bold cyan]$ educe {' '.join(args)}[/bold cyan]", soft_wrap=True)
        if made is not None and made.exists():
            say(f"{made} is there: skipped")
            continue
        try:
            cli.main(args=args, prog_name="educe", standalone_mode=False)
        except SystemExit as e:
            if e.code:
                raise
    _last_screen(run, out, time.monotonic() - began)


def _last_screen(run: Path, out: Path, took_s: float) -> None:
    program = "educe" if shutil.which("educe") else shown(Path(sys.argv[0]).absolute())
    console.print(f"\n[bold]Done in {minutes(took_s)}.[/bold]")
    click.echo(f"  Read the report:   {(run / 'report.html').resolve()}")
    click.echo(f"  Talk to it:        {program} chat {run} --base")
    click.echo(f"  Serve it:          vllm serve {out}   or: transformers serve {out}")
    click.echo(f"  Now yours:         {program} init --data your.jsonl")
