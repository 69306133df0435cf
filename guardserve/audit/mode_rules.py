"""Rules on modes: what trains that should not, and what a graph has fixed for good."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Iterator
from types import CodeType

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parallel import DataParallel, DistributedDataParallel

from guardserve.audit.flow import script_graph, script_path
from guardserve.audit.registry import Gap, Hit, rule
from guardserve.audit.report import join
from guardserve.audit.subject import Subject

_SHOWN = 3
_MODELESS = ("torch.export.", "torch.fx.", "torch._dynamo.", "torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")


@rule("BN001", "training-mode", "error")
def training_mode(subject: Subject) -> Iterator[Hit | Gap]:
    """A module is in training mode.

    Every module starts in training mode, and stays there until somebody calls ``eval()``; a class may also override
    ``train()`` so that ``eval()`` does not reach all of it.

    Why: in training mode BatchNorm normalises by the batch at hand and overwrites its running statistics, and dropout
    is active.

    Found: from each module's own ``training`` flag; one finding for each outermost module that trains. The flags of a
    traced program mean nothing and are left out, those that a scripted program reads count. Where only modules train
    whose code does not read the flag, it is a warning.

    Remedy: call ``model.eval()`` after loading, or serve through EvalGuard, which holds every module in eval mode.

    Example::

        model = resnet18()          # BN001
        model = resnet18().eval()   # clean
    """
    for name, module in _training_subtrees(subject.root, "", set()):
        members = dict(_training_modules(module, name))
        sensitive = {member: found for member, found in members.items() if _is_sensitive(found)}
        seen = f"training is True in {len(members)} module{'s' * (len(members) != 1)}"
        if sensitive:
            yield Hit(name, f"{seen}: {_kinds(sensitive)}")
        else:
            why = "nothing in it reads the flag as far as can be seen, but what it calls, or is added later, may"
            yield Hit(name, f"{seen}: {_kinds(members)}", "warning", why)


def _training_subtrees(module: nn.Module, name: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost modules that train."""
    if module in seen:
        return
    seen.add(module)
    if isinstance(module, torch.jit.ScriptModule):
        if any(True for _ in _training_modules(module, name)):
            yield name, module
    elif module.training and _has_mode(module):
        yield name, module
    else:
        for child_name, child in module.named_children():
            yield from _training_subtrees(child, f"{name}.{child_name}" if name else child_name, seen)


