"""Finding the module in which a non-finite value arises."""

from __future__ import annotations

import re
import subprocess
import sys

import torch
from torch import nn

from guardserve import trace_nonfinite


class LogNet(nn.Module):
    """Takes a logarithm in its own forward, outside any child."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
        self.last = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits, NaN for negative sums."""
        y: torch.Tensor = self.last(self.first(x))
        return y + x.sum(1, keepdim=True).log()


def test_a_child_with_bad_parameters_is_named() -> None:
    """The innermost module that made NaN of finite inputs is the origin, though all later ones give NaN too."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()), nn.Linear(3, 2))
    model.get_buffer("1.0.running_var").fill_(-1.0)
    origin = trace_nonfinite(model, torch.ones(2, 3))
    assert origin is not None
    assert (origin.module, origin.kind, origin.output.count) == ("1.0", "BatchNorm1d", 6)
    assert (origin.channel, origin.running_var) == (0, -1.0)
    assert origin.operator is not None
    assert "batch_norm" in origin.operator
    assert str(origin) == (
        f"1.0 (BatchNorm1d) by {origin.operator}, first in channel 0, where running_mean is 0 and running_var -1"
    )
    assert all(module.training for module in model.modules()), "the flags came back"
    assert not any(module._forward_hooks for module in model.modules())


def test_an_operation_outside_any_child_names_the_model_itself() -> None:
    """When no child is to blame, the module whose own forward made the value is."""
    origin = trace_nonfinite(LogNet(), -torch.ones(1, 3))
    assert origin is not None
    assert (origin.module, str(origin)) == ("", "the model itself (LogNet) by aten.log, first in channel 0")


class Attention(nn.Module):
    """Masks with minus infinity, as attention does, and takes a logarithm of what its norm gives."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return NaN for inputs below zero."""
        weights = torch.zeros_like(x).masked_fill(torch.arange(3) > 1, float("-inf")).softmax(-1)
        y: torch.Tensor = self.norm(x * weights)
        return y.log()


def test_an_infinity_that_is_used_up_rightly_is_not_blamed() -> None:
    """A mask of minus infinity ends in a softmax; the NaN comes from the logarithm after it."""
    origin = trace_nonfinite(Attention(), -torch.ones(2, 3))
    assert origin is not None
    assert (origin.module, origin.operator) == ("", "aten.log")
    model = Attention()
    model.get_buffer("norm.running_var").fill_(-1.0)
    origin = trace_nonfinite(model, torch.ones(2, 3))
    assert origin is not None
    assert (origin.module, origin.running_var) == ("norm", -1.0)


def test_finite_outputs_and_bad_inputs_have_no_origin() -> None:
    """Nothing arose in the model when all is finite, or when the input already was not."""
    model = LogNet()
    assert trace_nonfinite(model, torch.ones(1, 3)) is None
    assert trace_nonfinite(model, torch.full((1, 3), float("nan"))) is None


def test_an_origin_seen_before_the_forward_raised_is_kept() -> None:
    """A later operation that refuses NaN does not hide where it came from."""

    class Strict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bad = nn.Linear(2, 2)
            torch.nn.init.constant_(self.bad.weight, float("nan"))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.bad(x)
            if y.isnan().any():
                raise ValueError("NaN")
            return y

    origin = trace_nonfinite(Strict(), torch.ones(1, 2))
    assert origin is not None
    assert (origin.module, origin.operator) == ("bad", "aten.addmm")
    assert trace_nonfinite(Strict(), torch.ones(1, 5)) is None, "it raised before anything became non-finite"


def test_the_search_does_not_import_the_compiler() -> None:
    """That would take seconds, in which a server answers nobody."""
    code = (
        "import sys, torch, guardserve\n"
        "model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))\n"
        "model[1].weight.data.fill_(float('inf'))\n"
        "print(guardserve.trace_nonfinite(model, torch.ones(1, 2)), 'torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.search(r"\b1 \(Linear\).* False$", done.stdout), done.stdout
