"""A trained model as a directory that transformers, vLLM and others load: what was trained is what is served."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from educe.chat.prompt import render_prompt
from educe.chat.tokens import MORE_TEMPLATES, ChatTokenizer
from educe.config import Full, Lora
from educe.errors import ModelError
from educe.model.adapters import with_adapters
from educe.model.attention import answers_with
from educe.model.describe import weight_files
from educe.model.device import Device
from educe.model.load import CausalLM, load_model, quiet
from educe.model.saving import save_network
from educe.types import Conversation, Message

# One file of weights has at most so many bytes: hosts and file systems know limits.
MAX_SHARD_BYTES = 5 * 10**9
# With the files of models that also take images or sound: what makes numbers of those.
_COPIED = (
    "special_tokens_map.json",
    "tokenizer.model",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
# Files of these names say under which terms a model, and what was made of it, may be passed on.
_TERMS = ("LICENSE", "LICENCE", "NOTICE")


def merged(
    base: Path, weights: Path, tuning: Full | Lora, device: Device, *, new_ids: Collection[int] = ()
) -> CausalLM:
    """The tuned model, ready to answer, in the device's arithmetic: fp32 masters rounded once; adapters merged in fp32, into the model
    as it was published: not the 4-bit one that they were trained on (docs/decisions/014).

    `new_ids` are the tokens that training added, as `load_model` was given them.
    """
    if isinstance(tuning, Lora):
        model = load_model(base, device, new_ids=new_ids)
        if device.dtype == "float32" or _is_stored_in_16_bits(base):
            merge_into(model, stored(weights, device), tuning, new_ids)
            return model
        # What was published has more digits than the model here: they count until the adapters are in.
        exact = adapted(base, weights, tuning, device, new_ids=new_ids).network.merge_and_unload()
        exactly = dict(exact.named_parameters())
        with torch.no_grad():  # not `network.to(...)`: which tensors stay in fp32 is for the model's class to say
            for name, p in model.network.named_parameters():
                p.copy_(exactly[name])
        return model
    model = load_model(base, device, tuning, new_ids=new_ids)
    put(stored(weights, device), model)
    model.network.set_attn_implementation(answers_with(type(model.network), model.network.config))
    model.network.eval()
    return model


def _is_stored_in_16_bits(base: Path) -> bool:
    """Whether bfloat16 holds every weight as it was published."""
    for file in weight_files(base):
        with safe_open(file, "pt") as tensors:
            if any(tensors.get_slice(name).get_dtype() != "BF16" for name in tensors.keys()):  # noqa: SIM118 - no mapping
                return False
    return True


def merge_into(model: CausalLM, masters: dict[str, Tensor], tuning: Lora, new_ids: Collection[int]) -> None:
    """Merge fp32 masters of adapters into a model that was loaded to answer: in fp32, one matrix at a time, each rounded once."""
    from peft.tuners.lora.layer import LoraLayer  # takes seconds to import

    with quiet(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # peft's word on layers that are merged already
        network = with_adapters(model.network, tuning, sorted(new_ids))
        parameters = {n: p for n, p in network.named_parameters() if p.requires_grad}
        _need_same(masters, parameters)
        for name, p in parameters.items():
            p.data = masters[name]
        for layer in list(network.modules()):
            if isinstance(layer, LoraLayer):
                p = getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"))
                own = p.data
                p.data = own.float()
                layer.merge()
                p.data = own.copy_(p.data)
        network.merge_and_unload()  # rows of new tokens
    model.network.requires_grad_(True).eval()


def adapted(base: Path, weights: Path, tuning: Lora, device: Device, *, new_ids: Collection[int] = ()) -> CausalLM:
    """The published base model, not one in 4 bits, in fp32 with the trained adapters beside it."""
    exact = Device(kind=device.kind, dtype="float32", name=device.name, flops=device.flops, why=device.why)
    model = load_model(base, exact, tuning.model_copy(update={"base_bits": 16}), new_ids=new_ids)
    put(stored(weights, device), model)
    return model


def stored(weights: Path, device: Device) -> dict[str, Tensor]:
    """The fp32 masters in a file. Raises `ModelError`."""
    try:
        return dict(load_file(weights, device=device.kind))
    except SafetensorError as e:
        raise ModelError(2, str(weights), f"is no safetensors file: {e}.", "Train the run again.") from e


def put(masters: dict[str, Tensor], model: CausalLM) -> None:
    """Copy fp32 masters into the model's trainable parameters; the names must be the same, all of them."""
    parameters = model.trainable()
    _need_same(masters, parameters)
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(masters[name])