def _training_modules(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules inside one that train and whose flag matters."""
    scripts: list[str] = []
    for name, inner in module.named_modules(prefix=prefix):
        if any(name.startswith(f"{outer}.") or not outer for outer in scripts):
            continue
        if isinstance(inner, torch.jit.ScriptModule):
            scripts.append(name)
            yield from _script_flags(inner, name)
        elif inner.training and _has_mode(inner):
            yield name, inner


def _has_mode(module: nn.Module) -> bool:
    """Tell whether anything could depend on a module's flag: not in graphs, what an export leaves, and wrappers."""
    if type(module) is nn.Module or isinstance(module, (fx.GraphModule, DataParallel, DistributedDataParallel)):
        return False
    return not type(module).__module__.startswith(_MODELESS)


def _script_flags(module: torch.jit.ScriptModule, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules inside a TorchScript module that train, and whose flag its graph reads."""
    graph = script_graph(module)  # nodes live no longer than their graph
    paths = {".".join(script_path(node.output())) for node in graph.findAllNodes("prim::GetAttr", recurse=True)}
    for name, inner in module.named_modules():
        if getattr(inner, "training", False) and (f"{name}.training" if name else "training") in paths:
            yield ".".join(filter(None, (prefix, name))), inner


def _is_sensitive(module: nn.Module) -> bool:
    """Tell whether a module behaves differently in training mode, or has code of its own that might."""
    if isinstance(module, (_NormBase, _DropoutNd, nn.RReLU, torch.jit.ScriptModule)):
        return True
    if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
        return module.dropout > 0
    own = type(module).__mro__[: type(module).__mro__.index(nn.Module)]
    return any(_reads_flag(cls) for cls in own if not cls.__module__.startswith("torch.nn."))


@functools.cache
def _reads_flag(cls: type) -> bool:
    """Tell whether a class's own code reads ``training``; code that cannot be looked into might."""
    for attribute in vars(cls).values():
        function = inspect.unwrap(attribute) if callable(attribute) else getattr(attribute, "fget", None)
        code = getattr(function, "__code__", None)
        if code is not None and _mentions_training(code):
            return True
    return False


def _mentions_training(code: CodeType) -> bool:
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return "training" in (*code.co_names, *code.co_consts) or any(map(_mentions_training, inner))


def _kinds(modules: dict[str, nn.Module]) -> str:
    """Count modules by class, BatchNorm first, and name the first few of each class."""
    kinds = Counter(_class(module) for module in modules.values())
    ranked = sorted(kinds, key=lambda kind: ("BatchNorm" not in kind, "Dropout" not in kind, -kinds[kind]))
    texts = []
    for kind in ranked[:_SHOWN]:
        names = [name or "the model itself" for name, module in modules.items() if _class(module) == kind]
        texts.append(f"{kinds[kind]} {kind} ({join(names, _SHOWN)})")
    return join(texts + [f"{len(ranked) - _SHOWN} more classes"] * (len(ranked) > _SHOWN))


def _class(module: nn.Module) -> str:
    return str(getattr(module, "original_name", type(module).__name__))


@rule("BN002", "no-running-stats", "error")
def no_running_stats(subject: Subject) -> Iterator[Hit | Gap]:
    """A BatchNorm layer has no running statistics.

    With ``track_running_stats=False``, or with ``running_mean`` and ``running_var`` set to None, a layer has nothing to
    normalise by in eval mode but the batch at hand.

    Why: the layer uses batch statistics in eval mode too, so that a sample's output depends on its batch mates, and
    ``eval()`` cannot change that.

    Found: from the layer's buffers. Where only the attribute ``track_running_stats`` was set to False after the layer
    was built, eval mode still uses the statistics, and it is an info.

    Remedy: build the layer with ``track_running_stats=True`` and re-estimate its statistics, or use GroupNorm or
    LayerNorm, which need no batch.

    Example::

        nn.BatchNorm2d(64, track_running_stats=False)       # BN002
    """
    for layer in subject.eager_layers:
        # SyncBatchNorm and all other subclasses share this logic
        if not isinstance(layer.module, _BatchNorm):
            continue
        missing = [name for name in ("running_mean", "running_var") if getattr(layer, name) is None]
        if missing:
            yield Hit(layer.name, f"{join(missing)} {'is' if len(missing) == 1 else 'are'} None in a {layer.kind}")
        elif not layer.module.track_running_stats:
            why = "the statistics are used in eval mode, but training will not update them"
            yield Hit(layer.name, "track_running_stats is False, although it has running statistics", "info", why)


@rule("BN003", "training-baked-into-graph", "error")
def training_graph(subject: Subject) -> Iterator[Hit | Gap]:
    """A graph has training-mode BatchNorm or dropout baked in.

    Tracing, ``torch.export`` and ONNX export write the mode into the graph as a constant. ``eval()`` on the result may
    even set ``training`` to False: the graph does not read it.

    Why: the program normalises by the batch at hand, and may overwrite its running statistics, for good.

    Found: from the training argument of each batch normalisation whose input depends on the program's inputs, in
    TorchScript, ``torch.export`` and ``torch.fx`` graphs and in ONNX. A normalised weight (weight standardisation) is
    left out. Dropout that always drops counts too, where no BatchNorm tells.

    Remedy: call ``model.eval()`` and trace or export again; the finished program cannot be mended.

    Example::

        torch.jit.trace(model.train(), x).eval()    # BN003, though .training is False
        torch.jit.trace(model.eval(), x)            # clean
    """
    trained = [norm for norm in subject.graph_norms if norm.trains]
    for norm in trained:
        yield Hit(norm.name, f"{norm.operator} always uses batch statistics")
    if subject.is_graph and not trained:
        for step in subject.flow.dropping:
            why = "the program drops values at random for good, so that the same request gets another answer each time"
            yield Hit(step.name, f"{step.kind} with p={step.probability:g} always drops", why=why)


@rule("BN014", "frozen-by-halves", "warning")
def frozen_by_halves(subject: Subject) -> Iterator[Hit | Gap]:
    """A BatchNorm layer is frozen by halves.

    Fine-tuning freezes a layer in two places: ``requires_grad`` of its scale and shift, and its mode. Freezing the
    parameters alone leaves the running statistics moving with every batch; setting the mode alone leaves the optimiser
    changing the scale under statistics that stand still.

    Why: the half that still moves drifts away from the half that was frozen, and nothing in the loss shows it.

    Found: from ``requires_grad`` and ``training`` of each layer; the reverse case only where other layers train.

    Remedy: freeze both, with ``layer.eval()`` and ``layer.requires_grad_(False)``, again after each
    ``model.train()``; or neither.

    Example::

        for parameter in model.backbone.parameters():
            parameter.requires_grad = False     # BN014: the backbone's running statistics still move
    """
    layers = {layer.module for layer in subject.eager_layers}
    others_train = any(map(_trains, set(subject.modules) - layers))
    for layer in subject.eager_layers:
        module = layer.module
        if not isinstance(module, _NormBase) or layer.running_mean is None:
            continue
        affine = [tensor for tensor in (layer.weight, layer.bias) if tensor is not None]
        moves = module.training and module.track_running_stats and module.momentum != 0
        if affine and moves and not any(tensor.requires_grad for tensor in affine):
            yield Hit(
                layer.name, "weight and bias are frozen, but the layer is in training mode and updates its statistics"
            )
        elif others_train and not module.training and any(tensor.requires_grad for tensor in affine):
            yield Hit(layer.name, "the layer is in eval mode, but its weight and bias are trained")


def _trains(module: nn.Module) -> bool:
    """Tell whether a module with parameters of its own is being trained."""
    # a frozen TorchScript module has no flag
    training = getattr(module, "training", False)
    return training and any(parameter.requires_grad for parameter in module.parameters(recurse=False))
