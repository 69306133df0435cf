"""The watch: what it notices, remembers and logs."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from serving import loaded, wait_until
from torch import nn

from guardserve.metrics import LATENCY_BUCKETS, Metrics
from guardserve.monitor import Monitor
from guardserve.runtime import Runtime
from guardserve.traffic import Traffic
from guardserve.watch import EVENTS, POINTS, TIERS, Watch, alarm_level

PATIENCE = 0.025


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """Tell the time."""
        return self.now


@contextmanager
def watching(module: nn.Module) -> Iterator[tuple[Watch, Metrics, Clock]]:
    """Watch a started runtime, look by look."""
    runtime = Runtime(loaded(module), shift_window=64, shift_min_samples=16)
    metrics, clock = Metrics(runtime), Clock()
    watch = Watch(runtime, metrics, clock)
    runtime.start()
    try:
        yield watch, metrics, clock
    finally:
        runtime.close()


def look(watch: Watch, clock: Clock, seconds: float = 2.0) -> None:
    """Let time pass, and look."""
    clock.now += seconds
    watch.look()


def failing(watch: Watch) -> tuple[float | None, float | None]:
    """Return the share of failing requests, and since when it is told."""
    return watch.failing, watch.failing_since


def network() -> nn.Module:
    """Return a small network whose running statistics are those of standard normal inputs."""
    return nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.Linear(3, 2)).eval()


def test_traffic_is_what_the_metrics_counted() -> None:
    """Requests, failures and durations add up, also between two moments."""
    with watching(network()) as (_, metrics, _clock):
        metrics.request_ended(200, 0.003)
        before = Traffic.of(metrics)
        metrics.request_ended(400, 0.003, "malformed")
        metrics.request_ended(503, 99.0, "not_ready")
        since = Traffic.of(metrics).since(before)
    assert (before.requests, before.failed, sum(before.durations)) == (1, 0, 1)
    assert (since.requests, since.failed, sum(since.durations)) == (2, 1, 2)
    assert since.durations[-1] == 1, "the last bucket has no end"


@pytest.mark.parametrize(("q", "bucket"), [(0.25, 1), (0.75, 3), (1.0, 3)])
def test_a_quantile_lies_in_its_bucket(q: float, bucket: int) -> None:
    """As many durations are below it as it says."""
    durations = [0] * (len(LATENCY_BUCKETS) + 1)
    durations[1] = durations[3] = 5
    value = Traffic(10, 0, tuple(durations)).quantile(q)
    assert value is not None
    assert LATENCY_BUCKETS[bucket - 1] <= value <= LATENCY_BUCKETS[bucket]


def test_a_quantile_of_nothing_is_unknown_and_one_beyond_the_buckets_is_their_end() -> None:
    """No number is made up."""
    empty = (0,) * (len(LATENCY_BUCKETS) + 1)
    assert Traffic(0, 0, empty).quantile(0.5) is None
    assert Traffic(1, 0, (*empty[:-1], 1)).quantile(0.5) == LATENCY_BUCKETS[-1]


def test_a_shift_is_an_alarm_once_and_its_beginning_is_remembered(caplog: pytest.LogCaptureFixture) -> None:
    """Clean samples are calm; shifted ones raise one alarm, in the log too; its time stays while it lasts."""
    caplog.set_level(logging.INFO, "guardserve.watch")
    with watching(network()) as (watch, _, clock):
        look(watch, clock)
        watch.runtime.guard(torch.randn(64, 3, generator=torch.Generator().manual_seed(0)))
        look(watch, clock)
        assert watch.verdict.state == "ok"
        level = alarm_level(watch.verdict)
        assert level is not None
        assert level < 1
        watch.runtime.guard(torch.randn(128, 3) + 4)
        look(watch, clock)
        began = clock.now
        look(watch, clock)
    assert watch.since == began
    (alarm,) = [event for event in watch.events if event.kind == "alarm"]
    assert (alarm.at, alarm.level) == (began, "bad")
    assert "mean +" in alarm.text
    (line,) = [record for record in caplog.records if getattr(record, "event", "") == "alarm"]
    assert line.levelno == logging.WARNING
    level = alarm_level(watch.verdict)
    assert level is not None
    assert level >= 1


def test_readiness_is_an_event() -> None:
    """The model's getting ready, and its end."""
    with watching(network()) as (watch, _, clock):
        look(watch, clock)
        watch.runtime.close()
        look(watch, clock)
    assert [(event.kind, event.level) for event in watch.events] == [("ready", "good"), ("ready", "bad")]


def test_nonfinite_outputs_are_told_once_for_as_long_as_they_last() -> None:
    """Again and again within five minutes is one event; after a pause it is another."""
    with watching(network()) as (watch, _, clock):
        look(watch, clock)
        for seconds in (2, 100, 100, 400):
            watch.runtime.nonfinite["output", "output"] += 1
            look(watch, clock, seconds)
            look(watch, clock)
    first, second = [event.at for event in watch.events if event.kind == "nonfinite"]
    assert second - first > 600
    assert watch.nonfinite_since == second


