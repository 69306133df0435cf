"""What a BatchNorm layer is, and where its input can be observed."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
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


def has_running_stats(layer: BatchNorm | GraphBatchNorm) -> bool:
    """Tell whether a layer has running statistics to compare with (a lazy one has none before its first input)."""
    return (
        isinstance(layer.running_mean, torch.Tensor)
        and isinstance(layer.running_var, torch.Tensor)
        and not is_lazy(layer.running_mean)
    )


class FusedBatchNorm(nn.Module):
    """What is left of a BatchNorm layer whose arithmetic has gone into the layer before it.

    It hands its input on unchanged, under the layer's own name, and keeps the layer's constants: its input is
    ``y = weight * z + bias``, from which a monitor still reads ``z``. Children that the layer had, such as an
    activation, go on from there, one after the other.

    Args:
        layer: The layer in eval mode, with running statistics.
        ndim: Number of dimensions of the input for which the fusion holds; None for any.
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, layer: BatchNorm, ndim: int | None = None) -> None:
        super().__init__()
        if layer.running_mean is None or layer.running_var is None:
            raise ValueError("a BatchNorm layer without running statistics cannot be fused")
        self.eps = layer.eps
        self.ndim = ndim
        mean, var = layer.running_mean, layer.running_var
        self.register_buffer("running_mean", mean.detach().clone())
        self.register_buffer("running_var", var.detach().clone())
        weight: torch.Tensor | None = layer.weight
        bias: torch.Tensor | None = layer.bias
        self.register_buffer("weight", torch.ones_like(mean) if weight is None else weight.detach().clone())
        self.register_buffer("bias", torch.zeros_like(mean) if bias is None else bias.detach().clone())
        for name, child in layer.named_children():
            self.add_module(name, child)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - BatchNorm's own name for it
        """Return the input, or what the layer's children make of it."""
        self._check_input_dim(input)
        if self.ndim is not None and input.ndim != self.ndim:
            raise ValueError(
                f"this BatchNorm layer was fused for inputs of {self.ndim} dimensions and got {tuple(input.shape)}: "
                "fuse the model with an example input, which shows what enters it"
            )
        for child in self._modules.values():
            input = child(input)  # type: ignore[misc]  # noqa: A001
        return input

    def _check_input_dim(self, input: torch.Tensor) -> None:  # noqa: A002 - the names that BatchNorm has
        """Take any: it is where to look at the input."""

    def extra_repr(self) -> str:
        """Say what it stands for."""
        return f"{len(self.running_mean)}, eps={self.eps}"


class GraphBatchNorm(nn.Module):
    """Marks a batch normalisation in a traced graph: the graph hands it the input, which it hands on unchanged.

    It has the layer's constants as the graph's module has them, but holds none itself.

    Args:
        owner: The graph's module.
        targets: Attributes of it that hold ``running_mean``, ``running_var``, ``weight`` and ``bias``; None where the
            layer has none.
        eps: The layer's epsilon.
    """

    def __init__(self, owner: nn.Module, targets: Mapping[str, str | None], eps: float) -> None:
        super().__init__()
        self.training = False
        self.eps = eps
        self._source = (owner, dict(targets))  # in a tuple, or the owner would be a child of its child

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - BatchNorm's own name for it
        """Return the input."""
        self._check_input_dim(input)
        return input

    def _check_input_dim(self, input: torch.Tensor) -> None:  # noqa: A002 - the names that BatchNorm has
        """Take any."""

    @property
    def running_mean(self) -> torch.Tensor | None:
        """The layer's, as for the next three."""
        return self._constant("running_mean")

    @property
    def running_var(self) -> torch.Tensor | None:
        """Its running variance."""
        return self._constant("running_var")

    @property
    def weight(self) -> torch.Tensor | None:
        """Its weight."""
        return self._constant("weight")

    @property
    def bias(self) -> torch.Tensor | None:
        """Its bias."""
        return self._constant("bias")

    def _constant(self, name: str) -> torch.Tensor | None:
        owner, targets = self._source
        target = targets[name]
        if target is None:
            return None
        value: object = functools.reduce(getattr, target.split("."), owner)
        return value if isinstance(value, torch.Tensor) else None


