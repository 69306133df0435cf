"""Moments against float64 numpy, and the laws that merging must keep."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from guardserve import Moments, stats

values = st.floats(-1e6, 1e6, width=32)
batches = hnp.arrays(np.float32, st.tuples(st.integers(0, 8), st.just(3)), elements=values)


def assert_same(left: Moments, right: Moments) -> None:
    """Compare two moments to rounding."""
    assert torch.equal(left.count, right.count)
    scale = 1 + right.mean.abs()
    torch.testing.assert_close(left.mean / scale, right.mean / scale, rtol=1e-12, atol=1e-12)
    scale = 1 + right.m2 + right.mean.square() * right.count
    torch.testing.assert_close(left.m2 / scale, right.m2 / scale, rtol=1e-12, atol=1e-12)


@given(batches)
def test_moments_equal_numpys_in_float64(batch: np.ndarray) -> None:
    """Mean and variance of a batch are what numpy computes in float64."""
    moments = Moments.of(torch.from_numpy(batch))
    if len(batch) == 0:
        assert moments.count.tolist() == [0, 0, 0]
        return
    exact = batch.astype(np.float64)
    np.testing.assert_allclose(moments.mean, exact.mean(0), rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(moments.variance, exact.var(0), rtol=1e-9, atol=1e-6)


@given(batches, batches)
def test_merging_equals_having_seen_both(left: np.ndarray, right: np.ndarray) -> None:
    """merge(a, b) and update(b) equal the moments of the concatenated stream."""
    a, b = torch.from_numpy(left), torch.from_numpy(right)
    both = Moments.of(torch.cat([a, b]))
    assert_same(Moments.of(a).merge(Moments.of(b)), both)
    assert_same(Moments.of(a).update(b), both)


@given(batches, batches, batches)
def test_merging_is_commutative_and_associative(one: np.ndarray, two: np.ndarray, three: np.ndarray) -> None:
    """Replicas may be merged in any order."""
    a, b, c = (Moments.of(torch.from_numpy(part)) for part in (one, two, three))
    assert_same(a.merge(b), b.merge(a))
    assert_same(a.merge(b).merge(c), a.merge(b.merge(c)))


@given(batches)
def test_empty_is_the_identity(batch: np.ndarray) -> None:
    """Merging with no samples changes nothing, not even by rounding."""
    moments = Moments.of(torch.from_numpy(batch))
    for merged in (moments.merge(Moments.empty((3,))), Moments.empty((3,)).merge(moments)):
        assert torch.equal(merged.mean, moments.mean)
        assert torch.equal(merged.m2, moments.m2)


def test_a_non_finite_value_leaves_only_its_own_element_out() -> None:
    """NaN and infinity never poison a statistic, and the count tells that they were left out."""
    moments = Moments.of(torch.tensor([[1.0, float("nan")], [3.0, 5.0], [float("inf"), 7.0]]))
    assert moments.count.tolist() == [2, 2]
    assert moments.mean.tolist() == [2.0, 6.0]
    assert moments.variance.tolist() == [1.0, 1.0]


def test_means_far_from_zero_keep_their_variance() -> None:
    """A mean of a million deviations costs no digits that float64 has."""
    generator = torch.Generator().manual_seed(0)
    stream = torch.randn(1000, generator=generator, dtype=torch.float64) + 1e6
    moments = Moments.empty(())
    for part in stream.reshape(-1, 8):
        moments = moments.update(part)
    np.testing.assert_allclose(moments.variance, stream.numpy().var(), rtol=1e-9)


def test_moments_of_different_shapes_do_not_merge() -> None:
    """Two layers' moments are not the same thing, and the error says so."""
    with pytest.raises(ValueError, match=r"shape \(3,\) into shape \(2,\)"):
        Moments.empty((2,)).merge(Moments.empty((3,)))


def test_the_example_in_the_docstring_is_true() -> None:
    """The docstring's example gives what it shows."""
    assert doctest.testmod(stats).failed == 0
