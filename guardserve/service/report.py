"""Log lines about requests that were not served: which one, and why."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable

import orjson

from guardserve.identity import Identity
from guardserve.service.answer import Answer

FIRST_FAILURE = 500

TOLD = ("unlike_reference",)
"""Reasons of answers below :data:`FIRST_FAILURE` that are told: what is refused for what its data are."""

LINES = 10
"""Lines a second for one reason: an overloaded server has better things to do. What is left out is counted."""

_log = logging.getLogger(__name__)


class Reporter:
    """Writes a line for each request that failed, or was refused by the shift policy.

    Args:
        model: The model's name.
        clock: Seconds.
    """

    def __init__(self, model: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._model = model
        self._clock = clock
        self._second = 0
        self._written: Counter[str] = Counter()
        self._left_out: Counter[str] = Counter()

    def report(self, answer: Answer, identity: Identity | None) -> None:
        """Tell of an answer, if it is one to tell of."""
        reason = answer.reason
        if reason is None or (answer.status < FIRST_FAILURE and reason not in TOLD):
            return
        second = int(self._clock())
        if second != self._second:
            self._second = second
            self._written.clear()
        if self._written[reason] >= LINES:
            self._left_out[reason] += 1
            return
        self._written[reason] += 1
        left_out = self._left_out.pop(reason, 0)
        _log.warning(
            "%s: request %s was answered %d, %s: %s%s",
            self._model,
            "without an id" if identity is None else identity.request_id,
            answer.status,
            reason,
            orjson.loads(answer.body)["error"],
            f" (and {left_out} before it, which were not told)" if left_out else "",
            extra={
                "event": "request",
                "model": self._model,
                "status": answer.status,
                "reason": reason,
                **({} if identity is None else identity.labels()),
                **({"left_out": left_out} if left_out else {}),
            },
        )
