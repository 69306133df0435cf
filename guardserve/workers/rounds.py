"""How workers are asked what they have counted and seen, all at once, for whoever scrapes and for the detector."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence

from guardserve.workers.messages import Collect, Pooled, Report
from guardserve.workers.pool import Pool
from guardserve.workers.worker import Worker

_log = logging.getLogger(__name__)

POLL_INTERVAL = 2.0
"""Seconds between two times that the workers are asked for what they have counted, scraped or not."""

PATIENCE = 0.5
"""Seconds that workers have to report: after that, the last report of one that is busy or hangs is used."""


class Rounds:
    """Asks the workers, one round after the other.

    Args:
        workers: All of them, also those that do not take connections now.
        pool: Where their reports come together.
        restarts: How many were started again so far.
        refused: How many inference requests were refused so far while no worker took any.
    """

    def __init__(
        self, workers: Sequence[Worker], pool: Pool, restarts: Callable[[], int], refused: Callable[[], int]
    ) -> None:
        self._workers = workers
        self._pool = pool
        self._restarts = restarts
        self._refused = refused
        self._round = 0
        self._ends: float | None = None
        self._next = 0.0
        self._asked: set[int] = set()
        self._waiting: list[tuple[Worker, int]] = []
        self._next_waiting: list[tuple[Worker, int]] = []

    @property
    def due(self) -> float | None:
        """When a round ends or begins; None while there is nobody to ask."""
        if self._ends is not None:
            return self._ends
        return self._next if any(worker.up for worker in self._workers) else None

    def tell(self, worker: Worker, ticket: int) -> None:
        """Have the next round's result told to a worker."""
        self._next_waiting.append((worker, ticket))

    def hear(self, worker: Worker, report: Report) -> None:
        """Take what a worker has counted and seen."""
        if worker.report is None or worker.report.round is not None or report.round is None:
            worker.report = report  # a last word stays, whatever was on its way
        worker.silent_since = None
        if report.round == self._round and self._ends is not None:
            worker.fresh = True
            self._asked.discard(worker.number)
        else:
            self._judge([report])

    def lose(self, worker: Worker) -> None:
        """Note that a worker has ended."""
        self._asked.discard(worker.number)

    def in_time(self, now: float) -> None:
        """Do what is due."""
        if self._ends is not None and (now >= self._ends or not self._asked):
            self._end()
        if self._ends is None and (self._next_waiting or now >= self._next):
            self._begin()

    def _begin(self) -> None:
        """Ask every worker for what it has counted."""
        now = time.monotonic()
        self._round += 1
        self._ends, self._next = now + PATIENCE, now + POLL_INTERVAL
        self._waiting, self._next_waiting = self._next_waiting, []
        since = self._pool.since(self._reports())
        for worker in self._workers:
            worker.fresh = False
            if worker.up and worker.caught_up:
                worker.asked, worker.silent_since = self._round, now
                if worker.tell(Collect(self._round, since)):
                    self._asked.add(worker.number)

    def _end(self) -> None:
        """Tell those who wait what all workers have counted."""
        self._ends = None
        self._asked.clear()
        reports = self._reports()
        self._judge([worker.report for worker in self._workers if worker.fresh and worker.report is not None])
        waiting, self._waiting = self._waiting, []
        try:
            self._answer(waiting, reports)
        except Exception:  # noqa: BLE001 - a scrape that fails is no reason to serve no more
            _log.exception("the metrics of all workers could not be put together")

    def _judge(self, reports: Sequence[Report]) -> None:
        """Show the detector what workers have told; whatever comes of it, they are to serve on."""
        try:
            self._pool.judge(reports)
        except Exception:  # noqa: BLE001
            _log.exception("the detector of all workers could not judge what they have seen")

    def _answer(self, waiting: Sequence[tuple[Worker, int]], reports: Sequence[Report]) -> None:
        if not waiting:
            return
        states = Counter("up" if worker.up else "held" if worker.held else "down" for worker in self._workers)
        families = self._pool.families(reports, states, self._restarts(), self._refused())
        detection = self._pool.detection
        for worker, ticket in waiting:
            version = "" if worker.report is None else worker.report.version
            worker.tell(Pooled(ticket, families, version, self._pool.seen(reports, version), detection))

    def _reports(self) -> list[Report]:
        return [worker.report for worker in self._workers if worker.report is not None]
