"""A monitor that learns its reference from what it sees, and whose detector outlives a restart."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from guardserve import Monitor, ReferenceProfile, ReferenceProfileError
from guardserve.demo.digits import SHIFTS
from guardserve.exceptions import DetectorStateError
from guardserve.monitor import StateKeeper

Sampler = Callable[..., torch.Tensor]


def wait_for(condition: Callable[[], bool], seconds: float = 100.0) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("the condition did not come true")
        time.sleep(0.02)


@torch.inference_mode()
def show(model: nn.Module, images: torch.Tensor, size: int = 20) -> None:
    """Pass images through a model."""
    for batch in torch.split(images, size):
        model(batch)


def test_a_monitor_learns_its_reference_from_what_it_sees_and_goes_on_with_it(model: nn.Module, clean: Sampler) -> None:
    """It warms up meanwhile, forgets no sample, reads as much as before, and then judges."""
    model.eval()
    made: list[tuple[ReferenceProfile, str]] = []
    ready = threading.Event()

    def learned(profile: ReferenceProfile) -> None:
        made.append((profile, threading.current_thread().name))
        ready.set()

    with Monitor(model, budget=0.5) as monitor:
        monitor.learn(400, 1000, learned)
        with pytest.raises(ReferenceProfileError, match="making one"):
            monitor.learn(400)
        show(model, clean(390, seed=71))
        assert monitor.verdict().state == "warming"
        values = monitor.values
        show(model, clean(30, seed=72))
        assert monitor.verdict().samples == 420
        assert ready.wait(100)
        show(model, clean(300, seed=73))
        verdict = monitor.verdict()
        assert verdict.state in ("ok", "suspect")
        assert (verdict.samples, verdict.alarms) == (720, 0)
        show(model, SHIFTS["inverted"](clean(8, seed=74)))
        assert monitor.verdict().state == "shifted"
        assert len(monitor.scores()) >= 308
        [(profile, thread)] = made
        assert profile is monitor.reference
        assert (profile.samples, profile.values, monitor.values) == (400, values, values)
        assert thread != threading.current_thread().name
        with pytest.raises(ReferenceProfileError, match="has a reference"):
            monitor.learn(400)


def test_a_reset_begins_to_learn_anew(model: nn.Module, clean: Sampler) -> None:
    """What was shown before it, such as a start-up probe, does not become the reference."""
    ready = threading.Event()
    with Monitor(model.eval()) as monitor:
        monitor.learn(100, 1000, lambda _: ready.set())
        show(model, torch.zeros(90, 1, 8, 8))
        monitor.reset()
        show(model, clean(90, seed=75))
        assert monitor.verdict().samples == 90
        assert not ready.wait(0.5)
        show(model, clean(20, seed=76))
        assert monitor.verdict().samples == 110
        assert ready.wait(100)


def test_what_gives_no_profile_leaves_the_monitor_as_it_was(
    model: nn.Module, clean: Sampler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The failure is logged, and the running statistics alone judge on."""

    def fail(*_: object, **__: object) -> None:
        raise ReferenceProfileError("no such luck")

    monkeypatch.setattr(ReferenceProfile, "of_data", fail)
    with Monitor(model.eval(), threshold=100) as monitor:
        monitor.learn(100, 1000)
        show(model, clean(120, seed=77))
        wait_for(lambda: monitor.verdict().state == "ok")
        assert monitor.reference is None
    assert "no reference profile could be made" in caplog.text


def test_a_kept_state_is_there_after_a_restart(
    model: nn.Module, profile: ReferenceProfile, clean: Sampler, tmp_path: Path
) -> None:
    """It is saved every so often and at the end; another monitor goes on where the first one was."""
    path = tmp_path / "state"
    with Monitor(model.eval(), reference=profile, target_arl=1000) as monitor:
        assert not monitor.load_state(path)
        keeper = StateKeeper(monitor, path, interval=0.05)
        keeper.start()
        keeper.start()
        wait_for(path.exists)
        show(model, SHIFTS["inverted"](clean(8, seed=78)))
        keeper.close()
        before = monitor.verdict()
    assert keeper.failures == 0
    assert [file.name for file in tmp_path.iterdir()] == ["state"]
    with Monitor(model, reference=profile, target_arl=1000) as monitor:
        assert monitor.load_state(path)
        after = monitor.verdict()
    assert before.state == after.state == "shifted"
    assert (after.alarms, after.alarm_at, after.layer, after.reading) == (
        before.alarms,
        before.alarm_at,
        before.layer,
        before.reading,
    )


def test_a_state_that_cannot_be_saved_harms_nothing_else(
    model: nn.Module, profile: ReferenceProfile, clean: Sampler, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder that is not there, as a disk that is full, is logged and counted each time; the monitor works on."""
    with Monitor(model.eval(), reference=profile, target_arl=1000) as monitor:
        keeper = StateKeeper(monitor, tmp_path / "absent" / "state", interval=0.02)
        keeper.start()
        wait_for(lambda: keeper.failures >= 2)
        show(model, clean(40, seed=79))
        assert monitor.verdict().samples == 40
        failures = keeper.failures
        keeper.close()
        assert keeper.failures > failures
        assert "could not be saved" in caplog.text
        (tmp_path / "broken").write_bytes(b"no state")
        with pytest.raises(DetectorStateError, match="remove it"):
            monitor.load_state(tmp_path / "broken")
        assert monitor.verdict().samples == 40


def test_there_is_no_state_without_a_reference(model: nn.Module, tmp_path: Path) -> None:
    """A monitor without one has nothing to save; its keeper waits for one."""
    with Monitor(model.eval()) as monitor:
        for use in (monitor.save_state, monitor.load_state):
            with pytest.raises(ReferenceProfileError, match="reference=profile"):
                use(tmp_path / "state")
        keeper = StateKeeper(monitor, tmp_path / "state")
        keeper.save()
        assert keeper.failures == 0
    assert not list(tmp_path.iterdir())
