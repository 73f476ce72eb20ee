"""A model's own Jinja chat template, rendered in a sandbox exactly as servers render it."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from educe.errors import ChatError
from educe.types import Message

# A template that prints the date gets this one, in training and evaluation alike: rendering stays a pure function.
FIXED_DATE = datetime.datetime(2025, 1, 1)
MAX_RENDER_S = 2.0

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class TemplateRefusal(Exception):
    """The template raised, or ran over a limit, on one conversation: (code, what it said)."""


class _Generation(Extension):
    """`{% generation %}` marks answers for other tools; here the block is rendered and the mark ignored."""

    tags = {"generation"}  # noqa: RUF012 - jinja's interface

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return FIXED_DATE.strftime(form)


class ChatTemplate:
    """A compiled template with the special tokens it may print. `render` is deterministic."""

    def __init__(self, source: str, special: dict[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(raise_exception=_raise, strftime_now=_strftime_now)
        self.source = source
        self._special = special
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as e:
            fix = "Give a template that parses, as chat_template.jinja in the model's directory."
            raise ChatError(101, f"chat template:{e.lineno}", f"does not parse: {e.message}.", fix) from e
        except Exception as e:  # nested too deep for jinja or for Python's compiler
            fix = "Give a simpler template, as chat_template.jinja in the model's directory."
            raise ChatError(101, "chat template", f"does not compile: {type(e).__name__}: {e}.", fix) from e

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The text a server would send for these messages. Raises `TemplateRefusal`."""
        said = [{"role": m.role, "content": m.content} for m in messages]
        # Servers pass tools and documents even when there are none: `is defined` must see what it sees there.
        given = {"messages": said, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        limit = 20 * sum(len(m.content) for m in messages) + 65_536
        started, size, parts = time.monotonic(), 0, []
        try:
            for part in self._template.generate(**{**self._special, **given}):
                parts.append(part)
                size += len(part)
                if size > limit:
                    raise TemplateRefusal("E-CHAT-103", f"it wrote more than {limit} characters")
                if time.monotonic() - started > MAX_RENDER_S:
                    raise TemplateRefusal("E-CHAT-103", f"it ran longer than {MAX_RENDER_S:.0f} s")
            text = "".join(parts)
            text.encode()  # a lone surrogate is no text
        except TemplateRefusal:
            raise
        except jinja2.TemplateError as e:
            raise TemplateRefusal("E-CHAT-102", str(e) or type(e).__name__) from e
        except Exception as e:  # foreign code: whatever it raises is its own failure
            raise TemplateRefusal("E-CHAT-102", f"{type(e).__name__}: {e}") from e
        return text
