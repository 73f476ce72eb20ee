"""What a page may do, said to the browser: nothing but its own style and its own script, known by their hashes."""

from __future__ import annotations

import base64
import hashlib


def _hash(text: str) -> str:
    """As CSP Level 3 (8.4) writes it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def policy(css: str, script: str = "", *, live: bool = False) -> str:
    """`live`: it may also ask the server that it came from."""
    parts = ["default-src 'none'", f"style-src {_hash(css)}", *([f"script-src {_hash(script)}"] if script else [])]
    return "; ".join([*parts, *(["connect-src 'self'"] if live else []), "base-uri 'none'", "form-action 'none'"])


PAGE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""What a served page tells the browser besides: no frames, no guesses, no copies, nothing for other sites."""
