"""What a forward has changed in a model."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from audit.models import convolutional, residual
from audit.programs import scripted
from torch import nn

from guardserve.audit.state import StateChange


class Holder(nn.Module):
    """Holds anything."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.hidden: Any = None
        self.parts: Any = [torch.zeros(2), {"deep": [1.0, float("nan")]}]
        self.array = np.zeros(2)
        self.thing = SimpleNamespace(count=0)
        self.extra: Any = None


def with_tensor(model: Any) -> None:
    """Leave a hidden state behind."""
    model.hidden = torch.ones(2)


def with_part(model: Any) -> None:
    """Change a number deep inside."""
    model.parts[1]["deep"][0] = 2.0


def with_array(model: Any) -> None:
    """Change an array in place."""
    model.array += 1


def with_object(model: Any) -> None:
    """Change an attribute of another object."""
    model.thing.count += 1


def with_statistics(model: Any) -> None:
    """Move running statistics."""
    model.norm.running_mean += 1


def with_new(model: Any) -> None:
    """Add an attribute, and a module."""
    model.new = 1


def with_module(model: Any) -> None:
    """Add a module."""
    model.extra = nn.Linear(2, 2)


CHANGES = {
    with_tensor: "hidden",
    with_part: "parts",
    with_array: "array",
    with_object: "thing",
    with_statistics: "norm.running_mean",
    with_new: "new",
    with_module: "extra",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_whatever_changes_is_named(change: Any) -> None:
    """Tensors, numbers, arrays and objects, nested in any way."""
    model = Holder()
    after = copy.deepcopy(model)
    assert not StateChange(model, after).names
    change(after)
    assert CHANGES[change] in StateChange(model, after).names


def test_only_what_can_be_seen_through_is_certain() -> None:
    """Ordinary layers are; objects of unknown classes, hooks and TorchScript are not, nor is a flag that moved."""
    for build in (convolutional, residual):
        model = build()[0]
        after = copy.deepcopy(model)
        assert StateChange(model, after).certain
        after.get_submodule("stem" if build is residual else "0").train()
        assert not StateChange(model, after).certain
    script = scripted(convolutional()[0])
    hooked = nn.Sequential(nn.Linear(2, 2))
    hooked.register_forward_hook(lambda *_: None)
    for model in (Holder(), script, hooked):
        assert not StateChange(model, copy.deepcopy(model)).certain
