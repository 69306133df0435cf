"""Run lengths: as asked for on independent and on ordered samples, and what extrapolates to rare ones."""

from __future__ import annotations

import math
from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn

from guardserve import ReferenceProfile
from guardserve.batchnorm import observation_points
from guardserve.detection.calibration import (
    ARLS,
    FOLDS,
    PARTS,
    STUDENT,
    Pool,
    dependent_run,
    largest_evidence,
    mean_run_length,
    prudence,
    tail_thresholds,
)
from guardserve.detection.collection import ReferenceData
from guardserve.detection.encoding import Sketch
from guardserve.observation.features import Array

LAYERS, CHANNELS = 4, 16
TARGET = 1000


def autoregressive(count: int, phi: float, rng: np.random.Generator) -> Array:
    """Return a stationary sequence of shape ``(N, layers, width)``: ``phi`` times the sample before, and noise."""
    noise = rng.standard_normal((count + 100, LAYERS, 2 * CHANNELS)) * math.sqrt(1 - phi**2)
    for step in range(1, len(noise)):
        noise[step] += phi * noise[step - 1]
    return noise[100:].astype(np.float32)


def fitted(samples: Array, ordered: bool) -> ReferenceProfile:
    """Fit a profile to sketches."""
    model = nn.Sequential(*(nn.BatchNorm1d(CHANNELS) for _ in range(LAYERS)))
    size, features = len(samples), 2 * LAYERS * CHANNELS
    sketch = Sketch((CHANNELS,) * LAYERS, 2 * CHANNELS, np.zeros(features, np.float32), np.ones(features, np.float32))
    points, held_out = list(observation_points(model)), 3 * size // 4
    data = ReferenceData(points, sketch, samples[:held_out], samples[held_out:], 0, 0, len(samples), ordered)
    return ReferenceProfile.of_data(data, target_arl=TARGET, rng=np.random.default_rng(0))


def run_length(profile: ReferenceProfile, samples: Array, run: int) -> float:
    """Measure a profile's run length on streams of fresh samples, ``run`` of them together."""
    pool = Pool.of(profile.whitening.apply(samples), profile.levels, run=run)
    largest = largest_evidence(
        pool, profile.sketch.dimensions, profile.levels, streams=96, horizons=[TARGET], rng=np.random.default_rng(1)
    )
    alarms = int((largest[0] >= profile.threshold(TARGET)[:, None]).any(0).sum())
    return mean_run_length(alarms, 96, TARGET)


def test_an_ordered_reference_keeps_its_run_length_on_an_autocorrelated_stream() -> None:
    """At phi .9 at least .3 of the target; taken as independent, the same samples give less than half of that."""
    rng = np.random.default_rng(2)
    samples, fresh = autoregressive(2000, 0.9, rng), autoregressive(40_000, 0.9, rng)
    ordered = run_length(fitted(samples, ordered=True), fresh, 1000)
    assert ordered >= 0.3 * TARGET
    assert run_length(fitted(samples, ordered=False), fresh, 1000) < 0.5 * ordered


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("seed", [3, 4])
def test_independent_samples_give_about_the_run_length_asked_for(seed: int, ordered: bool) -> None:
    """Between half and three times the target from 1,500 samples; more where order has to be allowed for."""
    rng = np.random.default_rng(seed)
    profile = fitted(autoregressive(1500, 0, rng), ordered)
    measured = run_length(profile, autoregressive(20_000, 0, rng), 1)
    assert measured >= 0.5 * TARGET
    assert ordered or measured <= 3 * TARGET


def test_the_run_that_stays_together_follows_the_autocorrelation() -> None:
    """A few samples where they are independent, five times the integrated autocorrelation time where not."""
    rng = np.random.default_rng(5)
    assert dependent_run(autoregressive(4000, 0, rng)) == 5
    assert 60 <= dependent_run(autoregressive(4000, 0.9, rng)) <= 110
    assert dependent_run(np.zeros((200, 1, 4), np.float32)) == 5


def test_runs_stay_together_and_nothing_comes_twice_before_all_have_come() -> None:
    """A stream is a sequence of stretches, each in order."""
    vectors = np.arange(60, dtype=np.float32).reshape(60, 1, 1)
    pool = Pool(vectors, np.zeros(60, np.float32), run=10)
    orders = pool.orders(3, np.random.default_rng(6))
    for stream in next(orders).T:
        assert sorted(stream.tolist()) == list(range(60))
        assert (np.diff(stream) % 60 == 1).sum() >= 54


