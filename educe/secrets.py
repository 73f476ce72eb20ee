"""Keys and passwords in text: found by their form, or because the environment holds them; hidden before anything is shown or kept.

Rows of data are not looked at: they are the user's, and stay as they are.
"""

from __future__ import annotations

import os
import re
from typing import Any

# What it is: how it is written. Forms with letters alone would hide ordinary words, so those ask for a digit.
_FORMS = {
    "private key": r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----(?:[\s\S]*?-----END [A-Z0-9 ]*PRIVATE KEY-----|[\s\S]*)",
    "password in an address": r"(?<=://)[^\s/:@'\"]*:[^\s/@'\"]+(?=@)",
    "bearer token": r"(?i:\bbearer)\s+(?=\S*\d)[\w.~+-]{20,}+=*(?!/)",
    "Hub token": r"\bhf_[A-Za-z0-9]{30,}",
    "Anthropic key": r"\bsk-ant-[\w-]{16,}",
    "OpenAI key": r"\bsk-(?=[\w-]*\d)(?=[\w-]*[A-Z])[\w-]{20,}+(?!\.\w)",
    "AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,})",
    "Slack token": r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}",
    "Google key": r"\bAIza[\w-]{30,}",
    "signed web token": r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{4,}",
}
_FORM = re.compile("|".join(f"(?P<k{i}>{form})" for i, form in enumerate(_FORMS.values())))
_KINDS = list(_FORMS)
_NAME = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIALS?)$", re.I)
_MIN_CHARACTERS = 16  # a shorter value is a word that text may hold by chance


def is_secret_name(variable: str) -> bool:
    """Whether a variable of that name in the environment holds a secret, as far as the name tells."""
    return bool(_NAME.search(variable))


def find_secret(text: str) -> tuple[str, int] | None:
    """What the first secret in a text is, and where it begins; None where there is none."""
    found = [(m.start(), _kind(m)) for m in [_FORM.search(text)] if m is not None]
    found += [(text.index(value), f"value of {name}") for name, value in _held() if value in text]
    return (min(found)[1], min(found)[0]) if found else None


def redacted(text: str) -> str:
    """The text with each secret replaced by what it was."""
    for name, value in _held():
        text = text.replace(value, f"***(value of {name})")
    return _FORM.sub(lambda m: f"***({_kind(m)})", text)


def redacted_values(value: Any) -> Any:
    """A JSON value with all its strings, keys too, redacted."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return {redacted_values(k): redacted_values(v) for k, v in value.items()}
    return [redacted_values(v) for v in value] if isinstance(value, (list, tuple)) else value


def public_environment() -> dict[str, str]:
    """The environment without what it holds secret, for a process that runs foreign code."""
    return {k: v for k, v in os.environ.items() if not is_secret_name(k) and _FORM.search(v) is None}


def _kind(match: re.Match[str]) -> str:
    return _KINDS[int(str(match.lastgroup)[1:])]


def _held() -> list[tuple[str, str]]:
    """The environment's secrets, the longest first: one may be part of another. A path names where a secret lies and is none."""
    held = [(k, v) for k, v in os.environ.items() if len(v) >= _MIN_CHARACTERS and is_secret_name(k)]
    return sorted(((k, v) for k, v in held if not v.startswith(("/", "~"))), key=lambda kv: -len(kv[1]))
