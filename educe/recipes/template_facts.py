"""Facts about a template, each found by giving it a conversation and reading what it writes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from educe.chat.examples import build_rendered
from educe.chat.openers import OPENERS, close_of
from educe.chat.pieces import control_in
from educe.chat.probe import (
    ANSWER,
    ASK,
    CALL,
    CITY,
    MORE,
    REASON,
    RESULT,
    TOOL,
    assistant,
    common_start,
    settings_to_try,
    user,
)
from educe.chat.render import Renderer
from educe.chat.settle import settle
from educe.chat.template import REASONING_KEYS, TemplateRefusal, Text
from educe.chat.tokens import ChatTokenizer
from educe.chat.turns import Row, Unproved, find_turn
from educe.errors import Refusal
from educe.recipes.inspect import why_apart
from educe.recipes.template_talks import (
    BRIEF,
    CALLS,
    CASES,
    MULTI,
    NARROW,
    SEVERAL,
    SINGLE,
    THOUGHT,
    TOWN,
    WITH_SYSTEM,
    system,
    talk,
)
from educe.recipes.template_text import SPECIAL
from educe.types import Conversation, Rendered

_NOT_SETTINGS = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception", "namespace", "range",
     "dict", "loop", "true", "false", "none", "message", "content", "reasoning_content", "custom_tools")
)  # fmt: skip


class Unusable(Exception):
    """A limit was exceeded: nothing more is asked of the template."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """In words; "" and {} where there is nothing to say. `stop` is the token that ends an answer, `stop_by` who writes it,
    `stop_of_calls` what ends a turn that calls tools, where that is another. `needs`: what a row must have.
    """

    needs: str = ""
    stop: str = ""
    stop_by: str = ""
    stop_of_calls: str = ""
    system: str = ""
    default_system: str = ""
    date: str = ""
    turns: Mapping[str, str] = field(default_factory=dict)
    tools: Mapping[str, str] = field(default_factory=dict)
    reasoning: Mapping[str, str] = field(default_factory=dict)
    generation: Mapping[str, str] = field(default_factory=dict)
    history: Mapping[str, str] = field(default_factory=dict)
    trims: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    forms: Mapping[str, str] = field(default_factory=dict)
    refuses: Mapping[str, str] = field(default_factory=dict)


def _built(tokenizer: ChatTokenizer, c: Conversation) -> list[Rendered] | Refusal:
    built = build_rendered([c], Renderer(tokenizer))[0]
    if isinstance(built, Refusal) and built.code == "E-CHAT-103":
        raise Unusable(built.found)
    return built


def refusal_of(tokenizer: ChatTokenizer, c: Conversation) -> Refusal | None:
    """Why a conversation cannot be trained, under the settings that are chosen for it; None where it is proved."""
    found = _built(settle(tokenizer, [c]).tokenizer, c)
    return found if isinstance(found, Refusal) else None


def why_unproved(tokenizer: ChatTokenizer) -> Refusal | None:
    """Why no single answer can be trained; None where one can."""
    refused = refusal_of(tokenizer, SINGLE)
    return None if refused is None or any(refusal_of(tokenizer, c) is None for c in NARROW.values()) else refused


def facts_of(tokenizer: ChatTokenizer, *, guessed: bool) -> Facts:
    """Everything that is asked. Raises `Unusable` where a limit is exceeded."""
    ask = _Asker(tokenizer)
    plain = next((c for c in (SINGLE, *NARROW.values()) if refusal_of(tokenizer, c) is None), SINGLE)
    stop, by = _stop(tokenizer, plain, guessed)
    of_calls, _ = _stop(tokenizer, talk(*CALLS.messages[:2], tools=(TOOL,)), guessed)
    turns, refuses = _turns(ask)
    tools = _tools(ask, refuses)
    return Facts(
        needs=next((what for what, c in NARROW.items() if c is plain), ""),
        stop=stop,
        stop_by=by,
        stop_of_calls=of_calls if of_calls != stop else "",
        system=_system_role(ask, refuses),
        default_system=_injected(ask),
        date=_date(ask),
        turns=turns,
        tools=tools,
        reasoning=_reasoning(ask),
        generation=_generation(ask),
        history=_history(ask),
        trims=_trims(ask),
        settings=_settings(tokenizer),
        forms=_forms(tokenizer, shows_calls=tools["calls"] not in ("refused", "left out")),
        refuses=refuses,
    )


class _Asker:
    """Asks a template, as text."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self.tokenizer = tokenizer
        self.template = tokenizer.template

    def text(self, c: Conversation, *, generation: bool = False) -> Text | str:
        """What it writes, or (as str) what it says where it refuses."""
        try:
            return self.template.render(c.messages, tools=c.tools, generation=generation)
        except TemplateRefusal as e:
            if e.args[0] == "E-CHAT-103":
                raise Unusable(f"{e.args[1]}") from e
            return str(e.args[1])

    def shows(self, c: Conversation, *texts: str, generation: bool = False) -> str:
        """yes, or why not: which text it leaves out, what it says, or why it cannot be proved."""
        text = self.text(c, generation=generation)
        if isinstance(text, str):
            return f"refused: {text}"
        missing = [t for t in texts if t not in text.text]
        if missing:
            return "left out"
        refused = refusal_of(self.tokenizer, c) if not generation else None
        return "yes" if refused is None else f"shown, not trainable: {refused.code} {refused.found}"


