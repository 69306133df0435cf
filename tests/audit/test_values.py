"""Reading what models return."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from guardserve.audit.values import read_output
from guardserve.nonfinite import named_tensors


class Pair(NamedTuple):
    """A tuple with names."""

    logits: torch.Tensor
    label: Any


@dataclass
class Detection:
    """A typed output."""

    box: torch.Tensor
    score: float


@pytest.mark.parametrize(
    ("output", "shapes"),
    [
        (np.zeros((2, 3)), {"output": (2, 3)}),
        (np.zeros((2, 3)).astype(">f4"), {"output": (2, 3)}),
        (3.5, {"output": ()}),
        (np.float32(1), {"output": ()}),
        ([[1, 2], [3, 4], [5, 6]], {"output": (3, 2)}),
        ([0.5, True], {"output": (2,)}),
        ([[1, 2], [3]], {"output[0]": (2,), "output[1]": (1,)}),
        ([{"a": 1.0}, {"a": 2.0}], {"output[0]['a']": (), "output[1]['a']": ()}),
        (Pair(torch.ones(2), np.ones(3)), {"output[0]": (2,), "output[1]": (3,)}),
        (Detection(torch.ones(4), 0.5), {"output['box']": (4,), "output['score']": ()}),
        (SimpleNamespace(x=torch.ones(1)), {"output['x']": (1,)}),
        ((None, torch.ones(1)), {"output[1]": (1,)}),
    ],
    ids=str,
)
def test_numbers_in_any_form_become_tensors(output: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    """Arrays of any byte order, Python's and numpy's numbers, lists of lists, and what objects hold."""
    read, unread = read_output(output)
    assert {path: tuple(tensor.shape) for path, tensor in named_tensors(read)} == shapes
    assert not unread


def test_what_is_no_number_is_named() -> None:
    """Texts, arrays of objects, iterators and numbers that no tensor holds."""
    output = {"name": "cat", "raw": np.array([None]), "rows": iter(()), "huge": 10**40, "logits": torch.ones(1)}
    read, unread = read_output(output)
    assert set(unread) == {
        "output['name'] is a str",
        "output['raw'] is an array of object",
        "output['rows'] is a tuple_iterator",
        "output['huge'] is a int",
    }
    assert list(dict(named_tensors(read))) == ["output['logits']"]
