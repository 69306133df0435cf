"""The watch: looks at a served model every few seconds, logs what changed, and remembers it for a while."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from guardserve.metrics import Metrics
from guardserve.monitor import Verdict
from guardserve.runtime import Runtime
from guardserve.traffic import Traffic

_log = logging.getLogger(__name__)

LOOK_INTERVAL = 2.0
"""Seconds between two looks."""

PATIENCE = 0.025
"""Seconds that a scrape waits for a look of its own; where that takes longer, it shows what the last one saw."""

TIERS = (LOOK_INTERVAL, 60.0)
"""Seconds that one point of each memory stands for."""

POINTS = 300
"""Points that each memory holds: ten minutes and five hours."""

EVENTS = 100
"""Events that are remembered; the log has all of them."""

RECENT = 300.0
"""Seconds without another non-finite output after which they count as over."""

FAILING = 0.05
"""Share of the last minute's requests from which on it is told that the server fails them."""

LEVEL = {"good": logging.INFO, "watch": logging.WARNING, "bad": logging.WARNING}


@dataclass(frozen=True)
class Event:
    """Something that changed.

    Attributes:
        at: When it was noticed, in seconds since the epoch.
        kind: ``"ready"``, ``"state"``, ``"alarm"``, ``"nonfinite"``, ``"failures"`` or ``"version"``.
        level: ``"good"``, ``"watch"`` or ``"bad"``.
        text: What changed, in words.
    """

    at: float
    kind: str
    level: str
    text: str


@dataclass(frozen=True)
class Point:
    """What one stretch of time looked like.

    Attributes:
        at: Its end, in seconds since the epoch.
        level: How far the evidence was, as a share of its alarm threshold; None while nothing was judged.
        layers: The same of each layer by itself, by its name.
        requests: Requests ended in each second of it.
        failed: Those of them that the server failed (5xx), per second.
        p50: Median duration of its requests, in seconds; None without any.
        p99: The 99th percentile.
    """

    at: float
    level: float | None
    layers: Mapping[str, float]
    requests: float
    failed: float
    p50: float | None
    p99: float | None


class Memory:
    """The last points of one resolution.

    Args:
        interval: Seconds that each stands for.
    """

    def __init__(self, interval: float) -> None:
        self.interval = interval
        self.points: deque[Point] = deque(maxlen=POINTS)
        self._traffic: Traffic | None = None
        self._since = -math.inf
        self._level: float | None = None
        self._layers: dict[str, float] = {}

    def add(self, at: float, level: float | None, layers: Mapping[str, float], traffic: Traffic) -> None:
        """Take a look in; a stretch shows the highest values of its looks, lest a burst be lost."""
        if self._traffic is None:
            self._traffic, self._since = traffic, at
        self._level = max((value for value in (self._level, level) if value is not None), default=None)
        for layer, value in layers.items():
            self._layers[layer] = max(value, self._layers.get(layer, 0.0))
        seconds = at - self._since
        if seconds < 0.99 * self.interval:
            return
        ended = traffic.since(self._traffic)
        self.points.append(
            Point(
                at,
                self._level,
                self._layers,
                ended.requests / seconds,
                ended.failed / seconds,
                ended.quantile(0.5),
                ended.quantile(0.99),
            )
        )
        self._traffic, self._since, self._level, self._layers = traffic, at, None, {}


def even_clock() -> Callable[[], float]:
    """Return a clock that begins with the time of day and then goes on evenly, whatever is done to that."""
    offset = time.time() - time.monotonic()
    return lambda: offset + time.monotonic()


