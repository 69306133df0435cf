"""The memory that requests take, all of them together bounded."""

from __future__ import annotations

import threading

from guardserve.service.answer import RETRY_AFTER, Answer, refusal
from guardserve.service.limits import Limits


class RefusedBodyError(Exception):
    """A body that is not read to its end; its argument is the answer."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status)
        self.answer = answer


class Holding:
    """What all requests hold.

    Args:
        limits: How much one may, and all may.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._size = 0
        self._lock = threading.Lock()

    def check(self, size: int) -> None:
        """Refuse a body of more bytes than allowed.

        Raises:
            RefusedBodyError: If it has.
        """
        if size > self._limits.max_body_size:
            text = f"the request's body is larger than {self._limits.max_body_size} bytes: send fewer rows at once"
            raise RefusedBodyError(refusal(413, "too_large", text))

    def add(self, size: int) -> None:
        """Hold so many bytes more, or less.

        Raises:
            RefusedBodyError: If there would be too many.
        """
        with self._lock:
            if size > 0 and self._size + size > self._limits.max_pending_size:
                text = "the server holds as many requests as it can: try again later"
                raise RefusedBodyError(refusal(503, "overloaded", text, RETRY_AFTER))
            self._size += size


class Held:
    """What one request holds: its body as it came and decompressed, and its tensors.

    Args:
        holding: What all do.
    """

    __slots__ = ("_holding", "_size")

    def __init__(self, holding: Holding) -> None:
        self._holding = holding
        self._size = 0

    def take(self, body: bytes) -> None:
        """Hold a part of the body as it comes.

        Raises:
            RefusedBodyError: If it is too large, or there is no room for it.
        """
        self._holding.check(self._size + len(body))
        self.more(len(body))

    def more(self, size: int) -> None:
        """Hold so many bytes more, before they are allocated; a :data:`Hold` for any thread.

        Raises:
            RefusedBodyError: If there is no room for them.
        """
        self._holding.add(size)
        self._size += size

    def keep(self, size: int) -> None:
        """Let go of all but so many bytes."""
        if size < self._size:
            self._holding.add(size - self._size)
            self._size = size
