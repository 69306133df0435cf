"""Who answers while no worker takes connections: the socket listens on, and whoever has connected would wait."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.server import ServerState

from guardserve.identity import Identity
from guardserve.service.access import Access
from guardserve.service.answer import Answer, named, refusal
from guardserve.service.app import UNAUTHORIZED
from guardserve.service.connection import connection_class
from guardserve.service.life import closing
from guardserve.service.listening import stop_listening

_log = logging.getLogger(__name__)

LIVE = "/v2/health/live"

INFER = re.compile(r"/v2/models/[^/]+(/versions/[^/]+)?/infer")

BODY_TIMEOUT = 10.0
"""Seconds that the body of a request may take, which is read lest its sender be cut off before the answer."""

LINGER = 1.0
"""Seconds that those have who wait for an answer when the server stops."""


class StandIn:
    """An application, and the thread that serves it, that answers 503 and when to come again, but is alive.

    Args:
        access: Who may ask.
        sockets: Those that the workers listen on.
        configure: Gives uvicorn's configuration for an application.
        max_connections: Most connections.

    Attributes:
        active: Whether it answers.
        refused: Inference requests answered 503 so far.
    """

    def __init__(
        self,
        access: Access,
        sockets: Sequence[socket.socket],
        configure: Callable[[ASGIApp], uvicorn.Config],
        max_connections: int,
    ) -> None:
        self._access = access
        self._sockets = sockets
        self._config = configure(self)
        self._config.http = connection_class(max_connections)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._servers: list[asyncio.Server] = []
        self._state = ServerState()
        self._readings: set[asyncio.Future[None]] = set()
        self._until = 0.0
        self.active = False
        self.refused = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, the last of its connection."""
        reading = asyncio.ensure_future(_passed_over(receive))
        self._readings.add(reading)
        await asyncio.wait([reading], timeout=BODY_TIMEOUT)
        self._readings.discard(reading)
        reading.cancel()
        send = closing(named(send, Identity(dict(scope["headers"]))))
        await self._answer(scope).send(send)

    def begin(self, until: float) -> None:
        """Answer.

        Args:
            until: When the next worker is started, by the monotonic clock.
        """
        self._until = until
        if self.active:
            return
        self.active = True
        _log.error("no worker takes connections: what comes is answered 503 until one does", extra={"event": "worker"})
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="guardserve-stand-in", daemon=True)
            self._thread.start()
        self._soon(self._listen())

    def end(self) -> None:
        """Leave what comes from now on to the workers."""
        if self.active:
            self.active = False
            self._soon(self._leave())

    def close(self) -> None:
        """Answer who waits, and end."""
        self.end()
        if self._loop is not None and self._thread is not None:
            self._soon(self._stop(self._loop))
            self._thread.join()
            self._loop.close()
            self._loop = self._thread = None

    def _answer(self, scope: Scope) -> Answer:
        if not self._access.allows(scope):
            return UNAUTHORIZED
        if scope["path"] == LIVE:
            return Answer(200, b"", ())
        if scope["method"] == "POST" and INFER.fullmatch(scope["path"]):
            self.refused += 1
        seconds = max(1, math.ceil(self._until - time.monotonic()))
        text = "not ready: no worker takes connections now, and the next one is being started"
        return refusal(503, "not_ready", text, [(b"retry-after", b"%d" % seconds)])

    def _soon(self, work: Coroutine[Any, Any, None]) -> None:
        if self._loop is not None:
            asyncio.run_coroutine_threadsafe(work, self._loop).add_done_callback(_log_failure)

    async def _listen(self) -> None:
        if self._servers:
            return
        if not self._config.loaded:
            self._config.load()
        loop = asyncio.get_running_loop()
        for sock in self._sockets:
            if self.active:
                own = sock.dup()
                server = await loop.create_server(
                    self._protocol, sock=own, ssl=self._config.ssl, backlog=self._config.backlog
                )
                self._servers.append(server)
        if not self.active:
            await self._leave()

    async def _leave(self) -> None:
        servers, self._servers = self._servers, []
        await stop_listening(servers)

    async def _stop(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            end = time.monotonic() + LINGER
            await self._leave()
            for connection in list(self._state.connections):
                connection.shutdown()
            for reading in self._readings:  # who has not said all has an answer still
                reading.cancel()
            while self._state.connections and time.monotonic() < end:  # noqa: ASYNC110 - uvicorn has no event for it
                await asyncio.sleep(0.01)
            for connection in list(self._state.connections):
                connection.transport.abort()
            await asyncio.sleep(0)
        finally:
            loop.stop()

    def _protocol(self) -> asyncio.Protocol:
        kind: Any = self._config.http_protocol_class
        protocol: asyncio.Protocol = kind(config=self._config, server_state=self._state, app_state={})
        return protocol


async def _passed_over(receive: Receive) -> None:
    """Read a body, and keep nothing of it."""
    more = True
    while more:
        message = await receive()
        more = message["type"] == "http.request" and message.get("more_body", False)


def _log_failure(done: Any) -> None:
    if not done.cancelled() and done.exception() is not None:
        _log.error("nobody answers while no worker takes connections", exc_info=done.exception())
