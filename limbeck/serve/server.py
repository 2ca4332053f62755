"""uvicorn, with a deadline for senders who never finish their request's head."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from ..types import LimbeckError

if TYPE_CHECKING:
    import socket

HEAD_SECONDS = 10.0
BACKLOG = 1024


def claim(host: str, port: int) -> socket.socket:
    """Take the address before anything large is loaded; nobody is let in yet. Raises LimbeckError where it cannot be had."""
    import socket

    taken = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
    except OSError as error:
        taken.close()
        raise LimbeckError(
            f"--host {host} --port {port}: {error.strerror or error}; choose another one"
        ) from None
    return taken


def serve(app: Any, address: socket.socket, drain_seconds: float = 30.0) -> None:
    """Answer until SIGTERM or Ctrl-C; then take no new request, and give running ones `drain_seconds`."""
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
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(drain_seconds),
    )
    uvicorn.Server(config).run(sockets=[address])


def _protocol() -> type:
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Deadline(H11Protocol):
        """A head has `HEAD_SECONDS` from its first byte (the first one from the connection) to its last;
        uvicorn by itself waits for ever, and starts anew with each byte."""

        _alarm: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._alarm = self.loop.call_later(HEAD_SECONDS, self._give_up)

        def data_received(self, data: bytes) -> None:
            before = self.cycle
            if self._alarm is None and self._idle():
                self._alarm = self.loop.call_later(HEAD_SECONDS, self._give_up)
            super().data_received(data)
            if self._alarm is not None and self.cycle is not before:
                self._alarm.cancel()
                self._alarm = None

        def connection_lost(self, exc: Exception | None) -> None:
            if self._alarm is not None:
                self._alarm.cancel()
            super().connection_lost(exc)

        def _idle(self) -> bool:
            return self.cycle is None or self.cycle.response_complete

        def _give_up(self) -> None:
            self._alarm = None
            if self._idle() and not self.transport.is_closing():
                self.transport.close()

    return Deadline
