"""How numbers become metric families with the documented names, labels and sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from types import MappingProxyType
from typing import Any, get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.samples import Exemplar as Shown

from guardserve.identity import Exemplar
from guardserve.metrics.counts import Distribution
from guardserve.metrics.descriptions import METRICS, WORKER_STATES, WORST_CHANNELS
from guardserve.monitor import State, Verdict
from guardserve.totals import ALARMS, Labels


def pooled_families(model: str, verdict: Verdict) -> Iterator[Metric]:
    """Yield what a monitor of all workers' samples says, and how often it raised an alarm."""
    yield from verdict_families(model, verdict)
    yield family(ALARMS, [((model,), verdict.alarms)])


def worker_families(states: Mapping[str, int], restarts: int) -> Iterator[Metric]:
    """Yield what there is to say of workers; one process that serves by itself is one."""
    yield family("guardserve_workers", [((state,), states.get(state, 0)) for state in WORKER_STATES])
    yield family("guardserve_worker_restarts_total", [((), restarts)])


def refusal_families(model: str, refused: int) -> Iterator[Metric]:
    """Yield the inference requests that were refused as no worker took any, also before the first."""
    yield family("guardserve_requests_total", [((model, "503"), refused)])
    yield family("guardserve_request_errors_total", [((model, "not_ready"), refused)])


def verdict_families(model: str, verdict: Verdict) -> Iterator[Metric]:
    """Yield what a monitor says: each of its metrics, some without a sample, so that they can replace another's."""
    states = [((model, state), state == verdict.state) for state in get_args(State)]
    yield family("guardserve_shift_state", states)
    lead = [((model, verdict.layer), 1)] if verdict.state == "shifted" and verdict.layer is not None else []
    yield family("guardserve_shift_lead_layer", lead)
    for name, value in (
        ("guardserve_shift_evidence", verdict.evidence),
        ("guardserve_shift_evidence_threshold", verdict.evidence_threshold),
        ("guardserve_shift_score", verdict.score),
    ):
        yield family(name, [] if value is None else [((model,), value)])
    yield family("guardserve_layer_evidence", [((model, name), n) for name, n in verdict.layers.items()])
    layers = () if verdict.score is None else verdict.window.layers
    yield family("guardserve_layer_mean_shift", [((model, layer.name), layer.mean_shift) for layer in layers])
    yield family("guardserve_layer_log_std_ratio", [((model, layer.name), layer.log_std_ratio) for layer in layers])
    yield family("guardserve_layer_wasserstein2", [((model, layer.name), layer.wasserstein2) for layer in layers])
    channels = [] if verdict.score is None else verdict.window.worst_channels(WORST_CHANNELS)
    yield family(
        "guardserve_channel_wasserstein2",
        [((model, layer, str(channel.channel)), channel.wasserstein2) for layer, channel in channels],
    )


def shown(exemplar: Exemplar) -> Shown:
    """Write an exemplar: with ids of bounded length, as OpenMetrics allows its labels 128 characters."""
    identity, value, at = exemplar
    labels = {"request_id": identity.request_id}
    return Shown(labels if identity.trace_id is None else {**labels, "trace_id": identity.trace_id}, value, at)


def family(
    name: str, rows: Sequence[tuple[Labels, float]], exemplars: Mapping[Labels, Shown] = MappingProxyType({})
) -> Metric:
    """Return a counter or gauge with its series, and for some labels whose request stands for them."""
    kind, text, labels, _ = METRICS[name]
    metric: Any = (CounterMetricFamily if kind == "counter" else GaugeMetricFamily)(name, text, labels=labels)
    for values, value in rows:
        exemplar = exemplars.get(values)
        metric.add_metric(values, value, **({} if exemplar is None else {"exemplar": exemplar}))
    return metric  # type: ignore[no-any-return]


def histogram(name: str, model: str, distribution: Distribution) -> Metric:
    """Return a histogram of a model."""
    _, text, labels, _ = METRICS[name]
    metric = HistogramMetricFamily(name, text, labels=labels)
    bounds = [*(repr(float(bound)) for bound in distribution.bounds), "+Inf"]
    exemplars = [None if exemplar is None else shown(exemplar) for exemplar in distribution.exemplars]
    buckets: Any = list(zip(bounds, accumulate(distribution.counts), exemplars, strict=True))
    metric.add_metric((model,), buckets, distribution.sum)
    return metric
