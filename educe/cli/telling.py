"""What goes to stderr when something is wrong, without the secrets that a message may have picked up on its way."""

from __future__ import annotations

import sys
import traceback
from types import TracebackType

import click

from educe.errors import EduceError, UsageError
from educe.secrets import redacted


def tell(e: EduceError) -> None:
    """A user's mistake: code and place, what was found, what to do."""
    click.echo(click.style(f"{e.code} ", fg="red", bold=True, reset=True) + redacted(e.where), err=True)
    click.echo(f"  {redacted(e.found)}", err=True)
    click.echo(click.style("  → ", fg="green") + redacted(e.fix), err=True)


def tell_usage(e: click.ClickException) -> None:
    """A wrong command line, of which it may show a part, as any mistake is told."""
    of = e.ctx.command_path if isinstance(e, click.UsageError) and e.ctx is not None else "educe"
    tell(UsageError(101, of, f"{e.format_message().rstrip('.')}.", f"See `{of} --help`."))


def hide_in_tracebacks() -> None:
    """A defect keeps its traceback; what the environment holds secret is hidden in it."""
    sys.excepthook = _show


def _show(kind: type[BaseException], e: BaseException, tb: TracebackType | None) -> None:
    click.echo(redacted("".join(traceback.format_exception(kind, e, tb))), err=True, nl=False)
