"""Request traffic as the metrics have counted it."""

from __future__ import annotations

from dataclasses import dataclass

from guardserve.metrics import LATENCY_BUCKETS, Metrics

REQUESTS, DURATIONS = "guardserve_requests_total", "guardserve_request_duration_seconds_bucket"

FIRST_FAILURE = 500


@dataclass(frozen=True)
class Traffic:
    """Inference requests ended so far, or between two moments.

    Attributes:
        requests: Their number.
        failed: Those answered with a status of 500 or more.
        durations: How many fell into each of the latency histogram's buckets, and beyond the last.
    """

    requests: int
    failed: int
    durations: tuple[int, ...]

    @classmethod
    def of(cls, metrics: Metrics) -> Traffic:
        """Read the requests ended so far, without collecting any other metric."""
        requests = failed = 0
        cumulative: list[int] = []
        for family in metrics.registry.restricted_registry([REQUESTS, DURATIONS]).collect():
            for sample in family.samples:
                if sample.name == REQUESTS:
                    requests += int(sample.value)
                    failed += int(sample.value) * (int(sample.labels["status"]) >= FIRST_FAILURE)
                elif sample.name == DURATIONS:
                    cumulative.append(int(sample.value))
        return cls(requests, failed, tuple(now - then for now, then in zip(cumulative, [0, *cumulative], strict=False)))

    def since(self, earlier: Traffic) -> Traffic:
        """Return what has come since."""
        durations = tuple(now - then for now, then in zip(self.durations, earlier.durations, strict=True))
        return Traffic(self.requests - earlier.requests, self.failed - earlier.failed, durations)

    def quantile(self, q: float) -> float | None:
        """Estimate a quantile of the durations, in seconds, as Prometheus does: None without requests."""
        total, below, low = sum(self.durations), 0, 0.0
        if not total:
            return None
        for count, high in zip(self.durations, LATENCY_BUCKETS, strict=False):
            if count and below + count >= q * total:
                return low + (high - low) * (q * total - below) / count
            below, low = below + count, high
        return low
