"""Reference profiles: honest run lengths, the file, and what is refused."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

from guardserve import Monitor, ReferenceMismatchError, ReferenceProfile, ReferenceProfileError, ReferenceWarning
from guardserve.demo.digits import noisy
from guardserve.detection.calibration import RunLength
from guardserve.detection.encoding import Sketch, Whitening, ledoit_wolf
from guardserve.fusion import fuse

Sampler = Callable[..., torch.Tensor]


def alarms(model: nn.Module, profile: ReferenceProfile, images: torch.Tensor, target: float) -> int:
    """Count the alarms on a stream, starting anew after each."""
    with Monitor(model, reference=profile, target_arl=target) as monitor, torch.inference_mode():
        count = 0
        for batch in torch.split(images, 20):
            model(batch)
            if monitor.verdict().alarm_at is not None:
                count += 1
                monitor.reset()
    return count


def test_false_alarms_on_fresh_samples_come_about_as_rarely_as_asked_for(
    model: nn.Module, profile: ReferenceProfile, clean: Sampler
) -> None:
    """Of 40,000 samples that took no part, a target of 1,000 gives between 40/3 and 40/0.5 alarms."""
    model.eval()
    found = alarms(model, profile, clean(40_000, seed=2), 1000)
    assert 40 / 3 <= found <= 40 / 0.5


def test_the_measured_run_length_is_what_held_out_samples_show(profile: ReferenceProfile) -> None:
    """The profile reports its own run length, with an interval that covers the prudence it was made with."""
    measured = profile.measured_arl
    assert measured.low < measured.mean < measured.high
    assert measured.low <= 3 * profile.target_arl
    assert measured.high >= 0.5 * profile.target_arl
    assert profile.samples == 1200
    assert profile.supported_arl == 12_000


def test_few_samples_are_met_with_prudence_and_a_warning(model: nn.Module, clean: Sampler) -> None:
    """A profile of 160 samples says that it cannot carry a target of 10,000, and alarms no more often than twice it."""
    with pytest.warns(ReferenceWarning, match="more than a reference of 160 samples carries"):
        small = ReferenceProfile.fit(model, [clean(160, seed=3)], target_arl=10_000)
    assert small.supported_arl == 1600
    with pytest.warns(ReferenceWarning, match="give at least 1000 samples"), Monitor(model, reference=small):
        pass

    assert alarms(model.eval(), small, clean(20_000, seed=4), 1000) <= 40


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        (RunLength(300, 200, 450), "one false alarm in 300 (200 to 450), where 1000 was asked for: false alarms will"),
        (RunLength(9000, 4000, 20_000), "one false alarm in 9000 (4000 to 20000), where 1000 was asked for: weak"),
        (RunLength(400, 200, 700), ""),
        (RunLength(5000, 2500, 10_000), ""),
        (RunLength(300, 80, 1200), ""),
        (RunLength(9000, 900, 90_000), ""),
    ],
)
def test_a_measured_run_length_far_from_the_target_is_told_of(
    model: nn.Module, profile: ReferenceProfile, measured: RunLength, said: str
) -> None:
    """Only where all of the interval is out of the band that is promised."""
    found = replace(profile, measured_arl=measured)
    assert [said in caution for caution in found.cautions(1000)] == [True] * bool(said)
    if said:
        with pytest.warns(ReferenceWarning, match=re.escape(said)), Monitor(model, reference=found):
            pass


def test_heavy_tails_are_told_of(model: nn.Module, clean: Sampler) -> None:
    """Samples divided by the cube of a uniform number, some a million times as bright, hide what thresholds are for."""
    samples = clean(1000, seed=64) / torch.rand(1000, 1, 1, 1, generator=torch.Generator().manual_seed(1)) ** 3
    with pytest.warns(ReferenceWarning, match="weak shifts will be seen late or not at all"):
        ReferenceProfile.fit(model, torch.split(samples, 100), target_arl=10_000)


def test_a_saved_profile_is_the_same_profile(
    model: nn.Module, profile: ReferenceProfile, clean: Sampler, tmp_path: Path
) -> None:
    """Decisions, evidence and p-values are identical after a round trip; nothing but the file is left behind."""
    path = tmp_path / "profile.safetensors"
    profile.save(path)
    assert os.listdir(tmp_path) == [path.name]  # noqa: PTH208
    loaded = ReferenceProfile.load(path)
    assert loaded.measured_arl == profile.measured_arl
    assert loaded.layers == profile.layers
    stream = torch.cat([clean(50, seed=5), noisy(clean(30, seed=6), 0.3, torch.Generator().manual_seed(0))])
    seen = []
    for reference in (profile, loaded):
        with Monitor(model, reference=reference, target_arl=2000) as monitor, torch.inference_mode():
            model.eval()(stream)
            verdict = monitor.verdict()
            seen.append((verdict.state, verdict.alarm_at, verdict.evidence, verdict.channels, monitor.scores()))
    assert seen[0] == seen[1]
    assert seen[0][0] == "shifted"


def test_a_profile_is_small(profile: ReferenceProfile, tmp_path: Path) -> None:
    """It holds a few numbers a channel and a small matrix a layer, whatever the number of samples."""
    profile.save(tmp_path / "profile.safetensors")
    channels, layers = 208, 5
    size = (tmp_path / "profile.safetensors").stat().st_size
    assert size < 32 * channels + 4 * layers * 128 * 129 + 9 * 1200 + 4096


def test_a_profile_of_another_model_is_refused(model: nn.Module, profile: ReferenceProfile) -> None:
    """Other weights, moved statistics or missing layers are errors, and no hook stays on the refused model."""
    moved = copy.deepcopy(model)
    norm = next(layer for layer in moved.modules() if isinstance(layer, nn.BatchNorm2d))
    assert norm.running_mean is not None
    norm.running_mean[0] += 0.01
    with pytest.raises(ReferenceMismatchError, match="fingerprint"):
        Monitor(moved, reference=profile)
    assert not any(m._forward_pre_hooks or "_check_input_dim" in vars(m) for m in moved.modules())
    with pytest.raises(ReferenceMismatchError, match=r"no BatchNorm layer 'blocks\.0\.norm'"):
        Monitor(nn.Sequential(nn.BatchNorm1d(3)), reference=profile)


def test_a_fused_model_keeps_its_profile(model: nn.Module, profile: ReferenceProfile, clean: Sampler) -> None:
    """Fusion leaves the observation points, so the same stream gives the same p-values to rounding."""
    scores = []
    for network in (model.eval(), fuse(model)):
        with Monitor(network, reference=profile, target_arl=1000) as monitor, torch.inference_mode():
            network(clean(64, seed=7))
            scores.append(monitor.scores())
    assert np.allclose(scores[0], scores[1], atol=5 / profile.samples)


def test_damaged_and_foreign_files_are_clear_errors(profile: ReferenceProfile, tmp_path: Path) -> None:
    """A missing, cut, foreign, edited or newer file is refused with its name and the reason."""
    good = tmp_path / "good.safetensors"
    profile.save(good)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-100])
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": np.zeros(3, np.float32)}, foreign)
    newer = tmp_path / "newer.safetensors"
    save_file({"weight": np.zeros(3, np.float32)}, newer, {"guardserve_reference": json.dumps({"version": 99})})
    nan = tmp_path / "nan.safetensors"
    replace(profile, thresholds=profile.thresholds * np.nan).save(nan)
    for path, reason in (
        (tmp_path / "absent", "cannot be read"),
        (cut, "damaged or not"),
        (foreign, "but not a reference profile"),
        (newer, "its version is 99, this guardserve reads"),
        (nan, "thresholds holds something else than finite numbers"),
    ):
        with pytest.raises(ReferenceProfileError, match=reason) as error:
            ReferenceProfile.load(path)
        assert path.name in str(error.value)


def test_what_gives_no_profile_is_refused(model: nn.Module, clean: Sampler) -> None:
    """Too few samples, only NaN, no BatchNorm, a target without a threshold: each says so; flags and hooks go back."""
    with pytest.raises(ReferenceProfileError, match="99 finite samples"):
        ReferenceProfile.fit(model, [clean(99, seed=0)])
    with pytest.raises(ReferenceProfileError, match="no finite sample"):
        ReferenceProfile.fit(model, [torch.full((8, 1, 8, 8), torch.nan)])
    with pytest.raises(ReferenceProfileError, match="no finite sample"):
        ReferenceProfile.fit(model, [])
    with pytest.raises(ReferenceProfileError, match="no BatchNorm layer"):
        ReferenceProfile.fit(nn.Linear(2, 2), [torch.zeros(200, 2)])
    with pytest.raises(ValueError, match="target_arl=5"):
        ReferenceProfile.fit(model, [clean(200, seed=0)], target_arl=5)
    model.train()
    with pytest.raises(ReferenceProfileError):
        ReferenceProfile.fit(model, [clean(10, seed=0)])
    assert model.training
    assert not any(m._forward_pre_hooks or m._forward_hooks or "_check_input_dim" in vars(m) for m in model.modules())


def test_samples_with_nan_are_left_out_of_a_profile_and_counted(model: nn.Module, clean: Sampler) -> None:
    """A poisoned sample in the reference changes nothing but a count; labels beside the images are passed over."""

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        images = clean(300, seed=8)
        images[::50] = torch.nan
        yield images, torch.zeros(300)

    profile = ReferenceProfile.fit(model, batches(), target_arl=1000)
    assert (profile.samples, profile.nonfinite_samples) == (294, 6)
    assert all(np.isfinite(array).all() for array in (profile.sketch.centre, profile.whitening.matrix, profile.scores))


def test_whitening_gives_the_reference_mean_zero_and_covariance_one() -> None:
    """With many samples the shrinkage is slight and the result is white; a constant direction stays 0."""
    rng = np.random.default_rng(0)
    mixed = (rng.standard_normal((20_000, 8)) @ (np.eye(8) + 0.2 * rng.standard_normal((8, 8))) + 3).astype(np.float32)
    mixed[:, 7] = 2.5
    white = Whitening.fit(mixed[:, None], [8]).apply(mixed[:, None])[:, 0]
    assert np.abs(white.mean(0)).max() < 1e-3
    assert np.allclose(np.cov(white[:, :7].T), np.eye(7), atol=0.05)
    assert np.abs(white[:, 7]).max() < 1e-3


def test_shrinkage_is_that_of_scikit_learn() -> None:
    """Our Ledoit-Wolf covariance equals the well-known implementation's."""
    covariance = pytest.importorskip("sklearn.covariance")
    x = np.random.default_rng(1).standard_normal((40, 12)).astype(np.float32)
    x -= x.mean(0)
    expected, _ = covariance.ledoit_wolf(x.astype(np.float64), assume_centered=True)
    assert np.allclose(ledoit_wolf(x), expected, rtol=1e-6)


