"""Prometheus metrics, and the only home of ``prometheus_client``.

Requests are counted as they end; everything else is read from the runtime and its engine when a scrape asks.
"""

from __future__ import annotations

import math
import platform
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple, get_args

import torch
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from guardserve import __version__
from guardserve.engine import FAULTS, Engine, EngineCounts
from guardserve.identity import Exemplar, Identity
from guardserve.monitor import State, Verdict
from guardserve.runtime import Runtime

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

WORST_CHANNELS = 5
"""Channels with a series of their own, over all layers."""

LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
P_VALUE_BUCKETS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

REASONS = (
    "malformed",
    "invalid_input",
    "unlike_reference",
    "unknown_output",
    "too_large",
    "unsupported_encoding",
    "not_found",
    "unauthorized",
    "not_ready",
    "overloaded",
    "slow_body",
    "timeout",
    "nonfinite_output",
    "model_error",
    "out_of_memory",
    "disconnected",
    "internal",
)
"""Every value of the label ``reason``."""


class Description(NamedTuple):
    """A row of the documented table.

    Attributes:
        kind: ``"counter"``, ``"gauge"`` or ``"histogram"``.
        help: What it says, in one sentence.
        labels: Its labels, in order.
    """

    kind: str
    help: str
    labels: tuple[str, ...]


METRICS: dict[str, Description] = {
    "guardserve_requests_total": Description(
        "counter", "Inference requests ended, by HTTP status.", ("model", "status")
    ),
    "guardserve_request_errors_total": Description(
        "counter", "Inference requests that were refused or failed, by reason.", ("model", "reason")
    ),
    "guardserve_requests_in_flight": Description("gauge", "Inference requests being worked on.", ("model",)),
    "guardserve_request_duration_seconds": Description(
        "histogram",
        "Time from a request's headers, or its body if that follows at once, until its answer is ready.",
        ("model",),
    ),
    "guardserve_forward_duration_seconds": Description(
        "histogram", "Time of one forward with its safeguards.", ("model",)
    ),
    "guardserve_batch_size": Description("histogram", "Rows of one forward.", ("model",)),
    "guardserve_queue_size": Description("gauge", "Requests that wait for a forward.", ("model",)),
    "guardserve_queue_duration_seconds": Description(
        "histogram", "Time that a request waited for its forward to begin.", ("model",)
    ),
    "guardserve_faults_total": Description(
        "counter",
        "Faults met in forwards: a joint batch that failed and was run one by one, memory that did not suffice, "
        "an error of the device, a forward that hung.",
        ("model", "kind"),
    ),
    "guardserve_recoveries_total": Description(
        "counter", "Times that a self-test made the model ready again after a fault.", ("model",)
    ),
    "guardserve_samples_total": Description("counter", "Samples that the monitor has seen.", ("model",)),
    "guardserve_nonfinite_samples_total": Description(
        "counter",
        "Samples with NaN or infinity, by where it was met: in an input, what enters a layer, or an output.",
        ("model", "origin", "name"),
    ),
    "guardserve_guard_violations_total": Description(
        "counter", "What the guard had to prevent or could only report, by kind.", ("model", "kind")
    ),
    "guardserve_shift_score": Description(
        "gauge",
        "Largest layer Wasserstein-2 distance in the recent window, in running standard deviations; "
        "absent until the window holds enough samples.",
        ("model",),
    ),
    "guardserve_shift_threshold": Description("gauge", "Score from which on the input counts as shifted.", ("model",)),
    "guardserve_shift_state": Description(
        "gauge", "1 for the state that the monitor is in, 0 for the others.", ("model", "state")
    ),
    "guardserve_shift_evidence": Description(
        "gauge",
        "Largest evidence of the detector's charts after the last sample; only with a reference profile.",
        ("model",),
    ),
    "guardserve_shift_evidence_threshold": Description(
        "gauge", "Evidence from which on there is an alarm; only with a reference profile.", ("model",)
    ),
    "guardserve_shift_alarms_total": Description(
        "counter", "Alarms of the detector; always 0 without a reference profile.", ("model",)
    ),
    "guardserve_shift_lead_layer": Description(
        "gauge",
        "Always 1, while there is a shift; the earliest layer that left its null, or without a reference profile the "
        "one with the largest distance.",
        ("model", "layer"),
    ),
    "guardserve_shift_p_value": Description(
        "histogram",
        "P-values of the samples judged by a reference profile: uniform on clean data, small for odd samples.",
        ("model",),
    ),
    "guardserve_reference_info": Description(
        "gauge",
        "Always 1; the reference profile's samples, and the samples between false alarms that it is used for; only "
        "with one.",
        ("model", "samples", "target_arl"),
    ),
    "guardserve_state_save_failures_total": Description(
        "counter", "Times that the detector's state could not be saved.", ("model",)
    ),
    "guardserve_monitor_share": Description(
        "gauge",
        "Share of the forwards' time that the monitor takes to read; absent before the first is timed.",
        ("model",),
    ),
    "guardserve_layer_mean_shift": Description(
        "gauge", "Mean shift of the layer's input in the recent window, RMS over channels.", ("model", "layer")
    ),
    "guardserve_layer_log_std_ratio": Description(
        "gauge", "Log ratio of live to running standard deviation, RMS over channels.", ("model", "layer")
    ),
    "guardserve_layer_wasserstein2": Description(
        "gauge", "Normalised Wasserstein-2 distance from the running statistics, RMS over channels.", ("model", "layer")
    ),
    "guardserve_channel_wasserstein2": Description(
        "gauge", f"The same for one channel; the worst {WORST_CHANNELS} of the model.", ("model", "layer", "channel")
    ),
    "guardserve_batchnorm_layers": Description("gauge", "BatchNorm layers of the model.", ("model", "observed")),
    "guardserve_unobservable_channels": Description(
        "gauge",
        "Channels that the monitor leaves out: fusion has scaled away what enters them, "
        "or their statistics are not finite.",
        ("model",),
    ),
    "guardserve_model_ready": Description("gauge", "1 when the model has passed its start-up probe.", ("model",)),
    "guardserve_model_info": Description("gauge", "Always 1; what is served.", ("model", "platform", "device")),
    "guardserve_build_info": Description("gauge", "Always 1; what serves it.", ("version", "torch", "python")),
}
"""Every metric that guardserve exports, beside the ``process_`` and ``python_`` ones of prometheus_client."""

