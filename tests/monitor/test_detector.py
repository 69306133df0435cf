"""The referenced monitor: early alarms, the same ones however samples are batched, with the right reading."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from guardserve import Monitor, ReferenceProfile, ReferenceProfileError
from guardserve.demo.digits import SHIFTS, blurred, brighter, faded, noisy
from guardserve.detection.chart import LAMBDAS, Chart
from guardserve.detection.detector import CALM, RECOVERY, WARM, Detector
from guardserve.detection.diagnosis import ShiftAverage
from guardserve.monitor import Verdict
from guardserve.observation.features import Array

Sampler = Callable[..., torch.Tensor]
Reader = Callable[[torch.Tensor], Array]
TARGET = 2000


def watch(
    model: nn.Module, profile: ReferenceProfile, images: torch.Tensor, sizes: list[int] | None = None
) -> tuple[Verdict, list[float]]:
    """Show a fresh monitor a stream, in batches of the given sizes, and ask what it makes of it."""
    with Monitor(model.eval(), reference=profile, target_arl=TARGET) as monitor, torch.inference_mode():
        for batch in torch.split(images, sizes or 16):
            model(batch)
        return monitor.verdict(), monitor.scores()


def kolmogorov_smirnov(p_values: list[float]) -> float:
    """Return the distance of p-values from uniform."""
    ordered, count = np.sort(p_values), len(p_values)
    return float(np.maximum(np.arange(1, count + 1) / count - ordered, ordered - np.arange(count) / count).max())


@pytest.mark.parametrize("name", SHIFTS)
def test_a_gross_shift_is_seen_within_four_samples(
    model: nn.Module, profile: ReferenceProfile, clean: Sampler, name: str
) -> None:
    """After 100 clean samples without an alarm, each of the demo's shifts alarms almost at once."""
    torch.manual_seed(0)
    verdict, _ = watch(model, profile, torch.cat([clean(100, seed=10), SHIFTS[name](clean(40, seed=11))]))
    assert verdict.state == "shifted"
    assert verdict.alarm_at is not None
    assert 101 <= verdict.alarm_at <= 104
    assert verdict.alarms == 1


@pytest.mark.parametrize(
    ("shift", "within"),
    [
        (lambda x: brighter(x, 0.05), 25),
        (lambda x: faded(x, 0.9), 25),
        (lambda x: blurred(x, 0.6), 25),
        (lambda x: noisy(x, 0.1, torch.Generator().manual_seed(0)), 40),
    ],
    ids=["brighter", "faded", "blurred", "noisy"],
)
def test_a_weak_shift_is_seen_within_tens_of_samples(
    model: nn.Module,
    profile: ReferenceProfile,
    clean: Sampler,
    shift: Callable[[torch.Tensor], torch.Tensor],
    within: int,
) -> None:
    """Changes that hardly cost accuracy alarm long before a window of a few hundred samples is full."""
    verdict, _ = watch(model, profile, torch.cat([clean(100, seed=12), shift(clean(100, seed=13))]))
    assert verdict.alarm_at is not None
    assert 100 < verdict.alarm_at <= 100 + within


def test_the_decision_does_not_depend_on_batching(model: nn.Module, profile: ReferenceProfile, clean: Sampler) -> None:
    """One by one, in odd batches or all at once: the same alarm at the same sample, the same p-values to rounding."""
    stream = torch.cat([clean(90, seed=14), brighter(clean(40, seed=15), 0.1)])
    seen = [watch(model, profile, stream, sizes) for sizes in ([1] * 130, [3, 60, 7, 1, 59], [130])]
    assert len({(verdict.alarm_at, verdict.state, verdict.layer, verdict.reading) for verdict, _ in seen}) == 1
    assert all(verdict.samples == len(scores) == 130 for verdict, scores in seen)
    for _, scores in seen[1:]:
        assert np.allclose(scores, seen[0][1], atol=3 / profile.samples)


def test_p_values_of_clean_samples_are_uniform_and_of_odd_ones_small(
    model: nn.Module, profile: ReferenceProfile, clean: Sampler
) -> None:
    """A Kolmogorov-Smirnov test at 1 % accepts fresh clean samples; nearly every shifted one is below 1 %."""
    _, scores = watch(model, profile, clean(500, seed=16))
    assert kolmogorov_smirnov(scores) < 1.63 * math.sqrt(1 / 500 + 1 / profile.samples)
    _, odd = watch(model, profile, SHIFTS["inverted"](clean(100, seed=17)))
    assert np.quantile(odd, 0.95) < 0.01


