"""Forty ways in which text tries to become markup, and runs that are full of one."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from educe.files.run_dir import RunDir

from run_directory import make_run, write_file

PAYLOADS = [
    "<script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "</title><img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "'><iframe srcdoc=x>",
    '" onmouseover="alert(1)" x="',
    "' onfocus='alert(1)' autofocus='",
    "<!--",
    "-->",
    "]]><x>",
    "<base href=//evil.test>",
    "<meta http-equiv=refresh content=0>",
    "{{ 7*7 }}{% include 'x' %}",
    "javascript:alert(1)",
    "&lt;b&gt;&#60;b&#62;&amp;",
    "</bdi></td></table></main><h1>Hi",
    "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)>",
    "\\u003cscript\\u003e<plaintext>",
    "</svg></desc></textarea><xmp>",
    "`${alert(1)}`<%= 1 %>",
    "<details open ontoggle=alert(1)>",
    "<input autofocus onfocus=alert(1)>",
    "<video><source onerror=alert(1)>",
    "<form action=//evil.test><button>go",
    "<a href=javascript:alert(1)>click</a>",
    "<style>*{display:none}</style>",
    "<link rel=stylesheet href=//evil.test>",
    "<object data=data:text/html,<script>alert(1)</script>>",
    "<embed src=//evil.test>",
    "<noscript><p title='</noscript><img src=x onerror=alert(1)>'>",
    "<template><img src=x onerror=alert(1)></template>",
    "<svg><animate onbegin=alert(1) attributeName=x>",
    "<svg><use href='data:image/svg+xml,<svg id=x/>#x'/>",
    "<select><option></select><img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>",
    "<marquee onstart=alert(1)>",
    '\\"><img src=x onerror=alert(1)>',
    "<img src=x onerror=alert(1)//",
    "<![CDATA[><img src=x onerror=alert(1)>]]>",
    "<td><tr></table><caption><b>",
]

FILES = ("recipe.resolved.json", "provenance.json", "preflight.json", "ledger.jsonl", "metrics.jsonl", "samples.jsonl",
         "preview.json", "scores.json", "shift.json", "judged/mt_bench.json", "suites/ifeval.json", "suites/choices-arc.json",
         "suites/lm-eval-tiny.json",
         "answers/untouched.jsonl", "answers/few_shot.jsonl", "answers/tuned.jsonl")  # fmt: skip
_CHOICES = frozenset({"train", "dev", "test", "dropped", "refused", "full", "user", "system", "role", "template", "content",
                      "trained", "step", "score", "file", "untouched", "few_shot", "tuned", "pass", "warn", "skip"})  # fmt: skip
_CHOOSING = frozenset({"kind", "role", "status", "before", "after", "verdict"})
_NAMES = frozenset({"name", "model", "tuning", "evaluation", "train", "data", "file"})
_RENAMED = frozenset({"packages", "recipe", "data", "tasks"})


def poison(value: Any, word: str, everything: bool) -> Any:
    """Every text replaced by `word` and a number, apart from the words that the page reads as choices; with `everything` those,
    numbers and truths as well."""
    counter = itertools.count()

    def swap(v: Any, key: str = "") -> Any:
        if isinstance(v, dict):
            return {(f"{k}{word}" if key in _RENAMED and k not in _NAMES else k): swap(x, k) for k, x in v.items()}
        if isinstance(v, list):
            return [swap(x, key) for x in v]
        if everything and (
            (isinstance(v, int | float) and key != "step") or (isinstance(v, str) and v not in ("step", "dev", "score"))
        ):
            return f"{word}{next(counter)}"
        if isinstance(v, str) and not (key in _CHOOSING and v in _CHOICES):
            return f"{word}{next(counter)}" if key not in ("row", "code") else f"{v}{word}"
        return v

    return swap(value)


def poisoned(path: Path, word: str, how: str) -> RunDir:
    """A run in which all text (`how`: texts), or everything, of all files is `word`."""
    run = make_run(path, rows=30, steps=12)
    for name in FILES:
        file = run.path / name
        write_file(file, poison(run.load(file), word, how == "everything"))
    return run
