"""ASGI middleware that refuses a request's body before it is read, or as soon as it is too long or too slow."""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from diffguard.serving.limits import LINGER_SECONDS, REQUEST_BYTES, RETRY_SECONDS, Limits
from diffguard.serving.requests import too_many_bytes

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


class BodyLimit:
    """Passes on requests whose whole body has arrived within the limits, and answers all others itself.

    Args:
        limits: `max_bytes` of a body, declared by Content-Length or counted as its chunks arrive.
        seconds: time in which a body has to arrive.
        max_open_bytes: most bytes of the requests that are processed at once, each its body and `REQUEST_BYTES`; a
            request is never too large for a server that processes no other. Bodies that are still arriving are not
            counted, so that slow clients do not block others; together they may have as many bytes again, so that
            memory is bounded.
    """

    def __init__(self, app: App, limits: Limits, seconds: float, max_open_bytes: int) -> None:
        self._app, self._limits = app, limits
        self._seconds, self._max_open_bytes = seconds, max_open_bytes
        self._open_bytes = self._arriving_bytes = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http" or not _has_body(scope):
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length")
        # The server has refused what is not a number; 20 digits are too long a body, whatever they are.
        size = None if declared is not None and len(declared) >= 20 else int(declared or 0)
        if size is None or size > self._limits.max_bytes:
            await refuse(receive, send, 413, too_many_bytes(size, self._limits))
            return
        if self._is_full(size):
            await refuse(receive, send, 503, _BUSY)
            return
        try:
            async with asyncio.timeout(self._seconds):
                body = await self._read(receive)
        except TimeoutError:
            await refuse(receive, send, 408, f"the body did not arrive within {self._seconds:g} seconds")
        except _TooLongError:
            await refuse(receive, send, 413, too_many_bytes(None, self._limits))
        except _BusyError:
            await refuse(receive, send, 503, _BUSY)
        else:
            if body is not None:
                await self._pass_on(scope, body, receive, send)

    def _is_full(self, size: int) -> bool:
        """Whether a body of this size is one too many for those that are processed."""
        return self._open_bytes > 0 and self._open_bytes + size + REQUEST_BYTES > self._max_open_bytes

    async def _read(self, receive: Receive) -> bytes | None:
        """Read the whole body; None if the client disconnected."""
        body, more = bytearray(), True
        try:
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                chunk = message.get("body", b"")
                body += chunk
                self._arriving_bytes += len(chunk)
                if len(body) > self._limits.max_bytes:
                    raise _TooLongError
                more = message.get("more_body", False)
                # A body that arrives alone is never too large.
                is_crowded = self._arriving_bytes > max(self._max_open_bytes, len(body))
                if is_crowded or (not more and self._is_full(len(body))):
                    raise _BusyError
            return bytes(body)
        finally:
            self._arriving_bytes -= len(body)

    async def _pass_on(self, scope: MutableMapping[str, Any], body: bytes, receive: Receive, send: Send) -> None:
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        self._open_bytes += len(body) + REQUEST_BYTES
        try:
            await self._app(scope, lambda: _replayed(messages, receive), send)
        finally:
            self._open_bytes -= len(body) + REQUEST_BYTES


_BUSY = "too many requests at once; try again in a second"


class _TooLongError(Exception):
    pass


class _BusyError(Exception):
    pass


def _has_body(scope: MutableMapping[str, Any]) -> bool:
    return any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])


async def _replayed(messages: list[Message], receive: Receive) -> Message:
    return messages.pop() if messages else await receive()


async def refuse(
    receive: Receive, send: Send, status: int, detail: str, extra_headers: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    """Answer a request instead of the application, with an error in one line.

    What still arrives of its body is read and discarded for `LINGER_SECONDS`.
    """
    body = json.dumps({"detail": detail}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
        *extra_headers,
    ]
    if status == 503:
        headers.append((b"retry-after", str(RETRY_SECONDS).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    try:
        async with asyncio.timeout(LINGER_SECONDS):
            more = True
            while more:
                message = await receive()
                more = message["type"] == "http.request" and message.get("more_body", False)
    except TimeoutError:
        pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})
