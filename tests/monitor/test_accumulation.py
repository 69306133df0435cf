"""What stretches of a stream add up to: by the part in C, and by numpy's and torch's operations, which say the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from guardserve.batchnorm import observation_points
from guardserve.monitor import effect_size
from guardserve.monitor.accumulation import RouteMoments, Scale
from guardserve.monitor.effect_size import LayerMoments
from guardserve.observation.reading import Rows
from guardserve.observation.workspace import NATIVE
from guardserve.stats import Moments

needs_native = pytest.mark.skipif(not NATIVE, reason="the part in C was not compiled")


def scale(*widths: int) -> Scale:
    """Return the scale of layers with so many channels; the last channel of each is not known."""
    layers = nn.Sequential(*map(nn.BatchNorm1d, widths)).eval()
    generator = torch.Generator().manual_seed(0)
    for point in (points := list(observation_points(layers))):
        mean, var, *_ = point.constants
        assert mean is not None
        assert var is not None
        mean.normal_(generator=generator)
        var.uniform_(0.1, 3, generator=generator)
        var[-1] = torch.nan
    return Scale(points)


def rows(samples: int, columns: int, *, variance: bool, far: float = 0.0, seed: int = 0) -> Rows:
    """Return rows that lie in wider ones, as those of a layer do."""
    random = np.random.default_rng(seed)
    wide = (far + random.normal(size=(2, samples, columns + 3))).astype(np.float32)
    return Rows(wide[0][:, 1:-2], np.square(wide[1][:, 1:-2]) if variance else None)


def by_numpy(scale: Scale, parts: list[Rows]) -> RouteMoments:
    """Summarise as rows of float64 are, and of float32 where nothing was compiled."""
    zeros = [np.zeros_like(part.mean) if part.variance is None else part.variance for part in parts]
    return scale.moments(
        [Rows(part.mean.astype(np.float64), z.astype(np.float64)) for part, z in zip(parts, zeros, strict=True)]
    )


def assert_same(left: RouteMoments, right: RouteMoments, rtol: float = 1e-10) -> None:
    """Compare what two have accumulated."""
    a, b = left.together, right.together
    assert (a.samples, left.nonfinite_samples.tolist()) == (b.samples, right.nonfinite_samples.tolist())
    assert a.moments.count.equal(b.moments.count)
    for mine, other in ((a.moments.mean, b.moments.mean), (a.moments.m2, b.moments.m2), (a.within, b.within)):
        torch.testing.assert_close(mine, other, rtol=rtol, atol=1e-12)


@needs_native
@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 70), min_size=1, max_size=4),
    widths=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    variance=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_the_part_in_c_adds_up_what_numpy_does(sizes: list[int], widths: list[int], variance: list[bool]) -> None:
    """Any number of forwards of any sizes, with variances or without."""
    if not sum(sizes):
        sizes[0] = 1
    where = scale(*widths)
    parts = [rows(n, sum(widths), variance=v, seed=i) for i, (n, v) in enumerate(zip(sizes, variance, strict=False))]
    assert_same(where.moments(parts), by_numpy(where, parts))


@needs_native
def test_means_far_from_zero_are_summed_up_as_in_float64() -> None:
    """10,000 standard deviations away, and no more is lost than float32 had lost already."""
    where = scale(5)
    part = rows(64, 5, variance=True, far=1e4)
    seen = where.moments([part]).together.moments
    known = slice(0, 4)
    exact = part.mean.astype(np.float64)[:, known]
    squares = torch.from_numpy(np.square(exact - exact.mean(0)).sum(0) / where._columns[2, known] ** 2)
    torch.testing.assert_close(seen.m2[known], squares, rtol=1e-9, atol=0)
    assert seen.count.tolist() == [64] * 4 + [0]


@needs_native
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("which", ["mean", "variance"])
def test_values_that_are_not_finite_are_left_out_of_their_channel(bad: float, which: str) -> None:
    """As numpy does it, whatever the part in C has made of them."""
    where = scale(4, 3)
    parts = [rows(6, 7, variance=True, seed=i) for i in range(2)]
    values = parts[1].mean if which == "mean" else parts[1].variance
    assert values is not None
    values[2, 5] = bad
    seen = where.moments(parts)
    assert_same(seen, by_numpy(where, parts))
    assert seen.nonfinite_samples.tolist() == [0, 1]
    assert seen.together.moments.count.tolist() == [12, 12, 12, 0, 12, 11, 0]


def apart(seen: RouteMoments) -> LayerMoments:
    """Return every other channel, which lie apart."""
    whole = seen.together
    count, mean, m2, within = (
        t[::2] for t in (whole.moments.count, whole.moments.mean, whole.moments.m2, whole.within)
    )
    return LayerMoments(whole.samples, 0, Moments(count, mean, m2), within)


@needs_native
def test_two_stretches_merge_as_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with channels that nobody has seen, and tensors that the part in C does not take."""
    where = scale(4, 3)
    left, right = (where.moments([rows(n, 7, variance=True, seed=n)]) for n in (5, 8))
    merged = left.merge(right)
    assert_same(merged, where.moments([rows(5, 7, variance=True, seed=5), rows(8, 7, variance=True, seed=8)]))
    torch.testing.assert_close(apart(left).merge(apart(right)).moments.m2, apart(merged).moments.m2)
    monkeypatch.setattr(effect_size, "NATIVE", False)
    assert_same(merged, left.merge(right), rtol=1e-12)


@needs_native
def test_the_part_in_c_refuses_what_it_cannot_read() -> None:
    """By name, instead of reading what is not there."""
    from guardserve.native import add_up, merge_moments  # noqa: PLC0415 - it may not be there

    part, constants, made = rows(2, 3, variance=True), np.ones((3, 3)), np.empty((4, 3))
    assert add_up([part], constants, made)
    assert not add_up([], constants, made)
    for wrong in (
        ([rows(2, 4, variance=True)], constants, made),
        ([part._replace(variance=rows(1, 3, variance=True).variance)], constants, made),
        ([part._replace(mean=part.mean.astype(np.float64))], constants, made),
        ([part._replace(mean=part.mean[:, ::2])], constants, made),
        ([part._replace(mean=part.mean.astype(">f4"))], constants, made),
        ([part], constants[:2], made),
        ([part], constants, np.broadcast_to(made[0], (4, 3))),
        ([part], constants, made[:, :2]),
    ):
        with pytest.raises(ValueError, match=r"as many|-byte|three constants"):
            add_up(*wrong)
    ones = torch.ones(3, dtype=torch.int64), *[torch.ones(3, dtype=torch.float64)] * 3
    assert not merge_moments(ones, ones, ones[::-1])
    assert not merge_moments(ones, ones, tuple(tensor[:2] for tensor in ones))
