"""Who may see a served page: a browser that came with a link, once; from then on it holds another secret, as a cookie.

A link can be read by others (on a screen, in the list of processes), so it works once, and the next one is told. The cookie is of one
random path: cookies know no ports, and a server of somebody else on this machine is sent none of it.
"""

from __future__ import annotations

import hmac
import http.cookies
import secrets
import threading
from collections.abc import Callable

HERE = "127.0.0.1"
_COOKIE = "educe"


def refusal(host: str, origin: str, port: int) -> str:
    """Why a request is refused whatever it holds; empty where it may pass. Pure, so that every combination can be tested."""
    names = {f"{HERE}:{port}", f"localhost:{port}"}
    if host not in names:
        return "another name for this machine"
    if origin and origin not in {f"http://{name}" for name in names}:
        return "asked by another site"
    return ""


class Entrance:
    """The page's path, the link of now and the cookie. `on_link` is told each link after the first."""

    def __init__(self, on_link: Callable[[str], None]) -> None:
        self.path = f"/{secrets.token_urlsafe(12)}/"
        self.port = 0  # known when the server has one
        self._on_link, self._lock = on_link, threading.Lock()
        self._token, self._secret = secrets.token_urlsafe(24), secrets.token_urlsafe(24)

    @property
    def link(self) -> str:
        return f"http://{HERE}:{self.port}{self.path}?token={self._token}"

    @property
    def cookie(self) -> str:
        """For the header that sets it."""
        return f"{_COOKIE}={self._secret}; HttpOnly; SameSite=Lax; Path={self.path}"

    def knows(self, header: str) -> bool:
        """Whether a request's cookies hold the secret."""
        try:
            found = http.cookies.SimpleCookie(header).get(_COOKIE)
        except http.cookies.CookieError:
            return False
        return found is not None and hmac.compare_digest(found.value.encode(), self._secret.encode())

    def takes(self, token: str) -> bool:
        """Whether it is the token of now, which then has been used."""
        with self._lock:
            right = hmac.compare_digest(token.encode("utf-8", "surrogatepass"), self._token.encode())
            if right:
                self._token = secrets.token_urlsafe(24)
        if right:
            self._on_link(self.link)
        return right
