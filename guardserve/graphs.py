"""Batch normalisation in traced graphs: TorchScript, ``torch.export`` programs and ``torch.fx``.

A graph has no modules whose flag could be switched. Whether a normalisation uses its batch's statistics is an
argument of the operator: a constant True there stays, whatever ``eval()`` says.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from guardserve.batchnorm import GraphBatchNorm

# position of the training argument, by operator; None where the operator always trains
_FX_OPERATORS: dict[str, int | None] = {
    "aten.batch_norm": 5,
    "aten.native_batch_norm": 5,
    "aten.cudnn_batch_norm": 5,
    "aten.miopen_batch_norm": 5,
    "aten._native_batch_norm_legit": 5,
    "aten._native_batch_norm_legit.no_stats": 3,
    "aten._native_batch_norm_legit_functional": 5,
    "aten._native_batch_norm_legit_no_training": None,
    "aten._batch_norm_with_update": None,
    "aten._batch_norm_with_update_functional": None,
}
_EPSILON = {name: 7 for name, training in _FX_OPERATORS.items() if training == 5}  # noqa: PLR2004 - see above
_EPSILON["aten._native_batch_norm_legit_no_training"] = 6
_NEVER_TRAINS = "aten._native_batch_norm_legit_no_training"
SCRIPT_OPERATORS = ("aten::batch_norm", "aten::native_batch_norm", "aten::_batch_norm_impl_index")
_SCRIPT_TRAINING = 5


@dataclass(frozen=True)
class GraphNorm:
    """One batch normalisation of a graph.

    Attributes:
        name: Qualified name of the layer as far as the graph tells it, else the node's own name.
        operator: The operator, such as ``aten.batch_norm``.
        trains: Whether it is fixed to use its batch's statistics.
    """

    name: str
    operator: str
    trains: bool


def graph_norms(model: nn.Module) -> Iterator[GraphNorm]:
    """Yield the batch normalisations of every graph in a model: none for an eager module.

    A normalisation of parameters alone, such as weight standardisation, is left out: it always uses the
    statistics of what it is given, rightly, and no request can change them.
    """
    inlined: list[str] = []  # a ScriptModule's graph already holds those of its children
    for name, module in model.named_modules():
        if any(not outer or name.startswith(f"{outer}.") for outer in inlined):
            continue
        if isinstance(module, torch.jit.ScriptModule):
            inlined.append(name)
            yield from _script_norms(module, name)
        elif isinstance(module, fx.GraphModule):
            yield from _fx_norms(module, name)


class GraphMarks:
    """Marks every batch normalisation of the ``torch.fx`` graphs in a model that can be read, until it is closed.

    Attributes:
        layers: The marks, by the qualified name of the layer as :func:`graph_norms` tells it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers: dict[str, GraphBatchNorm] = {}
        self._graphs: list[tuple[fx.GraphModule, list[str]]] = []
        for prefix, module in list(model.named_modules()):
            if isinstance(module, fx.GraphModule):
                self._mark(module, prefix)

    def close(self) -> None:
        """Take every mark out again."""
        for module, marks in self._graphs:
            for node in [node for node in module.graph.nodes if node.op == "call_module" and node.target in marks]:
                node.replace_all_uses_with(node.args[0])
                module.graph.erase_node(node)
            for mark in marks:
                module.delete_submodule(mark)
            module.recompile()
        self._graphs.clear()

    def _mark(self, module: fx.GraphModule, prefix: str) -> None:
        marks: dict[str, str] = {}
        for node in _fx_norm_nodes(module):
            constants = _fx_constants(node)
            if constants is None:
                continue
            targets, eps = constants
            x: Any = node.args[0]
            own = _fx_name(node)
            name = _join(prefix, own)
            if own not in marks:
                marks[own] = f"_guardserve_{len(marks)}"
                self.layers[name] = GraphBatchNorm(module, targets, eps)
                module.add_submodule(marks[own], self.layers[name])
            with module.graph.inserting_before(node):
                mark = module.graph.call_module(marks[own], (x,))
            node.replace_input_with(x, mark)
        if marks:
            self._graphs.append((module, list(marks.values())))
            module.recompile()


