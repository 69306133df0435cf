"""A thread that does an object's work when it is told to, and goes when the object does."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable
from queue import SimpleQueue

_log = logging.getLogger(__name__)

PATIENCE = 5.0
"""Seconds to wait for the thread to end: it may be in the midst of something."""


GRACE = 0.001
"""Seconds that the thread leaves to whoever woke it, who has an answer to give, before both take turns at Python."""


class Worker:
    """Calls a method in a thread of its own, once or more after each :meth:`wake`.

    The thread is started by the first :meth:`wake`, so that a fork before it takes nothing along, and it holds no
    reference to the method's object while it waits.

    Args:
        work: A bound method.
        name: Name of the thread.
    """

    def __init__(self, work: Callable[[], object], name: str) -> None:
        self._work = weakref.WeakMethod(work)
        self._name = name
        self._wanted = False
        self._calls: SimpleQueue[None] = SimpleQueue()  # unlike an event's, its lock is never waited for
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stopped = False

    def wake(self) -> None:
        """Have the work done soon."""
        if self._thread is None:
            self._start()
        if not self._wanted:
            self._wanted = True
            self._calls.put(None)

    def stop(self) -> None:
        """End the thread; work that it is in is finished first."""
        self._stopped = True
        self._calls.put(None)
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(PATIENCE)

    def _start(self) -> None:
        with self._starting:
            if self._thread is None and not self._stopped:
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                thread.start()
                self._thread = thread

    def _run(self) -> None:
        while True:
            self._calls.get()
            time.sleep(GRACE)
            self._wanted = False
            work = self._work()
            if self._stopped or work is None:
                return
            try:
                work()
            except Exception:  # noqa: BLE001 - the thread outlives whatever it is
                _log.exception("work in the background failed")
            del work