def _stop(tokenizer: ChatTokenizer, c: Conversation, guessed: bool) -> tuple[str, str]:
    """The token that ends the last turn, and who writes it."""
    settled = settle(tokenizer, [c]).tokenizer
    try:
        turn = find_turn(Row(c, settled), len(c.messages) - 1)
    except (TemplateRefusal, Unproved):
        return "", ""
    if turn.adds_stop:
        return _word(tokenizer, tokenizer.eos, guessed), "nobody: educe appends it"
    written = control_in(turn.completion[-1].text, settled.control)
    word = written[-1][2] if written else ""
    named = _word(tokenizer, settled.control.get(word, -1), guessed)
    if word in settled.habits.written_by_next.values():
        return named, "the next message (the model must emit it all the same)"
    return named, "the template"


def _word(tokenizer: ChatTokenizer, number: int, guessed: bool) -> str:
    word = next((w for w, i in tokenizer.control.items() if i == number), tokenizer.decode([number]))
    is_eos = guessed and word == SPECIAL["eos_token"] and word not in tokenizer.template.source
    return "eos_token (the tokenizer says which)" if is_eos else word


def _turns(ask: _Asker) -> tuple[dict[str, str], dict[str, str]]:
    """What becomes of orders of roles, and what the template says of those that it refuses."""
    turns, refuses = {}, {}
    for name, c in CASES.items():
        said = ask.shows(c, *(m.content for m in c.messages))
        if said.startswith("refused: "):
            refuses[name] = said.removeprefix("refused: ")
            said = "refused"
        turns[name] = said
    return turns, refuses


def _system_role(ask: _Asker, refuses: dict[str, str]) -> str:
    text, plain = (ask.text(talk(*c.messages[:-1]), generation=True) for c in (WITH_SYSTEM, MULTI))
    if isinstance(text, str):
        refuses["system"] = text
        return "refused"
    if BRIEF not in text.text:
        return "left out"
    at, first, second = (text.text.find(t) for t in (BRIEF, ASK, MORE))
    if at > first >= 0:
        return "merged into the last user's turn" if at < second else "written after the user's text"
    if isinstance(plain, str) or first < 0:
        return "a turn of its own"
    header = plain.text[: plain.text.find(ASK)].rstrip()[-6:]
    between = text.text[at + len(BRIEF) : first]
    return "a turn of its own" if header.strip() in between and header.strip() else "merged into the first user's turn"


