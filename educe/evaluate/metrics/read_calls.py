"""Tool calls in a model's text, as servers read them: a reader for each family, by the mark that its calls have.

Families write calls in tags of their own, or a call is the whole answer. What cannot be read is no call.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from educe.errors import Refusal
from educe.files.jsonl import parse_json


@dataclass(frozen=True, slots=True)
class Written:
    """An argument as bare text, where a family writes no JSON: a string is itself, anything else is its JSON."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Called:
    """A call that was read; `arguments` is a JSON object, or `Written` values by name."""

    name: str
    arguments: Mapping[str, Any]


class Unreadable(Exception):
    """A text begins a call and does not hold one: why."""


def read_calls(text: str) -> list[Called]:
    """The calls of an answer, in order; none where it makes none. Raises `Unreadable`."""
    for mark, read in READERS:
        if mark.search(text):
            return list(read(text))
    return _bare(text.strip())


def _json(text: str) -> Any:
    value = parse_json(text.strip(), "call")
    if isinstance(value, Refusal):
        raise Unreadable(f"a call is not JSON: {value.found.rstrip('.')}")
    return value


def _of_json(value: Any) -> Called:
    """{"name", "arguments"}; Llama says "parameters", Command "tool_name"."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict):
        raise Unreadable("a call is no object")
    name = next((value[k] for k in ("name", "tool_name") if k in value), None)
    arguments = next((value[k] for k in ("arguments", "parameters") if k in value), None)
    arguments = _json(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise Unreadable("a call is not {name, arguments}")
    return Called(name=name, arguments=arguments)


def _list(value: Any) -> list[Called]:
    return [_of_json(v) for v in (value if isinstance(value, list) else [value])]


def _bare(text: str) -> list[Called]:
    """The whole answer is a call, or a list of them: JSON, one value after the other, or Python's `[f(a=1)]`."""
    text = re.sub(r"^(<\|python_(start|end|tag)\|>\s*)+", "", text)
    if re.match(r"\[\s*[\w.]+\(", text) and _is_call_list(text):
        return _pythonic(text)
    try:
        return [call for value in _values(text) for call in _list(value)]
    except Unreadable:
        return []  # no call, and JSON that is none, is an answer


def _values(text: str) -> Iterator[Any]:
    """JSON values one after the other, as Llama writes several calls."""
    decoder, at = json.JSONDecoder(), 0
    while at < len(text):
        try:
            end = decoder.raw_decode(text, at)[1]
        except (ValueError, RecursionError) as e:
            raise Unreadable("a call is not JSON") from e
        yield _json(text[at:end])
        at = end + len(text[end:]) - len(text[end:].lstrip("; \n"))


def _between(text: str, start: str, end: str) -> Iterator[str]:
    """What stands in each pair of tags. Raises `Unreadable` for one that is not closed."""
    for rest in text.split(start)[1:]:
        inside, closed, _ = rest.partition(end)
        if not closed:
            raise Unreadable(f"{start} is not closed")
        yield inside


def _tool_call_tags(text: str) -> Iterator[Called]:
    """<tool_call> with JSON (Hermes, Qwen), with <function=f> (Qwen coder) or with <arg_key> (GLM)."""
    for inside in _between(text, "<tool_call>", "</tool_call>"):
        if "<function=" in inside:
            yield from _function_tags(inside)
        elif inside.lstrip().startswith(("{", "[")):
            yield from _list(_json(inside))
        else:
            keys = [k.strip() for k in _between(inside, "<arg_key>", "</arg_key>")]
            values = [_unwrapped(v) for v in _between(inside, "<arg_value>", "</arg_value>")]
            if len(keys) != len(values):
                raise Unreadable("a call has not as many values as keys")
            yield Called(name=inside.partition("<arg_key>")[0].strip(), arguments=dict(zip(keys, values, strict=True)))


def _function_tags(text: str) -> Iterator[Called]:
    """<function=f> with JSON (Llama) or with <parameter=a> (Qwen coder)."""
    for inside in _between(text, "<function=", "</function>"):
        name, _, body = inside.partition(">")
        if "<parameter=" in body:
            pairs = (p.partition(">") for p in _between(body, "<parameter=", "</parameter>"))
            yield Called(name=name.strip(), arguments={k.strip(): _unwrapped(v) for k, _, v in pairs})
        else:
            yield _of_json({"name": name.strip(), "arguments": _json(body) if body.strip() else {}})


def _unwrapped(text: str) -> Written:
    """One line end at each side belongs to the tags."""
    return Written(text.removeprefix("\n").removesuffix("\n"))


def _mistral(text: str) -> Iterator[Called]:
    """[TOOL_CALLS] with a JSON list, or before each f[ARGS]{…}, with an id between in some versions."""
    for part in text.split("[TOOL_CALLS]")[1:]:
        body = part.strip()
        if body.startswith("["):
            yield from _list(_json(body))
            continue
        name, brace, rest = body.partition("{")
        if not brace:
            raise Unreadable("a call has no arguments")
        yield _of_json({"name": re.split(r"\[(?:CALL_ID|ARGS)\]", name)[0].strip(), "arguments": _json(brace + rest)})