def test_nan_never_poisons(model: nn.Module, profile: ReferenceProfile, clean: Sampler) -> None:
    """Poisoned samples are counted and odder than any; the stream around them is judged as if they were not there."""
    stream = torch.cat([clean(60, seed=18), brighter(clean(40, seed=19), 0.1)])
    poisoned = torch.cat([stream[:10], torch.full((2, 1, 8, 8), torch.nan), stream[10:]])
    poisoned[11] = 1e30  # finite, but its square is not
    expected, scores = watch(model, profile, stream)
    verdict, with_nan = watch(model, profile, poisoned)
    assert expected.alarm_at is not None
    assert verdict.alarm_at == expected.alarm_at + 2
    assert verdict.evidence == pytest.approx(expected.evidence, rel=1e-4)
    assert [p == 0 for p in with_nan] == [10 <= i < 12 for i in range(102)]
    assert np.allclose(with_nan[:10] + with_nan[12:], scores, atol=3 / profile.samples)


def test_nothing_but_nan_is_counted_and_judged(model: nn.Module, profile: ReferenceProfile) -> None:
    """A request with no finite sample raises nothing and loses nobody's."""
    verdict, scores = watch(model, profile, torch.full((3, 1, 8, 8), torch.nan))
    assert (verdict.samples, scores) == (3, [0, 0, 0])


@pytest.mark.parametrize(
    ("shift", "words"),
    [
        (lambda x: brighter(x, 0.15), ("input-level", "offset")),
        (lambda x: noisy(x, 0.5, torch.Generator().manual_seed(0)), ("input-level", "vary more")),
        (lambda x: blurred(x, 1.0), ("input-level", "vary less")),
        (torch.zeros_like, ("input-level: all samples are alike", "vary less")),
    ],
    ids=["brightness", "noise", "blur", "dead sensor"],
)
def test_the_reading_names_what_happened_to_the_input(
    model: nn.Module,
    profile: ReferenceProfile,
    clean: Sampler,
    shift: Callable[[torch.Tensor], torch.Tensor],
    words: tuple[str, str],
) -> None:
    """An input-level shift starts at the first layer, is an offset or a scale, and lasts."""
    verdict, _ = watch(model, profile, torch.cat([clean(60, seed=20), shift(clean(120, seed=21))]))
    assert verdict.layer == "blocks.0.norm"
    assert all(word in verdict.reading for word in words), verdict.reading
    assert verdict.reading.endswith("; lasting")


@pytest.mark.parametrize("digit", [0, 3, 5])
def test_one_image_over_and_over_is_no_mixture_of_classes(
    model: nn.Module, profile: ReferenceProfile, clean: Sampler, digit: int
) -> None:
    """A camera that is stuck shows a clean digit, but always the same."""
    stuck = clean(1, seed=60 + digit, classes=(digit,)).expand(80, -1, -1, -1)
    verdict, _ = watch(model, profile, torch.cat([clean(60, seed=20), stuck]), [60, *[3] * 20, 20])
    assert verdict.alarm_at is not None
    assert verdict.alarm_at > 60
    assert verdict.reading.startswith("input-level: all samples are alike; "), verdict.reading


def test_a_few_equal_samples_among_others_are_not_all_alike(
    model: nn.Module, profile: ReferenceProfile, clean: Sampler
) -> None:
    """A retried request, or each twice in turn, is no stuck sensor."""
    shifted = brighter(clean(120, seed=21), 0.15)
    for images in (torch.cat([shifted, shifted[:1].expand(6, -1, -1, -1)]), shifted.repeat_interleave(2, 0)):
        verdict, _ = watch(model, profile, torch.cat([clean(60, seed=20), images]))
        assert verdict.reading.startswith("input-level: early layers"), verdict.reading


@pytest.mark.parametrize("block", [1, 2, 3, 4])
def test_a_fault_inside_the_model_is_named_where_it_is(
    model: nn.Module, profile: ReferenceProfile, clean: Sampler, block: int
) -> None:
    """A convolution that lost a third of its output leads to the layer behind it, not to one before or after."""
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.get_parameter(f"blocks.{block}.conv.weight").mul_(0.67)
    verdict, _ = watch(broken, profile, clean(120, seed=26))
    assert verdict.state == "shifted"
    assert verdict.layer == f"blocks.{block}.norm"


