"""Connections: how many there may be, and how long one may take to say what it wants."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADER_TIMEOUT = 10.0
"""Seconds from a connection's first moment, or from a request's first byte, until its headers are whole."""

SLACK = 64
"""Connections beyond the limit that are still taken, for health and metrics; each is closed after one answer."""


class Connection(HttpToolsProtocol):
    """uvicorn's connection, with an end to one that never sends a request, or never all of its headers."""

    # a limit that belongs to the server: it makes a class of its own, see connection_class
    max_connections = 1024

    def connection_made(self, transport: Any) -> None:
        """Begin, unless there are far too many already."""
        if len(self.connections) >= self.max_connections + SLACK:
            transport.abort()
            return
        super().connection_made(transport)
        self._waiting: asyncio.TimerHandle | None = self.loop.call_later(HEADER_TIMEOUT, self._give_up)
        self._begun = False

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        if self.transport is not None:
            self._stop_waiting()
            super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what has come; if that is a part of a request's headers, wait only so long for the rest."""
        super().data_received(data)
        if self._begun and self._waiting is None:
            self._waiting = self.loop.call_later(HEADER_TIMEOUT, self._give_up)

    def on_message_begin(self) -> None:
        """Begin a request."""
        self._begun = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Go on with a request whose headers are whole."""
        self._begun = False
        if self._waiting is not None:
            self._stop_waiting()
        super().on_headers_complete()

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _give_up(self) -> None:
        self._waiting = None
        if not self.transport.is_closing():
            self.transport.close()


def connection_class(max_connections: int) -> type[asyncio.Protocol]:
    """Return the class of a server's connections, of which there may be so many."""
    return type("Connection", (Connection,), {"max_connections": max_connections})
