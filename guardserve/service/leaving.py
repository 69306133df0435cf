"""How a connection ends: behind its last answer, which its client is to have whole."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from guardserve.service.answer import REFUSAL, Answer
from guardserve.service.delivery import Delivery

LINGER = 0.5
"""Seconds that what comes behind the last answer is read once that is taken.

As many are left, when the server stops, for a body of which nothing has come.
"""

LOOK_INTERVAL = 0.05
"""Seconds between two looks whether a client that sends no more is still there to take its answer.

Over TLS, as many until the first look whether it has taken its last one.
"""


class Flow(FlowControl):
    """uvicorn's, which also reads on while pipelined requests wait: a client could send more of them without end."""

    def __init__(self, transport: asyncio.Transport, pipeline: deque[Any]) -> None:
        super().__init__(transport)
        self._pipeline = pipeline

    def resume_reading(self) -> None:
        """Read on, if all that came before is being answered."""
        if not self._pipeline:
            super().resume_reading()


class Outlet:
    """Where uvicorn writes an answer: the transport, but closed as its connection wishes.

    When a client goes, uvicorn tells that to the last of its pipelined requests alone.
    """

    __slots__ = ("_write", "close", "is_closing")

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self._write = transport.write
        self.is_closing = transport.is_closing
        self.close = close

    def write(self, data: bytes) -> None:
        """Write, unless nobody is there any more."""
        if not self.is_closing():
            self._write(data)


class LeavingConnection(HttpToolsProtocol):
    """uvicorn's connection, which waits until its client has its last answer, but not for what else that sends."""

    def connection_made(self, transport: Any) -> None:
        """Begin."""
        super().connection_made(transport)
        self.flow = Flow(transport, self.pipeline)
        self._outlet = Outlet(transport, self._leave)
        self._delivery = Delivery(transport, self.loop)
        self._waiting: asyncio.TimerHandle | None = None
        # what has come of the request that is being read
        self._stage: Literal["nothing", "head", "headers", "body", "refused", "over"] = "nothing"
        self._patience = LINGER
        self._heard_all = False

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        if self.transport is not None:
            self._stop_waiting()
            self._delivery.stop()
            super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Write no more: the client does not take what there is."""
        super().pause_writing()
        self._see_answer_off()

    def _drop_request(self, answer: Answer | None = None) -> None:
        """Tell the application that nobody waits for its answer any more, and what was answered in its place."""
        cycle: Any = self.cycle
        if cycle is not None and not cycle.response_complete:
            if answer is not None:
                cycle.scope["state"][REFUSAL] = answer
            cycle.disconnected = True
            cycle.waiting_for_100_continue = False  # uvicorn would still tell it to go on
            cycle.message_event.set()

    def _leave(self) -> None:
        """Close behind the last answer, in stages: with input that nobody has read, the kernel would take it back.

        What else the client sends is dropped for a while (RFC 9112, 9.6), a body as long as that of any early answer.
        """
        self._stop_waiting()
        self._drop_request()
        if self.transport.is_closing():
            return
        if self._heard_all or not self.transport.can_write_eof():  # all is read, or TLS sees to it
            self._close()
            self._see_answer_off()
            return
        try:
            self.transport.write_eof()
        except OSError:  # the client has gone
            self.transport.abort()
            return
        limit = self._patience if self._stage in ("headers", "body") else LINGER
        self._waiting = self.loop.call_later(limit, self._let_go)
        self._pass_over()

    def _pass_over(self) -> None:
        """See the last answer off, and take nothing else."""
        self._stage = "over"
        self._delivery.begin()
        self.pipeline.clear()
        self.flow.resume_reading()

    def _see_answer_off(self) -> None:
        """Have the connection end if what is left of an answer is not taken."""
        if self.transport.get_write_buffer_size():
            self._delivery.begin()

    def _close(self) -> None:
        """Close behind what there is to send.

        TLS would cut what is not taken within half a minute, and wait as long for the client to agree.
        """
        self._stop_waiting()
        if self.scheme != "https":
            self.transport.close()
            return
        wait = LINGER
        if not self.transport.is_closing():  # asyncio forgets what there is to send when it is told twice
            if self._delivery.left:
                self._drop_request()
                self._pass_over()
                wait = LOOK_INTERVAL
            else:
                self.transport.close()
        self._waiting = self.loop.call_later(wait, self._let_go)

    def _let_go(self) -> None:
        """End, once the last answer has been taken."""
        self._waiting = None
        if self._delivery.left:
            self._waiting = self.loop.call_later(LINGER, self._let_go)
        elif self.transport.is_closing():
            self.transport.abort()
        else:
            self._close()

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
