"""`educe watch`: a run's page, live."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path), required=False)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=0, show_default=True, help="On 127.0.0.1; 0: any free one."
)
@click.option("--open", "browse", is_flag=True, help="Open the link in a browser.")
def watch(run: Path | None, port: int, browse: bool) -> None:
    """Show a run's report on this machine while it trains, updating itself. RUN need not exist yet."""
    from educe.recipes.live import live

    live(run, port, click.echo, browse)
