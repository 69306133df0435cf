"""When a call in this thread has to end: httpx limits each read, of which a server may make many of one answer."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping

import httpcore
import httpx

PIECE = 2**16
"""Bytes that are written at once."""


class Deadline(threading.local):
    """Each thread's own end of what it is sending and receiving.

    Attributes:
        end: Seconds of the monotonic clock.
    """

    end = math.inf

    def watch(self, _event: str, info: Mapping[str, object]) -> None:
        """Hold a connection to the deadline of whoever uses it: the ``trace`` of a request, told of each new one."""
        stream = info.get("return_value")
        if not isinstance(stream, httpcore.NetworkStream):
            return
        read, write = stream.read, stream.write

        def read_in_time(max_bytes: int, timeout: float | None = None) -> bytes:
            return read(max_bytes, self._left(timeout, httpx.ReadTimeout))

        def write_in_time(buffer: bytes, timeout: float | None = None) -> None:
            for start in range(0, len(buffer), PIECE):
                write(buffer[start : start + PIECE], self._left(timeout, httpx.WriteTimeout))

        vars(stream).update(read=read_in_time, write=write_in_time)

    def _left(self, timeout: float | None, error: type[httpx.TimeoutException]) -> float | None:
        left = self.end - time.monotonic()
        if left <= 0:
            raise error("the call's time is over")
        return left if timeout is None or timeout > left else timeout
