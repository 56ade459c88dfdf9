"""ASGI middleware: a request without the server's key is refused before its body is read."""

import hmac
import ipaddress
from collections.abc import MutableMapping
from typing import Any

from diffguard.errors import SettingError
from diffguard.serving.body_limit import App, Receive, Send, refuse

VARIABLE = "DIFFGUARD_API_KEY"
HEADER = "X-API-Key"
GUARDED = ("/score", "/version")
"""Paths that take a key. Whether the server is well, and what its interface is, may be known to all."""


class ApiKey:
    """Hands on requests to `GUARDED` paths that carry the key, as ``Authorization: Bearer KEY`` or ``X-API-Key: KEY``.

    Others are answered 401.
    """

    def __init__(self, app: App, key: str) -> None:
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one connection event as ASGI has it."""
        is_guarded = scope["type"] == "http" and scope["path"].rstrip("/") in GUARDED
        if not is_guarded or self._is_there(scope):
            await self._app(scope, receive, send)
            return
        detail = f"the key is missing or wrong; send it as Authorization: Bearer KEY, or {HEADER}: KEY"
        await refuse(receive, send, 401, detail, [(b"www-authenticate", b"Bearer")])

    def _is_there(self, scope: MutableMapping[str, Any]) -> bool:
        given = []
        for name, value in scope["headers"]:
            kind, _, rest = value.partition(b" ")
            if name == b"authorization" and kind.lower() == b"bearer":
                given.append(rest.strip())
            elif name == HEADER.lower().encode():
                given.append(value.strip())
        # In constant time, so that the time of an answer tells nothing of the key.
        return any([hmac.compare_digest(each, self._key) for each in given])


def checked_key(key: str | None) -> str | None:
    """The key of the environment variable; None: there is none.

    Raises:
        SettingError: it is set and empty, or cannot be sent in a header.
    """
    if key is None:
        return None
    if not key.strip():
        raise SettingError(f"{VARIABLE}: it is set and empty, which would be no key; unset it, or give one")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise SettingError(f"{VARIABLE}: a key is of printable ASCII characters without spaces, as it goes in a header")
    return key


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches an address.

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
