"""The requests that wait, and which of them go together."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict

from guardserve.engine.job import Job, QueueFullError

GATHER = 0.001
"""Seconds after a batch in which fewer requests than it had wait for more: those that it answered are often followed
by others at once, and go with the ones that came meanwhile rather than in turn with them."""


class JobQueue:
    """A bounded queue that any thread fills and one thread empties, a batch at a time.

    The oldest request is always in the next batch. Others join it in their order if their shape is the same and all
    of their rows fit; one that does not fit waits for the next batch, where it comes first.

    What comes to an idle taker goes at once. Only right after a batch it waits for :data:`GATHER` at most, until as
    many requests are there as that batch had.

    Args:
        max_jobs: Most requests that may wait.
        max_rows: Most rows of a batch of several requests; one request alone may have more.
        max_delay: Seconds that the oldest request may wait for others to fill its batch, when the taker is idle.
    """

    def __init__(self, max_jobs: int, max_rows: int, max_delay: float = 0.0) -> None:
        self.max_jobs = max_jobs
        self.max_rows = max_rows
        self._max_delay = max_delay
        self._jobs: OrderedDict[Job, None] = OrderedDict()
        self._lock = threading.Lock()
        self._closed = False
        self._taken = 0
        self._gathered_at = 0.0
        # a lock that is taken while there is nothing to do: the cheapest way to sleep until another thread says so
        self._bell = threading.Lock()
        self._bell.acquire()
        self._asleep = False

    def __len__(self) -> int:
        """Return the number of requests that wait."""
        return len(self._jobs)

    def check_room(self) -> None:
        """Check that one more request may wait.

        Raises:
            QueueFullError: If too many wait already.
        """
        if len(self._jobs) >= self.max_jobs:
            raise QueueFullError(f"{self.max_jobs} requests are waiting already: try again later")

    def put(self, job: Job) -> None:
        """Let a request wait. The taker is not woken: see :meth:`wake`.

        Raises:
            QueueFullError: If too many wait already, or the queue is closed.
        """
        with self._lock:
            if self._closed:
                raise QueueFullError("the server is stopping and takes no more requests")
            self.check_room()
            job.state = "queued"
            job.queued_at = time.monotonic()
            self._jobs[job] = None

    def wake(self) -> None:
        """Tell the taker that there is something to take: once for all that was put at one time."""
        with self._lock:
            if self._asleep:
                self._asleep = False
                self._bell.release()

    def drop(self, job: Job) -> bool:
        """Take a request out that nobody waits for any more; False when it is too late for that."""
        with self._lock:
            if job.state != "queued":
                return False
            del self._jobs[job]
            job.state = "dropped"
            job.inputs = ()
            return True

    def close(self) -> None:
        """Take no more requests; those that wait can still be taken."""
        with self._lock:
            self._closed = True
        self.wake()

    def take(self, *, join: bool = True, timeout: float = -1) -> list[Job] | None:
        """Wait for the next batch.

        Args:
            join: Whether requests may share a batch.
            timeout: Seconds to wait for one; -1 for any time.

        Returns:
            The requests, now running; none when the time is over; None when the queue is closed and empty.
        """
        began = time.monotonic()
        end = None if timeout < 0 else began + timeout
        self._gathered_at = began + GATHER
        while True:
            with self._lock:
                until = self._ready_at(join=join)
                now = time.monotonic()
                if until is not None and until <= now:
                    return self._choose(join=join)
                if until is None and self._closed:
                    return None
                if end is not None and end <= now:
                    return []
                self._bell.acquire(blocking=False)  # a ring that came after the sleeper had woken by itself
                self._asleep = True
            waits = [moment - now for moment in (until, end) if moment is not None]
            self._bell.acquire(timeout=min(waits) if waits else -1)

    def _ready_at(self, *, join: bool) -> float | None:
        """Return when the next batch may go, None when nothing waits; the lock is held."""
        oldest = next(iter(self._jobs), None)
        if oldest is None:
            return None
        if not join or self._closed:
            return oldest.queued_at
        if not self._max_delay:
            return oldest.queued_at if len(self._jobs) >= self._taken else self._gathered_at
        rows = sum(job.rows for job in self._jobs if job.shape == oldest.shape)
        return oldest.queued_at + (0.0 if rows >= self.max_rows else self._max_delay)

    def _choose(self, *, join: bool) -> list[Job]:
        """Take the oldest request and those that join it; the lock is held."""
        oldest = next(iter(self._jobs))
        batch, rows = [oldest], oldest.rows
        if join:
            for job in self._jobs:
                if rows >= self.max_rows:
                    break
                if job is not oldest and job.shape == oldest.shape and rows + job.rows <= self.max_rows:
                    batch.append(job)
                    rows += job.rows
        self._taken = len(batch)
        now = time.monotonic()
        for job in batch:
            del self._jobs[job]
            job.state = "running"
            job.began_at = now
        return batch