def _deepseek(text: str) -> Iterator[Called]:
    """V3: a kind, a name, and JSON in a fence; V3.1: a name and JSON."""
    for inside in _between(text, "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"):
        first, _, second = inside.partition("<｜tool▁sep｜>")
        name, fence, body = second.partition("```json")
        if fence:
            yield _of_json({"name": name.strip(), "arguments": _json(body.rpartition("```")[0])})
        else:
            yield _of_json({"name": first.strip(), "arguments": _json(second)})


def _kimi(text: str) -> Iterator[Called]:
    """functions.f:0, then JSON."""
    for inside in _between(text, "<|tool_call_begin|>", "<|tool_call_end|>"):
        name, _, body = inside.partition("<|tool_call_argument_begin|>")
        name = name.strip().removeprefix("functions.")
        yield _of_json({"name": re.sub(r":\d+$", "", name), "arguments": _json(body)})


def _harmony(text: str) -> Iterator[Called]:
    """A message to a function: `to=functions.f … <|message|>` JSON."""
    for part in re.split(r"\bto=functions\.", text)[1:]:
        head, _, body = part.partition("<|message|>")
        name = re.split(r"[\s<]", head, maxsplit=1)[0]
        yield _of_json({"name": name, "arguments": _json(body.partition("<|call|>")[0])})


def _command(text: str) -> Iterator[Called]:
    for inside in _between(text, "<|START_ACTION|>", "<|END_ACTION|>"):
        yield from _list(_json(inside))


def _fenced_action(text: str) -> Iterator[Called]:
    """Command R: `Action: ```json` and a list."""
    yield from _list(_json(text.partition("```json")[2].rpartition("```")[0]))


def _liquid(text: str) -> Iterator[Called]:
    for inside in _between(text, "<|tool_call_start|>", "<|tool_call_end|>"):
        yield from _pythonic(inside.strip()) if "(" in inside else _list(_json(inside))


def _jamba(text: str) -> Iterator[Called]:
    for inside in _between(text, "<tool_calls>", "</tool_calls>"):
        yield from _list(_json(inside))


def _gemma(text: str) -> Iterator[Called]:
    """Gemma 4: call:f{…} with bare keys, and strings in marks of their own."""
    for inside in _between(text, "<|tool_call>", "<tool_call|>"):
        name, brace, rest = inside.partition("{")
        parts = (brace + rest).split('<|"|>')
        for k in range(0, len(parts), 2):
            keyed = re.sub(r"([{,]\s*)([^\s{}\[\],:\"]+)\s*:", lambda m: f"{m[1]}{json.dumps(m[2])}:", parts[k])
            parts[k] = re.sub(r"\bNone\b", "null", keyed)
        body = "".join(json.dumps(p) if k % 2 else p for k, p in enumerate(parts))
        yield _of_json({"name": name.strip().removeprefix("call:"), "arguments": _json(body)})


def _behind_mark(text: str) -> Iterator[Called]:
    """Granite: a list behind a mark, to the end."""
    yield from _list(_json(text.partition("<|tool_call|>")[2]))


def _is_call_list(text: str) -> bool:
    """Whether all of it is Python's list of calls: a Markdown link, `[f(x)](https://…)`, only begins like one."""
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return isinstance(tree, ast.List) and all(isinstance(call, ast.Call) for call in tree.elts)


def _pythonic(text: str) -> list[Called]:
    """A list of calls with keyword arguments, each a literal (Llama 4, LFM2)."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        calls = tree.elts if isinstance(tree, ast.List) else [tree]
        made = []
        for call in calls:
            if not isinstance(call, ast.Call) or call.args:
                raise Unreadable("a call is not f(name=value)")
            made.append(
                Called(
                    name=ast.unparse(call.func),
                    arguments={str(k.arg): ast.literal_eval(k.value) for k in call.keywords},
                )
            )
        return made
    except (SyntaxError, ValueError, MemoryError, RecursionError) as e:
        raise Unreadable("calls are not Python's f(name=value)") from e


# The open family: what marks it, and how it is read; the first that is there decides.
READERS: list[tuple[re.Pattern[str], Callable[[str], Iterator[Called]]]] = [
    (re.compile(r"<tool_call>"), _tool_call_tags),
    (re.compile(r"<function="), _function_tags),
    (re.compile(r"\[TOOL_CALLS\]"), _mistral),
    (re.compile(r"<｜tool▁call▁begin｜>"), _deepseek),
    (re.compile(r"<\|tool_call_begin\|>"), _kimi),
    (re.compile(r"<\|START_ACTION\|>"), _command),
    (re.compile(r"<\|tool_call_start\|>"), _liquid),
    (re.compile(r"\bto=functions\.\w"), _harmony),
    (re.compile(r"<\|tool_call>"), _gemma),
    (re.compile(r"<\|tool_call\|>"), _behind_mark),
    (re.compile(r"<tool_calls>"), _jamba),
    (re.compile(r"^\s*Action: ```json", re.M), _fenced_action),
]
