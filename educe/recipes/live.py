"""`educe watch`: the page of a run served on this machine until Ctrl-C."""

from __future__ import annotations

import webbrowser
from collections.abc import Callable
from pathlib import Path

from educe.errors import RunError
from educe.files.run_dir import find_run
from educe.report.live import served


def live(run: Path | None, port: int, say: Callable[[str], None], browse: bool = False) -> None:
    """Serve until interrupted. A run that is named need not exist yet; the latest is taken where none is."""
    path = run if run is not None else find_run(None, Path("runs")).path
    if path.exists() and not path.is_dir():
        raise RunError(1, str(path), "is no directory.", "Give the directory of a run: RUNS/NAME of the recipe.")
    with served(path, port) as (link, serve):
        say(f"Watching {path}: {link}")
        say("Only this machine, only with this link. Ctrl-C ends it; training goes on.")
        if browse:
            webbrowser.open(link)
        serve()
