"""Pairs of a layer and the BatchNorm layer that follows it, and the one layer that does the arithmetic of both."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from guardserve.batchnorm import BatchNorm, FusedBatchNorm, batchnorm_layers, has_running_stats, is_batchnorm
from guardserve.fusion.dataflow import Dataflow, DataflowError, has_hooks
from guardserve.fusion.norm_act import calls_children_after
from guardserve.inlets import Inlet
from guardserve.nonfinite import is_finite

# how many dimensions the output has where its channels are on BatchNorm's axis, the batch included
_LAYERS: dict[type[nn.Module], int] = {
    nn.Linear: 2,
    nn.Conv1d: 3,
    nn.Conv2d: 4,
    nn.Conv3d: 5,
    nn.ConvTranspose1d: 3,
    nn.ConvTranspose2d: 4,
    nn.ConvTranspose3d: 5,
}
# how many dimensions of input they take
_NORMS: dict[type[nn.Module], tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3),
    nn.BatchNorm2d: (4,),
    nn.BatchNorm3d: (5,),
    nn.SyncBatchNorm: (2, 3, 4, 5),
}
# what a subclass must leave alone to compute what its base does
_COMPUTING = (
    "__call__",
    "_call_impl",
    "__getattr__",
    "forward",
    "_conv_forward",
    "_output_padding",
    "_check_input_dim",
)


class _NotFusedError(Exception):
    """A BatchNorm layer cannot be fused; the message is the reason."""


@dataclass(frozen=True)
class Pair:
    """A BatchNorm layer with the one that it follows, called ``source``, and the parameters of the two in one."""

    norm: BatchNorm
    source: str
    layer: Any
    ndim: int
    weight: torch.Tensor
    bias: torch.Tensor

    def merge(self) -> None:
        """Give the layer the parameters of both, and turn the BatchNorm layer into what is left of it.

        It stays the same object, so that whoever calls it by another name or from a list calls what is left.
        """
        grad = self.layer.weight.requires_grad
        self.layer.weight = nn.Parameter(self.weight, requires_grad=grad)
        self.layer.bias = nn.Parameter(self.bias, requires_grad=grad)
        left = FusedBatchNorm(self.norm, self.ndim).eval()
        others = {name: value for name, value in vars(self.norm).items() if not name.startswith("_")}
        self.norm.__class__ = FusedBatchNorm  # type: ignore[assignment]
        self.norm.__dict__ = others | vars(left)


def find_pairs(model: nn.Module, flow: Dataflow | DataflowError) -> tuple[dict[str, Pair], dict[str, str]]:
    """Return what can be fused, and the reasons for the rest, each by the name of the BatchNorm layer."""
    pairs: dict[str, Pair] = {}
    skipped: dict[str, str] = {}
    for name, norm in batchnorm_layers(model):
        try:
            pairs[name] = _find_pair(model, flow, name, norm)
        except (_NotFusedError, DataflowError) as reason:  # noqa: PERF203 - each layer has its own
            skipped[name] = str(reason)
    return pairs, skipped


def _find_pair(model: nn.Module, flow: Dataflow | DataflowError, name: str, norm: BatchNorm) -> Pair:
    if "_orig_mod" in name.split("."):
        raise _NotFusedError("it is in a compiled module: fuse the model, and compile the fused copy")
    if not has_running_stats(norm):
        raise _NotFusedError("it has no running statistics, and uses those of each batch")
    kind = _kind(norm, _NORMS, "it")
    if isinstance(flow, DataflowError):
        raise flow
    source = flow.feeder(name)
    what = f"{source}, which it follows,"
    layer: Any = model.get_submodule(source)
    ndim = _LAYERS[_kind(layer, _LAYERS, what)]
    parameters = {"weight": None, "bias": None} | dict(layer.named_parameters(recurse=False))
    if any(getattr(layer, key) is not parameter for key, parameter in parameters.items()):
        raise _NotFusedError(f"{what} keeps its weight or bias elsewhere than in its parameters")
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    left = FusedBatchNorm(norm, ndim)
    if ndim not in _NORMS[kind] or channels != len(left.running_mean):
        raise _NotFusedError(f"{what} has its channels on another axis")
    _check_numbers(layer, left)
    weight, bias = _fold(layer, left)
    if not (is_finite(weight) and is_finite(bias)):
        raise _NotFusedError(f"{what} would have non-finite parameters")
    return Pair(norm, source, layer, ndim, weight, bias)


def _check_numbers(layer: nn.Module, norm: FusedBatchNorm) -> None:
    tensors = [*layer.parameters(), norm.running_mean, norm.running_var, norm.weight, norm.bias]
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
    if len(dtypes) > 1 or not tensors[0].is_floating_point():
        raise _NotFusedError(f"it and the layer that it follows are of {' and '.join(dtypes)}")
    for name, tensor in norm.named_buffers(recurse=False):
        if not is_finite(tensor):
            raise _NotFusedError(f"its {name} is not finite")
    if (norm.running_var < 0).any():
        raise _NotFusedError("its running_var is negative")


def _kind(module: nn.Module, kinds: Iterable[type[nn.Module]], what: str) -> type[nn.Module]:
    """Return the class of which a module does just the arithmetic, with tensors of its own.

    Raises:
        _NotFusedError: If it does more, or otherwise.
    """
    if is_parametrized(module):
        raise _NotFusedError(f"{what} is parametrized: remove the parametrizations first")
    kind = next((kind for kind in kinds if isinstance(module, kind)), None)
    own = {"forward"} if kind is None else {name for name in _COMPUTING if _overrides(module, kind, name)}
    if kind is None or (own and not (own == {"forward"} and is_batchnorm(module) and calls_children_after(module))):
        raise _NotFusedError(f"{what} is a {type(module).__name__}, whose forward is not known to be the usual one")
    if has_hooks(module):
        raise _NotFusedError(f"{what} has hooks: fuse the model before it gets hooks or monitors")
    for name, tensor in chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
        if type(tensor) not in (nn.Parameter, torch.Tensor) or tensor.is_meta:
            raise _NotFusedError(f"{what} holds a {type(tensor).__name__} on {tensor.device} as {name}")
    return kind


def _overrides(module: nn.Module, kind: type[nn.Module], method: str) -> bool:
    own = vars(module).get(method)
    replaced = own is not None and not isinstance(own, Inlet)  # a guard leaves inlets in copies
    return replaced or getattr(type(module), method, None) is not getattr(kind, method, None)


def _fold(layer: Any, norm: FusedBatchNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the weight and bias of one layer that does the arithmetic of both.

    With ``s = weight / sqrt(running_var + eps)`` of the norm: ``W' = s * W`` for each output channel, and
    ``b' = s * (b - running_mean) + bias``. Computed in float64, returned in the layer's own type and memory format.
    """
    mean, var, gamma, beta = (
        tensor.to("cpu", torch.float64) for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    scale = gamma / (var + norm.eps).sqrt()
    weight = layer.weight.to("cpu", torch.float64)
    ones = [1] * (weight.ndim - 2)
    if getattr(layer, "transposed", False):  # (inputs, outputs / groups, ...): a block of inputs has its own outputs
        blocks = weight.unflatten(0, (layer.groups, -1))
        weight = (blocks * scale.view(layer.groups, 1, -1, *ones)).flatten(0, 1)
    else:
        weight = weight * scale.view(-1, 1, *ones)
    bias = (0 if layer.bias is None else layer.bias.to("cpu", torch.float64)) - mean
    bias = bias * scale + beta
    return torch.empty_like(layer.weight).copy_(weight), torch.empty_like(norm.bias).copy_(bias)
