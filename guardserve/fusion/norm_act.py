"""BatchNorm subclasses that normalise and then call their children, such as timm's ``BatchNormAct2d``."""

from __future__ import annotations

import copy
import inspect
import operator

import torch
from torch import fx, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from guardserve.batchnorm import BatchNorm
from guardserve.symbolic import Tracer

_HARMLESS = {getattr, operator.eq, torch._assert}  # noqa: SLF001 - what an assertion on the input leaves in a graph


class _ChildrenAreLeaves(Tracer):
    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Look into no child."""
        del m, module_qualified_name
        return True


def calls_children_after(norm: BatchNorm) -> bool:
    """Tell whether a layer's own forward is batch normalisation and then its children, each once and in order.

    Args:
        norm: A layer in eval mode with running statistics.
    """
    norm = copy.deepcopy(norm)
    vars(norm)["_check_input_dim"] = lambda _: None  # it branches on the input
    try:
        graph = _ChildrenAreLeaves().trace(norm)
    except Exception:  # noqa: BLE001 - it runs the layer's own code on values that are no tensors
        return False
    children = [name for name, _ in norm.named_children()]
    chain: list[fx.Node] = []
    node = next(node for node in graph.nodes if node.op == "output").args[0]
    while isinstance(node, fx.Node) and node.op == "call_module" and not node.kwargs and len(node.args) == 1:
        chain.insert(0, node)
        node = node.args[0]
    if [call.target for call in chain] != children or not isinstance(node, fx.Node) or node.target is not F.batch_norm:
        return False
    others = [other for other in graph.nodes if other.op in ("call_module", "call_function", "call_method")]
    if any(other not in (node, *chain) and other.target not in _HARMLESS for other in others):
        return False
    given = inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs).arguments
    return (
        given["input"].op == "placeholder"
        and not given.get("training", False)
        and given.get("eps", 1e-5) == norm.eps
        and all(
            getattr(given.get(name), "target", None) == (name if getattr(norm, name) is not None else None)
            for name in ("running_mean", "running_var", "weight", "bias")
        )
    )
