"""An Ollama Modelfile beside a GGUF file. Ollama's templates are Go's: the chat template becomes one only where that is proved."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from educe.chat.template import ChatTemplate, TemplateRefusal
from educe.types import Message

ROLES = ("system", "user", "assistant")
# Two texts that occur nowhere in templates: where one stands, content goes.
_A, _B = "Qzj7first", "Wvk3second"
# In a Modelfile's text or a Go template these mean something else.
_SPECIAL = ("{{", "}}", '"""', "\\")


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """A chat template that is a text around each message: `begins` the conversation, `around` each role's content, `asks` for the
    answer. `system` is what it puts first where no system message is given."""

    begins: str
    around: Mapping[str, tuple[str, str]]
    asks: str
    system: str | None

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        given = messages if self.system is None or messages[0][0] == "system" else [("system", self.system), *messages]
        return self.begins + "".join(self.around[r][0] + c + self.around[r][1] for r, c in given) + self.asks

    def as_go(self) -> str:
        """Ollama's form of it; what the conversation begins with is left out: it is the BOS, which Ollama puts there."""
        cases = []
        for k, role in enumerate(self.around):
            before, after = self.around[role]
            test = f'{{{{ {"if" if k == 0 else "else if"} eq .Role "{role}" }}}}'
            cases.append(f"{test}{before}{{{{ .Content }}}}{after}")
        return "{{ range .Messages }}" + "".join(cases) + "{{ end }}{{ end }}" + self.asks


def find_turns(template: ChatTemplate, bos: str | None) -> Turns | str:
    """The template as text around messages, proved on conversations; or why it is none."""
    try:
        found = _learned(template, bos)
        if isinstance(found, str):
            return found
        for talk in _talks(has_system="system" in found.around):
            if _text(template, talk) != found.render(talk):
                return "what it writes for a message depends on more than its role and text"
    except (TemplateRefusal, ValueError) as e:
        return f"it refuses some conversations ({str(e.args[-1])[:80]})"
    odd = next(
        (t for t in [*sum(found.around.values(), ()), found.asks, found.system or ""] if any(s in t for s in _SPECIAL)),
        None,
    )
    return found if odd is None else f"Go would read {odd[:30]!r} otherwise"


def _text(template: ChatTemplate, talk: Sequence[tuple[str, str]], *, generation: bool = True) -> str:
    return template.render([Message(role=r, content=c) for r, c in talk], generation=generation).text  # type: ignore[arg-type]


def _learned(template: ChatTemplate, bos: str | None) -> Turns | str:
    """Each role's text from the differences between conversations that are one message longer than another."""
    short, long = (_text(template, [("user", _A)], generation=g) for g in (False, True))
    if not long.startswith(short):
        return "its prompt does not begin as the conversation does"
    asks = long[len(short) :]
    begins = bos if bos is not None and short.startswith(bos) else ""
    answered = _text(template, [("user", _A), ("assistant", _B)], generation=False)
    again = _text(template, [("user", _A), ("assistant", _B), ("user", _A)], generation=False)
    if not (answered.startswith(short) and again.startswith(answered)):
        return "it writes earlier messages otherwise once others follow"
    around = {"user": _cut(again[len(answered) :], _A), "assistant": _cut(answered[len(short) :], _B)}
    first = "".join((begins, around["user"][0], _A, around["user"][1]))
    opening = short.removesuffix(first.removeprefix(begins))
    system = None
    try:
        with_system = _text(template, [("system", _B), ("user", _A)], generation=False)
        around["system"] = _cut(with_system.removeprefix(begins).removesuffix(first.removeprefix(begins)), _B)
    except TemplateRefusal:
        pass  # such a template knows no system messages: those are refused by it, and left out here
    if opening != begins:
        before, after = around.get("system", ("", ""))
        own = opening.removeprefix(begins)
        if "system" not in around or not (own.startswith(before) and own.endswith(after)):
            return f"it puts {opening[:30]!r} before a conversation"
        system = own.removeprefix(before).removesuffix(after)
    return Turns(begins=begins, around={r: around[r] for r in ROLES if r in around}, asks=asks, system=system)


def _cut(text: str, content: str) -> tuple[str, str]:
    before, found, after = text.partition(content)
    if not found or content in after:
        raise ValueError("a message's text is not shown once")
    return before, after


def _talks(*, has_system: bool) -> list[list[tuple[str, str]]]:
    texts = ["Hello", " a  b \n", "x\n\ny", "3 < 5 & {z} 'q' \"r\"", "é你🙂"]
    talks = []
    for k in range(len(texts)):
        u, a, s = (texts[(k + i) % len(texts)] for i in range(3))
        talks += [
            [("user", u)],
            [("user", u), ("assistant", a), ("user", s)],
            [("user", u), ("assistant", a)] * 3 + [("user", s)],
        ]
    return [*talks, *([("system", t), *talk] for talk, t in zip(talks, texts * 3, strict=True) if has_system)]


def modelfile(
    file: str, template: ChatTemplate, stops: Sequence[str], num_positions: int, *, system: str | None, bos: str | None
) -> str:
    """The Modelfile's text. `system`: the recipe's prompt before rows without one; `stops`: texts of the stop tokens."""
    found = find_turns(template, bos)
    lines = [f"FROM ./{file}", f"PARAMETER num_ctx {num_positions}"]
    lines += [f"PARAMETER stop {json.dumps(s, ensure_ascii=False)}" for s in stops]
    own = system if system is not None else (found.system if isinstance(found, Turns) else None)
    if own is not None and not any(s in own for s in _SPECIAL):
        lines.append(f'SYSTEM """{own}"""')
    elif own is not None:
        lines.append("# The system prompt of training cannot be written here; send it as the first message.")
    if isinstance(found, Turns):
        lines += [
            "# The chat template in Go's language: it writes what the Jinja template in the GGUF file writes for system, user and",
            "# assistant messages. Calls of tools are not in it.",
            f'TEMPLATE """{found.as_go()}"""',
        ]
    else:
        lines += [
            f"# No TEMPLATE: the chat template is no text around messages ({found}),",
            "# so none in Go's language is proved to be the same. The GGUF file holds it in Jinja, which llama.cpp's server reads.",
            "# Ollama guesses one of its own: compare the prompts before you trust the answers.",
        ]
    return "\n".join(lines) + "\n"
