"""uvicorn's server, stopped without losing a request."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from types import FrameType
from typing import Any, Protocol

import uvicorn

from guardserve.service.connection import connection_class
from guardserve.service.life import Life
from guardserve.service.listening import stop_listening

LINGER = 1.0
"""Seconds that an idle connection has, after the listening socket is closed, for a request that is on its way."""

POLL = 0.02
"""Seconds between two looks at the connections that linger."""


class Companion(Protocol):
    """Another server, which listens and stops together with this one."""

    async def start(self) -> None:
        """Start to listen."""

    async def stop(self) -> None:
        """Take no more requests, and finish those that there are."""


class Server(uvicorn.Server):
    """Serves until a signal, then lets readiness fail, takes no more connections, and answers what it has accepted.

    A second signal ends the drain delay.

    Args:
        config: uvicorn's configuration.
        life: What the application is told of it.
        drain_delay: Seconds between a signal and the end of the listening socket, for load balancers to notice.
        companion: Another server of the same application.
    """

    def __init__(
        self, config: uvicorn.Config, life: Life, drain_delay: float = 0.0, companion: Companion | None = None
    ) -> None:
        config.http = connection_class(life.max_connections, life.unreadable)
        super().__init__(config)
        life.connections = self.server_state.connections
        self._life = life
        self._drain_delay = drain_delay
        self._companion = companion
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen."""
        self._loop = asyncio.get_running_loop()
        if self._companion is not None:
            await self._companion.start()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain: uvicorn would close its sockets at once, and end by the signal rather than with status 0."""
        del sig, frame
        if self._life.draining or self._loop is None:
            self.should_exit = True
            return
        self._life.drain()
        self._loop.call_soon_threadsafe(self._loop.call_later, self._drain_delay, self._stop)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, answer what was accepted, and close."""
        self._life.drain()
        await self._stop_listening()
        self._life.close()
        # the application ends with this server: what asks it must have finished before
        stopping = None if self._companion is None else asyncio.ensure_future(self._companion.stop())
        end = time.monotonic() + LINGER
        while self.server_state.connections and time.monotonic() < end:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(POLL)
        if stopping is not None:
            await stopping
        await super().shutdown(sockets)

    def _stop(self) -> None:
        self.should_exit = True

    async def _stop_listening(self) -> None:
        """Close the listening sockets, but take what has connected to them: the kernel would reset it."""
        listening = [socket.socket(fileno=os.dup(sock.fileno())) for server in self.servers for sock in server.sockets]
        await stop_listening(self.servers)
        for listener in listening:
            with listener:
                listener.setblocking(False)
                await self._accept_all(listener)

    async def _accept_all(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # nothing waits any more
                return
            connection.setblocking(False)
            await loop.connect_accepted_socket(self._protocol, connection, ssl=self.config.ssl)

    def _protocol(self) -> asyncio.Protocol:
        kind: Any = self.config.http_protocol_class
        protocol: asyncio.Protocol = kind(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return protocol
