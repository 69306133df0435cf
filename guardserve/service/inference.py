"""Inference requests on the event loop: read, queued for the engine, waited for, written."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from reprlib import repr as shown
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import torch

from guardserve.engine import Engine, Job, Result
from guardserve.exceptions import GuardserveError
from guardserve.identity import MAX_LENGTH, identified
from guardserve.metrics import Metrics
from guardserve.runtime import Runtime
from guardserve.service.answer import CLIENT_CLOSED_REQUEST, INTERNAL, RETRY_AFTER, Answer, failure, refusal
from guardserve.service.body import json_member
from guardserve.service.holding import Held
from guardserve.service.lanes import Lanes
from guardserve.service.limits import Limits
from guardserve.service.mailbox import Mailbox
from guardserve.service.protocol import InferRequest, ProtocolError
from guardserve.service.reading import Reading, Receive, is_small
from guardserve.service.request import SMALL
from guardserve.service.response import ResponseWriter
from guardserve.service.shift import P_VALUES, ShiftPolicy

Outcome: TypeAlias = Literal["done", "expired", "gone"]

IDLE_INTERVAL = 0.02
"""Seconds between two looks whether the last request has its answer."""

PATROL_INTERVAL = 0.05
"""Seconds between two looks at the requests that wait: for their deadlines, and for clients that have gone."""

MICROSECOND = 1e-6

OnNonFinite: TypeAlias = Literal["error", "flag"]
POLICIES = ("error", "flag")

# parameters of requests and answers that are not the protocol's
ON_NONFINITE = "guardserve_on_nonfinite"
NONFINITE_STRINGS = "guardserve_nonfinite_strings"
NONFINITE = "guardserve_nonfinite"

NOTHING: Mapping[str, object] = MappingProxyType({})

OUTCOMES: Mapping[Outcome, Answer] = {
    "done": refusal(500, "internal", "the request was lost"),
    "gone": refusal(CLIENT_CLOSED_REQUEST, "disconnected", "the client has gone"),
    "expired": refusal(504, "timeout", "the request's time was over before the model had answered"),
}

_log = logging.getLogger(__name__)


class Pending(Job):
    """A request that a client waits for.

    Args:
        inputs: See :class:`Job`, as for the last two.
        ended: Called once, with how it ended.
        receive: ASGI's channel, on which a client that goes away is noticed; None where that is noticed elsewhere.
        deadline: When it is not worth an answer any more, by the monotonic clock.
        allow_nonfinite: See above.
        score: See above.
    """

    __slots__ = ("arrived", "deadline", "ended", "receive", "timer", "watch")

    def __init__(
        self,
        inputs: Sequence[torch.Tensor],
        ended: Callable[[Outcome], object],
        receive: Receive | None,
        deadline: float | None,
        *,
        allow_nonfinite: bool,
        score: bool,
    ) -> None:
        super().__init__(inputs, allow_nonfinite=allow_nonfinite, score=score)
        self.arrived = time.monotonic()
        self.deadline = deadline
        self.receive = receive
        self.ended: Callable[[Outcome], object] | None = ended
        self.watch: asyncio.Task[None] | None = None
        self.timer: asyncio.TimerHandle | None = None

    def settle(self, outcome: Outcome) -> None:
        """Say how it ended; the first one to say so is right."""
        ended, self.ended = self.ended, None
        if ended is not None:
            ended(outcome)


class Inference:
    """Answers inference requests with one version of a model, through an engine.

    Everything but the engine's own thread runs on the event loop. Requests that arrive in one round of the loop are
    handed over together, and come back so.

    Args:
        runtime: The model.
        metrics: Where what happens is counted.
        limits: What is accepted.
        model_version: What the version is called, whichever it is; answers add which it is.
        on_nonfinite: What to do about non-finite outputs where a request does not say.
        shift_policy: What to do about samples unlike the reference.

    Attributes:
        runtime: The model.
        engine: What runs its forwards.
        versions: What the version is called in URLs: as the server was told, and with the model's fingerprint, which
            no other version has.
        paths: Those of its inference requests.
    """

    def __init__(
        self,
        runtime: Runtime,
        metrics: Metrics,
        limits: Limits,
        model_version: str,
        on_nonfinite: OnNonFinite,
        *,
        shift_policy: ShiftPolicy,
    ) -> None:
        self._shift = shift_policy
        self._on_nonfinite = on_nonfinite
        self._metrics = metrics
        self._limits = limits
        self.runtime = runtime
        self.versions = (model_version, f"{model_version}-{runtime.fingerprint}")
        model = f"/v2/models/{runtime.name}"
        self.paths = frozenset([f"{model}/infer", *(f"{model}/versions/{version}/infer" for version in self.versions)])
        # a model that takes one batch size only takes that, whatever the limit
        self._max_batch_size = max(limits.max_batch_size, runtime.static_batch or 1)
        self.engine = Engine(
            runtime,
            self._deliver,
            max_batch_size=self._max_batch_size,
            max_queue_size=limits.max_queue_size,
            max_queue_delay=limits.max_queue_delay,
            forward_timeout=limits.forward_timeout,
            self_test_interval=limits.self_test_interval,
            forward_ended=metrics.forward_ended,
        )
        self._lanes = Lanes()
        self._reading = Reading(runtime, limits, self._max_batch_size, self._lanes)
        self._writer = ResponseWriter(runtime.name, self.versions[-1])
        self._pending: dict[Pending, None] = {}
        self._done: Mailbox[Sequence[Job]] | None = None
        self._patrolling = False
        self._arrivals = 0
        self._arrivals_seen = 0
        self._alone = False

    def start(self) -> asyncio.Future[GuardserveError | None]:
        """Start the engine, which probes the model; call it on the event loop.

        Returns:
            What tells, once the model was probed, why it did not pass, if so.
        """
        loop = asyncio.get_running_loop()
        self._done = Mailbox(self._settle)
        started: asyncio.Future[GuardserveError | None] = loop.create_future()

        def tell(failure: GuardserveError | None) -> None:
            with suppress(RuntimeError):  # the loop was closed
                loop.call_soon_threadsafe(_tell, started, failure)

        self.engine.start(tell)
        return started

    async def idle(self) -> None:
        """Wait until every request that came here has its answer; none may come any more."""
        while self._pending or self._lanes.busy:  # noqa: ASYNC110 - an event would cost every request
            await asyncio.sleep(IDLE_INTERVAL)

    async def close(self, timeout: float | None) -> None:
        """Finish the work that was accepted, for so many seconds, then stop the engine."""
        await asyncio.get_running_loop().run_in_executor(None, self.engine.close, timeout)
        if self._done is not None:
            self._done.close()
        self._lanes.close()

    async def answer(self, body: bytes, headers: Mapping[bytes, bytes], receive: Receive, held: Held) -> Answer:
        """Answer one request.

        Args:
            body: Its body, all of it.
            headers: Its headers by their lower-case names.
            receive: ASGI's channel, on which a client that goes away is noticed.
            held: What it holds, so far its body.

        Raises:
            RefusedBodyError: If there is no room for what is made of the body.
        """
        if self.runtime.failure is not None:
            return self._unready()
        ended: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        try:
            self.engine.check_room()
            if is_small(body, headers):
                request = self._reading.read(body, headers, held)
            else:
                reading = await self._reading.aside(body, headers, receive, held)
                if not isinstance(reading, InferRequest):
                    return OUTCOMES[reading]
                request = reading
            del body
            job = self._submit(request, functools.partial(_end, ended), receive)
        except GuardserveError as error:
            return failure(error, self.runtime.name)
        try:
            outcome = await ended
        finally:
            self._forget(job)
        failed = self._failed(job, outcome)
        if failed is not None or job.result is None:
            return failed or OUTCOMES["done"]
        write = functools.partial(self._write, job.result, request)
        return await self._lanes.short(write) if _is_large(job.result) else write()

    def begin(
        self, body: bytes, headers: Mapping[bytes, bytes], send: Callable[[Answer], object], held: Held
    ) -> Pending | None:
        """Answer one small request without a task of its own.

        Args:
            body: Its body, all of it; see :func:`is_small`.
            headers: Its headers by their lower-case names.
            send: Called with the answer, perhaps at once, and always, unless something is raised.
            held: What it holds, so far its body.

        Returns:
            What waits for its forward; settle it as ``"gone"`` if the client goes away. None if that is over already.

        Raises:
            RefusedBodyError: If there is no room for what is made of the body.
        """
        if self.runtime.failure is not None:
            send(self._unready())
            return None

        def ended(outcome: Outcome) -> None:
            self._forget(job)
            try:
                answer = self._failed(job, outcome)
                if answer is None and job.result is not None:
                    if _is_large(job.result):
                        writing = asyncio.ensure_future(
                            self._lanes.short(functools.partial(self._write, job.result, request))
                        )
                        with identified(job.identity):
                            writing.add_done_callback(lambda written: send(_written(written)))
                        return
                    answer = self._write(job.result, request)
            except Exception:  # noqa: BLE001 - others are to be told how they ended, whatever went wrong here
                with identified(job.identity):
                    _log.exception("an answer could not be written")
                answer = INTERNAL
            send(answer or OUTCOMES["done"])

        try:
            self.engine.check_room()  # however the request reads: to refuse costs less than that
            request = self._reading.read(body, headers, held)
            job = self._submit(request, ended, None)
        except GuardserveError as error:
            send(failure(error, self.runtime.name))
            return None
        return job

    def _unready(self) -> Answer:
        return refusal(503, "not_ready", f"the model is not ready: {self.runtime.failure}", RETRY_AFTER)

    def _failed(self, job: Pending, outcome: Outcome) -> Answer | None:
        """Return the answer to a request that failed; None if it has not."""
        if outcome != "done" or job.result is None:
            return OUTCOMES[outcome]
        if job.result.error is not None:
            with identified(job.identity):
                return failure(job.result.error, self.runtime.name)
        return self._shift.refusal(job.result.p_values)

    def _write(self, result: Result, request: InferRequest) -> Answer:
        found = "; ".join(map(str, result.nonfinite))
        parameters = {NONFINITE: found} if found else NOTHING
        if result.p_values is not None:
            asked = bool(request.parameters.get(P_VALUES))
            parameters = {**parameters, **self._shift.parameters(result.p_values, asked=asked)}
        strings = self._strings(request)
        try:
            body, headers = self._writer.write(result.outputs, request, parameters, nonfinite_strings=strings)
        except ProtocolError as error:
            return failure(error, self.runtime.name)
        except ValueError:  # the model gave what JSON lacks, and the client has not said how to write it
            hint = f"ask for it in binary, or for strings with the parameter {NONFINITE_STRINGS}"
            return refusal(500, "nonfinite_output", f"the model gave a non-finite output: {found}; {hint}")
        return Answer(200, body, headers)

    def _submit(self, request: InferRequest, ended: Callable[[Outcome], object], receive: Receive | None) -> Pending:
        loop = asyncio.get_running_loop()
        self._strings(request)  # which is refused, if need be, before the forward
        timeout, own = self._timeout(request)
        deadline = None if timeout is None else time.monotonic() + timeout
        job = Pending(
            list(request.inputs.values()),
            ended,
            receive,
            deadline,
            allow_nonfinite=self._flags(request),
            score=self._scores(request),
        )
        if request.id is not None and job.identity is not None:
            job.identity.protocol_id = request.id[:MAX_LENGTH]
        self.engine.submit(job)
        self._pending[job] = None
        if own and timeout is not None:
            job.timer = loop.call_later(timeout, self._expire, job)
        if not self._patrolling:
            self._patrolling = True
            loop.call_later(PATROL_INTERVAL, self._patrol)
        if self._alone:  # nothing came with the last one, so nothing is waited for now
            self.engine.wake()
        elif self._arrivals == 0:
            loop.call_soon(self._hand_over)
        self._arrivals += not self._alone
        return job

    def _strings(self, request: InferRequest) -> bool:
        """Tell whether non-finite outputs in JSON are to be written as strings."""
        return json_member(request.parameters, NONFINITE_STRINGS, bool, "the request's parameters") or False

    def _timeout(self, request: InferRequest) -> tuple[float | None, bool]:
        """Return the seconds that a request may take, and whether it said so itself, in microseconds."""
        micros = json_member(request.parameters, "timeout", int, "the request's parameters")
        default = self._limits.request_timeout
        if not micros:
            return default, False
        if micros < 0:
            raise ProtocolError(f"timeout of the request's parameters is {micros}, not a number of microseconds")
        seconds = micros * MICROSECOND
        return (seconds, True) if default is None or seconds < default else (default, False)

    def _flags(self, request: InferRequest) -> bool:
        """Tell whether non-finite outputs are to be sent, and told of."""
        policy = request.parameters.get(ON_NONFINITE, self._on_nonfinite)
        if policy not in POLICIES:
            raise ProtocolError(f"{ON_NONFINITE} of the request's parameters is {shown(policy)}, not error or flag")
        return policy == "flag"

    def _scores(self, request: InferRequest) -> bool:
        """Tell whether the request asks how odd its samples are."""
        asked = json_member(request.parameters, P_VALUES, bool, "the request's parameters") or False
        if asked and not self.runtime.scores:
            raise ProtocolError(f"{P_VALUES} of the request's parameters needs a server with a reference profile")
        return asked or (self._shift.action != "observe" and self.runtime.scores)

    def _hand_over(self) -> None:
        """Wake the engine once a round of the loop has brought nothing new."""
        loop = asyncio.get_running_loop()
        if self._arrivals > self._arrivals_seen:
            self._arrivals_seen = self._arrivals
            loop.call_soon(self._hand_over)
            return
        self._arrivals = self._arrivals_seen = 0
        self.engine.wake()

    def _deliver(self, jobs: Sequence[Job]) -> None:
        """Take back a batch, on the engine's thread."""
        if self._done is not None:
            self._done.put(jobs)

    def _settle(self, jobs: Sequence[Any]) -> None:
        self._alone = len(jobs) == 1 == len(self._pending)
        for job in jobs:
            self._metrics.queue.observe(job.began_at - job.queued_at)
            try:
                job.settle("done")
            except Exception:  # noqa: BLE001 - others are to have their answers, whatever went wrong here
                _log.exception("an answer could not be sent")

    def _expire(self, job: Pending) -> None:
        self.engine.drop(job)
        job.settle("expired")

    def _forget(self, job: Pending) -> None:
        """Let go of a request whose handler goes on, or is cancelled."""
        self._pending.pop(job, None)
        if job.watch is not None:
            job.watch.cancel()
        if job.timer is not None:  # it would keep the answer, and the model, until then
            job.timer.cancel()
        self.engine.drop(job)

    def _patrol(self) -> None:
        """Expire what is past its deadline, and watch the clients of what takes long."""
        now = time.monotonic()
        for job in list(self._pending):
            if job.deadline is not None and job.deadline <= now:
                self._expire(job)
            elif job.receive is not None and job.watch is None and now - job.arrived >= PATROL_INTERVAL:
                job.watch = asyncio.get_running_loop().create_task(self._watch(job, job.receive))
        self._patrolling = bool(self._pending)
        if self._patrolling:
            asyncio.get_running_loop().call_later(PATROL_INTERVAL, self._patrol)

    async def _watch(self, job: Pending, receive: Receive) -> None:
        """Drop a request whose client goes away: after the body nothing else can come."""
        message = await receive()
        if message["type"] == "http.disconnect":
            self.engine.drop(job)
            job.settle("gone")


def _end(ended: asyncio.Future[Outcome], outcome: Outcome) -> None:
    """Wake who awaits a request's end, unless he was cancelled."""
    if not ended.done():
        ended.set_result(outcome)


def _tell(started: asyncio.Future[GuardserveError | None], failure: GuardserveError | None) -> None:
    """Tell who waits for the model to start how that ended, unless he was cancelled."""
    if not started.done():
        started.set_result(failure)


def _is_large(result: Result) -> bool:
    """Tell whether an answer is not written on the event loop."""
    return sum([tensor.nbytes for tensor in result.outputs.values()]) > SMALL


def _written(writing: asyncio.Future[Answer]) -> Answer:
    """Return an answer that was written aside."""
    error = asyncio.CancelledError() if writing.cancelled() else writing.exception()
    if error is None:
        return writing.result()
    _log.error("an answer could not be written", exc_info=error)
    return INTERNAL