class Watch:
    """Looks at a runtime, in a thread of its own from :meth:`start` to :meth:`close`.

    What the page, the log and the metrics say of the monitor is what it saw: none of them asks by itself, or waits for
    one that is busy.

    Args:
        runtime: The served model.
        metrics: Tell the requests so far, and show what it saw.
        clock: Seconds since the epoch; by default those of :func:`even_clock`.

    Attributes:
        verdict: What the monitor said at the last look.
        failure: Why the model was not ready then; None when it was.
        since: When the monitor's state, or readiness, last changed.
        looked_at: When that look was.
        events: What changed, oldest first.
        memories: What it looked like, one memory a resolution.
        nonfinite_at: When non-finite outputs were last seen to have grown in number; None if never.
        nonfinite_since: When that began: the first of them with less than five minutes between any two.
        failing: Share of the last minute's requests that the server failed (5xx); None without requests.
        failing_since: Since when that share is 5 % or more; None when it is not.
    """

    def __init__(self, runtime: Runtime, metrics: Metrics, clock: Callable[[], float] | None = None) -> None:
        self.runtime = runtime
        self._metrics = metrics
        self._clock = clock or even_clock()
        self.started_at = self.since = self.looked_at = self._clock()
        self.failure = runtime.failure
        metrics.look()
        self.verdict: Verdict = metrics.totals.seen(runtime).verdict
        self.events: deque[Event] = deque(maxlen=EVENTS)
        self.memories = tuple(Memory(interval) for interval in TIERS)
        self.nonfinite_at: float | None = None
        self.nonfinite_since: float | None = None
        self._nonfinite = 0
        self.failing: float | None = None
        self.failing_since: float | None = None
        self._minute = deque([Traffic.of(metrics)], maxlen=round(60 / LOOK_INTERVAL) + 1)
        self._looking = threading.Lock()
        self._turn = threading.Condition()
        self._stopping = self._asked = False
        self._begun = self._ended = 0
        self._seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="guardserve-watch", daemon=True)

    def start(self) -> None:
        """Begin to look, also for scrapes."""
        self._metrics.refresh = self.refresh
        self._thread.start()

    def close(self) -> None:
        """Look a last time, and stop."""
        with self._turn:
            self._stopping = True
            self._turn.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def refresh(self) -> None:
        """Have the metrics show what the monitor says now, if it says so soon; return soon in any case."""
        if self._seconds > PATIENCE:
            return
        with self._turn:
            wanted = self._begun + 1
            self._asked = True
            self._turn.notify_all()
            self._turn.wait_for(lambda: self._ended >= wanted or self._stopping, PATIENCE)

    def look(self) -> None:
        """Take one look."""
        with self._looking:
            self._look()

    def follow(self, runtime: Runtime) -> None:
        """Look at another version of the model from now on, with what is remembered of the last one."""
        with self._looking:
            now = self._clock()
            events = [Event(now, "version", "good", f"version {runtime.fingerprint} answers")]
            events += self._readiness(now, runtime.failure)
            self.runtime, self.failure, self.since = runtime, runtime.failure, now
            self._metrics.look()
            self.verdict = self._metrics.totals.seen(runtime).verdict
            self._nonfinite = _nonfinite_outputs(runtime)
            self._tell(events)

    def _look(self) -> None:
        self._metrics.look()
        now, verdict, failure = self._clock(), self._metrics.totals.seen(self.runtime).verdict, self.runtime.failure
        traffic = Traffic.of(self._metrics)
        self._tell(
            [
                *self._readiness(now, failure),
                *self._shift(now, verdict),
                *self._nonfinite_outputs(now),
                *self._failures(now, traffic),
            ]
        )
        self.verdict, self.failure, self.looked_at = verdict, failure, now
        for memory in self.memories:
            memory.add(now, alarm_level(verdict), layer_levels(verdict), traffic)

    def _tell(self, events: Sequence[Event]) -> None:
        for event in events:
            self.events.append(event)
            extra = {"event": event.kind, "model": self.runtime.name}
            _log.log(LEVEL[event.level], "%s: %s", self.runtime.name, event.text, extra=extra)

    def _run(self) -> None:
        due = time.monotonic() + LOOK_INTERVAL
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self._asked or self._stopping, max(0.0, due - time.monotonic()))
                stopping, self._asked = self._stopping, False
                self._begun += 1
            began = time.monotonic()
            try:
                if stopping or began >= due:
                    due = began + LOOK_INTERVAL
                    self.look()
                else:  # what is remembered goes by time, and is not for scrapes to make more of
                    self._metrics.look()
            except Exception:  # noqa: BLE001 - one look that failed is no reason to go blind
                _log.exception("the watch could not look at %s", self.runtime.name)
            self._seconds = time.monotonic() - began
            with self._turn:
                self._ended = self._begun
                self._turn.notify_all()
            if stopping:
                return

    def _readiness(self, now: float, failure: str | None) -> Iterator[Event]:
        if (failure is None) != (self.failure is None):
            self.since = now
            yield (
                Event(now, "ready", "good", "ready")
                if failure is None
                else Event(now, "ready", "bad", f"not ready: {failure}")
            )

    def _shift(self, now: float, verdict: Verdict) -> Iterator[Event]:
        """Tell alarms and changes of state, but not that of suspicion, which clean samples raise and calm all day."""
        last = self.verdict
        if verdict.alarms > last.alarms or (verdict.evidence is None and verdict.state == "shifted" != last.state):
            yield Event(now, "alarm", "bad", f"shift at {verdict.layer}: {explain(verdict)}")
        if verdict.state != last.state and {verdict.state, last.state} != {"ok", "suspect"}:
            self.since = now
            if verdict.state != "shifted":
                level = "watch" if verdict.state == "blind" else "good"
                yield Event(now, "state", level, f"the monitor's state went from {last.state} to {verdict.state}")

    def _nonfinite_outputs(self, now: float) -> Iterator[Event]:
        total = _nonfinite_outputs(self.runtime)
        if total > self._nonfinite:
            if self.nonfinite_at is None or now - self.nonfinite_at > RECENT:
                self.nonfinite_since = now
                yield Event(now, "nonfinite", "bad", "outputs with NaN or infinity")
            self.nonfinite_at = now
        self._nonfinite = total

    def _failures(self, now: float, traffic: Traffic) -> Iterator[Event]:
        self._minute.append(traffic)
        ended = traffic.since(self._minute[0])
        self.failing = ended.failed / ended.requests if ended.requests else None
        if (self.failing or 0) < FAILING:
            self.failing_since = None
        elif self.failing_since is None:
            self.failing_since = now
            yield Event(now, "failures", "bad", f"{ended.failed} of the last minute's {ended.requests} requests failed")