def test_a_stream_goes_through_one_fold_after_the_other() -> None:
    """All vectors of a cycle are of one fold, and FOLDS cycles hold every sample once."""
    vectors = np.zeros((20 * FOLDS * 2, 1, 1), np.float32)
    pool = Pool(vectors, np.zeros(len(vectors), np.float32), folds=2 * FOLDS)
    assert (pool.cycle, pool.samples) == (20, 20 * FOLDS)
    cycles = list(islice(pool.orders(5, np.random.default_rng(14)), FOLDS))
    for stream in np.stack(cycles, axis=2).transpose(1, 2, 0):
        assert all(sorted(cycle % 20) == list(range(20)) and len(set(cycle // 20)) == 1 for cycle in stream)
        folds = sorted(int(cycle[0]) // 20 for cycle in stream)
        assert folds in (list(range(FOLDS)), list(range(FOLDS, 2 * FOLDS)))


def test_few_samples_are_met_with_prudence_and_rare_ones_with_more() -> None:
    """The tail is extrapolated beyond all that was seen, and steeper beyond what so many samples can tell."""
    assert (prudence(100) > 5).all()
    assert (np.diff([prudence(samples) for samples in (3000, 700, 200, 100)], axis=0) > 0).all()
    assert (prudence(3000) > 1).all()
    assert (prudence(750)[:2] < 1.25).all()
    tail = np.random.default_rng(7).exponential(0.1, 1000).astype(np.float32)
    thresholds = tail_thresholds(tail, ARLS)
    exact = 0.1 * np.log(ARLS / 0.1)
    assert (thresholds >= tail.max()).all()
    within = ARLS <= 1000
    assert np.abs(thresholds[within] - exact[within]).max() < 0.35
    assert (thresholds[~within] > exact[~within] + 0.2 * np.log(ARLS[~within] / 1000)).all()


def test_chance_is_as_wide_as_the_error_of_a_mean() -> None:
    """The mean of 400 white vectors is off by a twentieth of a standard deviation."""
    vectors = np.random.default_rng(8).standard_normal((400, 2, 8)).astype(np.float32)
    chance = Pool(vectors, np.zeros(400, np.float32)).chance(500, 400, np.random.default_rng(9))
    assert chance.std() == pytest.approx(1 / 20, rel=0.1)
    assert abs(chance.mean()) < 0.01


def test_held_out_vectors_are_moved_to_where_production_may_be() -> None:
    """About ``m / (n + m)`` of their mean, as wide as the mean of ``n + m``, and otherwise as they are."""
    vectors = np.random.default_rng(11).standard_normal((100, 2, 8)).astype(np.float32) + 1
    pool = Pool(vectors, np.zeros(100, np.float32))
    means = pool.plausible_means(200, 300, np.random.default_rng(12))
    np.testing.assert_allclose(means.mean(0), vectors.mean(0) / 4, atol=0.015)
    assert means.std(0).mean() == pytest.approx(1 / 20, rel=0.1)
    moved = pool.moved(means[0]).vectors
    np.testing.assert_allclose(moved.mean(0), means[0], atol=1e-5)
    np.testing.assert_allclose(moved - means[0], vectors - vectors.mean(0), atol=1e-5)


def test_a_small_reference_measures_its_true_run_length() -> None:
    """The chance mean of 150 held-out samples is not taken for a shift: four profiles of 600 are right on average."""
    rng = np.random.default_rng(13)
    fresh = autoregressive(20_000, 0, rng)
    ratios = []
    for _ in range(4):
        profile = fitted(autoregressive(600, 0, rng), ordered=False)
        true = run_length(profile, fresh, 1)
        assert profile.measured_arl.low / 2 < true < 2 * profile.measured_arl.high
        ratios.append(profile.measured_arl.mean / true)
    assert 0.5 < math.exp(np.log(ratios).mean()) < 2


def test_fitting_leaves_torch_its_threads() -> None:
    """Calibration sets no global number of threads."""
    before = torch.get_num_threads()
    fitted(autoregressive(200, 0, np.random.default_rng(10)), ordered=False)
    assert torch.get_num_threads() == before


def test_the_interval_allows_for_an_error_known_from_few_measurements() -> None:
    """Of means of eight normal values, the interval made of these covers 95 %: with 1.96 errors it is 91 %."""
    values = np.random.default_rng(0).standard_normal((200_000, PARTS))
    error = values.std(1, ddof=1) / math.sqrt(PARTS)
    assert (np.abs(values.mean(1)) < STUDENT * error).mean() == pytest.approx(0.95, abs=0.003)
