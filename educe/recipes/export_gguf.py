"""The files of a GGUF export, and what is proved of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from educe.chat.prompt import render_prompt
from educe.chat.template import compile_template
from educe.chat.tokens import ChatTokenizer
from educe.errors import ModelError
from educe.model.export import plain_prompt, served_template
from educe.model.export_ollama import modelfile
from educe.model.gguf import check_gguf, context_of, write_gguf
from educe.model.gguf_llama import K_QUANTS, PACKAGE, check_by_llama_cpp, has_llama_cpp, quantize
from educe.model.gguf_vocabulary import Vocabulary, texts_to_compare, vocabulary_of
from educe.model.load import CausalLM
from educe.model.source import Say
from educe.types import Conversation, Message

_OLLAMA_POSITIONS = 8192  # Ollama reserves memory for all of `num_ctx`


@dataclass(frozen=True, slots=True)
class Written:
    """What was proved of the files, and lines for the card."""

    proof: str
    usage: list[str]


def write_gguf_files(
    model: CausalLM,
    tokenizer: ChatTokenizer,
    part: Path,
    kind: str,
    *,
    name: str,
    about: Mapping[str, str],
    rows: Sequence[Conversation],
    system: str | None,
    say: Say,
) -> Written:
    """NAME-KIND.gguf and a Modelfile into the directory `part`. Raises `ModelError` where the file would not be the model."""
    templates = _templates(tokenizer, system)
    prompts = _check_template(templates["default"], tokenizer, rows, system)
    vocabulary = vocabulary_of(tokenizer, int(model.network.get_input_embeddings().weight.shape[0]), templates)
    file = part / f"{name}-{kind}.gguf"
    proof = _write(model, vocabulary, file, kind, name=name, about=dict(about), say=say)
    notes = [*vocabulary.notes]
    positions = int(model.network.config.max_position_embeddings)
    if context_of(model.network) < positions:
        notes.append(
            f"llama.cpp knows no windows here, so the context is {context_of(model.network)} tokens, not {positions}"
        )
    for note in notes:
        say(note)
    if has_llama_cpp():
        texts = texts_to_compare(tokenizer, prompts)
        check_by_llama_cpp(file, texts, [tokenizer.encode(t) for t in texts], sorted(tokenizer.stop))
        proof += f"; llama.cpp makes the training's ids of {len(texts)} texts and ends at every stop token"
    else:
        say(f"llama.cpp was not asked whether it reads the file so: {PACKAGE} is not installed")
    bos = tokenizer.template.special.get("bos_token") if vocabulary.adds_bos else None
    stops = [tokenizer.decode([i]) for i in sorted(tokenizer.stop)]
    most = min(context_of(model.network), _OLLAMA_POSITIONS)
    text = modelfile(file.name, tokenizer.template, stops, most, system=system, bos=bos)
    (part / "Modelfile").write_text(text, encoding="utf-8")
    if "TEMPLATE" not in text.replace("No TEMPLATE", ""):
        say(
            "the Modelfile has no TEMPLATE: none in Go is proved to be the chat template, which llama.cpp's server reads itself"
        )
    usage = [
        f"`llama-server -m {file.name} --jinja`, or `ollama create {name} -f Modelfile` (read the comments in it)."
    ]
    return Written(
        f"{proof}; its template writes {len(prompts)} held-out prompts as in training",
        [*usage, *(["", *notes] if notes else [])],
    )


def _write(
    model: CausalLM, vocabulary: Vocabulary, file: Path, kind: str, *, name: str, about: dict[str, str], say: Say
) -> str:
    if kind not in K_QUANTS:
        write_gguf(model.network, vocabulary, file, kind, name=name, about=about)
        return check_gguf(file, model.network, kind)
    whole, exact = ("bf16" if model.device.dtype == "bfloat16" else "f32"), file.with_suffix(".exact")
    write_gguf(model.network, vocabulary, exact, whole, name=name, about=about)
    proof = check_gguf(exact, model.network, whole)
    say(f"llama.cpp quantises to {kind}: {quantize(exact, file, kind)}")
    exact.unlink()
    return f"{proof}, before llama.cpp made {kind} of them"


def _templates(tokenizer: ChatTokenizer, system: str | None) -> dict[str, str]:
    """By name, each with the recipe's system prompt, and the settings of training as its defaults: not every server of GGUF files
    can be told settings."""
    named = {"default": tokenizer.template.source}
    if tokenizer.tool_use is not None:
        named["tool_use"] = tokenizer.tool_use.template.source
    return {n: _with_settings(served_template(source, system), tokenizer.settings) for n, source in named.items()}


def _with_settings(source: str, settings: Mapping[str, Any]) -> str:
    sets = "".join(
        f"{{%- if {k} is not defined %}}{{%- set {k} = {json.dumps(v, ensure_ascii=False)} %}}{{%- endif %}}"
        for k, v in settings.items()
    )
    return f"{sets}{{{{- '' }}}}{source}" if sets else source


def _check_template(
    source: str, tokenizer: ChatTokenizer, rows: Sequence[Conversation], system: str | None
) -> list[str]:
    """The file's template, given nothing but messages, must write the prompts of training; returns them. Raises `ModelError`."""
    template = compile_template(source, dict(tokenizer.template.special), "chat template").with_(
        forms=tokenizer.template.forms
    )
    prompts = []
    for row in rows:
        asked = plain_prompt(row, tokenizer)
        if asked is None:
            continue
        sent = (
            asked[1:]
            if system is not None and asked[0] == Message(role="system", content=system) and len(asked) > 1
            else asked
        )
        text = template.render(sent, generation=True).text
        if tokenizer.encode(text) != render_prompt(asked, tokenizer):
            found = f"written into the file, it writes another prompt for {row.source.file}:{row.source.line} than in training."
            raise ModelError(206, "chat template", found, "Nothing was exported; report this.")
        prompts.append(text)
    return prompts
