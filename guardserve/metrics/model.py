"""The metrics of one served model, from its requests and its monitors to the scrape."""

from __future__ import annotations

import threading
from collections.abc import Callable

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.registry import Collector

from guardserve.engine import Engine
from guardserve.metrics.collectors import RequestCollector, RuntimeCollector
from guardserve.metrics.counts import Counts
from guardserve.metrics.exposition import CONTENT_TYPE, exposition
from guardserve.monitor import Summary
from guardserve.runtime import Runtime
from guardserve.totals import Totals, Version


class Metrics(Counts):
    """The metrics of one served model.

    Args:
        runtime: The model.
        registry: Where to register; a fresh registry by default, never the global one.

    Attributes:
        model: Its name.
        totals: Counts of the model's versions.
        refresh: Called before a scrape, to look at the monitors anew; whoever looks regularly may put less here.
        exposed: What a scrape shows: where several workers serve the model, all of them.
    """

    def __init__(self, runtime: Runtime, registry: CollectorRegistry | None = None) -> None:
        super().__init__()
        self.registry = registry if registry is not None else CollectorRegistry()
        self.exposed: Collector = self.registry
        self.model = runtime.name
        self.totals = Totals(runtime)
        self.refresh: Callable[[], object] = self.look
        self._taking = threading.Lock()
        self._summaries: list[Summary] | None = None
        self._looking = threading.Lock()
        for collector in (
            RequestCollector(runtime.name, self, self.totals),
            RuntimeCollector(self.totals, self.p_values, lambda: self.refresh()),  # noqa: PLW0108 - it may be set anew
        ):
            self.registry.register(collector)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

    @property
    def runtime(self) -> Runtime:
        """The version of the model that answers requests."""
        return self.totals.versions[-1].runtime

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
        """Return all metrics in a format: see :func:`guardserve.metrics.negotiated`."""
        return exposition(self.exposed, content_type)
