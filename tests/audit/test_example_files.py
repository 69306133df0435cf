"""Example inputs in files: what they may hold, and what a model makes of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from audit.models import Tabular, convolutional, noise, settled
from audit.programs import frozen
from torch import nn

from guardserve.audit import audit
from guardserve.audit.example_files import fitted, load_example
from guardserve.exceptions import InputError


@pytest.mark.parametrize("dtype", [">f4", ">f8", "<f4", ">i8", "u1", "?", "c8"])
def test_numbers_of_any_byte_order_are_read(dtype: str, tmp_path: Path) -> None:
    """A file from another machine holds the same numbers."""
    array = np.arange(6).reshape(2, 3).astype(dtype)
    np.save(tmp_path / "rows.npy", array)
    assert torch.equal(
        load_example(tmp_path / "rows.npy"), torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    )


def test_what_is_no_number_is_named(tmp_path: Path) -> None:
    """Texts and dates, by file, name and type."""
    np.save(tmp_path / "text.npy", np.array(["a", "b"]))
    np.savez(tmp_path / "when.npz", x=np.ones(2), day=np.array(["2026-11-22"], "datetime64[D]"))
    with pytest.raises(InputError, match=r"text\.npy holds an array of <U1: example inputs are arrays of numbers"):
        load_example(tmp_path / "text.npy")
    with pytest.raises(InputError, match=r"when\.npz holds 'day', an array of datetime64"):
        load_example(tmp_path / "when.npz")
    np.savez(tmp_path / "none.npz")
    with pytest.raises(InputError, match="holds no arrays"):
        load_example(tmp_path / "none.npz")


def test_floating_point_inputs_take_the_type_of_the_parameters() -> None:
    """And that is told; integers, and what fits already, stay as they are."""
    model, _ = convolutional()
    rows, note = fitted(torch.ones(2, 3, 12, 12, dtype=torch.float64), model)
    assert (rows.dtype, note) == (torch.float32, "converted from float64 to float32")
    assert fitted(rows.double(), frozen(model))[0].dtype == torch.float32
    named = {"x": torch.ones(2, 5), "category": torch.arange(2)}
    assert fitted(named, Tabular()) == (named, "")
    converted, note = fitted({"x": torch.ones(2, 5).double(), "category": torch.arange(2)}, Tabular().half())
    assert (converted["x"].dtype, converted["category"].dtype) == (torch.float16, torch.int64)
    assert note == "converted from float64 to float16"
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    assert fitted(torch.ones(2, 2).double(), mixed)[1] == ""


def test_names_that_the_forward_does_not_take_are_told() -> None:
    """With those that it takes; a forward of one argument may take a dict."""
    model, (x, category) = settled(Tabular(), (noise(8, 5), torch.arange(8)))
    with pytest.raises(InputError, match=r"the example has 'mask', which the forward does not take: it takes 'x' and"):
        audit(model, {"x": x, "category": category, "mask": x})
    with pytest.raises(InputError, match="'a' and 'b', which the forward does not take"):
        audit(model, {"a": x, "b": category})

    class Taking(nn.Module):
        def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            return inputs["a"] + inputs["b"]

    assert "BN102" in audit(Taking(), {"a": x, "b": x}).ran
