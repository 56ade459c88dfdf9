"""The server's connections: silent and slow clients do not keep others out.

uvicorn's own limits start once a request's headers have arrived; until then it waits for a client for ever.
"""

import asyncio
import socket

from uvicorn.protocols.http.h11_impl import H11Protocol

from diffguard.errors import ServiceError
from diffguard.serving.limits import BACKLOG, HEADER_SECONDS, MAX_CONNECTIONS, STALLED_SECONDS


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens for connections.

    Args:
        port: 0 for any free port.

    Raises:
        ServiceError: the address cannot be listened on.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ServiceError(f"--host {host} --port {port}: cannot listen there ({error.strerror or error})") from None
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # Accepted connections inherit the option.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_SECONDS * 1000)
    return listener


class Connection(H11Protocol):
    """An HTTP/1.1 connection that is closed if its client does not send.

    Attributes:
        header_seconds: time in which the headers of a request have to arrive; for the first request it starts with
            the connection.
        max_connections: most connections that are open. Beyond it the one whose client has been silent longest is
            closed; if all are being answered, the new one.
    """

    header_seconds = HEADER_SECONDS
    max_connections = MAX_CONNECTIONS

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Register a new client."""
        super().connection_made(transport)
        self._heard_at = self.loop.time()
        self._await_headers()
        self._make_room()

    def data_received(self, data: bytes) -> None:
        """Take what the client has sent."""
        self._heard_at = self.loop.time()
        super().data_received(data)
        if self._is_idle():
            self._await_headers()
        else:
            self._unset_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        """Clean up after the connection has ended."""
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
        connections = [other for other in self.connections if isinstance(other, Connection)]
        active = [other for other in connections if not other.transport.is_closing()]
        if len(active) <= self.max_connections:
            return
        silent = [other for other in active if other is not self and (other._is_idle() or other.cycle.more_body)]
        min(silent, key=lambda other: other._heard_at, default=self).transport.abort()