UNOBSERVABLE_WEIGHT = 1e-6
"""A fused channel whose ``|weight|`` is at most this carries no more information about ``z`` than rounding does."""


@dataclass(frozen=True)
class ObservationPoint:
    """A place in a model where what a BatchNorm normalisation sees can be read: the input of ``layer``.

    A monitor knows only observation points. In an eager model there is one at each BatchNorm layer; fusion
    leaves one behind; in a traced graph they are put where it normalises.

    Attributes:
        name: Qualified name of the layer in the model.
        layer: The layer, or what is left of it after fusion, or what marks it in a graph.
    """

    name: str
    layer: BatchNorm | FusedBatchNorm | GraphBatchNorm

    @property
    def affine(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``(a, b)`` with ``input = a * z + b`` and ``z = (x - running_mean) / sqrt(running_var + eps)``.

        Each is float64 of shape ``(C,)`` on the CPU. ``a`` is NaN in channels where ``z`` cannot be read.
        """
        layer = self.layer
        location = _float64(self.location)
        if isinstance(layer, FusedBatchNorm):
            scale = _float64(layer.weight)
            return scale.where(scale.abs() > UNOBSERVABLE_WEIGHT, torch.nan), location
        scale = (_float64(layer.running_var) + layer.eps).sqrt()
        return scale.where((scale > 0) & scale.isfinite() & location.isfinite(), torch.nan), location

    @property
    def constants(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What :attr:`affine` is made from, as the layer has it."""
        layer = self.layer
        if isinstance(layer, FusedBatchNorm):
            return layer.weight, layer.bias
        return layer.running_mean, layer.running_var

    @property
    def location(self) -> torch.Tensor:
        """Where the input is when ``z`` is 0, shape ``(C,)``, on the layer's device and in its type."""
        value = self.layer.bias if isinstance(self.layer, FusedBatchNorm) else self.layer.running_mean
        if value is None:
            raise ValueError("the BatchNorm layer has no running statistics")
        return value.detach()

    @cached_property
    def anchor(self) -> torch.Tensor:
        """A number of each channel to count its input from: finite, and where the location was when first asked for.

        Shape ``(C,)``, float64 if the layer is, else float32.
        """
        wide = self.location.to(torch.promote_types(self.location.dtype, torch.float32))
        return wide.where(wide.isfinite(), 0.0)

    @property
    def expected_variance(self) -> torch.Tensor:
        """Variance of ``z`` where activations fit the running statistics, float64 of shape ``(C,)``.

        It is below 1 because of ``eps``, and 0 for a channel that was constant in training.
        """
        variance = _float64(self.layer.running_var)
        return variance / (variance + self.layer.eps)

    @property
    def unobservable_channels(self) -> int:
        """Number of channels where ``z`` cannot be read: fusion scaled it away, or the statistics are not finite."""
        return int(self.affine[0].isnan().sum()) if self.readable else 0

    @property
    def readable(self) -> bool:
        """Whether the layer has running statistics now: a lazy one has none before its first input, or one on meta."""
        held = isinstance(self.layer, FusedBatchNorm) or has_running_stats(self.layer)
        return held and not any(value is not None and value.is_meta for value in self.constants)

    def takes(self, x: torch.Tensor) -> bool:
        """Tell whether a tensor has a channel axis with as many channels as the layer has statistics."""
        mean = self.layer.running_mean
        return self.readable and mean is not None and x.ndim > CHANNEL_AXIS and x.shape[CHANNEL_AXIS] == len(mean)


def observation_points(model: nn.Module) -> Iterator[ObservationPoint]:
    """Yield the observation points of a model, in registration order.

    Layers without running statistics have none: ``track_running_stats=False``.
    """
    for name, module in model.named_modules():
        if isinstance(module, (FusedBatchNorm, _BatchNorm)):
            mean, var = module.running_mean, module.running_var
            if mean is not None and var is not None:
                yield ObservationPoint(name, module)


def _float64(value: torch.Tensor | None) -> torch.Tensor:
    if value is None:
        raise ValueError("the BatchNorm layer has no running statistics")
    return value.detach().to("cpu", torch.float64)