@pytest.mark.parametrize("classes", [(1, 7), (3, 8), (0, 2, 4, 6, 8)])
def test_another_mixture_of_classes_is_read_as_such(
    model: nn.Module, profile: ReferenceProfile, clean: Sampler, classes: tuple[int, ...]
) -> None:
    """Only some of the digits: no image is odd, yet late layers move most."""
    verdict, _ = watch(model, profile, torch.cat([clean(60, seed=22), clean(300, seed=23, classes=classes)]))
    assert verdict.state == "shifted"
    assert verdict.reading.startswith("semantic or class mix"), verdict.reading


def test_channels_are_named_with_their_direction(model: nn.Module, profile: ReferenceProfile, clean: Sampler) -> None:
    """The channel said to have moved most did: its mean over the images differs as stated."""
    verdict, _ = watch(model, profile, brighter(clean(200, seed=24), 0.3))
    assert verdict.layer == "blocks.0.norm"
    conv = model.get_submodule("blocks.0.conv")
    with torch.inference_mode():
        before, after = (conv(x).mean((2, 3)) for x in (clean(400, seed=25), brighter(clean(400, seed=25), 0.3)))
    moved = (after.mean(0) - before.mean(0)) / before.std(0)
    for channel in verdict.channels:
        if channel.feature == "mean":
            assert math.copysign(1, channel.shift) == math.copysign(1, float(moved[channel.channel]))
    assert {c.channel for c in verdict.channels} & set(moved.abs().argsort(descending=True)[:5].tolist())


def test_each_layer_has_evidence_of_its_own_and_one_that_reaches_the_threshold_alarms(
    model: nn.Module, profile: ReferenceProfile, clean: Sampler
) -> None:
    """On one scale: the largest is the detector's; a shift is beyond 1 where it begins, clean samples nowhere."""
    calm, _ = watch(model, profile, clean(100, seed=10))
    shifted, _ = watch(model, profile, torch.cat([clean(100, seed=10), brighter(clean(40, seed=11), 0.5)]))
    for verdict in (calm, shifted):
        assert tuple(verdict.layers) == profile.layers
        assert max(verdict.layers.values()) == pytest.approx(verdict.evidence)
    assert max(calm.layers.values()) < 1
    assert shifted.layer is not None
    assert shifted.layers[shifted.layer] > 1
    with Monitor(model) as monitor:
        assert monitor.verdict().layers == {}


