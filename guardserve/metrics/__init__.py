"""Prometheus metrics, and the only home of ``prometheus_client``.

Requests are counted as they end. What monitors say is looked at beforehand; the rest is read when a scrape asks.
"""

from guardserve.metrics.counts import LATENCY_BUCKETS
from guardserve.metrics.descriptions import METRIC_NAMES, METRICS, REASONS, WORKER_STATES, WORST_CHANNELS
from guardserve.metrics.exposition import CONTENT_TYPE, OPENMETRICS, negotiated
from guardserve.metrics.families import pooled_families, refusal_families, worker_families
from guardserve.metrics.model import Metrics

__all__ = [
    "CONTENT_TYPE",
    "LATENCY_BUCKETS",
    "METRICS",
    "METRIC_NAMES",
    "OPENMETRICS",
    "REASONS",
    "WORKER_STATES",
    "WORST_CHANNELS",
    "Metrics",
    "negotiated",
    "pooled_families",
    "refusal_families",
    "worker_families",
]