def test_failing_requests_are_told_from_a_share_on() -> None:
    """One in a hundred is no news; half of them is; a minute without ends it."""
    with watching(network()) as (watch, metrics, clock):
        for _ in range(99):
            metrics.request_ended(200, 0.01)
        metrics.request_ended(500, 0.01, "model_error")
        look(watch, clock)
        assert failing(watch) == (0.01, None)
        for _ in range(100):
            metrics.request_ended(500, 0.01, "model_error")
        look(watch, clock)
        assert failing(watch)[1] == clock.now
        for _ in range(31):
            look(watch, clock)
        assert failing(watch) == (None, None)
    assert [event.kind for event in watch.events].count("failures") == 1


def test_a_point_shows_the_highest_of_its_looks() -> None:
    """A burst between two points of the slow memory is not lost."""
    with watching(network()) as (watch, metrics, clock):
        fast, slow = watch.memories
        look(watch, clock)
        for i in range(30):
            if i == 10:
                watch.runtime.guard(torch.randn(64, 3) + 4)
                metrics.request_ended(200, 0.01)
            if i == 15:
                for _ in range(4):
                    watch.runtime.guard(torch.randn(64, 3))
            look(watch, clock)
        assert len(fast.points) == 30
        (point,) = slow.points
        now = fast.points[-1]
        assert point.level is not None
        assert now.level is not None
        assert point.level > 1 > now.level
        assert point.layers["0"] > 1 > now.layers["0"]
        assert point.requests == pytest.approx(1 / TIERS[1])
        assert now.requests == 0


def test_it_forgets_in_time() -> None:
    """However long it looks, it remembers so much and no more."""
    with watching(network()) as (watch, _, clock):
        for i in range(3 * POINTS):
            watch.runtime.nonfinite["output", "output"] += 1
            look(watch, clock, 400 if i % 2 else 2)
    assert [len(memory.points) for memory in watch.memories] == [POINTS, POINTS]
    assert len(watch.events) == EVENTS


def samples_shown(metrics: Metrics) -> float:
    """Scrape, and read how many samples the monitor has seen."""
    (line,) = [line for line in metrics.render().splitlines() if line.startswith(b"guardserve_samples_total{")]
    return float(line.rsplit(b" ", 1)[1])


def test_a_scrape_shows_what_is_so_now_and_is_remembered_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two looks it has one of its own, which makes neither points nor events."""
    monkeypatch.setattr("guardserve.watch.LOOK_INTERVAL", 1000.0)
    with watching(network()) as (watch, metrics, clock):
        watch.start()
        for batch in range(1, 4):
            clock.now += 10
            watch.runtime.guard(torch.randn(64, 3) + 4)
            assert samples_shown(metrics) == 64 * batch
        assert watch.verdict.samples == 0
        assert [list(memory.points) for memory in watch.memories] == [[], []]
        assert not watch.events
        watch.close()
        assert watch.verdict.samples == 64 * 3, "the last look"
        assert "alarm" in [event.kind for event in watch.events]


def test_a_scrape_does_not_wait_for_a_monitor_that_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows the last look; and so do those after it, until a look is quick again."""
    monkeypatch.setattr("guardserve.watch.PATIENCE", PATIENCE)
    monkeypatch.setattr("guardserve.watch.LOOK_INTERVAL", 0.1)
    with watching(network()) as (watch, metrics, _):
        watch.start()
        watch.runtime.guard(torch.randn(64, 3))
        wait_until(lambda: samples_shown(metrics) == 64)
        with watch.runtime.monitor._lock:
            watch.runtime.guard(torch.randn(8, 3))
            time.sleep(0.2)  # it is being looked at
            assert [samples_shown(metrics) for _ in range(3)] == [64] * 3
        wait_until(lambda: samples_shown(metrics) == 72)
        watch.close()


def test_a_look_that_takes_long_is_not_asked_for_by_scrapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """They could not wait for it, and it would be made again and again for nobody."""
    monkeypatch.setattr("guardserve.watch.PATIENCE", PATIENCE)
    monkeypatch.setattr("guardserve.watch.LOOK_INTERVAL", 1000.0)
    looks = []
    with watching(network()) as (watch, metrics, _):
        look = metrics.look

        def slow() -> None:
            looks.append(time.monotonic())
            time.sleep(2 * PATIENCE)
            look()

        monkeypatch.setattr(metrics, "look", slow)
        watch.start()
        samples_shown(metrics)
        wait_until(lambda: watch._seconds > PATIENCE)
        before = len(looks)
        for _ in range(20):
            samples_shown(metrics)
        assert len(looks) == before
        watch.close()


def test_a_look_that_fails_is_logged_and_not_the_last(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The thread goes on."""
    with watching(network()) as (watch, _, _clock):

        def broken(_: Monitor) -> None:
            raise RuntimeError("no")

        monkeypatch.setattr(Monitor, "verdict", broken)
        monkeypatch.setattr("guardserve.watch.LOOK_INTERVAL", 0.01)
        watch.start()
        wait_until(lambda: len(caplog.records) >= 2)
        assert watch._thread.is_alive()
        watch.close()
    assert "could not look at net" in caplog.text
