"""Anthropic's messages, whose content is blocks: text, thinking, tool_use, tool_result → turns in the form of OpenAI's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from educe.data.tools import Row, Unfit

_OWN = frozenset({"tool_use", "tool_result", "redacted_thinking"})


def _kind(block: Any) -> str | None:
    kind = block.get("type") if isinstance(block, dict) else None
    return kind if isinstance(kind, str) else None


def has_blocks(turns: Sequence[Row]) -> bool:
    """Whether a turn holds a block that only this form has."""
    return any(
        _kind(block) in _OWN for turn in turns if isinstance(content := turn.get("content"), list) for block in content
    )


def from_blocks(turns: Sequence[Row]) -> list[Row]:
    """The same turns: uses of tools as tool_calls, results (which stand in user turns) as tool turns before the rest of the turn."""
    made: list[Row] = []
    for i, turn in enumerate(turns):
        content = turn.get("content")
        if not isinstance(content, list):
            made.append(turn)
            continue
        kinds = [_kind(b) for b in content]
        rest = [b for b, kind in zip(content, kinds, strict=True) if kind not in _OWN]
        calls = [_call(b) for b, kind in zip(content, kinds, strict=True) if kind == "tool_use"]
        results = [_result(b, i) for b, kind in zip(content, kinds, strict=True) if kind == "tool_result"]
        if "tool_use" in kinds and any(kind not in _OWN for kind in kinds[kinds.index("tool_use") :]):
            found = f"messages[{i}] says something after it uses a tool."
            raise Unfit("E-DATA-146", found, "Split the turn in two.")
        if "redacted_thinking" in kinds:
            found = f"messages[{i}] holds redacted thinking, which nothing can learn."
            raise Unfit("E-DATA-146", found, "Remove the block or the row.")
        made += results
        if calls:
            made.append({**turn, "content": rest or None, "tool_calls": calls})
        elif rest or not results:
            made.append({**turn, "content": rest})
    return made


def _call(block: Row) -> Row:
    return {"id": block.get("id"), "function": {"name": block.get("name"), "arguments": block.get("input")}}


def _result(block: Row, i: int) -> Row:
    content: Any = block.get("content")
    if isinstance(content, list) and any(not isinstance(b, dict) or b.get("type") != "text" for b in content):
        found = f"messages[{i}] has a tool result that is not text."
        raise Unfit("E-DATA-146", found, "Only text is read: remove the block or the row.")
    return {"role": "tool", "content": "" if content is None else content, "tool_call_id": block.get("tool_use_id")}
