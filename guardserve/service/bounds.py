"""What bounds a connection: how many there may be, how long each may take, and what is refused before it is read."""

from __future__ import annotations

import asyncio
import functools
import socket
from collections.abc import Callable, Sequence
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from guardserve.identity import Identity
from guardserve.service.answer import Answer
from guardserve.service.heads import CUT_SHORT, RefusedHeadError, answer_to, check_head, check_size, spoken
from guardserve.service.leaving import LINGER, LOOK_INTERVAL, LeavingConnection
from guardserve.service.throttle import Throttle

HEADER_TIMEOUT = 10.0
"""Seconds from a connection's first moment, or from a request's first byte, until its headers are whole.

As many are left for a body that comes after its request was answered, and for the request behind it.
"""

SLACK = 64
"""Connections beyond the limit that are still taken, for health and metrics; each is closed after one answer."""

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
"""What tells: a client that waits passes it over, one that has gone has nobody who would take it."""


class _OverError(Exception):
    """Something behind the last answer."""


class BoundedConnection(LeavingConnection):
    """uvicorn's connection, with an end to one that never sends a request or all its headers, or takes no answer."""

    # these belong to the server: it makes a class of its own, see connection_class
    max_connections = 1024
    throttle: Throttle
    unreadable: Callable[[], object]

    _looking: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin, unless there are far too many already; the one that has said nothing for longest then makes room."""
        if len(self.connections) >= self.max_connections + SLACK:
            others: Any = self.connections
            silent = [other for other in others if other.is_idle and not other.transport.is_closing()]
            if not silent:
                transport.abort()
                return
            min(silent, key=_since).transport.abort()
        super().connection_made(transport)
        self.parser.set_dangerous_leniencies(lenient_version=True)  # it would refuse 1.2; see spoken
        self._waiting = self.loop.call_later(HEADER_TIMEOUT, self._give_up)
        self._refusal: Callable[[], object] = bool
        self._unread = 0  # bytes since there was last a body or its headers
        self._patience = HEADER_TIMEOUT
        self._idle_since: float | None = None

    @property
    def is_idle(self) -> bool:
        """Whether it has asked for nothing yet, or has its last answer."""
        cycle: Any = self.cycle
        return cycle is None or (self._stage == "over" and not self.transport.get_write_buffer_size())

    @property
    def _is_answering(self) -> bool:
        """Whether a request that is whole has no answer yet."""
        cycle: Any = self.cycle
        waits = cycle is not None and not cycle.response_complete
        return bool(self.pipeline) or (waits and self._stage in ("nothing", "head"))

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        super().connection_lost(exc)
        if self._looking is not None:
            self._looking.cancel()

    def data_received(self, data: bytes) -> None:
        """Take what has come; where nothing is being answered, wait only so long for the rest."""
        if self._stage in ("refused", "over"):
            return
        self._idle_since = None
        rested = self._stage == "nothing" and not self._unread
        self._unread += len(data)
        try:
            rest = self._parse(data)
            at_once = rested and not rest
            while rest:
                rest = self._parse(rest)
            check_size(self._unread)
        except (httptools.HttpParserError, RefusedHeadError) as error:
            self._refuse(error)
            return
        self.have_read(data, at_once=at_once)
        if self._waiting is None and (self._stage == "head" or self.cycle.response_complete):
            self._waiting = self.loop.call_later(HEADER_TIMEOUT, self._give_up)

    def have_read(self, data: bytes, *, at_once: bool) -> None:
        """Go on when what has come was read.

        Args:
            data: That.
            at_once: Whether it began with a request, and was read in one go.
        """

    def eof_received(self) -> bool:  # type: ignore[override] # asyncio's own may say so, uvicorn's does not
        """Answer a client that sends no more; TLS has no such connection."""
        cycle: Any = self.cycle
        self._heard_all = True
        if self._stage == "refused":
            return self._can_answer_later()
        if self._stage == "over" or (cycle is not None and cycle.response_started and not cycle.response_complete):
            return False
        if self._is_answering:
            if self.scheme == "https":
                return False
            cycle.keep_alive = False
            self._looking = self.loop.call_later(LOOK_INTERVAL, self._look, cycle)
            return True
        if self._stage == "nothing" or (self._stage != "head" and cycle.response_complete):
            return False
        self._refuse(RefusedHeadError(CUT_SHORT))
        return self._can_answer_later()

    def on_message_begin(self) -> None:
        """Begin a request, unless it came behind the last one that is answered."""
        if self._stage == "over":
            raise _OverError
        self._stage, self._unread = "head", 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Go on with a request whose headers are whole."""
        version = spoken(self.parser.get_http_version())
        check_head(version, self.url, self.headers)
        if self.parser.should_upgrade():  # it is read again, see _parse
            return
        self._stage, self._unread = "headers", 0
        if self._waiting is not None:
            self._stop_waiting()
        super().on_headers_complete()
        cycle: Any = self.cycle
        cycle.transport = self._outlet
        cycle.scope["http_version"] = version

    def on_body(self, body: bytes) -> None:
        """Take a part of a request's body."""
        self._stage, self._unread = "body", 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Take the end of a request's body."""
        if self.parser.should_upgrade():
            return
        self._stage, self._unread = "nothing", 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Go on with the next request, or wait for it: uvicorn's, but with a timer that many requests share."""
        self.server_state.total_requests += 1
        self._see_answer_off()
        if self._stage == "over" or self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            BoundedConnection._start_asgi_task(self, *self.pipeline.pop())
            return
        self._idle_since = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._wait_for_request(self.timeout_keep_alive)

    def timeout_keep_alive_handler(self) -> None:
        """End a connection on which nothing has come for so long."""
        self.timeout_keep_alive_task = None
        if self._idle_since is None:
            return
        left = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if left > 0:
            self._wait_for_request(left)
        else:
            self._close()

    def shutdown(self) -> None:
        """Stop, once what was asked is answered; a body of which nothing has come is not waited for."""
        self._patience = LINGER
        self.throttle.open()
        if self._stage == "over":
            self._leave()  # with less time, if it had more
            return
        cycle: Any = self.cycle
        if cycle is None or cycle.response_complete or self.transport.is_closing():
            self._close()
            return
        cycle.keep_alive = False
        if self._stage == "headers" and self._waiting is None:
            self._waiting = self.loop.call_later(LINGER, self._give_up_body)

    def needs_forward(self, app: Any, cycle: Any) -> bool:
        """Tell whether a request is for a forward, as far as is known; others wait for their turn."""
        del app, cycle
        return True

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        """Begin with a request, when it is its turn."""
        if self.needs_forward(app, cycle):
            super()._start_asgi_task(cycle, app)
        else:
            self.throttle.call(functools.partial(self._take_turn, cycle, app))

    def _take_turn(self, cycle: Any, app: Any) -> bool:
        if cycle.disconnected:
            return False
        super()._start_asgi_task(cycle, app)
        return True

    def _parse(self, data: bytes) -> bytes:
        """Read on, and return what is to be read again: a request that asked for another protocol, but without that."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            method = self.parser.get_method()
            if method == b"CONNECT":
                raise httptools.HttpParserError("there is nothing to connect to") from None
            lines = [b"%b %b HTTP/%b" % (method, self.url, spoken(self.parser.get_http_version()).encode())]
            lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
            self.parser = httptools.HttpRequestParser(self)  # this one takes nothing more after "Connection: close"
            self.parser.set_dangerous_leniencies(lenient_version=True)
            return b"\r\n".join([*lines, b"", data[upgrade.args[0] :]])
        return b""

    def _refuse(self, error: Exception) -> None:
        """Answer what cannot be read, and end; but what was whole before has its answer first, and no other."""
        if self._stage == "over":
            return
        self.logger.warning("Invalid HTTP request received.")
        self.unreadable()
        cycle: Any = self.cycle
        if self._is_answering:
            cycle.keep_alive = False
            self.flow.pause_reading()
            return
        if cycle is not None and cycle.response_started and not cycle.response_complete:
            self._close()
            return
        answer = answer_to(error, self.parser.get_http_version())
        bare = bool(self.url) and self.parser.get_method() == b"HEAD"
        self._drop_request(None if self._heard_all else answer)  # most that end their side have gone
        self._stage = "refused"
        self._refusal = functools.partial(self._leave_with, answer, bare=bare)
        self.throttle.call(self._refusal)

    def _can_answer_later(self) -> bool:
        """Tell whether a refused client that sends no more can wait for its turn; else, over TLS, answer it now."""
        if self.scheme != "https":
            return True
        self._refusal()
        return False

    def _leave_with(self, answer: Answer, *, bare: bool) -> bool:
        """Write the last answer, perhaps without its body, unless the client has gone or has had it."""
        if self._stage != "refused" or self.transport.is_closing():
            return False
        end = b"connection: close\r\n\r\n"
        self._write(answer.named(Identity({})), self.server_state.default_headers, end, bare=bare)
        self._leave()
        return True

    def _write(
        self, answer: Answer, default_headers: Sequence[tuple[bytes, bytes]], end: bytes, *, bare: bool = False
    ) -> None:
        own = [b"%b: %b\r\n" % (name.lower(), value) for name, value in answer.headers]
        length = b"content-length: %d\r\n" % len(answer.body)
        head = (STATUS_LINE[answer.status], _lines(default_headers), *own, length, end)
        self.transport.write(b"".join(head if bare else (*head, answer.body)))

    def _look(self, cycle: Any, *, asked: bool = False) -> None:
        """End a connection that the other side has closed: as long as it is sent nothing, it looks like one that waits.

        Args:
            cycle: The last request.
            asked: Whether it was sent something.
        """
        if self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
            return
        if not asked and not self.pipeline and not cycle.response_started and cycle.scope["http_version"] == "1.1":
            self.transport.write(CONTINUE)
            asked = True
        self._looking = self.loop.call_later(LOOK_INTERVAL, functools.partial(self._look, cycle, asked=asked))

    def _wait_for_request(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def _give_up(self) -> None:
        self._waiting = None
        # while requests wait for their turn nothing is read: it is not the client who lets the other wait
        if not self.pipeline and not self.transport.is_closing():
            self._close()

    def _give_up_body(self) -> None:
        self._waiting = None
        if self._stage == "headers":
            self._give_up()


def _since(connection: BoundedConnection) -> float:
    """Return when a connection ends if it sends no request, which tells how long it has been there."""
    return 0.0 if connection._waiting is None else connection._waiting.when()  # noqa: SLF001 - one of its own kind


_written: tuple[Sequence[tuple[bytes, bytes]], bytes] = ((), b"")


def _lines(headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Write the headers that all answers have, which uvicorn makes anew once a second, as lines."""
    global _written  # noqa: PLW0603 - the last ones
    if _written[0] is not headers:
        _written = headers, b"".join([b"%b: %b\r\n" % header for header in headers])
    return _written[1]