def test_a_sketch_sums_signed_channels() -> None:
    """Each bucket of a layer is the signed sum of every other channel; narrow layers keep every feature."""
    features = np.random.default_rng(2).standard_normal((500, 2 * (5 + 2))).astype(np.float32)
    sketch = Sketch.fit(features, [5, 2], 4, np.random.default_rng(3))
    standardised = sketch.standardise(features)
    short = sketch.project(standardised)
    assert short.shape == (500, 2, 4)
    assert sketch.dimensions == (4, 4)
    expected = [standardised[:, list(run)].sum(1) for run in ((0, 2, 4), (1, 3), (7, 9, 11), (8, 10))]
    assert np.allclose(short[:, 0], np.stack(expected, axis=1), atol=1e-5)
    assert np.array_equal(short[:, 1], standardised[:, [5, 6, 12, 13]])


@pytest.mark.parametrize("width", [16, 8, 4])
def test_a_folded_sketch_is_the_narrower_one(width: int) -> None:
    """Few samples carry fewer dimensions; nobody knows how few before all have been read."""
    features = np.random.default_rng(2).standard_normal((50, 2 * (40 + 3 + 11))).astype(np.float32)
    wide = Sketch.fit(features, [40, 3, 11], 32, np.random.default_rng(3))
    narrow = replace(wide, width=width)
    z = wide.standardise(features)
    assert np.allclose(wide.fold(wide.project(z), narrow), narrow.project(z), atol=1e-5)
