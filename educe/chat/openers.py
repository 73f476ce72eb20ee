"""Tags that open reasoning, in what a template writes and in what a row says."""

from __future__ import annotations

import re

from educe.chat.template import Asked, Piece

# Tags that open reasoning, and how each is closed.
OPENERS = re.compile(
    r"<(?P<angle>think|thinking|thought|reasoning|seed:think)>|\[(?P<square>THINK)\]|<\|(?P<bar>START_THINKING)\|>"
    r"|<\|channel>(?P<channel>thought|analysis)\n|<(?P<fish>[｜|]begin_of_thought[｜|])>"
)
OPENED = (
    *(f"<{word}>" for word in ("think", "thinking", "thought", "reasoning", "seed:think")),
    *("[THINK]", "<|START_THINKING|>", "<|channel>thought\n", "<|channel>analysis\n"),
    *("<｜begin_of_thought｜>", "<|begin_of_thought|>"),
)


def close_of(opener: re.Match[str]) -> str:
    kind, name = next((k, v) for k, v in opener.groupdict().items() if v)
    return {
        "angle": f"</{name}>",
        "square": "[/THINK]",
        "bar": "<|END_THINKING|>",
        "channel": "<channel|>",
        "fish": f"<{name.replace('begin', 'end')}>",
    }[kind]


def inline(content: str) -> bool:
    """Whether a text starts with a reasoning block of its own."""
    found = OPENERS.match(content.lstrip())
    return found is not None and close_of(found).strip() in content


def about_opening(content: str, i: int, block: str) -> list[Asked]:
    """What the bridge depends on: whether the answer starts with a reasoning block of its own, and how that looks."""
    whole, bare = (Piece(content, i, "content", (i, "content"), ops) for ops in ((), (("lstrip", None),)))
    found = OPENERS.match(content.lstrip())
    asked = [Asked((bare,), "startswith", (OPENED,), found is not None)]
    if found is not None:
        close = close_of(found).strip()
        asked.append(Asked((bare,), "startswith", (found[0],), True))
        asked.append(Asked((whole,), "contains", (close,), close in content))
        asked.append(Asked((whole,), "startswith", (block,), content.startswith(block)))
    return asked
