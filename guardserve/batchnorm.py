"""What a BatchNorm layer is, and where its input can be observed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from typing_extensions import TypeIs

BatchNorm: TypeAlias = _BatchNorm

CHANNEL_AXIS = 1
"""BatchNorm of every rank normalises over all axes but this one."""


def is_batchnorm(module: nn.Module) -> TypeIs[BatchNorm]:
    """Tell whether a module is a BatchNorm layer.

    True for ``BatchNorm1d/2d/3d``, ``SyncBatchNorm``, the lazy variants and every subclass of them;
    False for ``InstanceNorm``, whose statistics belong to a sample, not to a batch.
    """
    return isinstance(module, _BatchNorm)


def batchnorm_layers(model: nn.Module) -> Iterator[tuple[str, BatchNorm]]:
    """Yield each BatchNorm layer of a model once, with its qualified name, in registration order."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            yield name, module


def has_running_stats(layer: BatchNorm) -> bool:
    """Tell whether a layer has running statistics to compare with (a lazy one has none before its first input)."""
    return (
        isinstance(layer.running_mean, torch.Tensor)
        and isinstance(layer.running_var, torch.Tensor)
        and not is_lazy(layer.running_mean)
    )


@dataclass(frozen=True)
class ObservationPoint:
    """A place in a model where the input of one BatchNorm normalisation can be read.

    A monitor knows only observation points. In an eager model there is one at each BatchNorm layer.

    Attributes:
        name: Qualified name of the layer in the model.
        layer: The layer, whose ``running_mean``, ``running_var`` (each of shape ``(C,)``) and ``eps``
            turn an input into ``z = (x - running_mean) / sqrt(running_var + eps)``.
    """

    name: str
    layer: BatchNorm

    def location_and_scale(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``(running_mean, sqrt(running_var + eps))``, each float64 of shape ``(C,)`` on the CPU."""
        layer = self.layer
        if layer.running_mean is None or layer.running_var is None:
            raise ValueError(f"{self.name} has no running statistics")
        mean = layer.running_mean.detach().to("cpu", torch.float64)
        variance = layer.running_var.detach().to("cpu", torch.float64)
        return mean, (variance + layer.eps).sqrt()
