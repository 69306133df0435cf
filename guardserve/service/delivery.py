"""Whether a client takes its answers, and the end of a connection whose client does not."""

from __future__ import annotations

import asyncio
import sys

if sys.platform == "linux":
    import fcntl
    import termios

WRITE_TIMEOUT = 60.0
"""Seconds for which a client may take nothing of an answer that waits for it."""

LOOKS = 4
"""Looks in that time whether it has taken any."""


class Delivery:
    """Sees answers off, until their client has them or has taken nothing for too long.

    Args:
        transport: Where they are written.
        loop: The event loop.
    """

    __slots__ = ("_loop", "_timer", "_transport")

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None

    @property
    def left(self) -> int:
        """How many bytes of answers the client's side has not got yet, as far as the kernel tells."""
        size = self._transport.get_write_buffer_size()
        sock = self._transport.get_extra_info("socket")
        return size if sock is None or sock.fileno() < 0 else size + _unacknowledged(sock.fileno())

    def begin(self) -> None:
        """End the connection if what there is to send is not taken, unless that is seen to already."""
        if self._timer is None:
            self._look(None)

    def stop(self) -> None:
        """See to nothing any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self, before: int | None, in_vain: int = 0) -> None:
        """End the connection at the last look that has found as much to send as the one before it."""
        left = self.left
        in_vain = in_vain + 1 if left == before else 0
        self._timer = None
        if left and in_vain >= LOOKS:
            self._transport.abort()
        elif left:
            self._timer = self._loop.call_later(WRITE_TIMEOUT / LOOKS, self._look, left, in_vain)


def _unacknowledged(file: int) -> int:
    """Return how many of the bytes that were written to a socket the other side's kernel has not acknowledged."""
    if sys.platform != "linux":
        return 0
    try:
        return int.from_bytes(fcntl.ioctl(file, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    except OSError:
        return 0
