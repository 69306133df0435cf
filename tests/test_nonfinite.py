"""Finding NaN and infinity in nested outputs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from guardserve import EvalGuard, NonFiniteOutputError, native
from guardserve.nonfinite import find_nonfinite, is_finite, named_tensors


class Pair(NamedTuple):
    """An output as a named tuple."""

    logits: torch.Tensor
    mask: torch.Tensor


@dataclass
class Wrapped:
    """An output as a dataclass."""

    boxes: list[torch.Tensor]


def test_every_tensor_in_a_nested_output_has_a_path() -> None:
    """Mappings, sequences, named tuples and dataclasses are walked; anything else holds no tensors."""
    x = torch.zeros(1)
    output = {"a": [x, (x,)], "b": Pair(x, x), "c": Wrapped([x]), "d": "text", "e": None}
    assert [path for path, _ in named_tensors(output)] == [
        "output['a'][0]",
        "output['a'][1][0]",
        "output['b'][0]",
        "output['b'][1]",
        "output['c'].boxes[0]",
    ]


def test_tensors_in_plain_objects_sets_and_deques_are_found() -> None:
    """Whatever class holds them, also one that refers to itself; modules and functions hold no outputs."""
    x = torch.zeros(1)
    output = SimpleNamespace(scores=x, parts=deque([{x}]), layer=nn.BatchNorm1d(3), function=is_finite)
    output.itself = output
    assert [path for path, _ in named_tensors(output)] == ["output.scores", "output.parts[0][0]"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_each_non_finite_value_is_found_in_each_float_type(bad: float, dtype: torch.dtype) -> None:
    """Count, rows and first index are those of the bad values."""
    x = torch.zeros(3, 4, dtype=dtype)
    x[1, 2] = bad
    x[2, 0] = bad
    (found,) = find_nonfinite(x)
    assert (found.count, found.total, found.rows, found.first) == (2, 12, (1, 2), (1, 2))
    assert str(found) == "output holds 2 non-finite values of 12, the first at index (1, 2)"


def test_finite_values_whose_sum_overflows_are_finite() -> None:
    """The quick test by the sum must not take an overflow for a fault."""
    assert is_finite(torch.full((4,), torch.finfo(torch.float32).max))
    assert is_finite(torch.full((4,), 60000.0, dtype=torch.float16))


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.to_sparse(),
        lambda x: x.to_sparse_csr(),
        lambda x: x.to(torch.float8_e4m3fn),
        lambda x: x.to(torch.complex64),
        lambda x: torch.nested.nested_tensor([x, x[:1]], layout=torch.jagged),
    ],
    ids=["sparse", "csr", "float8", "complex", "nested"],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_unusual_tensors_are_looked_into(make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Layouts and types that torch cannot sum or test directly are no blind spot."""
    x = torch.ones(2, 3)
    assert is_finite(make(x))
    x[1, 2] = float("nan")
    bad = make(x)
    assert not is_finite(bad)
    (found,) = find_nonfinite(bad)
    assert found.count == 1


def test_opposite_infinities_are_not_hidden_by_their_sum() -> None:
    """Infinity minus infinity is NaN, so the sum still shows them."""
    assert not is_finite(torch.tensor([float("inf"), -float("inf")]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("size", [1, 7, 4096, 4097, 70_001])
def test_one_value_in_many_is_found_wherever_it_is(dtype: torch.dtype, bad: float, size: int) -> None:
    """The first, the last, one in the middle; the values beside a view's own do not count."""
    x = torch.full((size + 2,), torch.finfo(dtype).max, dtype=dtype)
    x[1::2] = torch.finfo(dtype).tiny
    x[0] = x[-1] = bad
    assert native.is_finite(x[1:-1]) is is_finite(x[1:-1]) is True
    for place in {0, size // 2, size - 1}:
        y = x[1:-1].clone()
        y[place] = bad
        assert native.is_finite(y) is is_finite(y) is False


def test_what_is_compiled_leaves_the_rest_to_torch() -> None:
    """Whatever does not lie side by side in memory, or is no plain tensor of floats."""
    x = torch.randn(4, 6)
    others: list[object] = [
        *(x.t(), x[:, ::2], x.to("meta"), x.to_sparse(), x.to_mkldnn()),
        *(nn.Parameter(x), x.to(torch.complex64), x.long(), torch.empty(0), x.numpy(), None),
    ]
    assert [native.is_finite(value) for value in others] == [None] * len(others)
    assert torch.vmap(lambda row: row * float(native.is_finite(row) is None))(x).equal(x)


def test_integers_scalars_and_empty_tensors_are_handled() -> None:
    """Integers are always finite, a scalar has row 0, an empty tensor has nothing bad."""
    assert is_finite(torch.arange(3))
    assert is_finite(torch.empty(0, 5))
    (found,) = find_nonfinite(torch.tensor(float("nan")))
    assert (found.rows, found.first) == ((0,), ())


@pytest.mark.parametrize(
    "bad",
    [
        float("nan"),
        complex(0, float("inf")),
        np.float32("nan"),
        np.array([[1.0, 2.0], [3.0, np.inf]], np.float16),
        np.array([1.0, np.nan], np.longdouble),
        np.array([0.0, np.nan], ">f8")[::-1],
        np.array([complex(np.nan, 0)]),
    ],
    ids=lambda bad: f"{type(bad).__name__} {getattr(bad, 'dtype', '')}",
)
def test_numbers_and_arrays_count_as_well(bad: object) -> None:
    """A model that returns NumPy arrays or plain numbers is checked like any other."""
    (found,) = find_nonfinite({"ok": [1, "text", None, np.arange(3), 2.0, 1e300], "bad": (bad,)})
    assert found.path == "output['bad'][0]"
    assert found.count == 1


def test_a_guarded_model_that_returns_arrays_is_checked() -> None:
    """The guard's policy holds for them."""

    class Arrays(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return x.log().numpy()

    with pytest.raises(NonFiniteOutputError, match=r"index \(1,\)"):
        EvalGuard(Arrays())(torch.tensor([1.0, -1.0]))
