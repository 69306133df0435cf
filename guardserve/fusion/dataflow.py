"""Which layer's output feeds which BatchNorm layer, read from a graph of the forward."""

from __future__ import annotations

import gc
import inspect
import warnings
import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import Proxy
from torch.nn.modules.conv import _ConvNd

from guardserve.batchnorm import is_batchnorm
from guardserve.exceptions import GuardserveError
from guardserve.modes import _KeepEval
from guardserve.symbolic import Tracer

_IDENTITIES_IN_EVAL = {
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
}
_EXPORTED_DROPOUTS = {
    f"aten.{name}.default" for name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
}
_EXPORTED_LAYERS = ("aten.conv", "aten.linear")
_EXPORTED_NORM = "aten.batch_norm"
_KIND = "class of the called module"
_MESSAGE = 160
_METADATA = {"dtype", "device", "shape", "ndim", "requires_grad"}


class DataflowError(GuardserveError):
    """A graph of the forward cannot be had, or does not show what was asked; the message is the reason."""


@dataclass(frozen=True)
class Dataflow:
    """The calls of a model's convolutions, linear layers and BatchNorm layers, and what flows between them.

    Attributes:
        layers: Qualified name of the convolution or linear layer, for each graph node that is a call of one.
        norms: Likewise for BatchNorm layers.
        transparent: Nodes that hand on their input as it is: dropout in eval mode.
        kept: Nodes whose value the model keeps beyond its forward, where no graph shows who reads it.
        read: Names of modules with a parameter or buffer that the forward reads beside calling them.
    """

    layers: Mapping[fx.Node, str]
    norms: Mapping[fx.Node, str]
    transparent: frozenset[fx.Node]
    kept: frozenset[fx.Node]
    read: frozenset[str]

    def feeder(self, norm: str) -> str:
        """Name the one layer whose output each call of ``norm`` takes, and nothing else does.

        Raises:
            DataflowError: If there is none.
        """
        calls = [node for node, name in self.norms.items() if name == norm]
        if not calls:
            raise DataflowError("the forward does not call it, or not where a graph shows it")
        feeders = sorted({self._feeder(call) for call in calls})
        if len(feeders) > 1:
            raise DataflowError(f"it is shared: it follows {' and '.join(feeders)}")
        if list(self.layers.values()).count(feeders[0]) != len(calls):
            raise DataflowError(f"{feeders[0]}, which it follows, is also called without it")
        for name in (norm, feeders[0]):
            if name in self.read:
                raise DataflowError(f"the forward reads parameters of {name} beside calling it")
        return feeders[0]

    def _feeder(self, call: fx.Node) -> str:
        node = _input(call)
        path = [node]
        while node in self.transparent:
            node = _input(node)
            path.append(node)
        layer = None if node is None else self.layers.get(node)
        if layer is None:
            raise DataflowError(f"it follows {_describe(node)}, not a convolution or linear layer")
        for value in path:
            if value is not None and len(value.users) > 1:
                raise DataflowError(f"the output of {layer}, which it follows, is used elsewhere too")
            if value in self.kept:
                raise DataflowError(f"the output of {layer}, which it follows, is kept, and may be read elsewhere")
        return layer


def trace_dataflow(
    model: nn.Module, args: tuple[Any, ...] | None = None, kwargs: Mapping[str, Any] | None = None
) -> Dataflow:
    """Read a model's data flow from a symbolic trace, or else from an export.

    A symbolic trace holds for all inputs. A forward whose control flow depends on its input has none; it is
    exported for the shapes of the example instead, which fails too where control flow depends on the example's
    values. Either is the flow of a forward that is given the arguments of the example, or the required ones only.

    Do not call it while other threads run models: tracing patches ``torch.nn.Module``.

    Args:
        model: The model, in eval mode. Tracing may change what it keeps in attributes: give a copy.
        args: Positional arguments of the example; None when there is no example.
        kwargs: Its keyword arguments.

    Raises:
        DataflowError: If neither graph can be had.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _trace(model, len(args or ()), set(kwargs or ()))
        except Exception as error:  # noqa: BLE001 - tracing runs the model's own code on values that are no tensors
            reason = f"its forward cannot be traced ({one_line(error)})"
        if args is None:
            raise DataflowError(f"{reason}; an example input may help")
        # it says so, and no more, when the model keeps a value of its forward
        warnings.filterwarnings("error", "The tensor attribute")
        try:
            return _export(model, args, dict(kwargs or {}))
        except Exception as error:
            raise DataflowError(f"{reason} nor exported ({one_line(error)})") from error


def has_hooks(module: nn.Module) -> bool:
    """Tell whether hooks run when a module is called, other than those that a guard has left in a copy."""
    names = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    hooks = chain.from_iterable(vars(module).get(name, {}).values() for name in names)
    return any(not isinstance(hook, _KeepEval) for hook in hooks)


class _Tracer(Tracer):
    """Traces through containers, and notes which values outlive the trace."""

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self._proxies: list[tuple[fx.Node, weakref.ref[Proxy]]] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Look into every module but layers and those of torch, unless these hold BatchNorm layers."""
        if is_batchnorm(m) or isinstance(m, (nn.Linear, _ConvNd, torch.jit.ScriptModule)):
            return True
        return super().is_leaf_module(m, module_qualified_name) and not any(map(is_batchnorm, m.modules()))

    def proxy(self, node: fx.Node) -> Proxy:
        """Make a proxy, and keep an eye on it."""
        proxy = super().proxy(node)
        self._proxies.append((node, weakref.ref(proxy)))
        return proxy

    def kept(self) -> frozenset[fx.Node]:
        """Return the nodes whose proxy is alive after the trace: an attribute or a list holds it."""
        alive = any(proxy() is not None for _, proxy in self._proxies)
        if alive:
            gc.collect()  # it may merely be part of a cycle
        return frozenset(node for node, proxy in self._proxies if alive and proxy() is not None)


