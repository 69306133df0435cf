"""A worker's end of the line: it reports what it has counted, and shows what all have."""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TypeVar

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from guardserve.exceptions import GuardserveError
from guardserve.loading.imported import ImportedCode
from guardserve.metrics import Metrics, pooled_families
from guardserve.monitor import Seen
from guardserve.service.versions import ReloadError, ReloadRunningError, Versions
from guardserve.workers.contents import contents
from guardserve.workers.families import replaced
from guardserve.workers.messages import (
    Collect,
    Decide,
    Decided,
    Failed,
    Hurry,
    Line,
    Listen,
    Outcome,
    Pooled,
    Prepare,
    Prepared,
    Ready,
    Reload,
    Report,
    Scrape,
    Up,
    Upward,
)

T = TypeVar("T")

_log = logging.getLogger(__name__)

SCRAPE_TIMEOUT = 5.0
"""Seconds to wait for the supervisor, which waits for workers much less long."""


class Link(Collector):
    """Tells the supervisor what this worker has counted, and collects what all have.

    Args:
        connection: The line to the supervisor.
        code: What was imported to load the model.

    Attributes:
        admitted: Whether this worker may take connections.
    """

    def __init__(self, connection: Connection, code: ImportedCode) -> None:
        self._line = Line(connection)
        self._code = code
        self.admitted = False
        self._tickets = itertools.count()
        self._scrapes: dict[int, Future[Pooled]] = {}
        self._reloads: dict[int, Future[Outcome]] = {}
        self._answers: SimpleQueue[Callable[[], Upward]] = SimpleQueue()
        self._last = Report(None, [])

    def attach(self, metrics: Metrics, leave: Callable[[], object]) -> None:
        """Report these metrics from now on, and have scrapes show those of all workers.

        Args:
            metrics: This worker's.
            leave: Called, in a thread, when the supervisor is in a hurry, or gone.
        """
        self._metrics = metrics
        metrics.exposed = self
        threading.Thread(target=self._listen, args=(leave,), name="guardserve-link", daemon=True).start()
        threading.Thread(target=self._tell, name="guardserve-report", daemon=True).start()

    def ready(self, versions: Versions) -> None:
        """Say that this worker would take connections, and what it has loaded; call it on the event loop.

        Args:
            versions: Those of its model, which it loads again when it is told to.
        """
        self._versions = versions
        self._loop = asyncio.get_running_loop()
        self._say(Ready(contents(versions.current, self._code)))

    def up(self) -> None:
        """Say that this worker takes connections."""
        self._metrics.begin_summaries()
        self._say(Up())

    async def reload(self) -> None:
        """Have all workers load their model again.

        Raises:
            ReloadRunningError: If they do already.
            ReloadError: If one of them cannot; then none does.
        """
        ticket = next(self._tickets)
        told = self._reloads[ticket] = Future()
        try:
            await asyncio.get_running_loop().run_in_executor(None, self._line.send, Reload(ticket))
            outcome = await asyncio.wrap_future(told)
        except OSError as error:
            raise ReloadError("the supervisor of this worker is gone") from error
        finally:
            del self._reloads[ticket]
        if outcome.failure is not None:
            raise (ReloadRunningError if outcome.running else ReloadError)(outcome.failure)

    def fail(self, reason: str) -> None:
        """Say why this worker does not start."""
        self._say(Failed(reason))

    def close(self) -> None:
        """Say the last word: what was counted to the end."""
        summaries = self._metrics.take_summaries()
        self._say(Report(None, list(self._metrics.registry.collect()), summaries=summaries))

    def collect(self) -> Iterator[Metric]:
        """Yield what all workers have counted, and what this one's monitor makes of what all have seen.

        Raises:
            GuardserveError: If the supervisor does not tell. With what one worker has counted counters would go back.
        """
        ticket = next(self._tickets)
        answer = self._scrapes[ticket] = Future()
        try:
            self._line.send(Scrape(ticket))
            pooled = answer.result(SCRAPE_TIMEOUT)
        except (OSError, FutureTimeoutError) as error:
            raise GuardserveError("the supervisor of this worker does not answer: there are no metrics now") from error
        finally:
            del self._scrapes[ticket]
        runtime = self._metrics.runtime
        seen = pooled.seen if pooled.version == runtime.fingerprint else Seen()  # it was loaded again just now
        verdict = runtime.monitor.judge(seen, pooled.detection)
        yield from replaced(pooled.families, list(pooled_families(runtime.name, verdict)))

    def _say(self, message: Upward) -> None:
        try:
            self._line.send(message)
        except OSError:
            _log.warning("the supervisor of this worker is gone")

    def _listen(self, leave: Callable[[], object]) -> None:
        while True:
            try:
                self._hear(self._line.receive(), leave)
            except (EOFError, OSError):  # noqa: PERF203 - the end of the line is that of the loop
                break
        _log.error("the supervisor of this worker is gone: it answers what it has accepted, and ends")
        leave()
        for told in list(self._reloads.values()):
            _settle(told, Outcome(0, "the supervisor of this worker is gone"))

    def _hear(self, message: object, leave: Callable[[], object]) -> None:
        """Take a message; what takes long or may have to wait is done elsewhere."""
        if isinstance(message, Collect):
            self._answers.put(functools.partial(self._report, message))
        elif isinstance(message, Listen):
            self.admitted = True
        elif isinstance(message, Hurry):
            leave()
        elif isinstance(message, Pooled) and (waiting := self._scrapes.get(message.ticket)) is not None:
            _settle(waiting, message)
        elif isinstance(message, Outcome) and (told := self._reloads.get(message.ticket)) is not None:
            _settle(told, message)
        elif isinstance(message, (Prepare, Decide)):
            work = self._prepare(message) if isinstance(message, Prepare) else self._decide(message)
            try:
                asyncio.run_coroutine_threadsafe(work, self._loop)
            except RuntimeError:  # the server has ended, and this thread is about to
                work.close()

    async def _prepare(self, message: Prepare) -> None:
        try:
            answer = Prepared(message.number, contents(await self._versions.prepare(), self._code))
        except ReloadError as error:
            answer = Prepared(message.number, failure=str(error))
        except Exception as error:  # noqa: BLE001 - the others wait for an answer
            _log.exception("this worker could not load its model again")
            answer = Prepared(message.number, failure=f"{type(error).__name__}: {error}")
        self._answers.put(lambda: answer)

    async def _decide(self, message: Decide) -> None:
        try:
            if message.commit:
                self._versions.commit()
        except Exception:  # noqa: BLE001 - the others wait for an answer
            _log.exception("this worker could not let the new version of its model answer")
        decided = Decided(message.number, contents(self._versions.current, self._code))
        self._answers.put(lambda: decided)
        await self._versions.abandon()

    def _tell(self) -> None:
        """Answer what was asked, while the line is read on: else both ends could wait for the other to read."""
        while True:
            self._say(self._answers.get()())

    def _report(self, asked: Collect) -> Report:
        try:
            runtime = self._metrics.runtime
            families = list(self._metrics.registry.collect())
            window, seen = runtime.monitor.window(asked.since)
            summaries = self._metrics.take_summaries()
        except Exception:  # noqa: BLE001 - the server goes on, and the supervisor goes by what it has
            _log.exception("this worker could not tell its metrics")
            return replace(self._last, round=asked.round, summaries=())
        self._last = Report(asked.round, families, runtime.fingerprint, window, seen, summaries)
        return self._last


def _settle(waiting: Future[T], result: T) -> None:
    """Tell a thread or task that waits, unless it has given up."""
    with suppress(InvalidStateError):
        waiting.set_result(result)
