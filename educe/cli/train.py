"""`educe train`: as one process, or as so many ranks."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import click

from educe.cli.durations import seconds
from educe.cli.ending import ended_by
from educe.errors import UsageError


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--devices", type=click.IntRange(1), help="GPUs of this machine that share the model; processes on a CPU."
)
@click.option("--stop-after", metavar="TIME", help="Save and end before this time is over, such as 55m; exit code 0.")
@click.option("--allow", multiple=True, metavar="SETTING", help="Go on although this setting of the run has changed.")
@click.option(
    "--redo",
    multiple=True,
    metavar="STAGE",
    help="Delete this stage and those that start from it, and train them anew.",
)
@click.option("--hang-after", default="30m", show_default=True, help="A hang so long writes stacks and ends the run.")
def train(
    recipe: Path,
    devices: int | None,
    stop_after: str | None,
    allow: tuple[str, ...],
    redo: tuple[str, ...],
    hang_after: str,
) -> None:
    """Train. Ctrl-C saves; the same command goes on. So does SIGTERM; SIGUSR1 saves and ends with 0."""
    from educe.parallel.launch import launch, leads, stay_with_parent
    from educe.recipes.which import recipe_or_stages

    stop_after_s = seconds(stop_after, "--stop-after") if stop_after is not None else None
    hang_after_s = seconds(hang_after, "--hang-after")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and devices not in (None, size):
        found = f"is {devices}, and the environment names {size} ranks."
        raise UsageError(101, "--devices", found, "Leave it out where torchrun starts the ranks.")
    if size == 1 and devices is not None and devices > 1:
        recipe_or_stages(recipe)  # a mistake in it is told once
        words = ["train", str(recipe), "--devices", str(devices), "--hang-after", hang_after]
        words += ["--stop-after", stop_after] if stop_after is not None else []
        words += [word for field in allow for word in ("--allow", field)]
        words += [word for name in redo for word in ("--redo", name)]
        raise SystemExit(launch(words, devices, lambda text: click.echo(text, err=True, nl=False)))
    stay_with_parent()
    with _asked_while_nothing_is_trained():
        from educe.cli.screens import TrainScreen, say, shown
        from educe.recipes.run import train as run_train

        with TrainScreen() as screen:
            run = run_train(
                recipe,
                say=say,
                screen=screen,
                devices=devices,
                stop_after_s=stop_after_s,
                allow=allow,
                hang_after_s=hang_after_s,
                redo=redo,
            )
    if leads():
        click.echo(f"Trained: {shown(run.path)}. Next: educe eval {shown(run.path)}")


def _asked_while_nothing_is_trained() -> contextlib.AbstractContextManager[None]:
    """SIGUSR1 before the first step, after the last one, or a second time: a batch system's job is over, and is queued again."""
    if not hasattr(signal, "SIGUSR1"):
        return contextlib.nullcontext()
    word = "Ended by SIGUSR1. The same command goes on from the last checkpoint, or begins where there is none."
    return ended_by(signal.SIGUSR1, 0, word)
