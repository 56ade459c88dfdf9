"""ASGI middleware: a request's body is refused before it is read, or as soon as it is too long or too slow."""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from diffguard.serving.limits import Limits
from diffguard.serving.requests import too_many_bytes

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

LINGER_SECONDS = 2.0
"""How long a refused body is read and thrown away: a client that is cut off in the middle of sending
would see a broken connection in place of the answer."""


class BodyLimit:
    """Hands on requests whose body is there in full and within the limit, and answers the others itself.

    Args:
        limits: `max_bytes` of a body, declared by Content-Length or counted while it comes in chunks.
        seconds: in which a body has to arrive.
        max_requests: that may be answered at once. As many bytes as they may have, may be arriving besides:
            bodies that are sent slowly take no places from others, and memory is bounded too.
    """

    def __init__(self, app: App, limits: Limits, seconds: float, max_requests: int) -> None:
        self._app, self._limits = app, limits
        self._seconds, self._max_requests = seconds, max_requests
        self._at_work = self._arriving = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one connection event as ASGI has it."""
        if scope["type"] != "http" or not _has_body(scope):
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length")
        if declared is not None:
            # The server refuses what is no number; longer than any int that Python converts is too long.
            size = int(declared) if len(declared) < 20 else None
            if size is None or size > self._limits.max_bytes:
                await refuse(receive, send, 413, too_many_bytes(size, self._limits))
                return
        if self._at_work >= self._max_requests:
            await refuse(receive, send, 503, _BUSY)
            return
        try:
            async with asyncio.timeout(self._seconds):
                whole = await self._read(receive)
        except TimeoutError:
            await refuse(receive, send, 408, f"the body did not arrive within {self._seconds:g} seconds")
        except _TooLongError:
            await refuse(receive, send, 413, too_many_bytes(None, self._limits))
        except _BusyError:
            await refuse(receive, send, 503, _BUSY)
        else:
            if whole:
                await self._hand_on(scope, whole, receive, send)

    async def _read(self, receive: Receive) -> list[Message]:
        """The whole body as one message; none: the client is gone."""
        body, more = bytearray(), True
        try:
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return []
                part = message.get("body", b"")
                body += part
                self._arriving += len(part)
                if len(body) > self._limits.max_bytes:
                    raise _TooLongError
                more = message.get("more_body", False)
                no_place = not more and self._at_work >= self._max_requests
                if no_place or self._arriving > self._max_requests * self._limits.max_bytes:
                    raise _BusyError
            return [{"type": "http.request", "body": bytes(body), "more_body": False}]
        finally:
            self._arriving -= len(body)

    async def _hand_on(
        self, scope: MutableMapping[str, Any], whole: list[Message], receive: Receive, send: Send
    ) -> None:
        self._at_work += 1
        try:
            await self._app(scope, lambda: _replayed(whole, receive), send)
        finally:
            self._at_work -= 1


_BUSY = "too many requests at once; try again in a second"


class _TooLongError(Exception):
    pass


class _BusyError(Exception):
    pass


def _has_body(scope: MutableMapping[str, Any]) -> bool:
    return any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])


async def _replayed(whole: list[Message], receive: Receive) -> Message:
    return whole.pop() if whole else await receive()


async def refuse(
    receive: Receive, send: Send, status: int, detail: str, more: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    """Answer a request in place of the application, with an error in one line.

    Args:
        more: further headers.
    """
    body = json.dumps({"detail": detail}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
        *more,
    ]
    if status == 503:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    try:
        async with asyncio.timeout(LINGER_SECONDS):
            coming = True
            while coming:
                message = await receive()
                coming = message["type"] == "http.request" and message.get("more_body", False)
    except TimeoutError:
        pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})
