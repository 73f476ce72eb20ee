"""The OpenAI chat format: a prompt → a request's body, a body → what was said. And which addresses may be asked."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from educe.errors import SampleError
from educe.secrets import redacted
from educe.seeds import derive
from educe.types import Message, Prompt, Sampling, ToolCall

PATH = "/chat/completions"
_HOST = re.compile(r"[\w.:%-]+")
_ENDED = ("stop", "tool_calls", "function_call")


class Garbled(Exception):
    """Why a server's answer is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a server said. `finish` is its own word for why the text ends there, "" where it has none: then it is taken as cut.
    Tokens are as it counts (and bills) them; where it does not (`counted` is False), the most that they may be."""

    text: str
    finish: str
    tokens_in: int
    tokens_out: int
    counted: bool = True

    @property
    def stopped(self) -> bool:
        return self.finish in _ENDED


def endpoint_of(url: str, plain_http: bool) -> str:
    """Where requests go: `url` is a server's base (http://127.0.0.1:8000/v1), or the whole address. Raises `SampleError`."""
    fix = "Give the base address of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1."
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError as e:
        raise SampleError(101, redacted(url), f"is no address: {e}.", fix) from e
    if parts.username is not None or parts.password is not None:
        shown = f"{parts.scheme}://{host}"
        raise SampleError(101, shown, "an address with a password in it.", "Keys come from the environment alone.")
    if parts.scheme not in ("http", "https") or not _HOST.fullmatch(host) or parts.query or parts.fragment:
        raise SampleError(101, redacted(url), "is no base address of a server.", fix)
    if parts.scheme == "http" and not (plain_http or is_loopback(host)):
        found = "questions, answers and the key would go over the network unencrypted."
        raise SampleError(301, url, found, "Use https, or --plain-http where the network is your own.")
    path = parts.path.rstrip("/").removesuffix(PATH) or "/v1"
    return f"{parts.scheme}://{parts.netloc}{path}{PATH}"


def is_loopback(host: str) -> bool:
    """Whether the name is this machine itself."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def request_body(model: str, prompt: Prompt, sampling: Sampling) -> dict[str, Any]:
    """The same question, the same body. The seed of a draw is sent as one that belongs to the prompt's key."""
    body: dict[str, Any] = {"model": model, "messages": _messages(prompt.messages)}
    if prompt.tools:
        body["tools"] = [t if "function" in t else {"type": "function", "function": t} for t in prompt.tools]
    body |= {"max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature}
    if sampling.temperature > 0:
        body |= {"top_p": sampling.top_p, "seed": derive(sampling.seed, "server", prompt.key) % 2**31}
    return body


def _messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Results that do not say whose they are belong to the last calls, in their order."""
    made: list[dict[str, Any]] = []
    ids, num_results = list[str](), 0
    for m in messages:
        one: dict[str, Any] = {"role": m.role, "content": m.content}
        if m.tool_calls:
            ids, num_results = [c.id or f"call_{k}" for k, c in enumerate(m.tool_calls)], 0
            one["tool_calls"] = [_call(c, id) for c, id in zip(m.tool_calls, ids, strict=True)]
        if m.role == "tool":
            one["tool_call_id"] = m.call_id or (ids[num_results] if num_results < len(ids) else f"call_{num_results}")
            num_results += 1
        made.append(one)
    return made


def _call(c: ToolCall, id: str) -> dict[str, Any]:
    arguments = json.dumps(c.arguments, ensure_ascii=False)
    return {"id": id, "type": "function", "function": {"name": c.name, "arguments": arguments}}


def read_reply(raw: bytes, most_in: int, most_out: int) -> Reply:
    """Raises `Garbled`. Of a server that counts no tokens (some never do) each reply is counted as the most that it may have."""
    try:
        reply = json.loads(raw)
        choice, usage = reply["choices"][0], reply.get("usage") or {}
        message, finish = choice["message"], choice.get("finish_reason") or ""
        tokens: list[Any] = [usage.get(k) for k in ("prompt_tokens", "completion_tokens")]
    except (ValueError, RecursionError) as e:
        raise Garbled(f"is not JSON: {shown(raw)!r}") from e
    except (KeyError, IndexError, TypeError, AttributeError) as e:
        raise Garbled(f"lacks {e.args[0] if isinstance(e, KeyError) else 'what a chat completion has'}") from e
    if not (isinstance(finish, str) and isinstance(message, dict)):
        raise Garbled("is not what a chat completion is")
    text = _text(message)
    if not (text or finish):
        raise Garbled("holds no text, nor why there is none")
    counted = all(type(n) is int and n >= 0 for n in tokens)
    tokens_in, tokens_out = tokens if counted else (most_in, most_out)
    return Reply(text=text, finish=finish, tokens_in=tokens_in, tokens_out=tokens_out, counted=counted)


def _text(message: dict[str, Any]) -> str:
    """Content, and the calls behind it in tags, as `read_calls` finds them; the calls alone one JSON object a line; or a refusal."""
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(p.get("text", "")) for p in content if isinstance(p, dict))
    given = message.get("tool_calls")
    made = [c for c in given if isinstance(c, dict)] if isinstance(given, list) else []
    calls = [json.dumps(c.get("function"), ensure_ascii=False) for c in made]
    text = content or message.get("refusal") or ""
    if calls and isinstance(text, str):
        tagged = (f"<tool_call>\n{c}\n</tool_call>" for c in calls)
        text = "\n".join([text, *tagged] if text.strip() else calls)
    if not isinstance(text, str):
        raise Garbled("has a content that is no text")
    return text.encode("utf-8", "replace").decode()  # a lone surrogate cannot be kept in a file


def shown(raw: bytes, key: str = "") -> str:
    """The server's own words of an error, in a line, without the key or any other secret."""
    text = raw[:4000].decode("utf-8", "replace")
    try:
        error = json.loads(raw[:100_000])["error"]
        text = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    text = text.replace(key, "***") if key else text
    return "".join(c if c.isprintable() else " " for c in redacted(text)).strip().rstrip(".")[:300]
