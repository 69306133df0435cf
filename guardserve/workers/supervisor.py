"""The process that starts the workers, starts them again, collects what they count, and ends them.

uvicorn has a supervisor too. It is not used: it starts a worker that dies at once again and again, kills without a word
one that is busy, ends without a status, and has no line on which workers could tell what they have counted.
"""

from __future__ import annotations

import logging
import math
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import wait
from types import FrameType
from typing import Any

from guardserve.exceptions import GuardserveError
from guardserve.workers.admission import Admission
from guardserve.workers.messages import Decided, Failed, Hurry, Line, Prepared, Ready, Reload, Report, Scrape, Up
from guardserve.workers.pool import Pool
from guardserve.workers.reloading import Reloading
from guardserve.workers.rounds import Rounds
from guardserve.workers.stand_in import StandIn
from guardserve.workers.worker import Worker, limit, words

_log = logging.getLogger(__name__)

SILENCE = 60.0
"""Seconds after which a worker that does not report is taken for dead, and ended."""

BACKOFF = 0.5
"""Seconds until a worker that died is started again; twice as many each time that it dies young."""

LONGEST_BACKOFF = 30.0

GROWN_UP = 60.0
"""Seconds of taking connections after which a death is the first again."""

ATTEMPTS = 5
"""Starts in a row that may fail while no worker takes connections."""

SAVE_INTERVAL = 60.0
"""Seconds between two times that the pool's state is saved."""

