"""Prometheus metrics, and the only home of ``prometheus_client``.

Requests are counted as they end. What monitors say is looked at beforehand; the rest is read when a scrape asks.
"""

from __future__ import annotations

import platform
import re
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from types import MappingProxyType
from typing import Any, NamedTuple, get_args

import torch
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar as Shown

from guardserve import __version__
from guardserve.engine import Engine
from guardserve.identity import Exemplar, Identity
from guardserve.monitor import State, Summary, Verdict
from guardserve.runtime import Runtime
from guardserve.totals import ALARMS, Totals, Version

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"

_ASKED = re.compile(r"application/openmetrics-text *(?=;|$)(?!.*; *q=0(?:\.0*)?(?:;|$))(?!.*; *version=0\.)")

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
        pooled: How a gauge of several workers becomes one: ``"sum"``, ``"max"`` or ``"min"``. Counters and histograms
            add up, and what a monitor says is made anew of what all have seen.
    """

    kind: str
    help: str
    labels: tuple[str, ...]
    pooled: str = "max"


NONFINITE = "guardserve_nonfinite_samples_total"

METRICS: dict[str, Description] = {
    "guardserve_requests_total": Description(
        "counter", "Inference requests ended, by HTTP status.", ("model", "status")
    ),
    "guardserve_request_errors_total": Description(
        "counter", "Inference requests that were refused or failed, by reason.", ("model", "reason")
    ),
    "guardserve_requests_in_flight": Description("gauge", "Inference requests being worked on.", ("model",), "sum"),
    "guardserve_request_duration_seconds": Description(
        "histogram",
        "Time from a request's headers, or its body if that follows at once, until its answer is ready.",
        ("model",),
    ),
    "guardserve_forward_duration_seconds": Description(
        "histogram", "Time of one forward with its safeguards.", ("model",)
    ),
    "guardserve_batch_size": Description("histogram", "Rows of one forward.", ("model",)),
    "guardserve_queue_size": Description("gauge", "Requests that wait for a forward.", ("model",), "sum"),
    "guardserve_queue_duration_seconds": Description(
        "histogram", "Time that a request waited for its forward to begin.", ("model",)
    ),
    "guardserve_faults_total": Description(
        "counter",
        "Faults met in forwards: a joint batch that failed and was run one by one, memory that did not suffice, "
        "an error of the device, a forward that hung, a self-test that a model which worked did not pass.",
        ("model", "kind"),
    ),
    "guardserve_recoveries_total": Description(
        "counter", "Times that a self-test made the model ready again after a fault.", ("model",)
    ),
    "guardserve_reloads_total": Description(
        "counter",
        "Times that the model was to be loaded again: done, or failed, when the old version went on.",
        ("model", "outcome"),
    ),
    "guardserve_samples_total": Description("counter", "Samples that the monitor has seen.", ("model",)),
    NONFINITE: Description(
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
    "guardserve_layer_evidence": Description(
        "gauge",
        "Evidence of the layer after the last sample, as a share of what raises an alarm; only with a profile.",
        ("model", "layer"),
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
    "guardserve_model_ready": Description(
        "gauge", "1 when the model has passed its start-up probe.", ("model",), "min"
    ),
    "guardserve_model_info": Description(
        "gauge", "Always 1; what is served.", ("model", "platform", "device", "model_version")
    ),
    "guardserve_workers": Description(
        "gauge",
        "Processes that serve the model: up while they take connections, held while they may not as they have loaded "
        "something else than those that do, else down.",
        ("state",),
    ),
    "guardserve_worker_restarts_total": Description("counter", "Workers that ended and were started again.", ()),
    "guardserve_build_info": Description("gauge", "Always 1; what serves it.", ("version", "torch", "python")),
}
"""Every metric that guardserve exports, beside the ``process_`` and ``python_`` ones of prometheus_client."""

METRIC_NAMES = frozenset(METRICS)

WORKER_STATES = ("up", "held", "down")
"""Every value of the label ``state`` of workers."""

RELOADS = ("done", "failed")
"""Every value of the label ``outcome``."""


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
        reloads: Times that the model was to be loaded again, by outcome.
        totals: Counts of the model's versions.
        refresh: Called before a scrape, to look at the monitors anew; whoever looks regularly may put less here.
        exposed: What a scrape shows: where several workers serve the model, all of them.
    """

    def __init__(self, runtime: Runtime, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry if registry is not None else CollectorRegistry()
        self.exposed: Collector = self.registry
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
        self.reloads: Counter[str] = Counter(dict.fromkeys(RELOADS, 0))
        self.totals = Totals(runtime)
        self.refresh: Callable[[], object] = self.look
        self._taking = threading.Lock()
        self._summaries: list[Summary] | None = None
        self._looking = threading.Lock()
        self._ending = threading.Lock()
        self.registry.register(RequestCollector(runtime.name, self))
        self.registry.register(RuntimeCollector(self))
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

    @property
    def runtime(self) -> Runtime:
        """The version of the model that answers requests."""
        return self.totals.versions[-1].runtime

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
        """Count a forward of ``rows`` samples, from any thread."""
        with self._ending:
            self.forward.observe(seconds)
            self.batch.observe(rows)

    def follow(self, runtime: Runtime, engine: Engine, version: str) -> None:
        """Show what a version of the model counts, from now on the one that answers requests."""
        if self._summaries is not None:
            runtime.monitor.take_summary()  # what the probe showed, and from now on requests
        self.totals.follow(Version(runtime, engine, version))

    def leave(self, runtime: Runtime) -> None:
        """Look at a version for the last time: it has ended."""
        self.take_p_values()
        with self._taking:
            if self._summaries is not None and (last := runtime.monitor.take_summary()) is not None:
                self._summaries.append(last)
            self.totals.leave(runtime)

    def begin_summaries(self) -> None:
        """Begin to keep what samples show from now on for :meth:`take_summaries`."""
        self._summaries = []
        for version in self.totals.versions:
            version.runtime.monitor.take_summary()

    def take_summaries(self) -> list[Summary]:
        """Return what the samples since the last call show, by each version that had any; from any thread."""
        with self._taking:
            found, self._summaries = self._summaries or [], []
            shown = [version.runtime.monitor.take_summary() for version in self.totals.versions]
            return found + [summary for summary in shown if summary is not None]

    def take_p_values(self) -> None:
        """Count the samples that monitors have judged since the last call, from any thread; nobody else may drain."""
        with self._taking:
            for version in self.totals.versions:
                monitor = version.runtime.monitor
                for value in [] if monitor.reference is None else monitor.scores():
                    self.p_values.observe(value)

    def look(self) -> None:
        """Ask the monitors what they make of what they have seen: scrapes show it until the next look."""
        with self._looking:  # an older look that came later would put counters back
            self.take_p_values()
            self.totals.look()

    def render(self, content_type: str = CONTENT_TYPE) -> bytes:
        """Return all metrics in Prometheus' text format, or with exemplars as :data:`OPENMETRICS`."""
        return (openmetrics.generate_latest if content_type == OPENMETRICS else generate_latest)(self.exposed)


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
        waiting = sum(version.counts.waiting for version in metrics.totals.versions)
        requests = sorted(metrics.requests.copy().items())
        yield _family("guardserve_requests_total", [((model, str(status)), n) for status, n in requests])
        yield _family(
            "guardserve_request_errors_total", [((model, reason), metrics.errors[reason]) for reason in REASONS]
        )
        yield _family("guardserve_requests_in_flight", [((model,), metrics.in_flight)])
        yield _histogram("guardserve_request_duration_seconds", model, metrics.duration)
        yield _histogram("guardserve_forward_duration_seconds", model, metrics.forward)
        yield _histogram("guardserve_batch_size", model, metrics.batch)
        yield _family("guardserve_queue_size", [((model,), waiting)])
        yield _histogram("guardserve_queue_duration_seconds", model, metrics.queue)
        yield _family("guardserve_reloads_total", [((model, outcome), metrics.reloads[outcome]) for outcome in RELOADS])


class RuntimeCollector(Collector):
    """Reads at scrape time how the version that answers requests is, and what all of them have counted."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def describe(self) -> Iterator[Metric]:
        """Describe nothing, so that registering does not read the runtime."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as they are now."""
        self._metrics.refresh()
        totals = self._metrics.totals
        runtime, _, version = totals.versions[-1]
        model, monitor = runtime.name, runtime.monitor
        verdict, _, _, unobservable = totals.seen(runtime)
        yield _histogram("guardserve_shift_p_value", model, self._metrics.p_values)
        shown: dict[tuple[str, ...], Shown] = {
            (model, *key): _shown(exemplar) for key, exemplar in runtime.nonfinite_exemplars.copy().items()
        }
        for name, series in totals.read().items():
            yield _family(name, list(series.items()), shown if name == NONFINITE else {})
        yield _family("guardserve_build_info", [((__version__, torch.__version__, platform.python_version()), 1)])
        yield _family("guardserve_model_info", [((model, runtime.platform, str(runtime.device), version), 1)])
        yield _family("guardserve_model_ready", [((model,), runtime.failure is None)])
        lost = monitor.unobserved  # also layers that were observed once
        observed = [((model, "true"), len(set(monitor.layers) - lost.keys())), ((model, "false"), len(lost))]
        yield _family("guardserve_batchnorm_layers", observed)
        yield _family("guardserve_unobservable_channels", [((model,), unobservable)])
        yield _family("guardserve_shift_threshold", [((model,), monitor.threshold)])
        if monitor.reference is not None:
            labels = (model, str(monitor.reference.samples), f"{runtime.target_arl:g}")
            yield _family("guardserve_reference_info", [(labels, 1)])
        if monitor.share is not None:
            yield _family("guardserve_monitor_share", [((model,), monitor.share)])
        yield from verdict_families(model, verdict)
        yield from worker_families({"up": 1}, 0)


Row = tuple[tuple[str, ...], float]


def pooled_families(model: str, verdict: Verdict) -> Iterator[Metric]:
    """Yield what a monitor of all workers' samples says, and how often it raised an alarm."""
    yield from verdict_families(model, verdict)
    yield _family(ALARMS, [((model,), verdict.alarms)])


def worker_families(states: Mapping[str, int], restarts: int) -> Iterator[Metric]:
    """Yield what there is to say of workers; one process that serves by itself is one."""
    yield _family("guardserve_workers", [((state,), states.get(state, 0)) for state in WORKER_STATES])
    yield _family("guardserve_worker_restarts_total", [((), restarts)])


def refusal_families(model: str, refused: int) -> Iterator[Metric]:
    """Yield the inference requests that were refused as no worker took any, also before the first."""
    yield _family("guardserve_requests_total", [((model, "503"), refused)])
    yield _family("guardserve_request_errors_total", [((model, "not_ready"), refused)])


def verdict_families(model: str, verdict: Verdict) -> Iterator[Metric]:
    """Yield what a monitor says: each of its metrics, some without a sample, so that they can replace another's."""
    states = [((model, state), state == verdict.state) for state in get_args(State)]
    yield _family("guardserve_shift_state", states)
    lead = [((model, verdict.layer), 1)] if verdict.state == "shifted" and verdict.layer is not None else []
    yield _family("guardserve_shift_lead_layer", lead)
    for name, value in (
        ("guardserve_shift_evidence", verdict.evidence),
        ("guardserve_shift_evidence_threshold", verdict.evidence_threshold),
        ("guardserve_shift_score", verdict.score),
    ):
        yield _family(name, [] if value is None else [((model,), value)])
    yield _family("guardserve_layer_evidence", [((model, name), n) for name, n in verdict.layers.items()])
    layers = () if verdict.score is None else verdict.window.layers
    yield _family("guardserve_layer_mean_shift", [((model, layer.name), layer.mean_shift) for layer in layers])
    yield _family("guardserve_layer_log_std_ratio", [((model, layer.name), layer.log_std_ratio) for layer in layers])
    yield _family("guardserve_layer_wasserstein2", [((model, layer.name), layer.wasserstein2) for layer in layers])
    channels = [] if verdict.score is None else verdict.window.worst_channels(WORST_CHANNELS)
    yield _family(
        "guardserve_channel_wasserstein2",
        [((model, layer, str(channel.channel)), channel.wasserstein2) for layer, channel in channels],
    )


def negotiated(accept: str) -> str:
    """Return the content type of a scrape, given its ``Accept`` header: OpenMetrics if that is named, else text."""
    return OPENMETRICS if any(_ASKED.match(part.strip()) for part in accept.split(",")) else CONTENT_TYPE


def _shown(exemplar: Exemplar) -> Shown:
    """Write an exemplar: with ids of bounded length, as OpenMetrics allows its labels 128 characters."""
    identity, value, at = exemplar
    labels = {"request_id": identity.request_id}
    return Shown(labels if identity.trace_id is None else {**labels, "trace_id": identity.trace_id}, value, at)


def _family(
    name: str, rows: Sequence[Row], exemplars: Mapping[tuple[str, ...], Shown] = MappingProxyType({})
) -> Metric:
    kind, text, labels, _ = METRICS[name]
    family = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
    metric: Any = family(name, text, labels=labels)
    for values, value in rows:
        exemplar = exemplars.get(values)
        metric.add_metric(values, value, **({} if exemplar is None else {"exemplar": exemplar}))
    return metric  # type: ignore[no-any-return]


def _histogram(name: str, model: str, distribution: Distribution) -> Metric:
    _, text, labels, _ = METRICS[name]
    family = HistogramMetricFamily(name, text, labels=labels)
    bounds = [*(repr(float(bound)) for bound in distribution.bounds), "+Inf"]
    exemplars = [None if exemplar is None else _shown(exemplar) for exemplar in distribution.exemplars]
    buckets: Any = list(zip(bounds, accumulate(distribution.counts), exemplars, strict=True))
    family.add_metric((model,), buckets, distribution.sum)
    return family
