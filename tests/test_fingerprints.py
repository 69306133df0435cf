"""What tells one version of a model from another."""

from __future__ import annotations

import copy
import doctest
from collections.abc import Callable

import pytest
import torch
from torch import nn

from guardserve import fingerprints
from guardserve.fingerprints import fingerprint


def net(activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    """Return a small model, the same each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), activation()).eval()


def changed(change: Callable[[nn.Module], object]) -> nn.Module:
    """Return the model with something changed."""
    model = net()
    change(model)
    return model


def test_the_same_files_give_the_same_fingerprint() -> None:
    """In another process too: it is made of contents alone. Modes do not count."""
    assert fingerprint(net()) == fingerprint(net().train()) == fingerprint(copy.deepcopy(net()))
    assert len(fingerprint(net())) == 12
    assert doctest.testmod(fingerprints).failed == 0


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "other",
    [
        lambda: changed(lambda model: nn.init.constant_(model.get_parameter("0.weight")[0, 0], 9)),
        lambda: changed(lambda model: model.get_buffer("1.running_var").mul_(1.0001)),
        lambda: changed(lambda model: model.double()),
        lambda: net(nn.GELU),
        lambda: torch.jit.script(net()),
    ],
    ids=["a weight", "a statistic", "the type", "the structure", "a program"],
)
def test_whatever_changes_an_answer_changes_it(other: Callable[[], nn.Module]) -> None:
    """Weights, statistics, their type, and how modules are put together."""
    assert fingerprint(other()) != fingerprint(net())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half, torch.complex64, torch.bool])
def test_tensors_of_every_kind_count(dtype: torch.dtype) -> None:
    """Those that NumPy does not know, without an element or with one, and not in order in memory."""
    values = torch.ones(2, 3).to(dtype)
    found = []
    for tensor in (values, values.T, values[:0], values[0, 0], torch.zeros(2, 3).to(dtype), values.to_sparse()):
        model = nn.Module()
        model.register_buffer("values", tensor)
        found.append(fingerprint(model))
    assert len(set(found)) == len(found)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_programs_are_told_apart_by_their_code() -> None:
    """Of the same weights, one adds and the other takes away."""

    class Adding(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    class Taking(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - 1

    exported = [torch.export.export(kind().eval(), (torch.ones(2),)).module() for kind in (Adding, Taking)]
    scripted = [torch.jit.script(kind()) for kind in (Adding, Taking)]
    for one, other in (exported, scripted):
        assert fingerprint(one) != fingerprint(other)


def test_where_in_memory_a_function_is_makes_no_difference() -> None:
    """Some modules show theirs: two processes that load the same files have it at different places."""

    class Shown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.activation = lambda x: x

        def extra_repr(self) -> str:
            return f"activation={self.activation}"

    one, other = Shown(), Shown()
    assert repr(one) != repr(other)
    assert fingerprint(one) == fingerprint(other)
