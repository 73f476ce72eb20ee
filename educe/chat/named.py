"""Templates for base models that have none, by name. They write each turn alike in history and in the prompt of inference."""

from __future__ import annotations

from dataclasses import dataclass

_ONLY = (
    "{{%- if m.role not in ['system', 'user', 'assistant'] %}}"
    "{{{{- raise_exception('the template {name} knows the roles system, user and assistant, not ' + m.role) }}}}{{%- endif %}}"
)

_PLAIN = (
    "{%- for m in messages %}" + _ONLY.format(name="plain") + "{{- '<|' + m.role + '|>' + m.content + '<|end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)
_CHATML = (
    "{%- for m in messages %}"
    + _ONLY.format(name="chatml")
    + "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
_ALPACA = (
    "{%- set intro = 'Below is an instruction that describes a task. Write a response that appropriately completes the request.' %}"
    "{%- if messages and messages[0].role == 'system' %}{%- set intro = messages[0].content %}{%- endif %}{{- intro }}"
    "{%- for m in messages %}"
    "{%- if m.role == 'user' %}{{- '\\n\\n### Instruction:\\n' + m.content }}"
    "{%- elif m.role == 'assistant' %}{{- '\\n\\n### Response:\\n' + m.content + eos_token }}"
    "{%- elif not (m.role == 'system' and loop.first) %}"
    "{{- raise_exception('the template alpaca knows user, assistant and one system message at the start, not ' + m.role) }}"
    "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '\\n\\n### Response:\\n' }}{%- endif %}"
)


@dataclass(frozen=True, slots=True)
class NamedSource:
    """A template's source and the control tokens that a tokenizer must have for it."""

    source: str
    control: tuple[str, ...]


NAMED: dict[str, NamedSource] = {
    "plain": NamedSource(_PLAIN, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    "chatml": NamedSource(_CHATML, ("<|im_start|>", "<|im_end|>")),
    "alpaca": NamedSource(_ALPACA, ()),
}
