"""The conversation of `educe chat` on a terminal."""

from __future__ import annotations

import sys

from rich.markup import escape

from educe.cli.screens import console, say
from educe.files.run_dir import RunDir
from educe.recipes.machine import need_torch


def talk(run: RunDir, *, base: bool, max_new_tokens: int) -> None:
    """Read lines until /quit or the end of input; /reset forgets what was said."""
    need_torch()
    from educe.recipes.chat import Chat

    chat = Chat(run, say, base=base)
    if chat.system is not None:
        say(f"system prompt, as in training: {chat.system}")
    console.print("Type a message. [dim]/reset starts over, /quit or Ctrl-D ends.[/dim]")
    while True:
        try:
            line = console.input("[bold cyan]you[/bold cyan] > ") if sys.stdin.isatty() else _piped()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if line.strip() == "/quit":
            return
        if line.strip() == "/reset":
            chat.reset()
            continue
        if not line.strip():
            continue
        for name in chat.names:
            console.print(f"[bold green]{name}[/bold green] > ", end="")
            try:
                for part in chat.ask(name, line, max_new_tokens):
                    console.print(escape(part), end="", soft_wrap=True)
            except KeyboardInterrupt:
                console.print(" [dim](stopped)[/dim]", end="")
            console.print()


def _piped() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")
