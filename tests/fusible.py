"""What the tests of fusion share."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import nn

from guardserve.batchnorm import batchnorm_layers

M = TypeVar("M", bound=nn.Module)


def trained(model: M, seed: int = 0) -> M:
    """Give every BatchNorm layer statistics and parameters that are far from the trivial ones."""
    generator = torch.Generator().manual_seed(seed)
    for _, norm in batchnorm_layers(model):
        if norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.copy_(torch.randn(norm.num_features, generator=generator))
            norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) + 0.25)
        if norm.affine:
            signs = torch.rand(norm.num_features, generator=generator).sub(0.3).sign()
            norm.weight.data.copy_((torch.rand(norm.num_features, generator=generator) + 0.5) * signs)
            norm.bias.data.copy_(torch.randn(norm.num_features, generator=generator))
    return model


def answer(model: nn.Module, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
    """Return what a copy of the model gives in eval mode."""
    with torch.no_grad():
        return copy.deepcopy(model).eval()(*args, **kwargs)


def error(model: nn.Module, fused: nn.Module, *args: torch.Tensor) -> float:
    """Return the largest difference between the models' outputs, relative to the largest output."""
    expected, actual = answer(model, *args), answer(fused, *args)
    return float((expected - actual).abs().max() / expected.abs().max())
