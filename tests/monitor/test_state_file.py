"""A detector's memory: it goes on after a restart as if there had been none, and refuses what is not its own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from guardserve import ReferenceProfile
from guardserve.demo.digits import brighter
from guardserve.detection.detector import Detector
from guardserve.detection.files import sealed
from guardserve.detection.state_file import KEY, VERSION, load_state, save_state
from guardserve.exceptions import DetectorStateError, ReferenceProfileError
from guardserve.monitor import Detection
from guardserve.observation.features import Array

Sampler = Callable[..., torch.Tensor]
Reader = Callable[[torch.Tensor], Array]


@pytest.fixture(scope="module")
def stream(features: Reader, clean: Sampler) -> Array:
    """Return features of clean digits, then brighter ones, then clean ones."""
    return features(torch.cat([clean(70, seed=1), brighter(clean(50, seed=2), 0.3), clean(90, seed=3)]))


def judged(detector: Detector, stream: Array) -> tuple[Detection, list[float]]:
    """Show a detector a stream."""
    detector.judge(stream)
    return detector.detection(), detector.drain()


@pytest.mark.parametrize("restart", [0, 5, 71, 75, 119, 150, 210])
def test_after_a_restart_it_goes_on_as_if_there_had_been_none(
    profile: ReferenceProfile, stream: Array, tmp_path: Path, restart: int
) -> None:
    """Before, at, within and after a shift: state, evidence, diagnosis and p-values are those of one detector."""
    path = tmp_path / "state.safetensors"
    expected, scores = judged(Detector(profile, 1000), stream)
    before = Detector(profile, 1000)
    _, first = judged(before, stream[:restart])
    save_state(path, before)
    after = Detector(profile, 1000)
    assert load_state(path, after)
    assert after.detection() == before.detection()
    seen, second = judged(after, stream[restart:])
    assert (seen.state, seen.samples, seen.alarm_at, seen.layer) == (
        expected.state,
        expected.samples,
        expected.alarm_at,
        expected.layer,
    )
    assert seen.reading == expected.reading
    assert seen.evidence == pytest.approx(expected.evidence, rel=1e-3)
    assert [c.channel for c in seen.channels] == [c.channel for c in expected.channels]
    assert np.allclose(first + second, scores, atol=3 / profile.samples)
    assert os.listdir(tmp_path) == [path.name]  # noqa: PTH208


def test_a_stuck_sensor_is_known_as_one_after_a_restart(
    profile: ReferenceProfile, features: Reader, clean: Sampler
) -> None:
    """The reading goes on, by how alike samples were."""
    before = Detector(profile, 1000)
    before.judge(features(torch.cat([clean(60, seed=4), clean(1, seed=5).expand(40, -1, -1, -1)])))
    state = before.state_dict()
    after = Detector(profile, 1000)
    after.load_state_dict(state)
    assert "all samples are alike" in after.detection().reading
    with pytest.raises(DetectorStateError, match="damaged"):
        after.load_state_dict({**state, "compared": np.array([-1.0, 0.0])})


def test_without_a_file_it_begins_anew(profile: ReferenceProfile, tmp_path: Path) -> None:
    """The first start is no error."""
    detector = Detector(profile, 1000)
    assert not load_state(tmp_path / "none.safetensors", detector)
    assert detector.detection().samples == 0


def test_what_is_damaged_or_of_another_profile_is_refused_and_changes_nothing(
    model: nn.Module, profile: ReferenceProfile, stream: Array, clean: Sampler, tmp_path: Path
) -> None:
    """A cut file, a foreign one, edited numbers, another profile of the same model: each says what it is."""
    detector = Detector(profile, 1000)
    detector.judge(stream[:100])
    good = tmp_path / "good.safetensors"
    save_state(good, detector)
    facts = {"version": VERSION, "profile": profile.digest}
    arrays = load_file(good)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-9])
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": np.zeros(3, np.float32)}, foreign)
    edited = {
        "short": {name: array for name, array in arrays.items() if name != "chart"},
        "huge": {**arrays, "chart": arrays["chart"] + np.float32(3e38)},
        "nan": {**arrays, "chart": arrays["chart"] * np.float32(np.nan)},
        "state": {**arrays, "numbers": arrays["numbers"] + np.array([90, *[0] * 8])},
        "lead": {**arrays, "numbers": arrays["numbers"] + np.array([*[0] * 7, 90, 0])},
        "recent": {**arrays, "recent_vectors": arrays["recent_vectors"][1:]},
        "width": {**arrays, "average_features": arrays["average_features"][1:]},
    }
    for name, damaged in edited.items():
        save_file(damaged, tmp_path / f"{name}.safetensors", {KEY: sealed(facts, damaged)})
    older = tmp_path / "older.safetensors"
    save_file(arrays, older, {KEY: json.dumps(facts)})
    os.mkfifo(tmp_path / "fifo.safetensors")
    fresh = Detector(profile, 1000)
    fresh.judge(stream[:7])
    before = fresh.detection()
    for name, reason in (
        ("cut", "damaged"),
        ("foreign", "holds no detector's state of version 1"),
        ("short", "its chart is missing"),
        ("nan", "its chart holds NaN"),
        ("huge", "its chart holds NaN"),
        ("older", "it has no checksum, as it was written by an older guardserve.*remove it"),
        ("fifo", "is no regular file"),
        ("state", "its numbers are"),
        ("lead", "its numbers are"),
        ("recent", "its numbers are"),
        ("width", "its average_features is float32 of shape"),
    ):
        with pytest.raises(DetectorStateError, match=reason):
            load_state(tmp_path / f"{name}.safetensors", fresh)
        assert fresh.detection() == before
    other = ReferenceProfile.fit(model, torch.split(clean(300, seed=9), 100), target_arl=1000)
    with pytest.raises(DetectorStateError, match="another reference profile"):
        load_state(good, Detector(other, 1000))


def test_a_file_that_lost_one_bit_is_refused(profile: ReferenceProfile, stream: Array, tmp_path: Path) -> None:
    """Wherever its numbers or facts lost it, what is left looks like a state or a profile, and is none."""
    detector = Detector(profile, 1000)
    detector.judge(stream[:100])
    save_state(tmp_path / "state", detector)
    profile.save(tmp_path / "profile")
    rng = np.random.default_rng(0)
    for name, load in (("state", lambda path: load_state(path, detector)), ("profile", ReferenceProfile.load)):
        whole = (tmp_path / name).read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little")
        digit = whole.index(b'\\"checksum') + 20
        for at in (digit, *rng.integers(header, len(whole), 20).tolist()):
            damaged = bytearray(whole)
            damaged[at] ^= 1
            (tmp_path / "damaged").write_bytes(damaged)
            with pytest.raises(ReferenceProfileError, match=r"damaged|not"):
                load(tmp_path / "damaged")
        (tmp_path / "damaged").write_bytes(whole)
        load(tmp_path / "damaged")
