"""ASGI middleware that refuses requests without the server's key before their body is read."""

import hmac
import ipaddress
from collections.abc import MutableMapping
from typing import Any

from diffguard.errors import SettingError
from diffguard.serving.body_limit import App, Receive, Send, refuse

VARIABLE = "DIFFGUARD_API_KEY"
HEADER = "X-API-Key"
GUARDED = ("/score", "/version", "/metrics")
"""Paths that need the key. Health and the interface's description are public."""


class ApiKey:
    """Answers 401 to requests for a path in `GUARDED` that lack the key; passes all others on.

    The key is sent as ``Authorization: Bearer KEY`` or ``X-API-Key: KEY``.
    """

    def __init__(self, app: App, key: str) -> None:
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        is_guarded = scope["type"] == "http" and scope["path"].rstrip("/") in GUARDED
        if not is_guarded or self._has_key(scope):
            await self._app(scope, receive, send)
            return
        detail = f"the key is missing or wrong; send it as Authorization: Bearer KEY, or {HEADER}: KEY"
        await refuse(receive, send, 401, detail, [(b"www-authenticate", b"Bearer")])

    def _has_key(self, scope: MutableMapping[str, Any]) -> bool:
        keys = []
        for name, value in scope["headers"]:
            scheme, _, token = value.partition(b" ")
            if name == b"authorization" and scheme.lower() == b"bearer":
                keys.append(token.strip())
            elif name == HEADER.lower().encode():
                keys.append(value.strip())
        # Compared in constant time, and all of them, so that the time of an answer reveals nothing about the key.
        return any([hmac.compare_digest(key, self._key) for key in keys])


def checked_key(key: str | None) -> str | None:
    """Return the key of the environment variable after a check; None if the variable is not set.

    Raises:
        SettingError: the key is empty, or cannot be sent in a header.
    """
    if key is None:
        return None
    if not key.strip():
        raise SettingError(f"{VARIABLE}: set and empty; give a key, or unset it to serve without one")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise SettingError(f"{VARIABLE}: a header takes printable ASCII characters without spaces; choose another key")
    return key


def is_loopback(host: str) -> bool:
    """Whether an address is reachable from this machine alone.

    Example:
        >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
        (True, True, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
