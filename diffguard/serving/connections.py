"""The server's connections: clients that are silent or slow do not keep others out.

uvicorn's own limits begin where a request's headers are there: before that a client may be silent for ever.
"""

import asyncio
import socket

from uvicorn.protocols.http.h11_impl import H11Protocol

from diffguard.errors import ServiceError

STALLED_SECONDS = 30
"""A client that takes nothing of its answer for so long is cut off (on Linux)."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that connections can be made to.

    Args:
        port: 0: any that is free.

    Raises:
        ServiceError: nothing can listen at that address.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise ServiceError(f"--host {host} --port {port}: cannot listen there ({error.strerror or error})") from None
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # Connections inherit it.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_SECONDS * 1000)
    return listener


class Connection(H11Protocol):
    """A connection of HTTP/1.1 that is closed if its client does not send.

    Attributes:
        header_seconds: in which the headers of a request have to arrive, the first one's from the connection on.
        max_connections: that are open. One more, and the one whose client has been silent for the longest
            gives way; where all are being answered, the new one.
    """

    header_seconds = 10.0
    max_connections = 512  # a process may often have no more than 1,024 files open

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there."""
        super().connection_made(transport)
        self._heard_at = self.loop.time()
        self._await_headers()
        self._make_room()

    def data_received(self, data: bytes) -> None:
        """The client has sent something."""
        self._heard_at = self.loop.time()
        super().data_received(data)
        if self._is_idle():
            self._await_headers()
        else:
            self._unset_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        """The end."""
        self._unset_deadline()
        super().connection_lost(exc)

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _await_headers(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.header_seconds, self.transport.abort)

    def _unset_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _make_room(self) -> None:
        there = [each for each in self.connections if isinstance(each, Connection) and not each.transport.is_closing()]
        if len(there) <= self.max_connections:
            return
        silent = [each for each in there if each is not self and (each._is_idle() or each.cycle.more_body)]
        min(silent, key=lambda each: each._heard_at, default=self).transport.abort()
