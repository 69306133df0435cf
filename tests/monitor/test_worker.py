"""What happens off the request's thread: order, back-pressure, scores on the spot, ends, forks, and the time spent."""

from __future__ import annotations

import gc
import itertools
import logging
import math
import os
import threading
import tracemalloc
import weakref
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from serving import wait_until
from torch import nn

from guardserve import EvalGuard, Monitor, ReferenceProfile, ReferenceProfileError
from guardserve.detection import detector
from guardserve.monitor import monitor as monitor_module
from guardserve.monitor.worker import Worker
from guardserve.observation.budget import LEAST_VALUES

Sampler = Callable[..., torch.Tensor]


def conv_net(width: int = 8, layers: int = 4) -> nn.Sequential:
    """Return a few convolutions with BatchNorm, in eval mode."""
    torch.manual_seed(0)
    modules: list[nn.Module] = []
    for i in range(layers):
        modules += [nn.Conv2d(width if i else 3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*modules).eval()


def threads_named(name: str) -> list[threading.Thread]:
    """List the living threads of that name."""
    return [thread for thread in threading.enumerate() if thread.name == name]


def test_a_thread_accumulates_while_forwards_go_on_and_ends_with_the_monitor() -> None:
    """It starts when there is work, nobody has to ask for anything, and close waits for it to end."""
    model, before = conv_net(), len(threads_named("guardserve-monitor"))
    with Monitor(model) as monitor, torch.inference_mode():
        assert len(threads_named("guardserve-monitor")) == before
        for _ in range(80):
            model(torch.randn(1, 3, 8, 8))
        wait_until(lambda: len(monitor._pending) < 32)
        assert len(threads_named("guardserve-monitor")) == before + 1
        assert monitor.snapshot().samples == 80
    assert len(threads_named("guardserve-monitor")) == before


def test_a_forgotten_monitor_takes_its_thread_with_it() -> None:
    """The thread keeps no monitor alive."""
    model, before = conv_net(), len(threads_named("guardserve-monitor"))
    monitor = Monitor(model)
    with torch.inference_mode():
        for _ in range(80):
            model(torch.randn(1, 3, 8, 8))
    pending = monitor._pending
    wait_until(lambda: len(pending) < 32)
    gone = weakref.ref(monitor)
    del monitor
    wait_until(lambda: gc.collect() is not None and gone() is None)
    wait_until(lambda: len(threads_named("guardserve-monitor")) == before)


def test_a_forward_does_the_work_itself_rather_than_drop_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a thread that never comes to its turn, the queue stays short and all samples are counted."""
    monkeypatch.setattr(Worker, "wake", lambda _: None)
    model = conv_net()
    with Monitor(model) as monitor, torch.inference_mode():
        longest = 0
        for _ in range(300):
            model(torch.randn(1, 3, 8, 8))
            longest = max(longest, len(monitor._pending))
        assert longest <= monitor_module.MOST_PENDING
        assert monitor.snapshot().samples == 300


def test_eight_threads_under_load_lose_nothing_and_keep_the_window() -> None:
    """2,000 forwards of several sizes, judged in the background meanwhile, with questions in between."""
    model = conv_net()
    guard = EvalGuard(model)
    sizes = [1 + i % 4 for i in range(2000)]
    with Monitor(model, window=64) as monitor:

        def serve(part: list[int]) -> None:
            for size in part:
                guard(torch.randn(size, 3, 8, 8))

        threads = [threading.Thread(target=serve, args=(sizes[i::8],)) for i in range(8)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            assert monitor.verdict().window.samples <= 64 + 2 * (64 // 8 + 3)
        snapshot = monitor.snapshot()
    assert snapshot.samples == sum(sizes)
    assert {layer.samples for layer in snapshot.layers} == {sum(sizes)}


def test_a_request_gets_its_own_p_values_while_others_are_served(
    model: nn.Module, profile: ReferenceProfile, clean: Sampler
) -> None:
    """Each thread is told those of its rows, in order; together they are those that the monitor keeps."""
    images = clean(120, seed=40)
    images[::10] = torch.nan
    found: dict[int, list[float]] = {}
    with Monitor(model.eval(), reference=profile, target_arl=2000) as monitor:

        def serve(i: int) -> None:
            with torch.inference_mode(), monitor.scoring() as scores:
                model(images[12 * i : 12 * i + 5])
                model(images[12 * i + 5 : 12 * i + 12])
            found[i] = scores

        threads = [threading.Thread(target=serve, args=(i,)) for i in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        kept = monitor.scores()
        monitor.reset()
        with torch.inference_mode():
            model(images)
        alone = monitor.scores()
    together = [score for i in range(10) for score in found[i]]
    assert [score == 0 for score in together] == [i % 10 == 0 for i in range(120)]
    assert together == pytest.approx(alone, abs=3 / profile.samples, nan_ok=True)
    assert sorted(kept, key=str) == sorted(together, key=str)


def test_scores_of_more_samples_than_are_kept_are_those_of_their_rows(
    model: nn.Module, profile: ReferenceProfile, clean: Sampler
) -> None:
    """Who asks for them gets all; who drains them later gets the last."""
    images = clean(50, seed=44)
    images[0] *= 50
    with mock.patch.object(detector, "SCORES", 8), Monitor(model.eval(), reference=profile) as monitor:
        with torch.inference_mode(), monitor.scoring() as scores:
            model(images)
        assert len(scores) == 50
        assert scores[0] == min(scores) < 0.01 < max(scores)
        assert monitor.scores() == scores[-8:]


def test_scoring_tells_what_cannot_be_judged(model: nn.Module, profile: ReferenceProfile, clean: Sampler) -> None:
    """A part of the model gives NaN, and without a reference there is nothing to score by."""
    with Monitor(model.eval(), reference=profile, target_arl=2000) as monitor, torch.inference_mode():
        with monitor.scoring() as outer:
            with monitor.scoring() as inner:
                model(clean(2, seed=41))
            model.get_submodule("blocks.0")(clean(3, seed=42))
        assert len(inner) == 2
        assert outer[:2] == inner
        assert all(math.isnan(score) for score in outer[2:])
        assert len(outer) == 5
        model(clean(2, seed=43))
        assert len(outer) == 5
    with Monitor(model) as monitor, pytest.raises(ReferenceProfileError, match="reference"), monitor.scoring():
        pass


def test_an_error_in_the_background_is_logged_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Answers go on, and so does the thread."""
    model = conv_net()
    with Monitor(model) as monitor, torch.inference_mode():
        with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
            patch.setattr(monitor, "_merge", lambda _: 1 / 0)
            for _ in range(40):
                model(torch.randn(1, 3, 8, 8))
            wait_until(lambda: "could not be accumulated" in caplog.text)
        monitor.reset()
        for _ in range(20):
            model(torch.randn(1, 3, 8, 8))
        assert monitor.snapshot().samples == 20


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_monitors_on() -> None:
    """Neither a lock nor a thread of the parent is waited for."""
    model = conv_net()
    with Monitor(model) as monitor, torch.inference_mode():
        for _ in range(20):
            model(torch.randn(1, 3, 8, 8))
        monitor.reset()
        with monitor._lock:
            child = os.fork()
        if child == 0:
            for _ in range(80):
                model(torch.ones(1, 3, 8, 8))
            os._exit(0 if monitor.snapshot().samples == 80 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_share_of_time_is_measured_and_a_budget_changes_how_much_is_read() -> None:
    """A tight budget reads less, a wide one more, and every layer of every forward is read all the same."""
    model = conv_net()
    x = torch.randn(4, 3, 32, 32)
    for budget, direction in ((1e-6, -1), (0.99, 1)):
        with Monitor(model, budget=budget, values=1024) as monitor, torch.inference_mode():
            for _ in range(200):
                model(x)
            assert monitor.snapshot().samples == 800
            assert {layer.samples for layer in monitor.snapshot().layers} == {800}
            assert monitor.values is not None
            assert (monitor.values - 1024) * direction > 0
            assert monitor.values >= LEAST_VALUES
    shares = []
    with Monitor(model) as monitor, torch.inference_mode():
        for _ in range(2):
            shares.append(monitor.share)
            model(x)
            monitor.verdict()
    assert shares[0] is None
    assert shares[1] is not None
    assert 0 < shares[1] < 1
    with pytest.raises(ValueError, match="budget=2"):
        Monitor(model, budget=2)
    with pytest.raises(ValueError, match="values=0"):
        Monitor(model, values=0)


def test_nothing_grows_with_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once as many forwards of a dozen shapes have waited as ever do, thousands more do not each take more memory."""
    model = conv_net()
    with Monitor(model) as monitor, torch.inference_mode():

        def serve() -> int:
            for i in range(1000):
                model(torch.zeros(1 + i % 3, 3, 8 + i % 4, 8))
            monitor.verdict()
            gc.collect()
            return tracemalloc.get_traced_memory()[0]

        tracemalloc.start()
        try:
            with monkeypatch.context() as patch:
                patch.setattr(Worker, "wake", lambda _: None)
                serve()
            sizes = [serve() for _ in range(5)]
        finally:
            tracemalloc.stop()
    assert min(after - before for before, after in itertools.pairwise(sizes)) < 20_000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_hot_path_never_waits_for_a_gpu() -> None:
    """Forwards run with synchronisation forbidden; the statistics are those of the CPU."""
    model = conv_net()
    x = torch.randn(8, 3, 32, 32)
    with Monitor(model) as monitor, torch.inference_mode():
        model(x)
        expected = monitor.snapshot()
    model.cuda()
    on_gpu = x.cuda()
    with Monitor(model) as monitor, torch.inference_mode():
        model(on_gpu)
        monitor.reset()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(on_gpu)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found = monitor.snapshot()
    for a, b in zip(expected.layers, found.layers, strict=True):
        assert b.wasserstein2 == pytest.approx(a.wasserstein2, rel=0.05)
