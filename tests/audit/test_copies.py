"""Copies of models share nothing with them that a forward could alter."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from audit.models import convolutional, noise
from audit.programs import every_kind, exported, frozen, scripted, silence
from torch import nn

from guardserve.audit.copies import NotCopyableError, check_independence, copied

ROWS = noise(4, 3)


class Odd(nn.Module):
    """Has whatever attributes it is given."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform."""
        y: torch.Tensor = self.linear(x)
        return y


def test_nested_state_and_tensors_of_autograd_are_copied() -> None:
    """What deepcopy refuses, or would share, is another object with the same values."""
    weight = torch.ones(3, requires_grad=True)
    model = Odd(made=weight * 2, nested={"a": [torch.zeros(2), {"n": 1}]}, lock=threading.Lock(), library=torch)
    copy: Any = copied(model)
    check_independence(model, copy)
    copy.nested["a"][0].add_(1)
    copy.nested["a"][1]["n"] = 2
    copy.made.zero_()
    nested: Any = model.nested
    assert (nested["a"][0].tolist(), nested["a"][1]) == ([0, 0], {"n": 1})
    assert isinstance(model.made, torch.Tensor)
    assert model.made.tolist() == [2, 2, 2]
    assert (copy.library, copy.lock is model.lock) == (torch, True)


def test_closures_are_copied_with_the_model_in_them() -> None:
    """A forward that was put on a model calls the copy's layers, and fills the copy's list."""
    model, seen = Odd(), []

    def forward(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        y: torch.Tensor = model.linear(x) + 1
        return y

    model.forward = forward  # type: ignore[method-assign]
    copy = copied(model)
    check_independence(model, copy)
    before = model(ROWS)
    nn.init.zeros_(copy.get_submodule("linear").get_parameter("weight"))
    nn.init.zeros_(copy.get_submodule("linear").get_parameter("bias"))
    assert bool((copy(ROWS) == 1).all())
    assert torch.equal(model(ROWS), before)
    assert len(seen) == 2


def test_hooks_are_copied_with_what_they_collect() -> None:
    """Features that a user collects are not joined by those of the probes."""
    features: list[torch.Tensor] = []
    model = Odd()
    model.linear.register_forward_hook(lambda module, args, output: features.append(output))  # noqa: ARG005
    copied(model)(ROWS)
    assert not features
    model(ROWS)
    assert len(features) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda model, example: exported(model, example).module(),
        lambda model, example: every_kind(model, example)["unflattened"],
        lambda model, _: scripted(model),
        lambda model, _: frozen(model),
        lambda model, _: torch.fx.symbolic_trace(model),
        lambda model, _: model,
    ],
    ids=["exported", "unflattened", "scripted", "frozen", "symbolic", "eager"],
)
def test_programs_are_copied(make: Callable[[nn.Module, Any], nn.Module]) -> None:
    """The copy gives the same, and has parameters and buffers of its own."""
    model, example = convolutional()
    with silence():
        program = make(model, example)
        copy = copied(program)
        check_independence(program, copy)
        assert torch.equal(copy(example), program(example))


def test_lazy_layers_are_copied_lazy() -> None:
    """Their buffers too, which deepcopy refuses; each takes its own first input."""
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d()).eval()
    copy = copied(model)
    copy(ROWS)
    assert isinstance(copy[1], nn.BatchNorm1d)  # type: ignore[index]
    assert isinstance(model[1], nn.LazyBatchNorm1d)


class Refusing(nn.Module):
    """Cannot be copied."""

    def __deepcopy__(self, memo: object) -> Refusing:
        raise TypeError("one is enough")


class Selfish(Odd):
    """Gives itself for a copy."""

    def __deepcopy__(self, memo: object) -> Selfish:
        return self


class Shallow(Odd):
    """Shares its parameters with its copy."""

    def __deepcopy__(self, memo: object) -> Shallow:
        copy = Shallow()
        copy.linear.weight = nn.Parameter(self.linear.weight.data)
        return copy


def test_what_cannot_be_copied_says_why() -> None:
    """By its own word, or because the copy is none."""
    with pytest.raises(NotCopyableError, match=r"cannot be copied \(TypeError: one is enough\)"):
        copied(nn.Sequential(Refusing()))
    for model in (Selfish(), nn.Sequential(Shallow())):
        with pytest.raises(NotCopyableError, match="shares modules or tensors"):
            check_independence(model, copied(model))
