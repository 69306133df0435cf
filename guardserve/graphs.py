"""Batch normalisation in traced graphs: TorchScript, ``torch.export`` programs and ``torch.fx``.

A graph has no modules whose flag could be switched. Whether a normalisation uses its batch's statistics is an
argument of the operator: a constant True there stays, whatever ``eval()`` says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

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
_NEVER_TRAINS = "aten._native_batch_norm_legit_no_training"
_SCRIPT_OPERATORS = ("aten::batch_norm", "aten::native_batch_norm", "aten::_batch_norm_impl_index")
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


def _script_norms(module: torch.jit.ScriptModule, prefix: str) -> Iterator[GraphNorm]:
    graph: Any = getattr(module, "inlined_graph", None)
    if graph is None:
        return
    itself, *inputs = (value.debugName() for value in graph.inputs())
    for operator in _SCRIPT_OPERATORS:
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
    placeholders = {node for node in module.graph.nodes if node.op == "placeholder"}
    for node in module.graph.nodes:
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        target = str(node.target).removesuffix(".default")
        if node.target is nn.functional.batch_norm:
            trains = node.kwargs.get("training", node.args[5] if len(node.args) > 5 else False) is True  # noqa: PLR2004
        elif target in _FX_OPERATORS:
            position = _FX_OPERATORS[target]
            trains = target != _NEVER_TRAINS if position is None else node.args[position] is True
        else:
            continue
        if _fx_depends(node.args[0], placeholders):
            yield GraphNorm(_join(prefix, _fx_name(node)), target, trains)


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
