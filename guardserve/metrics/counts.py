"""What is counted as requests end, in plain numbers: a counter of prometheus_client costs each a lock or two."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

from guardserve.identity import Exemplar, Identity
from guardserve.metrics.descriptions import REASONS, RELOADS

LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
P_VALUE_BUCKETS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Distribution:
    """A histogram, to be written by one thread at a time.

    Args:
        bounds: Upper bounds of its buckets, each included; what is beyond the last is counted too.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0
        self.exemplars: list[Exemplar | None] = [None] * len(self.counts)

    def observe(self, value: float, identity: Identity | None = None) -> None:
        """Count a value, and keep whose it is until the next in its bucket."""
        bucket = bisect_left(self.bounds, value)
        self.counts[bucket] += 1
        self.sum += value
        if identity is not None:
            self.exemplars[bucket] = Exemplar(identity, value, time.time())


class Counts:
    """What has become of one model's requests and forwards.

    Attributes:
        in_flight: Inference requests being worked on.
        requests: Inference requests ended, by status.
        errors: Those that were refused or failed, by reason.
        duration: Seconds that they took.
        forward: Seconds that forwards took.
        batch: Their rows.
        queue: Seconds that requests waited for one.
        p_values: Those of the samples that were judged.
        reloads: Times that the model was to be loaded again, by outcome.
    """

    def __init__(self) -> None:
        self.in_flight = 0
        self.unreadable = 0
        # a counter that appears with its first increment hides that increment from rate() and increase()
        self.requests: Counter[int] = Counter({200: 0})
        self.errors: Counter[str] = Counter(dict.fromkeys(REASONS, 0))
        self.duration = Distribution(LATENCY_BUCKETS)
        self.forward = Distribution(LATENCY_BUCKETS)
        self.batch = Distribution(BATCH_BUCKETS)
        self.queue = Distribution(LATENCY_BUCKETS)
        self.p_values = Distribution(P_VALUE_BUCKETS)
        self.reloads: Counter[str] = Counter(dict.fromkeys(RELOADS, 0))
        self._ending = threading.Lock()

    def request_ended(
        self, status: int, seconds: float, reason: str | None = None, identity: Identity | None = None
    ) -> None:
        """Count an inference request.

        Args:
            status: HTTP status of its answer.
            seconds: Time that it took.
            reason: One of :data:`REASONS` when it was refused or failed.
            identity: Whose it was.
        """
        self.requests[status] += 1
        self.duration.observe(seconds, identity)
        if reason is not None:
            self.errors[reason] += 1

    def request_unreadable(self) -> None:
        """Count what came and could not be read as a request."""
        self.unreadable += 1

    def forward_ended(self, rows: int, seconds: float) -> None:
        """Count a forward of ``rows`` samples, from any thread."""
        with self._ending:
            self.forward.observe(seconds)
            self.batch.observe(rows)
