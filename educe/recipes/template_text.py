"""A tokenizer for a template that comes without one: bytes, and as control tokens what looks like one in what it writes."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from educe.chat.probe import CALL, CALLED, LOOKS_LIKE_CONTROL, TOOL, assistant, try_render, user
from educe.chat.template import ChatTemplate, TemplateRefusal, compile_template
from educe.chat.tokens import ChatTokenizer, load_tokenizer
from educe.config.recipe import FileTemplate
from educe.errors import ChatError
from educe.types import Message

# Stand for what the tokenizer would say.
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
# EXAONE's and GLM's, beside what `LOOKS_LIKE_CONTROL` finds.
_MORE_CONTROL = re.compile(r"\[\|[a-z]+\|\]|\[gMASK\]|<sop>")
_TALKS = (
    (user(), assistant(reasoning="some reasoning"), user(), assistant()),
    (Message(role="system", content="be brief"), user(), assistant()),
    (user(), CALL, CALLED, assistant()),
)


def text_tokenizer(source: str, where: str, words: tuple[str, ...], place: Path) -> ChatTokenizer:
    """A byte-level tokenizer with `words` and the template's own control tokens. Raises `ChatError`."""
    bare = compile_template(source, SPECIAL, where)
    control = sorted({*words, *SPECIAL.values(), *_control(bare, where)})
    tokenizer = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(control)
    (place / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    (place / "tokenizer_config.json").write_text(json.dumps(SPECIAL), encoding="utf-8")
    file = place / re.sub(r"[^\w.-]", "_", f"given-{Path(where).name}")
    file.write_text(source, encoding="utf-8")
    return load_tokenizer(place, FileTemplate(kind="file", file=str(file)))


def _control(template: ChatTemplate, where: str) -> set[str]:
    """What looks like a control token in the source and in what the template writes ('<|' + role + '|>')."""
    texts = [template.source]
    try:
        for talk in _TALKS:
            for generation in (False, True):
                text = try_render(template, talk, tools=(TOOL,) if CALL in talk else (), generation=generation)
                texts += [text.text] if text is not None else []
    except TemplateRefusal as e:
        raise ChatError(103, where, f"cannot be rendered: {e.args[1]}.", "Give another template.") from e
    return {m[0] for t in texts for kind in (LOOKS_LIKE_CONTROL, _MORE_CONTROL) for m in kind.finditer(t)}
