"""The engine: a queue, one worker thread, and a watchdog over it."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from guardserve.engine.batch import Batch
from guardserve.engine.job import DeviceError, ForwardTimeoutError, Job, OutOfMemoryError, Result
from guardserve.engine.queue import JobQueue
from guardserve.exceptions import GuardserveError
from guardserve.runtime import Runtime

_log = logging.getLogger(__name__)

FAULTS = ("batch_retry", "out_of_memory", "device_error", "hang", "self_test")
"""Every kind of fault that the engine counts."""

MAX_ABANDONED = 2
"""Workers whose forward hangs; beyond that no other is started until one of them comes back."""

RETEST_INTERVAL = 1.0
"""Seconds between self-tests of a model that is not ready since a fault."""

CLOSE_INTERVAL = 0.1
"""Seconds between two looks at a worker that finishes."""

Deliver = Callable[[Sequence[Job]], object]
OnStarted = Callable[[GuardserveError | None], object]


@dataclass(frozen=True)
class EngineCounts:
    """What the engine has done so far.

    Attributes:
        waiting: Requests in the queue now.
        faults: Faults met, by kind: see :data:`FAULTS`.
        recoveries: Times a self-test made the model ready again after a fault.
    """

    waiting: int
    faults: Mapping[str, int]
    recoveries: int


class Engine:
    """Runs a model's requests on one worker thread, in batches of what is there at once.

    After a fault that may outlast the request which met it (a hanging forward, memory that did not suffice, an error
    of the device) the model is not ready until a self-test passes, which the worker tries every second. A model that
    works is tested between its batches every so often; not to pass is such a fault too.

    Args:
        runtime: The model.
        deliver: Called on the worker's or the watchdog's thread with requests that are done, once for each batch.
        max_batch_size: Most rows of a forward of several requests; one request alone may have more.
        max_queue_size: Most requests that may wait.
        max_queue_delay: Seconds that a request may wait for others to fill its batch when the worker is idle.
        forward_timeout: Seconds after which a forward counts as hanging: its requests fail, and another thread takes
            the worker's place. None waits for ever.
        self_test_interval: Seconds between two self-tests of a model that works; 0 for none.
        forward_ended: Called after each forward with its rows and its seconds.
    """

    def __init__(
        self,
        runtime: Runtime,
        deliver: Deliver,
        *,
        max_batch_size: int = 64,
        max_queue_size: int = 256,
        max_queue_delay: float = 0.0,
        forward_timeout: float | None = None,
        self_test_interval: float = 0.0,
        forward_ended: Callable[[int, float], object] = lambda _rows, _seconds: None,
    ) -> None:
        self._runtime = runtime
        self._deliver = deliver
        self._forward_timeout = forward_timeout
        self._self_test_interval = self_test_interval
        self._tested_at = time.monotonic()
        self._forward_ended = forward_ended
        self._queue = JobQueue(max_queue_size, max_batch_size, max_queue_delay)
        self._faults: Counter[str] = Counter()
        self._recoveries = 0
        self._lock = threading.Lock()
        self._worker: Worker | None = None
        self._abandoned: set[Worker] = set()
        self._closing = threading.Event()
        self._watchdog: threading.Thread | None = None

    @property
    def counts(self) -> EngineCounts:
        """What the engine has done so far."""
        with self._lock:
            faults = {kind: self._faults[kind] for kind in FAULTS}
        return EngineCounts(len(self._queue), faults, self._recoveries)

    def start(self, on_started: OnStarted = lambda _: None) -> None:
        """Start the worker, which first passes the start-up probe through the model.

        Args:
            on_started: Called on the worker's thread after the probe, with why the model did not pass it, if so.
        """
        self._worker = Worker(self)
        self._worker.start(on_started)
        if self._forward_timeout is not None:
            self._watchdog = threading.Thread(target=self._watch, name="guardserve-watchdog", daemon=True)
            self._watchdog.start()

    def check_room(self) -> None:
        """Check that one more request may wait, before any work is done for it.

        Raises:
            QueueFullError: If too many wait already.
        """
        self._queue.check_room()

    def submit(self, job: Job) -> None:
        """Let a request wait for its forward. :meth:`wake` must follow, once for all that came at one time.

        Raises:
            QueueFullError: If too many wait already, or the engine is closing.
        """
        self._queue.put(job)

    def wake(self) -> None:
        """Tell the worker that requests wait."""
        self._queue.wake()

    def drop(self, job: Job) -> bool:
        """Forget a request that nobody waits for any more; False when its forward has begun."""
        return self._queue.drop(job)

    def close(self, timeout: float | None = None) -> bool:
        """Finish the requests that wait, then stop.

        Args:
            timeout: Seconds to wait for that.

        Returns:
            Whether all is finished; a forward that hangs is left behind.
        """
        self._queue.close()
        end = None if timeout is None else time.monotonic() + timeout
        while (worker := self._worker) is not None and worker.is_alive:  # another may take its place
            if end is not None and time.monotonic() >= end:
                break
            worker.join(CLOSE_INTERVAL)
        self._closing.set()
        if self._watchdog is not None:
            self._watchdog.join()
        return worker is None or not worker.is_alive

    def next_batch(self) -> list[Job] | None:
        """Wait for the worker's next batch; none when it is time for a self-test, None when there will be no more."""
        timeout = -1.0
        if self._runtime.failing:
            timeout = RETEST_INTERVAL
        elif self._self_test_interval and self._runtime.failure is None:
            timeout = self._tested_at + self._self_test_interval - time.monotonic()
            if timeout <= 0:  # however many requests wait
                return []
        return self._queue.take(join=self._runtime.apart is None, timeout=timeout)

    def begin_model(self) -> GuardserveError | None:
        """Pass the start-up probe through the model; return why it did not pass, in which case it is not ready."""
        try:
            self._runtime.start()
        except GuardserveError as error:
            return error
        finally:
            self._tested_at = time.monotonic()
        return None

    def test(self) -> None:
        """Have the model pass a self-test: it makes one that has failed ready again, and one that worked unready."""
        runtime, failing = self._runtime, self._runtime.failing
        if runtime.failure is not None and not failing:
            return
        try:
            runtime.self_test()
        except GuardserveError as error:
            if failing:
                _log.warning("%s is still not ready: %s", runtime.name, error)
            else:
                self.count("self_test")
                _log.error("%s is not ready until it passes: %s", runtime.name, error, exc_info=error.__cause__)
                runtime.fail(str(error))
        else:
            if failing:
                runtime.recover()
                self._recoveries += 1
                _log.warning("%s is ready again", runtime.name)
        finally:
            self._tested_at = time.monotonic()

    def count(self, fault: str) -> None:
        """Count a fault."""
        with self._lock:
            self._faults[fault] += 1

    def finished(self, worker: Worker, jobs: Sequence[Job], results: Sequence[Result]) -> None:
        """Take a worker's results, unless it was given up meanwhile and others have answered."""
        with self._lock:
            if worker in self._abandoned:
                return
            for job, result in zip(jobs, results, strict=True):
                job.finish(result)
            worker.jobs = ()
        for result in results:
            if isinstance(result.error, (OutOfMemoryError, DeviceError)):
                self._runtime.fail(str(result.error))
        self._deliver(jobs)

    def given_up(self, worker: Worker) -> bool:
        """Tell whether a worker must end because its forward had hung; if none took its place, let one begin."""
        with self._lock:
            if worker not in self._abandoned:
                return False
            self._abandoned.discard(worker)
            successor = None
            if (self._worker is worker or self._worker in self._abandoned) and not self._closing.is_set():
                successor = self._worker = Worker(self)
        _log.warning("a forward of %s that had hung has ended", self._runtime.name)
        if successor is not None:
            successor.start(None)
        return True

    def forward_ended(self, rows: int, seconds: float) -> None:
        """Report a forward."""
        self._forward_ended(rows, seconds)

    def batch(self, begin: Callable[[int], object], end: Callable[[], object]) -> Batch:
        """Return what runs a worker's batches."""
        return Batch(self._runtime, begin, end, self.count)

    def _watch(self) -> None:
        timeout = self._forward_timeout or 0.0
        while not self._closing.wait(min(0.5, timeout / 4)):
            worker = self._worker
            if worker is not None and worker.seconds > timeout:
                self._give_up(worker, timeout)

    def _give_up(self, worker: Worker, timeout: float) -> None:
        """Fail the requests of a worker whose forward hangs, and let another take its place."""
        error = ForwardTimeoutError(f"the forward took longer than {timeout:g} s")
        with self._lock:
            if worker in self._abandoned or worker.seconds <= timeout:
                return
            self._abandoned.add(worker)
            jobs, worker.jobs = worker.jobs, ()
            for job in jobs:
                job.finish(Result.failed(error))
            successor = None
            if len(self._abandoned) < MAX_ABANDONED:
                successor = self._worker = Worker(self)
        self.count("hang")
        _log.error("%s: %s; it is not ready until a self-test passes", self._runtime.name, error)
        self._runtime.fail(str(error))
        self._deliver(jobs)
        if successor is not None:
            successor.start(None)