METRIC_NAMES = frozenset(METRICS)

NO_ENGINE = EngineCounts(0, dict.fromkeys(FAULTS, 0), 0)


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


class Metrics:
    """The metrics of one served model.

    Requests are counted in plain numbers, as a counter of prometheus_client costs each of them a lock or two.

    Args:
        runtime: The model.
        registry: Where to register; a fresh registry by default, never the global one.

    Attributes:
        model: Its name.
        in_flight: Inference requests being worked on.
        requests: Inference requests ended, by status.
        errors: Those that were refused or failed, by reason.
        engine: What runs the model's forwards, where one does.
    """

    def __init__(self, runtime: Runtime, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry if registry is not None else CollectorRegistry()
        self.model = runtime.name
        self.in_flight = 0
        # a counter that appears with its first increment hides that increment from rate() and increase()
        self.requests: Counter[int] = Counter({200: 0})
        self.errors: Counter[str] = Counter(dict.fromkeys(REASONS, 0))
        self.duration = Distribution(LATENCY_BUCKETS)
        self.forward = Distribution(LATENCY_BUCKETS)
        self.batch = Distribution(BATCH_BUCKETS)
        self.queue = Distribution(LATENCY_BUCKETS)
        self.p_values = Distribution(P_VALUE_BUCKETS)
        self.engine: Engine | None = None
        self._monitor = runtime.monitor
        self._taking = threading.Lock()
        self.registry.register(RequestCollector(runtime.name, self))
        self.registry.register(RuntimeCollector(runtime))
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

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

    def forward_ended(self, rows: int, seconds: float) -> None:
        """Count a forward of ``rows`` samples."""
        self.forward.observe(seconds)
        self.batch.observe(rows)

    def take_p_values(self) -> None:
        """Count the samples that the monitor has judged since the last call, from any thread; nobody else may drain."""
        with self._taking:
            if self._monitor.reference is None:
                return
            for value in self._monitor.scores():
                if not math.isnan(value):  # a sample that could not be judged
                    self.p_values.observe(value)

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class RequestCollector(Collector):
    """Reads what has become of requests at scrape time."""

    def __init__(self, model: str, metrics: Metrics) -> None:
        self._model = model
        self._metrics = metrics

    def describe(self) -> Iterator[Metric]:
        """Describe what it collects, so that a part of it can be asked for."""
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as they are now."""
        metrics, model = self._metrics, self._model
        counts = NO_ENGINE if metrics.engine is None else metrics.engine.counts
        requests = sorted(metrics.requests.copy().items())
        yield _family("guardserve_requests_total", [((model, str(status)), n) for status, n in requests])
        yield _family(
            "guardserve_request_errors_total", [((model, reason), metrics.errors[reason]) for reason in REASONS]
        )
        yield _family("guardserve_requests_in_flight", [((model,), metrics.in_flight)])
        yield _histogram("guardserve_request_duration_seconds", model, metrics.duration)
        yield _histogram("guardserve_forward_duration_seconds", model, metrics.forward)
        yield _histogram("guardserve_batch_size", model, metrics.batch)
        yield _family("guardserve_queue_size", [((model,), counts.waiting)])
        yield _histogram("guardserve_queue_duration_seconds", model, metrics.queue)
        metrics.take_p_values()
        yield _histogram("guardserve_shift_p_value", model, metrics.p_values)
        yield _family("guardserve_faults_total", [((model, kind), counts.faults[kind]) for kind in FAULTS])
        yield _family("guardserve_recoveries_total", [((model,), counts.recoveries)])


class RuntimeCollector(Collector):
    """Reads a runtime's state at scrape time."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def describe(self) -> Iterator[Metric]:
        """Describe nothing, so that registering does not read the runtime."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as they are now."""
        runtime = self._runtime
        model = runtime.name
        monitor = runtime.monitor
        (samples, nonfinite), verdict = monitor.counts(), monitor.verdict()
        yield _family("guardserve_build_info", [((__version__, torch.__version__, platform.python_version()), 1)])
        yield _family("guardserve_model_info", [((model, runtime.platform, str(runtime.device)), 1)])
        yield _family("guardserve_model_ready", [((model,), runtime.failure is None)])
        counts = runtime.guard.counts
        kinds = ("training_on_entry", "training_during_forward", "buffers_changed", "hazards")
        yield _family("guardserve_guard_violations_total", [((model, kind), counts[kind]) for kind in kinds])
        observed = [((model, "true"), len(monitor.layers)), ((model, "false"), len(monitor.unobserved))]
        yield _family("guardserve_batchnorm_layers", observed)
        unobservable = sum(monitor.unobservable_channels.values())
        yield _family("guardserve_unobservable_channels", [((model,), unobservable)])
        yield _family("guardserve_samples_total", [((model,), samples)])
        yield _family("guardserve_nonfinite_samples_total", list(_nonfinite(runtime, nonfinite)))
        yield _family("guardserve_shift_threshold", [((model,), monitor.threshold)])
        states = [((model, state), state == verdict.state) for state in get_args(State)]
        yield _family("guardserve_shift_state", states)
        lead = [((model, verdict.layer), 1)] if verdict.state == "shifted" and verdict.layer is not None else []
        yield _family("guardserve_shift_lead_layer", lead)
        yield _family("guardserve_shift_alarms_total", [((model,), verdict.alarms)])
        if verdict.evidence is not None and verdict.evidence_threshold is not None:
            yield _family("guardserve_shift_evidence", [((model,), verdict.evidence)])
            yield _family("guardserve_shift_evidence_threshold", [((model,), verdict.evidence_threshold)])
        if monitor.reference is not None:
            labels = (model, str(monitor.reference.samples), f"{runtime.target_arl:g}")
            yield _family("guardserve_reference_info", [(labels, 1)])
        if monitor.share is not None:
            yield _family("guardserve_monitor_share", [((model,), monitor.share)])
        failures = 0 if runtime.keeper is None else runtime.keeper.failures
        yield _family("guardserve_state_save_failures_total", [((model,), failures)])
        yield from _shift(model, verdict)


Row = tuple[tuple[str, ...], float]


def _shift(model: str, verdict: Verdict) -> Iterator[Metric]:
    if verdict.score is None:
        return
    yield _family("guardserve_shift_score", [((model,), verdict.score)])
    layers = verdict.window.layers
    yield _family("guardserve_layer_mean_shift", [((model, layer.name), layer.mean_shift) for layer in layers])
    yield _family("guardserve_layer_log_std_ratio", [((model, layer.name), layer.log_std_ratio) for layer in layers])
    yield _family("guardserve_layer_wasserstein2", [((model, layer.name), layer.wasserstein2) for layer in layers])
    channels = verdict.window.worst_channels(WORST_CHANNELS)
    yield _family(
        "guardserve_channel_wasserstein2",
        [((model, layer, str(channel.channel)), channel.wasserstein2) for layer, channel in channels],
    )


def _nonfinite(runtime: Runtime, seen: Mapping[str, int]) -> Iterator[Row]:
    """Count by origin; what can count is there from the start, at 0."""
    for origin, specs in (("input", runtime.signature.inputs), ("output", runtime.signature.outputs)):
        for spec in specs:
            yield (runtime.name, origin, spec.name), runtime.nonfinite[origin, spec.name]
    for layer in runtime.monitor.layers:
        yield (runtime.name, "activation", layer), seen.get(layer, 0)


def _family(name: str, rows: Sequence[Row]) -> Metric:
    kind, text, labels = METRICS[name]
    family = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
    metric = family(name, text, labels=labels)
    for values, value in rows:
        metric.add_metric(values, value)
    return metric


def _histogram(name: str, model: str, distribution: Distribution) -> Metric:
    _, text, labels = METRICS[name]
    family = HistogramMetricFamily(name, text, labels=labels)
    bounds = [*(repr(float(bound)) for bound in distribution.bounds), "+Inf"]
    family.add_metric((model,), list(zip(bounds, accumulate(distribution.counts), strict=True)), distribution.sum)
    return family
