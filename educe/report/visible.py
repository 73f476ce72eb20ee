"""Untrusted text made safe to look at: escaped, isolated, clamped, and with nothing invisible left in it."""

from __future__ import annotations

import re
import unicodedata

from markupsafe import Markup, escape

from educe.report.words import differences

_KEPT = "\n\t"
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp"})
# Characters of other categories that draw nothing: fillers, joiners, blank braille.
_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")


def is_unseen(char: str) -> bool:
    """True for a character a reader would not see, or that would reorder the text around it."""
    if char < "\x7f":
        return char < " " and char not in _KEPT
    point = ord(char)
    # U+FE0E and U+FE0F choose between text and emoji and are everywhere; the other selectors only hide things.
    selector = 0x180B <= point <= 0x180F or 0xFE00 <= point <= 0xFE0D or 0xE0100 <= point <= 0xE01EF
    return selector or char in _BLANK or unicodedata.category(char) in _UNSEEN


def name_of(char: str) -> str:
    return f"⟨U+{ord(char):04X}⟩"


def visible(text: str) -> str:
    """`text` with every unseen character written out, for attributes and titles."""
    return "".join(name_of(c) if is_unseen(c) else c for c in text)


def clamp(text: str, limit: int) -> tuple[str, int]:
    """The first `limit` characters, and how many are left out; one that is written out counts as what is written.

    A few more are let pass: the note is as long.
    """
    room, kept = limit + 30, 0
    for kept, char in enumerate(text[: room + 1]):  # noqa: B007
        room -= len(name_of(char)) if is_unseen(char) else 1
        if room < 0:
            break
    else:
        return text, 0
    kept = max(1, min(kept, limit))
    return text[:kept], len(text) - kept


def cut(text: str, limit: int) -> str:
    """The same for an attribute, where nothing can be marked up."""
    kept, num_left = clamp(visible(text[: 2 * limit]), limit)
    return kept + "…" if num_left or len(text) > 2 * limit else kept


def _pieces(text: str, newlines: bool) -> Markup:
    parts: list[Markup] = []
    for piece in re.split(r"([^ -~])", text):
        if piece == "\n" and newlines:
            parts.append(Markup('<span class="nl">↵</span>\n'))
        elif len(piece) == 1 and is_unseen(piece):
            parts.append(Markup('<span class="unseen">{}</span>').format(name_of(piece)))
        else:
            parts.append(escape(piece))
    return Markup("").join(parts)


def _left(num: int) -> Markup:
    return Markup('<span class="more">… ({} more characters)</span>').format(f"{num:,}") if num else Markup("")


def shown(text: str, limit: int = 600, newlines: bool = False) -> Markup:
    """`text` as HTML. Unseen characters become labelled chips; with `newlines`, each line end shows as ↵."""
    kept, num_left = clamp(text, limit)
    return _pieces(kept, newlines) + _left(num_left)


def marked(answer: str, expected: str, limit: int = 600) -> Markup:
    """An answer as HTML, the words that differ from what was expected marked: <ins> more than expected, <del> missing."""
    if not answer:
        return block(answer)
    kept, num_left = clamp(answer, limit)
    tags = {"same": "{}", "more": "<ins>{}</ins>", "missing": "<del>{}</del>"}
    parts = (Markup(tags[p.kind]).format(_pieces(p.text, False)) for p in differences(kept, clamp(expected, limit)[0]))
    return Markup("").join(parts) + _left(num_left)


def block(text: str, limit: int = 600) -> Markup:
    """`text` as HTML for a block of its own; empty text is said to be empty."""
    return shown(text, limit) if text else Markup('<span class="more">(empty)</span>')


def inline(text: str, limit: int = 200) -> Markup:
    """`text` inside a sentence or a cell, isolated from the direction of what surrounds it."""
    return Markup("<bdi>{}</bdi>").format(shown(text, limit))
