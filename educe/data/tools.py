"""Tool calls, tool results and the tools a row offers, as JSON, → checked values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from educe.errors import Refusal
from educe.files.jsonl import parse_json
from educe.types import Message, ToolCall

Row = dict[str, Any]


def a_kind(value: Any) -> str:
    """What a JSON value is, in words: a string, a list."""
    if value is None:
        return "null"
    kinds = {
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return kinds.get(type(value), f"a {type(value).__name__}")


class Unfit(Exception):
    """Why a row is not used: (code, what was found, what to do)."""


def read_tool_calls(turn: Row, place: str) -> list[ToolCall]:
    """The calls of an assistant's turn: `tool_calls`, or OpenAI's older `function_call`."""
    given, legacy = turn.get("tool_calls"), turn.get("function_call")
    if given is not None and not isinstance(given, list):
        kind = a_kind(given)
        raise Unfit("E-DATA-147", f"{place}.tool_calls is {kind}, not a list.", "Give a list of calls.")
    if given and legacy is not None:
        raise Unfit("E-DATA-147", f"{place} has tool_calls and function_call.", "Keep one of them.")
    calls = [read_call(c, f"{place}.tool_calls[{k}]") for k, c in enumerate(given or ())]
    return calls if legacy is None else [read_call(legacy, f"{place}.function_call")]


def list_calls(value: Any, place: str) -> list[Any]:
    """One call or a list of them, or a string that holds either, as a list of calls still unread."""
    calls = _parsed(value, place) if isinstance(value, str) else value
    calls = calls if isinstance(calls, list) else [calls]
    if not calls:
        raise Unfit("E-DATA-147", f"{place} is a list of no calls.", "Give a call, or remove it.")
    return calls


def read_call(call: Any, place: str) -> ToolCall:
    """A call: {"id", "type": "function", "function": {"name", "arguments"}}, or {"name", "arguments"} at once."""
    if not isinstance(call, dict):
        raise Unfit("E-DATA-147", f"{place} is {a_kind(call)}.", "Give {name, arguments}.")
    if call.get("type") not in (None, "function"):
        raise Unfit("E-DATA-147", f"{place}.type is {call['type']!r:.40}.", "Only calls of functions are read.")
    body = call if call.get("function") is None else call["function"]
    name = body.get("name") if isinstance(body, dict) else None
    if not isinstance(name, str) or not name.strip():
        raise Unfit("E-DATA-147", f"{place} names no function.", "Give {name, arguments}.")
    arguments = body.get("arguments")
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"{place}.arguments")
    if not isinstance(arguments, dict):
        kind = "missing" if arguments is None else f"{a_kind(arguments)}"
        raise Unfit("E-DATA-147", f"{place}.arguments is {kind}, not an object.", "Give {} where there are none.")
    return ToolCall(name=name, arguments=arguments, id=text_or_none(call, "id", place))


def _parsed(text: str, place: str) -> Any:
    value = parse_json(text, place)
    if isinstance(value, Refusal):
        raise Unfit("E-DATA-147", f"{value.where}: {value.found}", "Give JSON, or an object in place of the string.")
    return value


def text_or_none(turn: Row, key: str, place: str) -> str | None:
    """An id or a name; "" is none."""
    value = turn.get(key)
    if value is not None and not isinstance(value, str):
        raise Unfit("E-DATA-147", f"{place}.{key} is {a_kind(value)}, not text.", "Give text, or leave it out.")
    return value or None


def read_tools(row: Row) -> tuple[Row, ...]:
    """The functions a row offers, in OpenAI's form. Raises `Unfit`.

    `tools` (or OpenAI's older `functions`) is a list, or a string that holds one.
    """
    tools, legacy = row.get("tools"), row.get("functions")
    if tools and legacy:
        raise Unfit("E-DATA-147", "the row has tools and functions.", "Keep one of them.")
    tools = tools or legacy
    if isinstance(tools, str):
        tools = _parsed(tools, "tools") if tools.strip() else None
    if tools is None:
        return ()
    if not isinstance(tools, list):
        raise Unfit("E-DATA-147", f"tools is {a_kind(tools)}, not a list.", "Give a list of functions.")
    return tuple(_tool(t, f"tools[{k}]") for k, t in enumerate(tools))


def _tool(tool: Any, place: str) -> Row:
    """{"type": "function", "function": {"name", …}} as it is, or made of {"name", …}."""
    if not isinstance(tool, dict) or tool.get("type") not in (None, "function"):
        raise Unfit("E-DATA-147", f"{place} is no function.", 'Give {"type": "function", "function": {…}}.')
    if tool.get("function") is None:
        tool = {"function": {k: v for k, v in tool.items() if k not in ("type", "function")}}
    body = tool["function"]
    if not isinstance(body, dict) or not isinstance(body.get("name"), str) or not body["name"].strip():
        raise Unfit("E-DATA-147", f"{place} has no name.", "Name the function.")
    if body.get("parameters") is not None and not isinstance(body["parameters"], dict):
        kind = a_kind(body["parameters"])
        raise Unfit("E-DATA-147", f"{place}.parameters is {kind}.", "Give a JSON schema, an object.")
    return {**tool, "type": "function"}


def check_results(messages: Sequence[Message]) -> None:
    """A result with an id answers a call made before it, if all of those have ids. Raises `Unfit`."""
    asked: list[str | None] = []
    for i, message in enumerate(messages):
        if message.call_id and asked and None not in asked and message.call_id not in asked:
            found = f"messages[{i}].tool_call_id {message.call_id!r:.60} is the id of no call before it."
            raise Unfit("E-DATA-147", found, "Give the id of the call it answers, or none.")
        asked += [c.id for c in message.tool_calls]
