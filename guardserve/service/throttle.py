"""Turns for what needs no forward: a flood of it leaves forwards their share of the interpreter."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

INTERVAL = 1e-3
"""Seconds between two turns, on average: what has one takes about a tenth of that."""

ROUND = 8e-3
"""Seconds after which those that wait have their turns, all whose time has come: each time a forward is interrupted."""

CREDIT = 32e-3
"""Seconds whose turns, where nobody took them, may be taken at once."""

LINE = 512
"""Most that wait; when more come the first goes on at once, lest they take up the connections that others may have."""


class Throttle:
    """Gives one after the other its turn; where few come they have it at once. It is for one event loop.

    Args:
        line: Most that wait.
    """

    def __init__(self, line: int = LINE) -> None:
        self._line = line
        self._interval = INTERVAL
        self._waiting: deque[Callable[[], object]] = deque()
        self._next = 0.0

    def call(self, work: Callable[[], object]) -> None:
        """Call a function when it is its turn; one that returns False has left that to the next."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        if not self._waiting:
            self._next = max(self._next, now - CREDIT)
            if self._next <= now:
                self._next += self._interval
                work()
                return
            self._wait(loop, now)
        self._waiting.append(work)
        if len(self._waiting) > self._line:
            self._waiting.popleft()()

    def open(self) -> None:
        """Keep nobody waiting any more."""
        self._interval = self._next = 0.0
        self._go_on()

    def _wait(self, loop: asyncio.AbstractEventLoop, now: float) -> None:
        loop.call_later(max(ROUND, self._next - now), self._go_on)

    def _go_on(self) -> None:
        """Give those their turns whose time has come."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        try:
            while self._waiting and self._next <= now:
                if self._waiting.popleft()() is not False:
                    self._next += self._interval
        finally:
            if self._waiting:
                self._wait(loop, now)