def test_states_follow_the_stream_with_hysteresis(model: nn.Module, profile: ReferenceProfile, clean: Sampler) -> None:
    """Warming, ok, shifted, then recovered only after many calm samples, then ok; the burst is remembered as one."""
    with Monitor(model.eval(), reference=profile, target_arl=12_000) as monitor, torch.inference_mode():
        assert monitor.verdict().state == "warming"
        model(clean(WARM - 1, seed=26))
        assert monitor.verdict().state == "warming"
        model(clean(40, seed=27))
        assert monitor.verdict().state == "ok"
        model(SHIFTS["inverted"](clean(12, seed=28)))
        shifted = monitor.verdict()
        assert shifted.state == "shifted"
        assert shifted.reading.endswith("just begun")
        model(clean(CALM // 2, seed=29))
        assert monitor.verdict().state == "shifted"
        model(clean(4 * CALM, seed=30))
        recovered = monitor.verdict()
        assert recovered.state == "recovered"
        assert "burst" in recovered.reading
        assert recovered.alarm_at == shifted.alarm_at
        model(clean(RECOVERY, seed=31))
        assert monitor.verdict().state == "ok"
        monitor.reset()
        fresh = monitor.verdict()
        assert (fresh.state, fresh.alarm_at, fresh.alarms, fresh.samples, fresh.reading) == ("warming", None, 0, 0, "")
        assert monitor.scores() == []


def test_one_odd_sample_is_a_burst_that_is_over_at_once(
    model: nn.Module, profile: ReferenceProfile, clean: Sampler
) -> None:
    """It alarms, and what clean samples come after it are no part of it."""
    freak = 1000 * clean(1, seed=36)
    verdict, _ = watch(model, profile, torch.cat([clean(60, seed=37), freak, clean(2 * CALM, seed=38)]))
    assert verdict.alarm_at == 61
    assert verdict.state == "recovered"
    assert verdict.reading.endswith("; burst, over at once"), verdict.reading


def test_nothing_grows_when_nobody_asks(model: nn.Module, profile: ReferenceProfile, clean: Sampler) -> None:
    """At most a few large forwards wait to be judged, and only the last 10,000 p-values to be drained."""
    images = clean(500, seed=32)
    with Monitor(model.eval(), reference=profile, target_arl=TARGET) as monitor, torch.inference_mode():
        for _ in range(22):
            model(images)
        assert len(monitor._pending) <= 8
        assert len(monitor.scores()) == 10_000
        assert monitor.scores() == []


def test_a_part_of_the_model_called_by_itself_is_not_judged(
    model: nn.Module, profile: ReferenceProfile, clean: Sampler
) -> None:
    """Half a sample has no p-value and moves no chart."""
    with Monitor(model.eval(), reference=profile, target_arl=TARGET) as monitor, torch.inference_mode():
        model.get_submodule("blocks.0")(clean(8, seed=33))
        assert monitor.scores() == []
        assert monitor.verdict().evidence == 0


def test_without_a_reference_there_are_no_scores(model: nn.Module) -> None:
    """The effect sizes have no null distribution, so there is nothing to make a p-value from."""
    with Monitor(model) as monitor:
        with pytest.raises(ReferenceProfileError, match="scores need a reference profile"):
            monitor.scores()
        verdict = monitor.verdict()
    assert (verdict.evidence, verdict.evidence_threshold, verdict.alarm_at, verdict.reading) == (None, None, None, "")


def test_the_chart_is_that_of_lowry_et_al() -> None:
    """Its state and statistic are the textbook recursion in float64."""
    vectors = np.random.default_rng(0).standard_normal((50, 2, 6)).astype(np.float32)
    chart = Chart(1, [6, 6], 6)
    for lam in LAMBDAS:
        w = np.zeros((2, 6))
        for f in vectors:
            w = (1 - lam) * w + lam * f
        expected = (np.square(w).sum(1) * (2 - lam) / lam - 6) / math.sqrt(12)
        chart = Chart(1, [6, 6], 6)
        for f in vectors:
            statistic = chart.step(f[None])
        assert np.allclose(statistic[0, LAMBDAS.index(lam)], expected, rtol=1e-4)


def test_a_chart_of_clean_vectors_has_no_drift_of_its_own() -> None:
    """After ten million vectors the statistic is distributed as after the first few hundred of each stream."""
    rng = np.random.default_rng(1)
    streams, steps = 500, 20_000
    chart = Chart(streams, [4], 4)
    early, late = [], []
    for step in range(steps):
        statistic = chart.step(rng.standard_normal((streams, 1, 4), np.float32))
        if 200 <= step < 1200:
            early.append(statistic[:, :, 0])
        if step >= steps - 1000:
            late.append(statistic[:, :, 0])
    assert np.mean(late, (0, 1)) == pytest.approx(np.mean(early, (0, 1)), abs=0.05)
    for level in (0.5, 0.99, 0.9999):
        before, after = (np.quantile(np.concatenate(part), level, axis=0) for part in (early, late))
        assert after == pytest.approx(before, rel=0.1, abs=0.05)


def test_a_detector_that_runs_for_long_alarms_no_more_often(
    profile: ReferenceProfile, features: Reader, clean: Sampler
) -> None:
    """Of 60,000 clean samples in one run, the second half raises about as many alarms as the first; nothing grows."""
    rows = features(clean(4000, seed=34))
    detector, rng = Detector(profile, 300), np.random.default_rng(0)
    alarms = [0]
    sizes = set()
    for _ in range(60):
        detector.judge(rows[rng.permutation(len(rows))[:1000]])
        alarms.append(detector.detection().alarms)
        sizes.add(sum(array.nbytes for array in detector.state_dict().values()))
    first, second = alarms[30] - alarms[0], alarms[60] - alarms[30]
    assert first + second > 20
    assert abs(first - second) < 4 * math.sqrt(first + second)
    assert len(sizes) == 1


def test_the_average_of_a_shift_is_the_same_however_it_comes() -> None:
    """Samples one by one or many at once move the average alike."""
    rng = np.random.default_rng(3)
    rows = [rng.standard_normal((300, *shape)).astype(np.float32) for shape in ((6,), (2, 4), (2,))]
    one, many = (ShiftAverage(*(part[:9] for part in rows)) for _ in range(2))
    for row in range(9, 300):
        one.update(*(part[row : row + 1] for part in rows))
    many.update(*(part[9:50] for part in rows))
    many.update(*(part[50:] for part in rows))
    assert np.allclose(one.features, many.features, atol=1e-5)
    assert np.allclose(one.vectors, many.vectors, atol=1e-5)
    assert np.allclose(one.oddness, many.oddness, atol=1e-5)
    assert one.noise == pytest.approx(many.noise)
    assert one.count == many.count == 300