def _fx_constants(node: fx.Node) -> tuple[dict[str, str | None], float] | None:
    """Return the attributes that hold a normalisation's constants, and its epsilon; None if it cannot be read."""
    arguments = node.args
    if node.target is nn.functional.batch_norm:
        bound = inspect.signature(nn.functional.batch_norm).bind(*node.args, **node.kwargs)
        bound.apply_defaults()
        given = bound.arguments
        values = [given["running_mean"], given["running_var"], given["weight"], given["bias"]]
        eps = given["eps"]
    else:
        position = _EPSILON.get(_operator(node))
        if position is None or len(arguments) <= position:
            return None
        values, eps = [arguments[3], arguments[4], arguments[1], arguments[2]], arguments[position]
    targets: dict[str, str | None] = {}
    for name, value in zip(("running_mean", "running_var", "weight", "bias"), values, strict=True):
        if value is not None and not (isinstance(value, fx.Node) and value.op == "get_attr"):
            return None
        targets[name] = None if value is None else str(value.target)
    return (targets, float(eps)) if targets["running_mean"] and targets["running_var"] else None


def _script_norms(module: torch.jit.ScriptModule, prefix: str) -> Iterator[GraphNorm]:
    graph: Any = getattr(module, "inlined_graph", None)
    if graph is None:
        return
    itself, *inputs = (value.debugName() for value in graph.inputs())
    for operator in SCRIPT_OPERATORS:
        for node in graph.findAllNodes(operator, recurse=True):
            values = list(node.inputs())
            if _script_depends(values[0], itself, set(inputs)):
                trains = values[_SCRIPT_TRAINING].toIValue() is True
                yield GraphNorm(_join(prefix, _script_name(values)), operator, trains)


def _script_depends(value: Any, itself: str, inputs: set[str]) -> bool:
    """Tell whether a TorchScript value depends on the forward's inputs; what cannot be followed does."""
    seen: set[str] = set()
    stack = [value]
    while stack:
        current = stack.pop()
        name = current.debugName()
        if name in inputs:
            return True
        if name == itself or name in seen:
            continue
        seen.add(name)
        node = current.node()
        if node.kind() in ("prim::Param", "prim::If", "prim::Loop"):
            return True
        stack.extend(node.inputs())
    return False


def _script_name(values: list[Any]) -> str:
    """Follow the attribute chain of a normalisation's running mean, or its weight, back to the module."""
    for value in (values[3], values[1]):
        parts: list[str] = []
        node = value.node()
        while node.kind() == "prim::GetAttr":
            parts.insert(0, node.s("name"))
            node = next(node.inputs()).node()
        if len(parts) > 1:
            return ".".join(parts[:-1])
    return str(values[0].debugName())


def _fx_norms(module: fx.GraphModule, prefix: str) -> Iterator[GraphNorm]:
    for node in _fx_norm_nodes(module):
        target = _operator(node)
        if node.target is nn.functional.batch_norm:
            trains = node.kwargs.get("training", node.args[5] if len(node.args) > 5 else False) is True  # noqa: PLR2004
        else:
            position = _FX_OPERATORS[target]
            trains = target != _NEVER_TRAINS if position is None else node.args[position] is True
        yield GraphNorm(_join(prefix, _fx_name(node)), target, trains)


def _fx_norm_nodes(module: fx.GraphModule) -> list[fx.Node]:
    """List the nodes that normalise what depends on the graph's inputs."""
    placeholders = {node for node in module.graph.nodes if node.op == "placeholder"}
    return [
        node
        for node in module.graph.nodes
        if node.op == "call_function"
        and node.args
        and isinstance(node.args[0], fx.Node)
        and (node.target is nn.functional.batch_norm or _operator(node) in _FX_OPERATORS)
        and _fx_depends(node.args[0], placeholders)
    ]


def _operator(node: fx.Node) -> str:
    return str(node.target).removesuffix(".default")


def _fx_depends(node: fx.Node, placeholders: set[fx.Node]) -> bool:
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in placeholders:
            return True
        if current not in seen:
            seen.add(current)
            stack.extend(current.all_input_nodes)
    return False


def _fx_name(node: fx.Node) -> str:
    """Name the layer by the attribute of its running mean or weight, which exports keep."""
    for argument in (*node.args[3:5], *node.args[1:3]):
        if isinstance(argument, fx.Node) and argument.op == "get_attr":
            return str(argument.target).rpartition(".")[0]
    return node.name


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name
