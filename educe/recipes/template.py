"""`educe template`: what a chat template does, found by giving it conversations, and whether it can be trained with."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from educe.chat.named import NAMED
from educe.chat.tokens import ChatTokenizer, load_tokenizer, read_template
from educe.config.recipe import FileTemplate
from educe.errors import ChatError, ModelError
from educe.model.packaged import PREFIX
from educe.model.source import DEFAULT_MODEL, HUB_DEADLINE_S, Say, find_model
from educe.recipes.template_facts import Facts, Unusable, facts_of, why_unproved
from educe.recipes.template_fix import Fix, propose
from educe.recipes.template_text import text_tokenizer

_FILES = ["tokenizer*.json", "*.jinja", "config.json", "generation_config.json"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateReport:
    """What a template does. `usable`: an answer can be trained with it; where not, `code` and `problem` say why.

    `tokenizer` says whose control tokens were used. `facts` has one entry for each thing asked, in words; those of a template
    that cannot be used may be missing. `fix` is a corrected template that was proved.
    """

    source: str
    kind: str
    tokenizer: str
    usable: bool
    code: str = ""
    problem: str = ""
    facts: Facts = field(default_factory=Facts)
    fix: Fix | None = None

    def as_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class _Found:
    """A template before anything is known of it, and how a tokenizer is made for it (None) or for a changed text of it."""

    source: str
    kind: str
    tokenizer: str
    load: Callable[[str | None], ChatTokenizer]


def report_template(what: str | Path, say: Say) -> TemplateReport:
    """A report on a template file, a named template, or the template of a model (a directory or a Hub id).

    Raises `ModelError` and `ChatError` for what cannot be read; a template that cannot be used is reported as such.
    """
    with tempfile.TemporaryDirectory() as made:
        return _report(_find(str(what), say, Path(made)))


def _report(found: _Found) -> TemplateReport:
    made = TemplateReport(source=found.source, kind=found.kind, tokenizer=found.tokenizer, usable=False)
    try:
        tokenizer = found.load(None)
    except ChatError as e:
        return replace(made, code=e.code, problem=f"{e.where} {e.found}")
    if found.kind == "model":
        own = tokenizer.template_name not in NAMED
        whose = tokenizer.template_name if own else f"has no chat template; educe uses {tokenizer.template_name}"
        made = replace(made, source=f"{found.source}: {whose}")
    try:
        refused = why_unproved(tokenizer)
        facts = facts_of(tokenizer, guessed=found.kind != "model")
    except Unusable as e:
        return replace(made, code="E-CHAT-103", problem=str(e))
    if refused is None:
        return replace(made, usable=True, facts=facts)
    fix = propose(tokenizer, found.load) if refused.code in ("E-CHAT-301", "E-CHAT-302") else None
    return replace(made, code=refused.code, problem=refused.found, facts=facts, fix=fix)


def _find(what: str, say: Say, place: Path) -> _Found:
    path = Path(what).expanduser()
    if what in NAMED:
        named = NAMED[what]
        by_text = _by_text(named.source, what, named.control, place)
        return _Found(what, "named", "none: educe's own control tokens", by_text)
    if path.is_file():
        source = read_template(path)
        guessed = "none: control tokens are guessed from the template's text"
        return _Found(what, "file", guessed, _by_text(source, path.name, (), place))
    model_dir = path if path.is_dir() else _files_of(what, say)
    numbers = iter(range(1000))

    def load(other: str | None) -> ChatTokenizer:
        if other is None:
            return load_tokenizer(model_dir)
        file = place / f"{next(numbers)}.jinja"
        file.write_text(other, encoding="utf-8")
        return load_tokenizer(model_dir, FileTemplate(kind="file", file=str(file)))

    return _Found(what, "model", "the model's own", load)


def _by_text(source: str, where: str, words: tuple[str, ...], place: Path) -> Callable[[str | None], ChatTokenizer]:
    return lambda other: text_tokenizer(source if other is None else other, where, words, place)


def _files_of(model: str, say: Say) -> Path:
    """The directory of a model's tokenizer and template: of one on the Hub no weights are fetched."""
    if model.startswith(PREFIX):
        return find_model(model, say)
    if model.startswith(("/", ".", "~")) or model.count("/") != 1 or model.endswith((".jinja", ".j2")):
        fix = "Give a .jinja file, a model's directory, ORG/NAME, plain, chatml or alpaca."
        raise ModelError(1, model, "is no file, no directory and no Hub id.", fix)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    gone = (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError)
    for here in (True, False):
        try:
            found = Path(
                snapshot_download(
                    model, allow_patterns=_FILES, local_files_only=here, etag_timeout=HUB_DEADLINE_S, max_workers=2
                )
            )
        except gone as e:
            if not here and model != DEFAULT_MODEL:
                fix = "Connect to the Hub, check the name, or give a directory."
                raise ModelError(1, model, f"cannot be fetched from the Hub ({type(e).__name__}).", fix) from e
            continue
        if (found / "tokenizer.json").is_file():
            return found
    return find_model(model, say)  # the default model lies in a package too
