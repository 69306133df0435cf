"""From other threads to the event loop."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

_ALL = 64


class Mailbox(Generic[T]):
    """Hands over what any thread puts into it, in order, on the event loop.

    ``call_soon_threadsafe`` wakes the loop's thread while it holds the interpreter's lock. Where both share a
    processor the loop runs at once, only to wait for that lock, and the threads take turns several times. A socket is
    written to without the lock: the loop has done its work when the other thread goes on.

    Args:
        take: Called on the event loop with what was put, one by one.
    """

    def __init__(self, take: Callable[[T], object]) -> None:
        self._take = take
        self._items: deque[T] = deque()
        self._loop = asyncio.get_running_loop()
        self._slot, self._flap = socket.socketpair()
        self._slot.setblocking(False)
        self._flap.setblocking(False)
        self._rung = False
        self._loop.add_reader(self._slot, self._empty)

    def put(self, item: T) -> None:
        """Hand an item over, from any thread; once the mailbox is closed nobody takes it."""
        self._items.append(item)
        if not self._rung:
            self._rung = True
            try:  # noqa: SIM105 - a context manager would cost each request more than what it guards
                self._flap.send(b"\0")
            except OSError:
                pass

    def close(self) -> None:
        """Take nothing more; what is in it is taken now. Call it on the event loop."""
        if self._slot.fileno() >= 0:
            self._loop.remove_reader(self._slot)
            self._empty()
            self._slot.close()
            self._flap.close()

    def _empty(self) -> None:
        try:  # noqa: SIM105 - likewise
            self._slot.recv(_ALL)
        except OSError:
            pass
        self._rung = False  # first: what comes from now on rings again
        try:
            while self._items:
                self._take(self._items.popleft())
        finally:
            if self._items:  # one was a fault of the taker's: the others wait for the loop's next round
                self._loop.call_soon(self._empty)
