"""What is audited: one view of modules, programs, state dicts and ONNX graphs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from inspect import signature
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import distributed, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DataParallel, DistributedDataParallel

from guardserve.audit.copies import NotCopyableError
from guardserve.audit.flow import Flow, fx_flow, script_flow, traced_flow
from guardserve.audit.layers import NormLayer, module_layers, module_weights, state_layers, state_weights
from guardserve.audit.prober import run_probes
from guardserve.audit.probes import NotRunnableError, Probes
from guardserve.audit.workbench import workbench
from guardserve.batchnorm import FusedBatchNorm
from guardserve.graphs import GraphNorm, graph_norms

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_T = TypeVar("_T")


class Unchecked(Exception):  # noqa: N818 - not an error: it says why a rule cannot be checked
    """A rule cannot be checked on this subject, for the reason given."""


class Subject:
    """A model, or what there is of one.

    Args:
        kind: What it is, as a person would call it.
        layers: Its normalisation layers.
        graph_norms: Batch normalisations of its graphs; None when it has no graph or code at all.
        root: The model as it was given, when there is one.
        example: Example input to probe it with.
        weights: Weights by qualified name, those of the layers among them.

    Attributes:
        note: What had to be done to the example, in words; empty when nothing had.
    """

    note = ""

    def __init__(
        self,
        kind: str,
        layers: Sequence[NormLayer],
        graph_norms: Sequence[GraphNorm] | None = None,
        root: nn.Module | None = None,
        example: Any = None,
        *,
        weights: Iterable[tuple[str, torch.Tensor]] = (),
    ) -> None:
        self.kind = kind
        self.layers = tuple(layers)
        self._graph_norms = graph_norms
        self._root = root
        self._example = example
        self.weights = tuple(weights)

    def __str__(self) -> str:
        count = sum(layer.is_batchnorm for layer in self.layers)
        known = {layer.name for layer in self.layers}
        count += sum(norm.name not in known for norm in self._graph_norms or ())
        note = f", run on an example {self.note}" if self.note else ""
        return f"{self.kind} with {count or 'no'} BatchNorm layer{'s' * (count != 1)}{note}"

    @classmethod
    def of_module(cls, model: nn.Module, example: Any = None) -> Subject:
        """View a model: eager, TorchScript, or a graph module from ``torch.export`` or ``torch.fx``."""
        inner, _ = unwrapped(model)
        kind = getattr(inner, "original_name", None) or type(inner).__name__
        # an export's graph module has a class of its own, whose name says nothing
        kind = "GraphModule" if isinstance(inner, fx.GraphModule) else kind
        norms = [*graph_norms(model), *_unflattened_norms(model)]
        return cls(kind, list(module_layers(model)), norms, model, example, weights=module_weights(model))

    @classmethod
    def of_program(cls, program: ExportedProgram, example: Any = None) -> Subject:
        """View a program from ``torch.export``."""
        # guards would refuse other batch sizes than the export's example had
        options = {"check_guards": False} if "check_guards" in signature(program.module).parameters else {}
        subject = cls.of_module(program.module(**options), example)
        subject.kind = "ExportedProgram"
        return subject

    @classmethod
    def of_state_dict(cls, state: Mapping[str, Any], example: Any = None) -> Subject:
        """View a state dict, from which no code can be seen, so that an example is of no use."""
        return cls("state_dict", list(state_layers(state)), example=example, weights=state_weights(state))

    @property
    def root(self) -> nn.Module:
        """The model as it was given.

        Raises:
            Unchecked: There is only state, or a foreign graph.
        """
        if self._root is None:
            unused = "" if self._example is None else ", so that the example was not used"
            raise Unchecked(f"the code of the model is needed, which this {self.kind} does not hold{unused}")
        return self._root

    @property
    def graph_norms(self) -> Sequence[GraphNorm]:
        """Batch normalisations of the model's graphs; none in an eager model.

        Raises:
            Unchecked: There is only state.
        """
        if self._graph_norms is None:
            raise Unchecked(f"the code or graph of the model is needed, which this {self.kind} does not hold")
        return self._graph_norms

    @property
    def probes(self) -> Probes:
        """What the model did when it was run on the example; names in it are without :attr:`prefix`.

        Raises:
            Unchecked: There is no example or no model to run, or it does not run.
            InputError: The example is none.
        """
        return _checked(self._probes)

    @property
    def flow(self) -> Flow:
        """What comes before each normalisation, read from a graph, or seen in a run on the example, or traced.

        Names in it are without :attr:`prefix`.

        Raises:
            Unchecked: None of these is possible.
        """
        return _checked(self._flow)

    @property
    def refusal(self) -> str | None:
        """Why the model does not run on the example; None when it does, or when there is none to run it on."""
        return self._probes if self._example is not None and isinstance(self._probes, str) else None

    @cached_property
    def _probes(self) -> Probes | str:
        try:
            inner = self.inner
        except Unchecked as gap:
            return str(gap)
        if self._example is None:
            return "an example input is needed"
        if (reason := _needs_others(inner)) is not None:
            return reason
        try:
            return run_probes(inner, self._example, self.norm_names)
        except NotRunnableError as error:
            return str(error)

    @cached_property
    def _flow(self) -> Flow | str:
        inner = self.inner
        if isinstance(inner, torch.jit.ScriptModule):
            return script_flow(inner)
        if isinstance(inner, fx.GraphModule):
            return fx_flow(inner.graph, dict(inner.named_modules()), self.norm_names)
        probes = self._probes
        if isinstance(probes, Probes) and probes.flow is not None:
            return probes.flow
        try:
            with workbench(inner) as bench, bench.eval_mode():
                return traced_flow(bench.model, self.norm_names)
        except NotCopyableError as error:
            return f"the order of operations is not known: {error}"
        except Exception:  # noqa: BLE001 - tracing raises whatever the model's code makes of a proxy
            reason = probes if isinstance(probes, str) else "the run on the example did not show it"
            return f"the order of operations is not known: it cannot be traced symbolically, and {reason}"

    @property
    def prefix(self) -> str:
        """What stands before the names of modules because of a wrapper: ``module.``, ``_orig_mod.`` or nothing."""
        return unwrapped(self.root)[1]

    @property
    def inner(self) -> nn.Module:
        """The model without wrappers."""
        return unwrapped(self.root)[0]

    @property
    def is_graph(self) -> bool:
        """Whether the model is a program whose graph can be read: TorchScript, or from torch.export or torch.fx."""
        return self._root is not None and isinstance(self.inner, (torch.jit.ScriptModule, fx.GraphModule))

    @property
    def modules(self) -> list[nn.Module]:
        """All modules; none when there is no code."""
        return [] if self._root is None else list(self._root.modules())

    @property
    def eager_layers(self) -> list[NormLayer]:
        """The normalisation layers that are modules of torch.nn, or of a subclass.

        Raises:
            Unchecked: There is no code, or its BatchNorm is elsewhere: in a graph, or in layers of its own.
        """
        inner = self.inner
        eager = [layer for layer in self.layers if isinstance(layer.module, _NormBase)]
        if not eager and self.has_batchnorm:
            raise Unchecked(f"BatchNorm layers of torch.nn are needed, and this {type(inner).__name__} has others")
        return eager

    @property
    def has_batchnorm(self) -> bool:
        """Whether there is any BatchNorm, in modules, graphs or state."""
        return bool(self._graph_norms) or any(layer.is_batchnorm for layer in self.layers)

    @property
    def norm_names(self) -> frozenset[str]:
        """Names of the layers that normalise, without :attr:`prefix`; what fusion leaves of one does not."""
        normalising = (layer for layer in self.layers if not isinstance(layer.module, FusedBatchNorm))
        return frozenset(layer.name.removeprefix(self.prefix) for layer in normalising)


def unwrapped(model: nn.Module) -> tuple[nn.Module, str]:
    """Take data parallelism and torch.compile off a model.

    Returns:
        The model inside, and what the wrappers put before the names of its modules.
    """
    prefix = ""
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model, prefix = model.module, prefix + "module."
        elif "_orig_mod" in dict(model.named_children()):
            model, prefix = model.get_submodule("_orig_mod"), prefix + "_orig_mod."
        else:
            return model, prefix


def _unflattened_norms(model: nn.Module) -> Iterator[GraphNorm]:
    """Yield the normalisations in what ``torch.export.unflatten`` gives: modules that hold a graph each."""
    for name, module in model.named_modules():
        graph = vars(module).get("graph")
        if isinstance(graph, fx.Graph) and not isinstance(module, fx.GraphModule):
            for norm in graph_norms(fx.GraphModule(module, graph)):
                yield replace(norm, name=f"{name}.{norm.name}".strip("."))


def _checked(result: _T | str) -> _T:
    """Return a result, or raise the reason why there is none."""
    if isinstance(result, str):
        raise Unchecked(result)
    return result


def is_sharded(module: nn.Module) -> bool:
    """Tell whether the parameters of a module are shared out over processes."""
    return not {"FullyShardedDataParallel", "FSDPModule"}.isdisjoint(cls.__name__ for cls in type(module).__mro__)


def _needs_others(model: nn.Module) -> str | None:
    """Tell why a model cannot be run by this process alone, or None when it can."""
    group = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    for name, module in model.named_modules():
        place = name or "the model"
        if is_sharded(module):
            return f"{place} is sharded over processes: audit it before it is"
        if group and isinstance(module, DistributedDataParallel):
            return f"{place} runs only together with the other processes of its group"
    return None
