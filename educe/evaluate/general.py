"""General text, that nobody tuned for: what a model loses there, it has forgotten.

The package's own text is 36 short passages of many kinds, written for this: prose, talk, code, sums, five languages. It is a smoke
alarm and no benchmark: 9 kilobytes show a model that has lost its language, not one that has lost a few facts.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from educe.chat.documents import document_made
from educe.chat.tokens import ChatTokenizer
from educe.errors import UsageError
from educe.types import Example

MOST_BYTES = 300_000
_MOST_READ = 2**26


def own_passages() -> list[str]:
    """The package's own."""
    return _passages((resources.files("educe.evaluate") / "general.txt").read_text(encoding="utf-8"))


def read_passages(file: Path) -> list[str]:
    """Passages of a text file, which empty lines divide; the first `MOST_BYTES` of them. Raises `UsageError`."""
    try:
        with file.open("rb") as opened:
            raw = opened.read(_MOST_READ)
        text = raw.decode("utf-8", errors="strict" if len(raw) < _MOST_READ else "ignore")
    except OSError as e:
        raise UsageError(101, "--general", f"{file} cannot be read: {e.strerror}.", "Give a text file.") from e
    except UnicodeDecodeError as e:
        raise UsageError(101, "--general", f"{file} is not UTF-8 text (byte {e.start}).", "Give a text file.") from e
    found: list[str] = []
    size = 0
    for passage in _passages(text):
        size += len(passage.encode())
        if size > MOST_BYTES and len(found) > 1:
            break
        found.append(passage)
    if len(found) < 2:
        fix = "Give one with several, divided by empty lines: the interval is over passages."
        raise UsageError(101, "--general", f"{file} holds {len(found)} passages.", fix)
    return found


def passage_examples(passages: list[str], tokenizer: ChatTokenizer, max_tokens: int) -> tuple[list[Example], list[int]]:
    """Passages as examples of at most `max_tokens` tokens, all of them predicted but the first; and the passage of each.

    No token that ends a text is among them: that a tuned model ends elsewhere is not forgetting.
    """
    examples, rows = [], []
    for row, passage in enumerate(passages):
        made = document_made(passage, tokenizer, max_tokens).examples
        if int(made[-1].ids_T[-1]) == tokenizer.eos:
            last = made.pop()
            if last.ids_T.size > 2:
                made.append(Example(ids_T=last.ids_T[:-1], weights_T=last.weights_T[:-1]))
        examples += made
        rows += [row] * len(made)
    return examples, rows


def _passages(text: str) -> list[str]:
    return [p.strip("\n") for p in re.split(r"\n[ \t\r]*\n", text) if len(p.split()) > 1]