def _injected(ask: _Asker) -> str:
    """Words that stand before the first user's text though the row has no system prompt."""
    text = ask.text(MULTI)
    if isinstance(text, str) or min(text.text.find(t) for t in (ASK, ANSWER, MORE)) < 0:
        return ""
    before = text.text[: text.text.find(ASK)]
    header = text.text[text.text.find(ANSWER) + len(ANSWER) : text.text.find(MORE)]
    same = 0
    while same < min(len(before), len(header)) and before[-1 - same] == header[-1 - same]:
        same += 1
    rest = before[: len(before) - same]
    for _, _, word in control_in(rest, ask.tokenizer.control):
        rest = rest.replace(word, " ")
    rest = re.sub(r"^(system|SYSTEM|System)\b:?", "", rest.strip()).strip()
    return rest if len(re.findall(r"[A-Za-z]{2,}", rest)) >= 3 else ""


def _date(ask: _Asker) -> str:
    if "strftime_now" in ask.template.source:
        return "today's (strftime_now): educe gives it a fixed one, so that rendering stays the same"
    text = ask.text(SINGLE)
    written = "" if isinstance(text, str) else text.text
    found = re.search(r"\b\d{1,2} [A-Z][a-z]{2} 20\d\d\b|\b20\d\d-\d\d-\d\d\b", written)
    return f"{found[0]}, fixed in the template" if found else ""


def _tools(ask: _Asker, refuses: dict[str, str]) -> dict[str, str]:
    said = {
        "offered": ask.shows(talk(user(), tools=(TOOL,)), "get_weather", generation=True),
        "calls": ask.shows(talk(user(), CALL, tools=(TOOL,)), "get_weather", CITY),
        "results": ask.shows(CALLS, "get_weather", CITY, RESULT),
        "several calls": ask.shows(SEVERAL, CITY, TOWN, "mild"),
    }
    for name, found in said.items():
        if found.startswith("refused: "):
            refuses[f"tools: {name}"] = found.removeprefix("refused: ")
            said[name] = "refused"
    return said


def _reasoning(ask: _Asker) -> dict[str, str]:
    said: dict[str, str] = {}
    answered = talk(user(), assistant(reasoning=REASON))
    keys = _keys_read(ask, answered)
    said["field"] = ", ".join(keys) or "none"
    if keys:
        earlier = _under(ask, keys[0]).text(talk(*answered.messages, user(MORE)), generation=True)
        said["in earlier turns"] = _kept(earlier)
    else:
        called = talk(user(), replace(CALL, reasoning=REASON), tools=(TOOL,))
        if of_calls := _keys_read(ask, called):
            said["field"] = f"{', '.join(of_calls)}, in turns that call tools only"
    inline = talk(user(), assistant(f"<think>\n{REASON}\n</think>\n\n{ANSWER}"))
    last, before = _kept(ask.text(inline)), _kept(ask.text(talk(*inline.messages, user(MORE)), generation=True))
    said["<think> in the text"] = last if last == before else f"{last} in the last turn, {before} in earlier ones"
    return said


def _keys_read(ask: _Asker, c: Conversation) -> list[str]:
    """Names under which a message may give its reasoning so that it is shown."""
    found = {key: _under(ask, key).text(c) for key in REASONING_KEYS}
    return [key for key, text in found.items() if not isinstance(text, str) and REASON in text.text]


def _under(ask: _Asker, key: str) -> _Asker:
    """The same template given reasoning under another name."""
    template = ask.template.with_(forms=replace(ask.template.forms, reasoning_key=key))
    return _Asker(replace(ask.tokenizer, template=template))


def _kept(text: Text | str) -> str:
    if isinstance(text, str):
        return f"refused: {text}"
    return "kept" if REASON in text.text else "stripped"


def _generation(ask: _Asker) -> dict[str, str]:
    """What inference adds after the user's message, and whether that opens or closes a reasoning block."""
    text = ask.text(talk(user()), generation=True)
    if isinstance(text, str):
        return {"text": f"refused: {text}"}
    asked = ask.text(talk(user()))
    at = text.text.rfind(ASK) + len(ASK) if ASK in text.text else 0
    if not isinstance(asked, str):  # what stands there without a generation prompt too is the end of the user's turn
        same = len(common_start(asked.text, text.text))
        words = control_in(text.text, ask.tokenizer.control)
        at = max(at, next((start for start, end, _ in words if start < same < end), same))
    sent = text.text[at:]
    said = {"text": sent}
    tags = list(OPENERS.finditer(sent))
    if tags:
        closed = close_of(tags[-1]).strip() in sent[tags[-1].end() :]
        said["block"] = f"opens {tags[-1][0].strip()}{' and closes it' if closed else ''}"
    return said


