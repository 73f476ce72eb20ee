"""A corrected template, for one whose generation prompt differs from its history by white space: tried, and kept only if proved."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from educe.chat.probe import ANSWER, ASK, assistant, try_render, user
from educe.chat.template import ChatTemplate
from educe.chat.tokens import ChatTokenizer
from educe.errors import EduceError
from educe.recipes.template_facts import Unusable, refusal_of
from educe.recipes.template_talks import MULTI, SINGLE, WITH_SYSTEM

_BLOCK = re.compile(
    r"(?P<start>\{%-?\s*if\s[^%]*\badd_generation_prompt\b[^%]*%\})(?P<inner>(?:(?!\{%-?\s*if\b).)*?)(?P<end>\{%-?\s*endif\s*-?%\})",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fix:
    """`how` the template was changed, its new text, what inference sends before an answer then and now, and the difference in
    what is written for a chat of two turns, line by line.
    """

    how: str
    template: str
    sent_before: str
    sent_now: str
    diff: tuple[str, ...]


def propose(tokenizer: ChatTokenizer, load: Callable[[str | None], ChatTokenizer]) -> Fix | None:
    """The first candidate under which probe conversations are proved; None where there is none."""
    source = tokenizer.template.source
    for how, candidate in _candidates(tokenizer.template):
        if candidate == source:
            continue
        try:
            changed = load(candidate)
            found = [refusal_of(changed, c) for c in (SINGLE, MULTI, WITH_SYSTEM)]
        except (EduceError, Unusable):
            continue
        # a conversation that the template itself refuses is no matter of white space
        if found[0] is None and all(r is None or r.code == "E-CHAT-102" for r in found):
            before, now = _sent(tokenizer.template), _sent(changed.template)
            diff = _diff(_written(tokenizer.template), _written(changed.template))
            return Fix(how=how, template=candidate, sent_before=before, sent_now=now, diff=diff)
    return None


def _candidates(template: ChatTemplate) -> Iterator[tuple[str, str]]:
    source = template.source
    yield "line ends and runs of four spaces removed, as such files are meant to be used", _stripped(source)
    yield "white-space control added to every tag", _controlled(source)
    header = _history(template)
    if header is not None:
        written = re.sub(
            r"[\n\r\t]", lambda m: {"\n": "\\n", "\r": "\\r", "\t": "\\t"}[m[0]], header.replace("\\", "\\\\")
        )
        literal = "{{- '" + written.replace("'", "\\'") + "' -}}"
        blocks = list(_BLOCK.finditer(source))
        if blocks:
            m = blocks[-1]
            changed = f"{source[: m.start('inner')]}{literal}{source[m.end('inner') :]}"
            yield f"its generation prompt replaced by what history has, {header!r}", changed


def _stripped(source: str) -> str:
    return source.replace("    ", "").replace("\n", "")


def _controlled(source: str) -> str:
    opened = re.sub(r"\{(%|\{|#)[-+]?", r"{\1-", source)
    return re.sub(r"[-+]?(%|\}|#)\}", r"-\1}", opened)


def _history(template: ChatTemplate) -> str | None:
    """What history has between a question and its answer where the prompt for it has something else."""
    asked, full = try_render(template, (user(),)), try_render(template, (user(), assistant()))
    if asked is None or full is None or not full.text.startswith(asked.text) or ANSWER not in full.text:
        return None
    return full.text[len(asked.text) : full.text.index(ANSWER)]


def _sent(template: ChatTemplate) -> str:
    text = try_render(template, (user(),), generation=True)
    return text.text.rpartition(ASK)[2] if text is not None else ""


def _written(template: ChatTemplate) -> str:
    text = try_render(template, MULTI.messages[:-1], generation=True)
    return text.text if text is not None else ""


def _diff(before: str, now: str) -> tuple[str, ...]:
    """Lines with a mark of what became of them: "-", "+" or " "; their ends are kept."""
    lines = difflib.ndiff(before.splitlines(keepends=True), now.splitlines(keepends=True))
    return tuple(line[0] + line[2:] for line in lines if not line.startswith("?"))
