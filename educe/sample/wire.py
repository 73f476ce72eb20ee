"""The OpenAI chat format: a prompt → a request's body, a body → what was said. And which addresses may be asked."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from educe.errors import SampleError
from educe.secrets import redacted
from educe.seeds import derive
from educe.types import Message, Prompt, Sampling

PATH = "/chat/completions"
_HOST = re.compile(r"[\w.:%-]+")
_ENDED = ("stop", "tool_calls", "function_call")


class Garbled(Exception):
    """Why a server's answer is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a server said. `finish` is its own word for why the text ends there; tokens are as it counts (and bills) them."""

    text: str
    finish: str
    tokens_in: int
    tokens_out: int

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
    body: dict[str, Any] = {"model": model, "messages": [_message(m) for m in prompt.messages]}
    if prompt.tools:
        body["tools"] = [t if "function" in t else {"type": "function", "function": t} for t in prompt.tools]
    body |= {"max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature}
    if sampling.temperature > 0:
        body |= {"top_p": sampling.top_p, "seed": derive(sampling.seed, "server", prompt.key) % 2**31}
    return body


def _message(m: Message) -> dict[str, Any]:
    made: dict[str, Any] = {"role": m.role, "content": m.content}
    if m.tool_calls:
        made["tool_calls"] = [
            {
                "id": c.id or f"call_{k}",
                "type": "function",
                "function": {"name": c.name, "arguments": json.dumps(c.arguments, ensure_ascii=False)},
            }
            for k, c in enumerate(m.tool_calls)
        ]
    if m.role == "tool":
        made["tool_call_id"] = m.call_id or "call_0"
    return made


def read_reply(raw: bytes) -> Reply:
    """Raises `Garbled`. A reply without counts of tokens is none: what it cost could not be told."""
    try:
        reply = json.loads(raw)
        choice, usage = reply["choices"][0], reply["usage"]
        message, finish = choice["message"], choice["finish_reason"]
        tokens_in, tokens_out = usage["prompt_tokens"], usage["completion_tokens"]
    except (ValueError, RecursionError) as e:
        raise Garbled(f"is not JSON: {shown(raw)!r}") from e
    except (KeyError, IndexError, TypeError) as e:
        raise Garbled(f"lacks {e.args[0] if isinstance(e, KeyError) else 'what a chat completion has'}") from e
    if not (isinstance(finish, str) and isinstance(message, dict)):
        raise Garbled("says not why the text ends")
    if not all(type(n) is int and n >= 0 for n in (tokens_in, tokens_out)):
        raise Garbled("counts no tokens")
    return Reply(text=_text(message), finish=finish, tokens_in=tokens_in, tokens_out=tokens_out)


def _text(message: dict[str, Any]) -> str:
    """Content; where there is none a refusal, or the calls, one JSON object a line."""
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(p.get("text", "")) for p in content if isinstance(p, dict))
    calls = message.get("tool_calls")
    if not content and isinstance(calls, list):
        content = "\n".join(json.dumps(c.get("function"), ensure_ascii=False) for c in calls if isinstance(c, dict))
    text = content or message.get("refusal") or ""
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
