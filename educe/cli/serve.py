"""`educe serve`: which model, on which port."""

from __future__ import annotations

import contextlib
import signal
import sys
from pathlib import Path

import click

from educe.cli.ending import ended_by
from educe.files.run_dir import is_staged


@click.command()
@click.argument("run", type=click.Path(path_type=Path), required=False, metavar="[RUN|DIR]")
@click.option("--port", type=click.IntRange(1, 65534), default=8000, show_default=True, help="On 127.0.0.1 alone.")
@click.option("--with", "beside", type=click.Choice(["base"]), help="The base model too, on the port after.")
def serve(run: Path | None, port: int, beside: str | None) -> None:
    """Serve the tuned model on this machine, OpenAI-compatible: by vLLM where it is installed, else by transformers' own server."""
    from educe.cli.screens import say
    from educe.recipes.machine import need_torch
    from educe.recipes.which import run_or_last_stage

    need_torch()
    from educe.recipes.serve import serve as run_serve

    named = run is None or "#" in run.name or is_staged(run) or (run / "recipe.resolved.json").is_file()
    place = run_or_last_stage(run, say) if run is None or named else run  # else a directory that was exported
    with _ended_with_the_terminal():
        code = run_serve(place, say, port=port, base=beside == "base")
    sys.exit(code)


def _ended_with_the_terminal() -> contextlib.AbstractContextManager[None]:
    """SIGHUP ends the servers too; under nohup it is ignored as before."""
    if not hasattr(signal, "SIGHUP") or signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        return contextlib.nullcontext()
    return ended_by(signal.SIGHUP)
