"""ASGI middleware that refuses a request's body before it is read, or as soon as it is too long or too slow."""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from diffguard.serving.limits import LINGER_SECONDS, RETRY_SECONDS, Limits
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
        max_requests: most requests that are processed at once. Bodies that are still arriving are not counted, so
            that slow clients do not block others; together they may have `max_requests * max_bytes` bytes, so that
            memory is bounded.
    """

    def __init__(self, app: App, limits: Limits, seconds: float, max_requests: int) -> None:
        self._app, self._limits = app, limits
        self._seconds, self._max_requests = seconds, max_requests
        self._in_process = self._arriving_bytes = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http" or not _has_body(scope):
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length")
        if declared is not None:
            # The server has refused what is not a number; 20 digits are too long a body, whatever they are.
            size = int(declared) if len(declared) < 20 else None
            if size is None or size > self._limits.max_bytes:
                await refuse(receive, send, 413, too_many_bytes(size, self._limits))
                return
        if self._in_process >= self._max_requests:
            await refuse(receive, send, 503, _BUSY)
            return
        try:
            async with asyncio.timeout(self._seconds):
                messages = await self._read(receive)
        except TimeoutError:
            await refuse(receive, send, 408, f"the body did not arrive within {self._seconds:g} seconds")
        except _TooLongError:
            await refuse(receive, send, 413, too_many_bytes(None, self._limits))
        except _BusyError:
            await refuse(receive, send, 503, _BUSY)
        else:
            if messages:
                await self._pass_on(scope, messages, receive, send)

    async def _read(self, receive: Receive) -> list[Message]:
        """Read the whole body into one message; an empty list if the client disconnected."""
        body, more = bytearray(), True
        try:
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return []
                chunk = message.get("body", b"")
                body += chunk
                self._arriving_bytes += len(chunk)
                if len(body) > self._limits.max_bytes:
                    raise _TooLongError
                more = message.get("more_body", False)
                is_full = not more and self._in_process >= self._max_requests
                if is_full or self._arriving_bytes > self._max_requests * self._limits.max_bytes:
                    raise _BusyError
            return [{"type": "http.request", "body": bytes(body), "more_body": False}]
        finally:
            self._arriving_bytes -= len(body)

    async def _pass_on(
        self, scope: MutableMapping[str, Any], messages: list[Message], receive: Receive, send: Send
    ) -> None:
        self._in_process += 1
        try:
            await self._app(scope, lambda: _replayed(messages, receive), send)
        finally:
            self._in_process -= 1


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