class Worker:
    """A thread that runs one batch after the other until it is given up or nothing is left.

    Attributes:
        jobs: The requests whose forward it runs now.
    """

    def __init__(self, engine: Engine) -> None:
        self.jobs: Sequence[Job] = ()
        self._engine = engine
        self._began: float | None = None
        self._rows = 0
        self._thread: threading.Thread | None = None

    @property
    def seconds(self) -> float:
        """Seconds that its present forward has taken; 0 outside one."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    @property
    def is_alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, on_started: OnStarted | None) -> None:
        """Start the thread; with a callback it starts the model first."""
        # a daemon: a forward that hangs must not keep the process from ending
        self._thread = threading.Thread(target=self._run, args=(on_started,), name="guardserve-forward", daemon=True)
        self._thread.start()

    def join(self, timeout: float | None) -> None:
        """Wait for the thread to end."""
        if self._thread is not None:
            self._thread.join(timeout)

    def _run(self, on_started: OnStarted | None) -> None:
        engine = self._engine
        if on_started is not None:
            on_started(engine.begin_model())
        else:
            self._test()
        batch = engine.batch(self._begin, self._end)
        while not engine.given_up(self) and (jobs := engine.next_batch()) is not None:
            if jobs:
                self.jobs = jobs
                engine.finished(self, jobs, batch.run(jobs))
            else:
                self._test()

    def _test(self) -> None:
        self._begin(0)
        try:
            self._engine.test()
        finally:
            self._began = None

    def _begin(self, rows: int) -> None:
        self._rows = rows
        self._began = time.monotonic()

    def _end(self) -> None:
        began, self._began = self._began, None
        if began is not None:
            self._engine.forward_ended(self._rows, time.monotonic() - began)