def _need_same(masters: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    if masters.keys() != parameters.keys():
        raise ValueError(f"weights do not fit: {sorted(masters.keys() ^ parameters.keys())[:3]}")


def served_template(source: str, system: str | None) -> str:
    """The chat template, with the recipe's system prompt put before a conversation that has none, as in training."""
    if system is None:
        return source
    text = json.dumps(system, ensure_ascii=False)  # JSON's escapes are Jinja's
    return (
        "{%- if not messages or messages[0]['role'] not in ['system', 'developer'] %}"
        f"{{%- set messages = [{{'role': 'system', 'content': {text}}}] + messages %}}{{%- endif %}}{{{{- '' }}}}{source}"
    )


def write_model(
    model: CausalLM, base: Path, tokenizer: ChatTokenizer, card: str, directory: Path, *, system: str | None = None
) -> None:
    """Weights, tokenizer, template, config and generation config (with every stop token) into a directory being built.

    `tokenizer` is the one that training used, with the control tokens that its template added and with its template; `system`
    the prompt that training put before rows without one.
    """
    save_network(model.network, directory, max_shard_size=MAX_SHARD_BYTES)
    write_tokenizer(base, tokenizer, directory, system=system)
    write_stops(directory, tokenizer)
    (directory / "README.md").write_text(card, encoding="utf-8")


def write_stops(directory: Path, tokenizer: ChatTokenizer) -> None:
    """Every stop token into the generation config that lies there."""
    generation = _read(directory / "generation_config.json")
    stop = sorted(tokenizer.stop)
    generation["eos_token_id"] = stop[0] if len(stop) == 1 else stop
    generation.setdefault("pad_token_id", tokenizer.eos)
    _write(directory / "generation_config.json", generation)


def write_tokenizer(base: Path, tokenizer: ChatTokenizer, directory: Path, *, system: str | None = None) -> None:
    """Tokenizer, chat template and the base model's terms into a directory being built; see `write_model`."""
    for file in sorted(base.iterdir()):
        if file.is_file() and (file.name in _COPIED or file.name.startswith(_TERMS)):
            shutil.copyfile(file, directory / file.name)
    (directory / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")
    (directory / "chat_template.jinja").write_text(served_template(tokenizer.template.source, system), encoding="utf-8")
    if tokenizer.tool_use is not None:
        (directory / MORE_TEMPLATES).mkdir()
        text = served_template(tokenizer.tool_use.template.source, system)
        (directory / MORE_TEMPLATES / "tool_use.jinja").write_text(text, encoding="utf-8")
    settings = _read(base / "tokenizer_config.json")
    settings.pop("chat_template", None)  # older than the file, or the template that was replaced
    if "added_tokens_decoder" in settings:  # transformers then reads added tokens here alone
        added = {str(t.pop("id")): t for t in json.loads(tokenizer.json)["added_tokens"]}
        settings["added_tokens_decoder"] = {**added, **settings["added_tokens_decoder"]}
    _write(directory / "tokenizer_config.json", settings)


def check_tokenizer(directory: Path, tokenizer: ChatTokenizer, *, system: str | None = None) -> None:
    """transformers must load `tokenizer` from `directory` as it was used: its template, its ids, and `system` before a
    conversation without one. Raises `ModelError`."""
    with quiet():
        loaded = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    text = "".join(f"{token}\nRow 12345,  naïve\n\n{token} x" for token in tokenizer.control)
    ours, theirs = tokenizer.encode(text), loaded.encode(text, add_special_tokens=False)
    if ours != theirs or loaded.get_chat_template() != served_template(tokenizer.template.source, system):
        at = next((k for k, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), 0)
        first = tokenizer.decode(ours[at : at + 1])
        found = f"read back by transformers, its tokenizer gives other ids than in training (first at {first!r})."
        if ours == theirs:
            found = "read back by transformers, its chat template is another than in training."
        raise ModelError(202, str(directory), found, "Nothing was exported; report this.")

    if system is not None:
        asked = Message(role="user", content="Row 12345,  naïve")
        expected = render_prompt((Message(role="system", content=system), asked), tokenizer)
        sent = [{"role": "user", "content": asked.content}]
        prompt = loaded.apply_chat_template(sent, add_generation_prompt=True, tokenize=False, **tokenizer.settings)
        if loaded.encode(prompt, add_special_tokens=False) != expected:
            found = "read back by transformers, its chat template does not put data.system before a conversation."
            raise ModelError(202, str(directory), found, "Nothing was exported; report this.")


def check_prompts(directory: Path, tokenizer: ChatTokenizer, rows: Sequence[Conversation]) -> int:
    """transformers, asked as its server asks, must make of `rows`' prompts the ids that training and evaluation see.

    Returns how many were compared: rows of plain messages, in which nobody typed a control token (which a server would take for one).
    Raises `ModelError`.
    """
    with quiet():
        loaded = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    compared = 0
    for row in rows:
        asked = plain_prompt(row, tokenizer)
        if asked is None:
            continue
        parts = tokenizer.template.forms.content == "parts"
        sent = [
            {"role": m.role, "content": [{"type": "text", "text": m.content}] if parts else m.content} for m in asked
        ]
        given: Any = loaded.apply_chat_template(
            sent, add_generation_prompt=True, tokenize=True, return_dict=True, **tokenizer.settings
        )
        if list(given["input_ids"]) != render_prompt(asked, tokenizer):
            found = (
                f"read back by transformers, it makes other ids of the prompt of {row.source.file}:{row.source.line}."
            )
            raise ModelError(202, str(directory), found, "Nothing was exported; report this.")
        compared += 1
    return compared


def plain_prompt(row: Conversation, tokenizer: ChatTokenizer) -> tuple[Message, ...] | None:
    """The messages before the row's last answer; None where some are more than role and text, or hold the text of a control token."""
    last = max((k for k, m in enumerate(row.messages) if m.role == "assistant"), default=0)
    asked = row.messages[:last]
    plain = all(
        not m.tool_calls and not m.reasoning and m.role != "tool" and not tokenizer.holds_control(m.content)
        for m in asked
    )
    return asked if asked and plain and not row.tools else None


def _read(file: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return settings


def _write(file: Path, settings: dict[str, Any]) -> None:
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