def _history(ask: _Asker) -> dict[str, str]:
    """Kinds of rows whose turns do not share a sequence, and where they part."""
    kinds = {
        "plain chats": MULTI,
        "with a system prompt": WITH_SYSTEM,
        "with reasoning": THOUGHT,
        "with tool calls": CALLS,
    }
    said: dict[str, str] = {}
    for name, c in kinds.items():
        built = _built(settle(ask.tokenizer, [c]).tokenizer, c)
        if not isinstance(built, Refusal) and len(built) > 1:
            said[name] = why_apart(built, 1)
            if name == "plain chats":
                return {"every chat": said[name]}
    return said


def _trims(ask: _Asker) -> dict[str, str]:
    """Roles whose text loses white space at its ends."""
    said = {}
    for role in ("system", "user", "assistant"):
        wide = f"  {ANSWER} \n"
        messages = {
            "system": (system(wide), user()),
            "user": (user(wide),),
            "assistant": (user(), assistant(wide), user(MORE)),
        }
        text = ask.text(talk(*messages[role]), generation=True)
        if isinstance(text, str) or ANSWER not in text.text or wide in text.text:
            continue
        left, right = f"  {ANSWER}" in text.text, f"{ANSWER} \n" in text.text
        said[role] = "at the end" if left else "at the start" if right else "at both ends"
    return said


def _settings(tokenizer: ChatTokenizer) -> dict[str, str]:
    """Variables about reasoning, each with what its values do to a turn without and with reasoning; other variables by name."""
    said: dict[str, str] = {}
    tried = settings_to_try(tokenizer.template)
    field_read = any(key in tokenizer.template.words for key in REASONING_KEYS)
    thought = assistant(reasoning=REASON) if field_read else assistant(f"<think>\n{REASON}\n</think>\n\n{ANSWER}")
    rows = {"answers": SINGLE, "reasoning": talk(user(), thought)}
    for settings in tried if len(tried) > 1 else ():
        name = ", ".join(f"{k}={str(v).lower()}" for k, v in settings.items()) or "defaults"
        other = tokenizer.with_settings(settings)
        said[name] = "; ".join(f"{what}: {_follows(other, c)}" for what, c in rows.items())
    assigned = set(re.findall(r"\bset\s+(\w+)", tokenizer.template.source)) | set(
        re.findall(r"\bfor\s+(\w+)(?:\s*,\s*\w+)?\s+in\b", tokenizer.template.source)
    )
    shown = {k for s in tried for k in s}
    more = sorted(
        v for v in tokenizer.template.variables - _NOT_SETTINGS - assigned - shown if not v.endswith("_token")
    )
    if more:
        said["other variables it reads"] = ", ".join(more)
    return said


def _follows(tokenizer: ChatTokenizer, c: Conversation) -> str:
    try:
        turn = find_turn(Row(c, tokenizer), 1)
    except TemplateRefusal as e:
        if e.args[0] == "E-CHAT-103":
            raise Unusable(f"{e.args[1]}") from e
        return "refused"
    except Unproved as e:
        return f"cannot be trained ({e.args[0]})"
    return "follows the block its prompt opens" if turn.bridged else "follows its prompt"


def _forms(tokenizer: ChatTokenizer, *, shows_calls: bool) -> dict[str, str]:
    """How a row is put before this template, where that is not as usual."""
    forms, said = tokenizer.template.forms, {}
    if forms.content == "parts":
        said["content"] = "a list of parts"
    if shows_calls and forms.arguments == "string":
        said["arguments of calls"] = "a JSON string"
    if shows_calls and forms.no_content == "empty":
        said["content of a turn that only calls"] = '"", not null'
    return said
