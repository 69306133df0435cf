"""Made-up rows: what stands beside a sample in a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from guardserve.audit.examples import WILD, Example, middle

DTYPES = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool])


def example(value: Any) -> Example:
    """Read an example for a model that takes anything."""
    return Example.of(value, nn.Identity())


@given(st.integers(1, 9), st.lists(st.integers(1, 4), max_size=3), DTYPES, st.integers(2, 6), st.integers(0, WILD))
def test_the_sample_is_in_the_middle_and_its_mates_are_others(
    rows: int, shape: list[int], dtype: torch.dtype, count: int, variant: int
) -> None:
    """Any shape and type; mates differ from the sample, and two makings agree."""
    generator = torch.Generator().manual_seed(rows)
    values = (torch.randn(rows, *shape, generator=generator) * 5).abs().to(dtype)
    (batch,) = example(values).among(count, variant).args
    assert batch.shape == (count, *shape)
    assert batch.dtype == dtype
    assert torch.equal(batch[middle(count)], values[0])
    assert torch.equal(batch, example(values).among(count, variant).args[0])
    if variant == WILD and dtype.is_floating_point:
        assert all(not torch.equal(batch[row], values[0]) for row in range(count) if row != middle(count))


@given(st.integers(1, 20), st.booleans())
def test_bounded_mates_stay_in_the_range_of_the_sample(size: int, positive: bool) -> None:
    """A model that takes logarithms, or values from 0 to 1, takes them too; integers are those of the sample."""
    row = torch.rand(1, size) if positive else torch.randn(1, size)
    (batch,) = example(row).among(5, 1).args
    if size > 1:
        assert batch.min() >= row.min() - 1e-6
        assert batch.max() <= row.max() + 1e-6
    tokens = torch.randint(0, 100, (1, size))
    (batch,) = example(tokens).among(5, 1).args
    assert set(batch.flatten().tolist()) <= set(tokens.flatten().tolist()) | {int(t) - 1 for t in tokens.flatten()} | {
        1
    }


def test_wild_mates_keep_the_sign_of_a_positive_sample() -> None:
    """A spectrum has no negative values, however loud it is."""
    (batch,) = example(torch.rand(1, 50)).among(5, WILD).args
    assert batch.min() >= 0
    assert batch.max() > 2


def test_constants_get_mates_that_are_none() -> None:
    """An example of zeros is made of nothing that could be shuffled."""
    (batch,) = example(torch.zeros(1, 3, 4, 4)).among(5, 1).args
    assert batch.std(0).min() > 0
    (tokens,) = example(torch.zeros(1, 4, dtype=torch.int64)).among(5, 1).args
    assert set(tokens.flatten().tolist()) == {0, 1}


def test_real_rows_come_first() -> None:
    """Rows of the example are the mates as far as they go."""
    rows = torch.randn(3, 2)
    (batch,) = example(rows).among(5, 0).args
    assert torch.equal(batch[:2], rows[1:])
    assert torch.equal(batch[2], rows[0])


def test_what_has_no_batch_axis_is_handed_on() -> None:
    """A tensor of another length, a scalar, and what is no tensor at all."""
    edges = torch.zeros(2, 7)
    read = example((torch.randn(4, 3), edges, torch.ones(()), "mode", {"deep": [torch.randn(4, 1)]}))
    assert read.rows == 4
    taken = read.take([1, 2])
    assert taken.args[0].shape == (2, 3)
    assert taken.args[1] is edges or torch.equal(taken.args[1], edges)
    assert (taken.args[2].ndim, taken.args[3]) == (0, "mode")
    assert taken.args[4]["deep"][0].shape == (2, 1)


def test_a_list_is_read_like_a_tuple() -> None:
    """Positional inputs in order."""
    assert len(example([torch.ones(2, 1), torch.ones(2, 1)]).args) == 2


@pytest.mark.parametrize("value", [torch.ones(3, 1, requires_grad=True)])
def test_an_example_carries_no_gradient(value: torch.Tensor) -> None:
    """The probes build no graph on it."""
    assert not example(value).args[0].requires_grad
