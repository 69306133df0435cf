"""Normalisation layers, wherever their statistics are: in modules, in graphs, or in a state dict alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from guardserve.audit.flow import script_graph, script_owner, script_path

# names under which layers keep their running statistics, and their scale and shift
_STATISTICS = (("running_mean", "running_var"), ("moving_mean", "moving_var"), ("moving_mean", "moving_variance"))
_WEIGHT, _BIAS, _BATCHES = ("weight", "gamma"), ("bias", "beta"), ("num_batches_tracked",)

_SCRIPT_MIXING = tuple(
    f"aten::{name}" for name in ("_convolution", "conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear", "addmm")
)
_SCRIPT_NORMS = ("aten::batch_norm", "aten::native_batch_norm")


@dataclass(frozen=True, eq=False)
class NormLayer:
    """A normalisation layer, or its state.

    Attributes:
        name: Qualified name.
        kind: Its class, as far as it is known.
        running_mean: Running mean, shape ``(C,)``, or None.
        running_var: Running variance, shape ``(C,)``, or None.
        weight: Scale, shape ``(C,)``, or None.
        bias: Shift, shape ``(C,)``, or None.
        batches: Number of batches that it was updated with, when it counts them.
        eps: Added to the variance; None when it is not known.
        module: The layer itself, when there is code.
    """

    name: str
    kind: str
    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    batches: torch.Tensor | None = None
    eps: float | None = None
    module: nn.Module | None = None

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Its statistics and parameters by name, without those that it does not have."""
        named = {
            "running_mean": self.running_mean,
            "running_var": self.running_var,
            "weight": self.weight,
            "bias": self.bias,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def is_batchnorm(self) -> bool:
        """Whether it normalises by batches as far as can be told, unlike an instance normalisation."""
        return "InstanceNorm" not in self.kind

    @property
    def unreadable(self) -> str | None:
        """Why its values cannot be read, or None when they can."""
        if any(is_lazy(tensor) for tensor in self.tensors.values()):
            return "it is lazy, and has no values before its first forward"
        if any(tensor.is_meta for tensor in self.tensors.values()):
            return "it is on the meta device, without values"
        return None


def module_layers(model: nn.Module) -> Iterator[NormLayer]:
    """Yield the normalisation layers of a model, and whatever else of it keeps running statistics."""
    epsilons = dict(_epsilons(model))
    for prefix, program in _script_programs(model):
        yield from _frozen_layers(program, prefix)
    for name, module in model.named_modules():
        statistics = _statistics(module)
        if statistics is None and not isinstance(module, _NormBase):
            continue
        mean, var = statistics or (None, None)
        eps = getattr(module, "eps", epsilons.get(name))
        yield NormLayer(
            name,
            _class_name(module),
            mean,
            var,
            _first_tensor(module, _WEIGHT),
            _first_tensor(module, _BIAS),
            _first_tensor(module, _BATCHES),
            float(eps) if isinstance(eps, (int, float)) else None,
            module,
        )


def module_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters of a model, and the weights that torch.jit.freeze has made constants of a graph."""
    yield from model.named_parameters()
    for prefix, program in _script_programs(model):
        graph = script_graph(program)
        for operator in _SCRIPT_MIXING:
            for node in graph.findAllNodes(operator, recurse=True):
                for value, role in zip(list(node.inputs())[1:3], ("weight", "bias"), strict=False):
                    tensor = value.toIValue()
                    if isinstance(tensor, torch.Tensor):
                        path = script_path(value) or [operator.rpartition("::")[2], role]
                        yield ".".join(filter(None, (prefix, *path))), tensor


def state_weights(state: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what a state dict names as weights and biases."""
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and name.rpartition(".")[2] in {*_WEIGHT, *_BIAS}:
            yield name, value


def state_layers(state: Mapping[str, Any]) -> Iterator[NormLayer]:
    """Yield the layers whose running statistics a state dict holds."""
    owned: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in state.items():
        owner, _, attribute = key.rpartition(".")
        if isinstance(value, torch.Tensor):
            owned.setdefault(owner, {})[attribute] = value
    for owner, tensors in owned.items():
        for mean, var in _STATISTICS:
            if mean in tensors and var in tensors:
                weight, bias, batches = (
                    next((tensors[name] for name in names if name in tensors), None)
                    for names in (_WEIGHT, _BIAS, _BATCHES)
                )
                yield NormLayer(owner, "normalisation", tensors[mean], tensors[var], weight, bias, batches)


def _statistics(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor] | None:
    for names in _STATISTICS:
        mean, var = (getattr(module, name, None) for name in names)
        if isinstance(mean, torch.Tensor) and isinstance(var, torch.Tensor):
            return _local(mean), _local(var)
    return None


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that this process has, of one that is shared out over several."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def _first_tensor(module: nn.Module, names: Sequence[str]) -> torch.Tensor | None:
    found = (getattr(module, name, None) for name in names)
    return next((_local(tensor) for tensor in found if isinstance(tensor, torch.Tensor)), None)


def _class_name(module: nn.Module) -> str:
    """Return the class that a module is, or was before TorchScript; what an export leaves of one has none."""
    name = str(getattr(module, "original_name", type(module).__name__))
    return "normalisation" if name in {"Module", "InterpreterModule"} else name


def _epsilons(model: nn.Module) -> Iterator[tuple[str, float]]:
    """Yield the eps of each normalisation in a graph by the layer's name: what a trace leaves of a layer has none."""
    for prefix, module in model.named_modules():
        found: Iterator[tuple[str, float]] = iter(())
        if isinstance(module, fx.GraphModule):
            found = _fx_epsilons(module.graph)
        elif isinstance(module, torch.jit.ScriptModule):
            found = ((script_owner(values[3]), values[7].toIValue()) for values in _script_norms(module))
        for name, eps in found:
            yield f"{prefix}.{name}" if prefix else name, eps


def _fx_epsilons(graph: fx.Graph) -> Iterator[tuple[str, float]]:
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and "batch_norm" in str(node.target):  # noqa: SLF001
            names = [argument.name for argument in node.target._schema.arguments]  # noqa: SLF001
            given = dict(zip(names, node.args, strict=False)) | node.kwargs
            mean, eps = given.get("running_mean"), given.get("eps")
            if isinstance(mean, fx.Node) and isinstance(eps, float):
                yield str(mean.target).rpartition(".")[0], eps


def _script_norms(module: torch.jit.ScriptModule) -> Iterator[list[Any]]:
    """Yield the arguments of each batch normalisation in a TorchScript graph."""
    graph = script_graph(module)
    for operator in _SCRIPT_NORMS:
        for node in graph.findAllNodes(operator, recurse=True):
            yield list(node.inputs())


def _script_programs(model: nn.Module) -> Iterator[tuple[str, torch.jit.ScriptModule]]:
    """Yield the outermost TorchScript modules, whose graphs hold those inside."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(not outer or name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, torch.jit.ScriptModule) and not inside:
            found.append(name)
            yield name, module


def _frozen_layers(module: torch.jit.ScriptModule, prefix: str) -> Iterator[NormLayer]:
    """Yield the layers whose statistics torch.jit.freeze has made constants of the graph."""
    for values in _script_norms(module):
        weight, bias, mean, var = (value.toIValue() for value in values[1:5])
        if isinstance(mean, torch.Tensor) and isinstance(var, torch.Tensor):
            name = ".".join(filter(None, (prefix, script_owner(values[3]))))
            yield NormLayer(name, "BatchNorm", mean, var, weight, bias, eps=values[7].toIValue())
