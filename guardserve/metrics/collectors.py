"""What is read when a scrape asks."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator

import torch
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar as Shown

from guardserve import __version__
from guardserve.metrics.counts import Counts, Distribution
from guardserve.metrics.descriptions import NONFINITE, REASONS, RELOADS
from guardserve.metrics.families import family, histogram, shown, verdict_families, worker_families
from guardserve.totals import Labels, Totals


class RequestCollector(Collector):
    """Reads what has become of requests at scrape time."""

    def __init__(self, model: str, counts: Counts, totals: Totals) -> None:
        self._model = model
        self._counts = counts
        self._totals = totals

    def describe(self) -> Iterator[Metric]:
        """Describe what it collects, so that a part of it can be asked for."""
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as they are now."""
        counts, model = self._counts, self._model
        waiting = sum(version.counts.waiting for version in self._totals.versions)
        requests = sorted(counts.requests.copy().items())
        yield family("guardserve_requests_total", [((model, str(status)), n) for status, n in requests])
        yield family(
            "guardserve_request_errors_total", [((model, reason), counts.errors[reason]) for reason in REASONS]
        )
        yield family("guardserve_unreadable_requests_total", [((model,), counts.unreadable)])
        yield family("guardserve_requests_in_flight", [((model,), counts.in_flight)])
        yield histogram("guardserve_request_duration_seconds", model, counts.duration)
        yield histogram("guardserve_forward_duration_seconds", model, counts.forward)
        yield histogram("guardserve_batch_size", model, counts.batch)
        yield family("guardserve_queue_size", [((model,), waiting)])
        yield histogram("guardserve_queue_duration_seconds", model, counts.queue)
        yield family("guardserve_reloads_total", [((model, outcome), counts.reloads[outcome]) for outcome in RELOADS])


class RuntimeCollector(Collector):
    """Reads at scrape time how the version that answers requests is, and what all of them have counted."""

    def __init__(self, totals: Totals, p_values: Distribution, refresh: Callable[[], object]) -> None:
        self._totals = totals
        self._p_values = p_values
        self._refresh = refresh

    def describe(self) -> Iterator[Metric]:
        """Describe nothing, so that registering does not read the runtime."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as they are now."""
        self._refresh()
        totals = self._totals
        runtime, _, version = totals.versions[-1]
        model, monitor = runtime.name, runtime.monitor
        verdict, _, _, unobservable = totals.seen(runtime)
        yield histogram("guardserve_shift_p_value", model, self._p_values)
        exemplars = runtime.nonfinite_exemplars.copy().items()
        latest: dict[Labels, Shown] = {(model, *key): shown(exemplar) for key, exemplar in exemplars}
        for name, series in totals.read().items():
            yield family(name, list(series.items()), latest if name == NONFINITE else {})
        yield family("guardserve_build_info", [((__version__, torch.__version__, platform.python_version()), 1)])
        yield family("guardserve_model_info", [((model, runtime.platform, str(runtime.device), version), 1)])
        yield family("guardserve_model_ready", [((model,), runtime.failure is None)])
        lost = monitor.unobserved  # also layers that were observed once
        observed = [((model, "true"), len(set(monitor.layers) - lost.keys())), ((model, "false"), len(lost))]
        yield family("guardserve_batchnorm_layers", observed)
        yield family("guardserve_unobservable_channels", [((model,), unobservable)])
        yield family("guardserve_shift_threshold", [((model,), monitor.threshold)])
        if monitor.reference is not None:
            labels = (model, str(monitor.reference.samples), f"{runtime.target_arl:g}")
            yield family("guardserve_reference_info", [(labels, 1)])
        if monitor.share is not None:
            yield family("guardserve_monitor_share", [((model,), monitor.share)])
        yield from verdict_families(model, verdict)
        yield from worker_families({"up": 1}, 0)
