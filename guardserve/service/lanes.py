"""Where requests are read and answers written that would keep the event loop from others: what is short goes first.

A few kilobytes of gzip may be 64 MiB of JSON, which takes seconds. What turns out to be as long as that has a lane of
its own, in which one is read at a time, and makes way for the others between any two of its pieces.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from guardserve.service.limits import MIB, Hold

T = TypeVar("T")

SHORT = 4 * MIB
"""Bytes of a body, unpacked, up to which it is short."""

WAY = 0.05
"""Seconds for which what is long makes way for what is short, at most, before each of its pieces: nor for longer than
it has been read since, or short ones without end would let it never be read."""


class NobodyWaitsError(Exception):
    """Nobody waits any more for what is being done: the client has gone, its time is over, or the server ends."""


class Lanes:
    """Two threads, one for each lane; all but :meth:`makes_way` is for the event loop."""

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(1, thread_name_prefix="guardserve-coder")
        self._long = ThreadPoolExecutor(1, thread_name_prefix="guardserve-long")
        self._free = threading.Event()
        self._free.set()
        self._closed = False
        self._ahead = 0
        self.busy = 0

    async def short(self, work: Callable[[], T]) -> T:
        """Do what is short."""
        self._ahead += 1
        self._free.clear()
        try:
            return await self._done(self._short, work)
        finally:
            self._ahead -= 1
            if not self._ahead:
                self._free.set()

    async def long(self, work: Callable[[], T]) -> T:
        """Do what is long."""
        return await self._done(self._long, work)

    def makes_way(self, hold: Hold, late: float, gone: threading.Event) -> Hold:
        """Have what is long make way, and end when nobody waits for it, whenever it is told of memory.

        Args:
            hold: What is to be told.
            late: When its time is over, by the monotonic clock.
            gone: Set when its client has gone.

        Returns:
            What raises :class:`NobodyWaitsError` if nobody does.
        """
        worked_since = time.monotonic()

        def held(size: int) -> None:
            nonlocal worked_since
            if not self._free.is_set():
                self._free.wait(min(WAY, time.monotonic() - worked_since))
                worked_since = time.monotonic()
            if self._closed or gone.is_set() or time.monotonic() >= late:
                raise NobodyWaitsError
            hold(size)

        return held

    def close(self) -> None:
        """Let the threads end."""
        self._closed = True
        for lane in (self._short, self._long):
            lane.shutdown(wait=False)

    async def _done(self, lane: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        self.busy += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(lane, work)
        finally:
            self.busy -= 1