def _nonfinite_outputs(runtime: Runtime) -> int:
    return sum(count for (origin, _), count in runtime.nonfinite.copy().items() if origin == "output")


def alarm_level(verdict: Verdict) -> float | None:
    """Return the evidence as a share of the threshold at which there is an alarm; None while nothing is judged."""
    if verdict.evidence is not None and verdict.evidence_threshold:
        return verdict.evidence / verdict.evidence_threshold
    return None if verdict.score is None else verdict.score / verdict.threshold


def layer_levels(verdict: Verdict) -> Mapping[str, float]:
    """Return the same for each layer: its evidence, or without a reference profile its distance from training."""
    if verdict.evidence is not None:
        return verdict.layers
    if verdict.score is None:
        return {}
    return {layer.name: layer.wasserstein2 / verdict.threshold for layer in verdict.window.layers}


def explain(verdict: Verdict) -> str:
    """Say what a shift looks like; without a reference, how the channels of the worst layer moved."""
    if verdict.reading:
        return verdict.reading
    layer = next((layer for layer in verdict.window.layers if layer.name == verdict.layer), None)
    if layer is None:
        return "nothing more is known"
    worst = layer.worst_channels[0]
    spread = math.exp(worst.log_std_ratio)
    distances = [layer.wasserstein2 for layer in verdict.window.layers]
    third = max(1, len(distances) // 3)
    early = sum(distances[:third]) >= sum(distances[-third:])
    where = (
        "early layers moved most, as when the input changes" if early else "late layers moved most, as when classes do"
    )
    return (
        f"{where}; its channels are {layer.wasserstein2:.2g} running standard deviations from training, channel "
        f"{worst.channel} most: mean {worst.mean_shift:+.2g}, spread \u00d7{spread:.2g}"
    )