def _trace(model: nn.Module, positional: int, named: set[str]) -> Dataflow:
    if "forward" in vars(model):
        raise DataflowError("it is an attribute of the instance")
    parameters = inspect.signature(model.forward).parameters.values()
    given = {parameter.name for parameter in list(parameters)[:positional]} | named
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty and p.name not in given}
    tracer = _Tracer()
    graph = tracer.trace(model, defaults)
    layers, norms, transparent = {}, {}, set()
    for node in _nodes(graph, "call_module"):
        name = str(node.target)
        module = model.get_submodule(name)
        node.meta[_KIND] = type(module).__name__
        if is_batchnorm(module):
            norms[node] = name
        elif isinstance(module, (nn.Linear, _ConvNd)):
            layers[node] = name
        elif type(module) in _IDENTITIES_IN_EVAL and not has_hooks(module):
            transparent.add(node)
    tensors = {str(node.target): node for node in _nodes(graph, "get_attr")}
    read = _read(model, tensors, layers | norms)
    return Dataflow(layers, norms, frozenset(transparent), tracer.kept(), read)


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Dataflow:
    if any(map(has_hooks, model.modules())):
        raise DataflowError("hooks may read what a graph does not show")
    model(*args, **kwargs)  # what the model computes once and keeps is no value of the forward that is exported
    program = torch.export.export(model, args, kwargs, strict=False)
    names = {module: name for name, module in model.named_modules()}
    layers, norms, transparent = {}, {}, set()
    for node in _nodes(program.graph, "call_function"):
        innermost = list(node.meta.get("nn_module_stack", {}).values())[-1:]
        module = model.get_submodule(innermost[0][0]) if innermost else model
        operator = str(node.target)
        if operator.startswith(_EXPORTED_NORM) and is_batchnorm(module):
            norms[node] = names[module]
        elif operator.startswith(_EXPORTED_LAYERS) and isinstance(module, (nn.Linear, _ConvNd)):
            layers[node] = names[module]
        elif operator in _EXPORTED_DROPOUTS and node.args[-1] is False:
            transparent.add(node)
    signature = program.graph_signature
    inputs = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    tensors = {inputs[node.name]: node for node in _nodes(program.graph, "placeholder") if node.name in inputs}
    return Dataflow(layers, norms, frozenset(transparent), frozenset(), _read(model, tensors, layers | norms))


def _read(model: nn.Module, nodes: Mapping[str, fx.Node], calls: Mapping[fx.Node, str]) -> frozenset[str]:
    """Name the modules that own a tensor which something else than a call of an owner uses.

    Args:
        model: The model.
        nodes: Graph node of parameters and buffers, by qualified name.
        calls: Nodes that are calls of modules.
    """
    owners: dict[int, set[str]] = defaultdict(set)
    for name, module in model.named_modules():
        for tensor in chain(module.parameters(recurse=False), module.buffers(recurse=False)):
            owners[id(tensor)].add(name)
    read: set[str] = set()
    for name, node in nodes.items():
        owning = owners[id(attrgetter(name)(model))]  # a tied tensor has several names
        if not all(calls.get(user) in owning or _reads_metadata(user) for user in node.users):
            read |= owning
    return frozenset(read)


def _nodes(graph: fx.Graph, op: str) -> Iterator[fx.Node]:
    return (node for node in graph.nodes if node.op == op)


def _reads_metadata(node: fx.Node) -> bool:
    return node.target is getattr and node.args[1] in _METADATA


def _input(call: fx.Node) -> fx.Node | None:
    given: Iterator[Any] = chain(call.args, call.kwargs.values())
    first = next(given, None)
    return first if isinstance(first, fx.Node) else None


def _describe(node: fx.Node | None) -> str:
    """Name what computes a value, as the model's author would."""
    if node is None:
        return "a constant"
    if node.op == "placeholder":
        return "the model's input"
    if _KIND in node.meta:
        return f"{node.target} ({node.meta[_KIND]})"
    return str(getattr(node.target, "__name__", node.target)).removesuffix(".default")


def one_line(error: Exception) -> str:
    """Put an error in one line, cut where it goes on for long."""
    text = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}".rstrip(": ")
    return text if len(text) <= _MESSAGE else f"{text[:_MESSAGE]}..."
