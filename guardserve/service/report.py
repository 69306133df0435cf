"""Log lines about requests that were not served: which one, and why."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import orjson

from guardserve.identity import Identity
from guardserve.logs import Quota, untold
from guardserve.service.answer import Answer

FIRST_FAILURE = 500

TOLD = ("unlike_reference",)
"""Reasons of answers below :data:`FIRST_FAILURE` that are told: what is refused for what its data are."""

_log = logging.getLogger(__name__)


class Reporter:
    """Writes a line for each request that failed, or was refused by the shift policy, some a second for one reason.

    Args:
        model: The model's name.
        clock: Seconds.
    """

    def __init__(self, model: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._model = model
        self._quota = Quota(clock)

    def report(self, answer: Answer, identity: Identity | None) -> None:
        """Tell of an answer, if it is one to tell of."""
        reason = answer.reason
        if reason is None or (answer.status < FIRST_FAILURE and reason not in TOLD):
            return
        left_out = self._quota.take(reason)
        if left_out is None:
            return
        _log.warning(
            "%s: request %s was answered %d, %s: %s%s",
            self._model,
            "without an id" if identity is None else identity.request_id,
            answer.status,
            reason,
            orjson.loads(answer.body)["error"],
            untold(left_out),
            extra={
                "event": "request",
                "model": self._model,
                "status": answer.status,
                "reason": reason,
                **({} if identity is None else identity.labels()),
                **({"left_out": left_out} if left_out else {}),
            },
        )
