"""The HTTP server: uvicorn, with a time limit for the head (request line and headers) of each request."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from ..types import LimbeckError, Resumable

if TYPE_CHECKING:
    import socket

    from ..engine.loop import EngineThread

HEAD_TIMEOUT_SECONDS = 10.0  # seconds from a request's first byte to the end of its head
KEEP_ALIVE_SECONDS = 30  # seconds that an idle connection stays open
BACKLOG = 1024  # connections that wait to be accepted


def claim(host: str, port: int) -> socket.socket:
    """Bind a socket to an address and return it. It does not listen yet.

    Called before the models are loaded, so that an address in use is reported at once. Raises LimbeckError if
    the address is not available.
    """
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    address = socket.socket(family)
    address.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        address.bind((host, port))
    except OSError as error:
        address.close()
        reason = error.strerror or error
        raise LimbeckError(f"--host {host} --port {port}: {reason}; choose another one") from None
    return address


def serve(app: Any, address: socket.socket, engine: EngineThread, drain_seconds: float = 30.0) -> None:
    """Serve an ASGI application on a bound socket until SIGTERM or Ctrl-C.

    Then no new request is accepted, and the running ones get `drain_seconds` to finish.

    Raises Resumable if the device of `engine`, the thread that runs the models, has failed: all requests have
    been told, and this process cannot use the device any more.
    """
    import uvicorn

    config = uvicorn.Config(
        app,
        http=_protocol(),
        ws="none",
        backlog=BACKLOG,
        log_level="warning",
        access_log=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(drain_seconds),
    )
    server = uvicorn.Server(config)

    def stop() -> None:
        server.should_exit = True

    engine.on_failure = stop
    server.run(sockets=[address])
    if engine.failure:
        reason = str(engine.failure).splitlines()[0]
        raise Resumable(
            f"the card failed ({reason}), and this process cannot use it any more; start the server again"
        ) from engine.failure


def _protocol() -> type:
    """Return the class of the HTTP protocol.

    It is defined inside a function so that uvicorn is imported only when a server starts.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class HeadDeadlineProtocol(H11Protocol):
        """HTTP/1.1 that closes a connection if the head of a request is not complete in time.

        The head is the request line and the headers; the limit is `HEAD_TIMEOUT_SECONDS`. For the first
        request it begins with the connection, for a later one with its first byte. uvicorn itself has no such
        limit, and its keep-alive timeout begins anew with each byte.
        """

        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._start_deadline()

        def data_received(self, data: bytes) -> None:
            cycle_before = self.cycle
            if self._deadline is None and self._between_requests():
                self._start_deadline()
            super().data_received(data)
            head_is_complete = self.cycle is not cycle_before
            if self._deadline is not None and head_is_complete:
                self._deadline.cancel()
                self._deadline = None

        def connection_lost(self, exc: Exception | None) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
            super().connection_lost(exc)

        def _start_deadline(self) -> None:
            self._deadline = self.loop.call_later(HEAD_TIMEOUT_SECONDS, self._close_if_idle)

        def _between_requests(self) -> bool:
            return self.cycle is None or self.cycle.response_complete

        def _close_if_idle(self) -> None:
            self._deadline = None
            if self._between_requests() and not self.transport.is_closing():
                self.transport.close()

    return HeadDeadlineProtocol
