"""The short way from a request's bytes to its answer."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from guardserve.service.answer import Answer
from guardserve.service.app import Service
from guardserve.service.bounds import BoundedConnection
from guardserve.service.gateway import Gateway
from guardserve.service.inference import Pending
from guardserve.service.reading import is_small
from guardserve.service.throttle import LINE, Throttle

PATIENCE = 0.005
"""Seconds that a body may come after its headers to be answered the short way; many clients send them apart."""

MAX_KNOWN = 2048
"""Bytes of a request's path and headers up to which a connection remembers them."""


class _Known(NamedTuple):
    """The last request of a connection that came at once and was plain.

    Attributes:
        head: Its path and headers, to the end of the empty line.
        size: Bytes of all of it.
        cycle: uvicorn's record of it, for the next one.
        headers: Its headers by their lower-case names.
    """

    head: bytes
    size: int
    cycle: Any
    headers: Mapping[bytes, bytes]


class Connection(BoundedConnection):
    """A connection that answers an inference request which comes at once past ASGI.

    Its tasks and messages cost more than a small model; the answer is written at once too. Whatever is not plain goes
    the long way: large and late bodies, pipelined requests, clients that read slowly, refusals, middleware around the
    application.

    Most clients send the same headers with every request: those that are the same to the byte are not parsed again.
    """

    def connection_made(self, transport: Any) -> None:
        """Begin."""
        # a request that may go the short way, if its body is there soon
        self._plain: tuple[Any, Gateway] | None = None
        self._late: asyncio.TimerHandle | None = None
        self._job: Pending | None = None
        self._known: _Known | None = None
        self._begun: tuple[Any, Mapping[bytes, bytes], bytes] | None = None
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        super().connection_lost(exc)
        self._go_on()
        if self._job is not None:
            self._job.settle("gone")

    def data_received(self, data: bytes) -> None:
        """Take what has come."""
        if self._stage == "nothing" and not self._unread and self._is_known(data):
            return
        super().data_received(data)

    def have_read(self, data: bytes, *, at_once: bool) -> None:
        """Remember a request that came at once; wait a moment for the body of one that may go the short way."""
        begun, self._begun = self._begun, None
        if begun is not None and at_once:
            self._know(data, *begun)
        if self._plain is not None:
            if self.flow.read_paused:  # it is a large one
                self._go_on()
            elif self._late is None:
                self._late = self.loop.call_later(PATIENCE, self._go_on)

    def on_message_complete(self) -> None:
        """Take the end of a request's body."""
        super().on_message_complete()
        if self._plain is not None:
            cycle, gateway = self._plain
            headers = dict(cycle.scope["headers"])
            if is_small(cycle.body, headers) and cycle.scope["path"] in gateway.inference.paths:
                self._forget_plain()
                body, cycle.body = bytes(cycle.body), bytearray()
                self._begun = cycle, headers, body
                self._answer(cycle, gateway, headers, body)
            else:
                self._go_on()

    def needs_forward(self, app: Any, cycle: Any) -> bool:
        """Tell whether a request is for a forward, as far as is known."""
        return not isinstance(app, Service) or app.runs_forward(cycle.scope)

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        """Begin with a request whose headers are there."""
        gateway = self._shortcut(app, cycle)
        if gateway is not None:
            self._plain = cycle, gateway
            return
        super()._start_asgi_task(cycle, app)

    def _go_on(self) -> None:
        """Go the long way with a request that is not as plain as it looked."""
        if self._plain is not None:
            cycle, _ = self._plain
            self._forget_plain()
            super()._start_asgi_task(cycle, self.app)

    def _forget_plain(self) -> None:
        self._plain = None
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _know(self, data: bytes, cycle: Any, headers: Mapping[bytes, bytes], body: bytes) -> None:
        """Remember the headers of a request, if it was all that came."""
        head = data[: len(data) - len(body)]
        alone = head.find(b"\r\n\r\n") == len(head) - 4 and data.endswith(body)
        if alone and body and len(head) <= MAX_KNOWN and cycle.keep_alive:
            self._known = _Known(head, len(data), cycle, headers)

    def _is_known(self, data: bytes) -> bool:
        """Answer a request whose headers are those of the last one, unless another is being answered."""
        known = self._known
        if known is None or len(data) != known.size or not data.startswith(known.head):
            return False
        gateway = self._shortcut(self.app, known.cycle) if self.cycle.response_complete else None
        if gateway is None:
            return False
        if self._waiting is not None:
            self._stop_waiting()
        self._idle_since = None
        cycle = self.cycle = known.cycle
        cycle.response_started = cycle.response_complete = False
        cycle.default_headers = self.server_state.default_headers
        self._answer(cycle, gateway, known.headers, data[len(known.head) :])
        return True

    def _shortcut(self, app: Any, cycle: Any) -> Gateway | None:
        """Return what may answer a request past ASGI, if it may be."""
        if not isinstance(app, Service) or cycle.waiting_for_100_continue or self.access_log or self.flow.write_paused:
            return None
        return app.shortcut(cycle.scope)

    def _answer(self, cycle: Any, gateway: Gateway, headers: Mapping[bytes, bytes], body: bytes) -> None:
        cycle.on_response = None  # it would keep the connection alive, and is uvicorn's to clear
        job = gateway.begin(body, headers, functools.partial(self._send, cycle))
        self._job = None if cycle.response_complete else job

    def _send(self, cycle: Any, answer: Answer) -> None:
        """Write an answer, headers and body at once."""
        self._job = None
        if cycle.disconnected or self.transport.is_closing():
            return
        cycle.response_started = cycle.response_complete = True
        end = b"\r\n" if cycle.keep_alive else b"connection: close\r\n\r\n"
        self._write(answer, cycle.default_headers, end)
        if not cycle.keep_alive:
            self._leave()
        self.on_response_complete()


def connection_class(max_connections: int, unreadable: Callable[[], object] = bool) -> type[asyncio.Protocol]:
    """Return the class of a server's connections, of which there may be so many.

    Args:
        max_connections: Their number.
        unreadable: Told of each request that cannot be read.
    """
    throttle = Throttle(min(LINE, max_connections // 2))
    own = {"max_connections": max_connections, "throttle": throttle, "unreadable": staticmethod(unreadable)}
    return type("Connection", (Connection,), own)
