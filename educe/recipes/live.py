"""`educe watch`: the page of a run served on this machine until Ctrl-C."""

from __future__ import annotations

import contextlib
import tempfile
import webbrowser
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path

from educe.errors import RunError
from educe.files.run_dir import find_place, is_staged
from educe.recipes.which import run_named
from educe.report.live import served

_LEADS_ON = (
    '<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0;url={link}"><title>educe</title>\n'
)


def live(run: Path | None, port: int, say: Callable[[str], None], browse: bool = False) -> None:
    """Serve until interrupted. A run that is named need not exist yet; the latest is taken where none is."""
    path = run_named(run) or find_place(None, Path("runs"))
    if path.exists() and not path.is_dir():
        raise RunError(1, str(path), "is no directory.", "Give the directory of a run: RUNS/NAME of the recipe.")
    if is_staged(path):
        say(f"{path} is a run of stages: the one that trains is shown; another one: educe watch {path}/N-NAME")
    with served(path, port, lambda link: say(f"That link was used. For another browser: {link}")) as (link, serve):
        say(f"Watching {path}: {link}")
        say("Only this machine, and each link once. Ctrl-C ends it; training goes on.")
        with leads_to(link) if browse else contextlib.nullcontext() as page:
            if page is not None and not webbrowser.open(page.as_uri()):
                say("No browser could be opened: open the link yourself.")
            serve()


@contextlib.contextmanager
def leads_to(link: str) -> Iterator[Path]:
    """A page that only its owner may read and that leads to the link: others see the browser's command line, with its name alone."""
    with tempfile.TemporaryDirectory(prefix="educe-") as place:  # its owner's alone: 0700
        page = Path(place) / "watch.html"
        page.touch(0o600)
        page.write_text(_LEADS_ON.format(link=escape(link)), encoding="utf-8")
        yield page
