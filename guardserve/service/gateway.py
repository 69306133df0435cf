"""The way of an inference request through ASGI, without a web framework in between."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping

from starlette.types import Receive, Scope, Send

from guardserve.identity import Identity, current, identified
from guardserve.metrics import Metrics
from guardserve.service.answer import CLIENT_CLOSED_REQUEST, INTERNAL, REFUSAL, Answer, refusal
from guardserve.service.holding import Held, Holding, RefusedBodyError
from guardserve.service.inference import Inference, Pending
from guardserve.service.limits import Limits
from guardserve.service.report import Reporter

_log = logging.getLogger(__name__)

DISCONNECTED = refusal(CLIENT_CLOSED_REQUEST, "disconnected", "the request was not whole")
PAUSE = 100e-6
"""Seconds for which the event loop pauses when requests are refused or have failed."""

PAUSE_INTERVAL = 200e-6
"""Seconds between two pauses, at least: many requests may fail together."""

_next_pause = 0.0

CLOSE = ((b"connection", b"close"),)


class Gateway:
    """An ASGI application that answers inference requests for one model.

    Args:
        inference: What answers a request once it is whole.
        metrics: Where it is counted.
        limits: What is accepted.

    Attributes:
        inference: What answers a request that is whole now. Another version of the model takes its place by being
            put here, on the event loop; what was whole before has its answer from the one that was here then.
    """

    def __init__(self, inference: Inference, metrics: Metrics, limits: Limits) -> None:
        self.inference = inference
        self._metrics = metrics
        self._limits = limits
        self._holding = Holding(limits)
        self._reporter = Reporter(metrics.model)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        answer = await self.counted(self._answer(scope, receive))
        await answer.send(send)

    async def counted(self, answering: Awaitable[Answer]) -> Answer:
        """Await the answer to an inference request, and count it."""
        started = time.perf_counter()
        metrics = self._metrics
        metrics.in_flight += 1
        answer = INTERNAL
        try:
            answer = await answering
        except Exception:  # noqa: BLE001 - a fault of ours is an answer too, and counted
            _log.exception("an inference request failed")
        finally:
            metrics.in_flight -= 1
            self._ended(answer, time.perf_counter() - started, current())
        return answer

    def refused(self, answer: Answer) -> None:
        """Count an inference request that was refused before it came here."""
        self._ended(answer, 0.0, current())

    def begin(self, body: bytes, headers: Mapping[bytes, bytes], send: Callable[[Answer], object]) -> Pending | None:
        """Answer a small request that is whole, past ASGI, and count it; see :meth:`Inference.begin`."""
        started = time.perf_counter()
        metrics = self._metrics
        metrics.in_flight += 1
        held = Held(self._holding)
        identity = Identity(headers)
        answered = False

        def ended(answer: Answer) -> None:
            nonlocal answered
            if answered:  # and could not be sent
                return
            answered = True
            held.keep(0)
            metrics.in_flight -= 1
            self._ended(answer, time.perf_counter() - started, identity)
            send(answer.named(identity))

        with identified(identity):
            try:
                held.take(body)
                return self.inference.begin(body, headers, ended, held)
            except RefusedBodyError as refused:
                ended(refused.answer)
            except Exception:  # noqa: BLE001 - a fault of ours is an answer too, and counted
                _log.exception("an inference request failed")
                ended(INTERNAL)
            return None

    def _ended(self, answer: Answer, seconds: float, identity: Identity | None) -> None:
        self._metrics.request_ended(answer.status, seconds, answer.reason, identity)
        if answer.reason is not None:
            self._reporter.report(answer, identity)
            give_way()

    async def _answer(self, scope: Scope, receive: Receive) -> Answer:
        headers: Mapping[bytes, bytes] = dict(scope["headers"])
        held = Held(self._holding)
        try:
            length = headers.get(b"content-length", b"")
            if length.isdigit():
                self._holding.check(int(length[:18]))
            body = await self._whole(held, receive, scope.get("state", {}))
            if scope["path"] not in self.inference.paths:  # it names a version that was replaced meanwhile
                return refusal(404, "not_found", f"{scope['path']} names a version that is served no more")
            answering = self.inference.answer(body, headers, receive, held)
            del body  # it is let go of when it has been read
            return await answering
        except RefusedBodyError as refused:
            return refused.answer
        finally:
            held.keep(0)

    async def _whole(self, held: Held, receive: Receive, state: Mapping[str, Answer]) -> bytes:
        """Read a body."""
        try:
            return await asyncio.wait_for(_received(held, receive, state), self._limits.body_timeout)
        except (asyncio.TimeoutError, TimeoutError):
            text = f"the request's body took longer than {self._limits.body_timeout:g} s to arrive"
            raise RefusedBodyError(refusal(408, "slow_body", text, CLOSE)) from None


async def _received(held: Held, receive: Receive, state: Mapping[str, Answer]) -> bytes:
    """Take every part of a body."""
    parts = []
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RefusedBodyError(state.get(REFUSAL, DISCONNECTED))
        held.take(message["body"])
        parts.append(message["body"])
        more = message.get("more_body", False)
    return b"".join(parts)


def give_way() -> None:
    """Let the forward's thread have the interpreter.

    It lets go of that for each operation of a model, and a loop that does not pause takes it again before the other
    thread has woken up: a flood of requests to refuse would slow forwards down to a tenth.
    """
    global _next_pause  # noqa: PLW0603 - of all gateways, as the interpreter is
    if time.monotonic() >= _next_pause:
        time.sleep(PAUSE)
        _next_pause = time.monotonic() + PAUSE_INTERVAL
