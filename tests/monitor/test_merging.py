"""Summaries of replicas: whatever the order, the sum is judged as one replica's summary of all would be."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from guardserve import ReferenceMismatchError, ReferenceProfile
from guardserve.demo.digits import brighter
from guardserve.detection.detector import Detector
from guardserve.detection.merging import Summary
from guardserve.observation.features import Array

Sampler = Callable[..., torch.Tensor]
Reader = Callable[[torch.Tensor], Array]
REPLICAS = 3


@pytest.fixture(scope="module")
def stream(features: Reader, clean: Sampler) -> Array:
    """Return features of clean digits, then brighter ones, a few of them poisoned."""
    rows = features(torch.cat([clean(120, seed=41), brighter(clean(80, seed=42), 0.1)]))
    rows[[11, 12, 150]] = np.nan
    return rows


def shared(profile: ReferenceProfile, stream: Array, intervals: list[int], seed: int) -> Summary:
    """Share a stream out among replicas at random, and merge their summaries in random order and grouping."""
    shuffle = random.Random(seed)
    replica = np.array([shuffle.randrange(REPLICAS) for _ in stream])
    keys = np.array(intervals)
    parts = []
    for number in range(REPLICAS):
        rows = np.flatnonzero(replica == number)
        shuffle.shuffle(order := rows.tolist())  # threads of a replica end in any order
        cuts = sorted(shuffle.sample(range(len(order)), 2))
        parts += [
            Summary.of(profile, stream[piece], keys[piece].tolist())
            for piece in (order[: cuts[0]], order[cuts[0] : cuts[1]], order[cuts[1] :])
        ]
    shuffle.shuffle(parts)
    return parts[0].merge(parts[1], parts[2].merge(*parts[3:6])).merge(*parts[6:])


@pytest.mark.parametrize("length", [1, 7, 25])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_merged_in_any_order_they_give_the_decision_of_one_that_saw_all(
    profile: ReferenceProfile, stream: Array, length: int, seed: int
) -> None:
    """State, alarm, layer, channels and reading are the same, and the evidence to rounding."""
    intervals = [i // length for i in range(len(stream))]
    one, merged = Detector(profile, 1000), Detector(profile, 1000)
    one.judge_summary(Summary.of(profile, stream, intervals))
    merged.judge_summary(shared(profile, stream, intervals, seed))
    expected, seen = one.detection(), merged.detection()
    assert expected.state == "shifted"
    assert expected.alarm_at is not None
    assert 120 < expected.alarm_at <= 160
    assert expected.nonfinite_samples == 3
    assert (seen.state, seen.samples, seen.nonfinite_samples, seen.alarms, seen.alarm_at, seen.layer, seen.reading) == (
        expected.state,
        expected.samples,
        expected.nonfinite_samples,
        expected.alarms,
        expected.alarm_at,
        expected.layer,
        expected.reading,
    )
    assert seen.evidence == pytest.approx(expected.evidence, rel=1e-5)
    assert [c.channel for c in seen.channels] == [c.channel for c in expected.channels]


@pytest.mark.parametrize("length", [1, 40])
def test_a_stuck_sensor_is_told_from_fewer_classes_by_summaries_too(
    profile: ReferenceProfile, features: Reader, clean: Sampler, length: int
) -> None:
    """Means of many samples hardly differ either; what counts is by how much less than those of clean samples do."""
    intervals = [i // length for i in range(40 * length)]
    for images, alike in ((clean(1, seed=43), True), (clean(len(intervals), seed=44, classes=(1, 7)), False)):
        rows = np.broadcast_to(features(images), (len(intervals), 2 * sum(profile.sketch.channels)))
        detector = Detector(profile, 1000)
        detector.judge_summary(Summary.of(profile, rows, intervals))
        found = detector.detection()
        assert found.state == "shifted"
        assert ("all samples are alike" in found.reading) == alike, found.reading


def test_with_one_sample_an_interval_the_decision_is_that_of_the_plain_detector(
    profile: ReferenceProfile, stream: Array
) -> None:
    """Numbers that a router counts make a fleet alarm at the very sample at which one server would."""
    plain, merged = Detector(profile, 1000), Detector(profile, 1000)
    plain.judge(stream)
    merged.judge_summary(shared(profile, stream, list(range(len(stream))), seed=5))
    expected, seen = plain.detection(), merged.detection()
    assert (seen.state, seen.samples, seen.alarm_at, seen.alarms) == (
        expected.state,
        expected.samples,
        expected.alarm_at,
        expected.alarms,
    )
    assert seen.evidence == pytest.approx(expected.evidence, rel=1e-4)


def test_summaries_one_after_the_other_are_judged_as_one(profile: ReferenceProfile, stream: Array) -> None:
    """A collector may judge each round as it comes."""
    intervals = [i // 10 for i in range(len(stream))]
    whole, rounds = Detector(profile, 1000), Detector(profile, 1000)
    whole.judge_summary(Summary.of(profile, stream, intervals))
    for start in range(0, len(stream), 50):
        rows = slice(start, start + 50)
        rounds.judge_summary(Summary.of(profile, stream[rows], intervals[rows]))
    assert rounds.detection().alarm_at == whole.detection().alarm_at
    assert rounds.detection().evidence == pytest.approx(whole.detection().evidence, rel=1e-5)


def test_longer_intervals_alarm_no_more_often_on_clean_samples(
    profile: ReferenceProfile, features: Reader, clean: Sampler
) -> None:
    """Means of more samples vary less: thresholds of single samples stay safe."""
    rows = features(clean(4000, seed=43))
    alarms: dict[int, int] = {}
    for length in (1, 50):
        detector = Detector(profile, 200)
        for start in range(0, len(rows), 200):
            detector.reset()
            detector.judge_summary(Summary.of(profile, rows[start : start + 200], [i // length for i in range(200)]))
            alarms[length] = alarms.get(length, 0) + detector.detection().alarms
    assert alarms[1] > 0
    assert alarms[50] <= alarms[1]


def test_it_grows_with_intervals_not_with_samples(profile: ReferenceProfile, stream: Array) -> None:
    """Merging summaries of the same intervals gives one of the same size."""
    one = Summary.of(profile, stream, [i // 50 for i in range(len(stream))])
    both = one.merge(one, one)
    assert both.vectors.shape == one.vectors.shape
    assert both.intervals.tolist() == [0, 1, 2, 3]
    assert both.samples.sum() == 3 * len(stream)


def test_profiles_are_not_mixed(model: nn.Module, profile: ReferenceProfile, features: Reader, clean: Sampler) -> None:
    """Vectors of another whitening mean something else."""
    other = ReferenceProfile.fit(model, torch.split(clean(300, seed=9), 100), target_arl=1000)
    rows = features(clean(4, seed=44))
    mine, theirs = (Summary.of(which, rows, [0, 0, 1, 1]) for which in (profile, other))
    with pytest.raises(ReferenceMismatchError, match="give all replicas the same one"):
        mine.merge(theirs)
    with pytest.raises(ReferenceMismatchError, match="another reference profile"):
        Detector(profile, 1000).judge_summary(theirs)