MARGIN = 10.0
"""Seconds beyond its own timeouts that a worker has to end in; then it is killed."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

Target = Callable[..., None]
"""What a worker runs: its end of the line, the sockets, and the arguments that the supervisor was given."""


class Supervisor:
    """Keeps so many workers at work on the same sockets until a signal.

    Args:
        target: What each of them runs, in a process of its own that is not forked.
        arguments: For it; they are pickled.
        sockets: Bound, not yet listening.
        workers: Their number.
        pool: Where their reports come together.
        timeout: Seconds that a worker may take to end once it is told to.
        stand_in: Answers what connects while no worker does, once one has.
    """

    def __init__(
        self,
        target: Target,
        arguments: Sequence[Any],
        *,
        sockets: Sequence[socket.socket],
        workers: int,
        pool: Pool,
        timeout: float,
        stand_in: StandIn | None = None,
    ) -> None:
        self._target = target
        self._arguments = arguments
        self._sockets = sockets
        self._workers = [Worker(number) for number in range(1, workers + 1)]
        self._pool = pool
        self._timeout = timeout
        self._signals: list[int] = []
        self._ends_by: float | None = None
        self._failure: GuardserveError | None = None
        self._restarts = 0
        self._failed_starts = 0
        self._was_up = False
        self._next_save = 0.0
        self._reloading = Reloading(self._workers)
        self._admission = Admission(self._workers, self._reloading)
        self._stand_in = stand_in
        self._rounds = Rounds(
            self._workers, pool, lambda: self._restarts, lambda: 0 if stand_in is None else stand_in.refused
        )

    def run(self) -> None:
        """Serve until a signal, then have every worker answer what it has accepted; call it on the main thread.

        Raises:
            GuardserveError: If workers cannot be started, or did not end as they should.
        """
        with ExitStack() as stack:
            wakeup = stack.enter_context(self._signalled())
            stack.callback(self._abandon)
            if self._stand_in is not None:
                stack.callback(self._stand_in.close)
            for worker in self._workers:
                self._start(worker)
            self._next_save = time.monotonic() + SAVE_INTERVAL
            while any(worker.process is not None for worker in self._workers) or self._ends_by is None:
                self._turn(wakeup)
            self._pool.save()
        if self._failure is not None:
            raise self._failure
        killed = [worker.number for worker in self._workers if worker.lost]
        if killed:
            raise GuardserveError(f"workers {killed} did not answer all that they had accepted: see the log")

    def _turn(self, wakeup: socket.socket) -> None:
        """Wait until something happens, and see to it."""
        alive = [worker for worker in self._workers if worker.process is not None]
        lines = {worker.line.connection: worker for worker in alive if worker.line is not None}
        sentinels = [worker.process.sentinel for worker in alive if worker.process is not None]
        ready = wait([wakeup, *lines, *sentinels], max(0.0, self._next_moment() - time.monotonic()))
        if wakeup in ready:
            with suppress(BlockingIOError):
                wakeup.recv(1024)
        self._obey()
        for connection, worker in lines.items():
            if connection in ready:
                self._hear(worker)
        for worker in alive:
            if worker.process is not None and worker.process.exitcode is not None:
                self._bury(worker)
        self._in_time()

    def _next_moment(self) -> float:
        """Return when something is due though nothing happens."""
        moments = [self._next_save, self._rounds.due, self._reloading.ends_by, self._ends_by]
        if self._ends_by is None:
            moments += [worker.starts_at for worker in self._workers if worker.process is None]
        return min(moment for moment in moments if moment is not None)

    def _in_time(self) -> None:
        """Do what is due."""
        now = time.monotonic()
        self._see_to_workers(now)
        if self._reloading.ends_by is not None and self._reloading.ends_by <= now:
            self._reloading.give_up()
        if now >= self._next_save:
            self._next_save = now + SAVE_INTERVAL
            self._pool.save()
        self._rounds.in_time(now)
        if self._ends_by is None:
            self._admit()
        self._have_answered()

    def _admit(self) -> None:
        """Let workers take connections, or have all end what they have accepted, and themselves."""
        try:
            self._admission.go_on()
        except GuardserveError as error:
            self._failure = error
            _log.error("the workers finish what they have accepted, and end")
            self._end()

    def _have_answered(self) -> None:
        """Have what connects answered by whoever can."""
        if self._stand_in is None or not self._was_up:
            return
        if self._ends_by is None and not any(worker.up for worker in self._workers):
            self._stand_in.begin(min(worker.starts_at for worker in self._workers))
        else:
            self._stand_in.end()

    def _see_to_workers(self, now: float) -> None:
        """Start those whose time has come, and end those whose time is over."""
        if self._ends_by is None:
            for worker in self._workers:
                if worker.process is None and worker.starts_at <= now:
                    self._restarts += 1
                    self._start(worker)
                elif worker.silent_since is not None and now - worker.silent_since >= SILENCE:
                    worker.silent_since = None
                    worker.end("does not report any more")
        elif self._ends_by <= now:
            for worker in self._workers:
                worker.end("did not end in time")
            self._ends_by = math.inf

    @contextmanager
    def _signalled(self) -> Iterator[socket.socket]:
        """Take the signals, and have each of them wake whoever waits for the socket."""

        def remember(number: int, frame: FrameType | None) -> None:
            del frame
            self._signals.append(number)

        read, write = socket.socketpair()
        with read, write:
            write.setblocking(False)
            read.setblocking(False)
            before = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
            handlers = {number: signal.signal(number, remember) for number in SIGNALS}
            try:
                yield read
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
                signal.set_wakeup_fd(before)

    def _obey(self) -> None:
        """Pass signals on: the first begins the end."""
        while self._signals:
            if self._signals.pop() == signal.SIGHUP:
                self._hang_up()
            elif self._ends_by is None:
                _log.info("the workers finish what they have accepted")
                self._end()
            else:
                for worker in self._workers:
                    worker.tell(Hurry())

    def _hang_up(self) -> None:
        """Have every worker load its model again."""
        if self._ends_by is None:
            self._reloading.begin()

    def _end(self) -> None:
        """Have every worker end; none is started again."""
        self._ends_by = time.monotonic() + self._timeout + MARGIN
        # the last worker to close its own takes what has connected; after that nobody may connect and wait in vain
        for sock in self._sockets:
            sock.close()
        for worker in self._workers:
            if worker.process is not None:
                worker.process.terminate()

    def _abandon(self) -> None:
        """End what is there still, as nobody sees to it any more."""
        for worker in self._workers:
            if worker.process is not None:
                worker.process.kill()
                worker.process.join()
                worker.forget()

    def _start(self, worker: Worker) -> None:
        context = get_context("spawn")
        try:
            mine, theirs = context.Pipe()
        except OSError as error:  # too many files, say: the others go on
            worker.reason = str(error)
            self._put_off(worker, None, None)
            return
        limit(mine)
        arguments = (theirs, list(self._sockets), *self._arguments)
        name = f"guardserve-worker-{worker.number}"
        process = context.Process(target=self._target, args=arguments, name=name)
        # Ctrl-C and a hang-up reach the whole group of processes, but are this one's to tell, also before a worker can
        # ignore them; a hang-up is heeded here as soon as the worker is there
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
        try:
            process.start()
        except OSError as error:  # no memory for another process, say: the others go on
            mine.close()
            worker.reason = str(error)
            self._put_off(worker, None, None)
        else:
            worker.process, worker.line, worker.reason = process, Line(mine), None
            worker.starts += 1
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            signal.signal(signal.SIGINT, before)
            theirs.close()

    def _hear(self, worker: Worker) -> None:
        """Take a message."""
        if worker.line is None:
            return
        try:
            message = worker.line.receive()
        except (EOFError, ConnectionError):
            worker.hang_up()
            return
        except Exception:  # noqa: BLE001 - whatever it was, nothing after it can be read
            _log.exception("a message of worker %d is not whole", worker.number)
            worker.end("stopped in the middle of a message")
            worker.hang_up()
            return
        self._take(worker, message)

    def _take(self, worker: Worker, message: object) -> None:
        if isinstance(message, Ready):
            worker.loaded = message.loaded
        elif isinstance(message, Up):
            self._is_up(worker)
        elif isinstance(message, Failed):
            worker.reason = message.reason
        elif isinstance(message, Scrape):
            self._rounds.tell(worker, message.ticket)
        elif isinstance(message, Reload):
            self._reloading.begin((worker, message.ticket))
        elif isinstance(message, (Prepared, Decided)):
            self._reloading.hear(worker, message)
        elif isinstance(message, Report):
            self._rounds.hear(worker, message)

    def _is_up(self, worker: Worker) -> None:
        """Note that a worker takes connections."""
        worker.up_since = time.monotonic()
        self._was_up, self._failed_starts = True, 0
        _log.info("worker %d takes connections (process %s)", worker.number, worker.pid)

    def _bury(self, worker: Worker) -> None:
        """Keep what an ended worker had counted, and see whether it is to be started again."""
        process = worker.process
        if process is None:
            return
        while worker.line is not None and worker.line.connection.poll():
            self._hear(worker)
        if worker.report is not None:
            self._pool.retain(worker.report)
        status, age, renewed = process.exitcode, worker.age, worker.renewed
        worker.forget()
        self._rounds.lose(worker)
        self._reloading.lose(worker)
        process.close()
        if self._ends_by is not None:
            worker.lost = worker.lost or (age is not None and status != 0)
        elif renewed:
            worker.starts_at = time.monotonic()
        else:
            self._put_off(worker, status, age)

    def _put_off(self, worker: Worker, status: int | None, age: float | None) -> None:
        """Have a worker started again after a while."""
        if age is None:
            self._failed_start(worker, status)
        worker.deaths = 1 if age is not None and age >= GROWN_UP else worker.deaths + 1
        delay = min(BACKOFF * 2 ** (worker.deaths - 1), LONGEST_BACKOFF)
        worker.starts_at = time.monotonic() + delay
        _log.error(
            "worker %d has ended%s%s: it is started again in %.1f s",
            worker.number,
            words(status),
            "" if worker.reason is None else f", as {worker.reason}",
            delay,
            extra={"event": "worker", "worker": worker.number},
        )

    def _failed_start(self, worker: Worker, status: int | None) -> None:
        """Give up if no worker can be started.

        Raises:
            GuardserveError: If so.
        """
        self._failed_starts += 1
        if not self._was_up or (self._failed_starts >= ATTEMPTS and not any(other.up for other in self._workers)):
            raise GuardserveError(worker.reason or f"worker {worker.number} ended{words(status)} before it was up")
