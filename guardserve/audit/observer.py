"""Watching one forward: the data flow around normalisations, and modules that go back to training."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from operator import itemgetter
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from guardserve.audit.flow import INPUT, Flow, Step, function_step, is_whole, module_step
from guardserve.nonfinite import named_tensors

_TRAINING = itemgetter("training")


def _trains(module: nn.Module) -> bool:
    """Tell whether a layer does in training mode what it must not do in inference."""
    return module.training and (isinstance(module, _BatchNorm) or (isinstance(module, _DropoutNd) and module.p > 0))


class Observer(TorchFunctionMode):
    """Records the steps of a forward, and the modules that are in training mode at any point of it.

    Modules of torch.nn, normalisation layers and activations are one step each; of all other modules the operators
    that their code calls are steps.

    Args:
        model: The model.
        norms: Names of its normalisation layers.

    Attributes:
        training: Names of the modules that were seen in training mode.
        unregistered: Layers that trained and are no submodules, so that no mode reaches them: the name of the module
            that called each, and its class.
    """

    def __init__(self, model: nn.Module, norms: frozenset[str]) -> None:
        super().__init__()
        self.training: list[str] = []
        self.unregistered: list[tuple[str, str]] = []
        self._model = model
        self._modules = set(model.modules())
        self._norms = norms
        self._named = {
            name: vars(module)
            for name, module in model.named_modules()
            if isinstance(vars(module).get("training"), bool)
        }
        self._flags = list(self._named.values())
        self._running: list[str] = []
        self._taken: list[list[Step]] = []
        self._whole = 0
        self._steps: list[Step] = []
        self._produced: dict[int, Step] = {}
        self._alive: list[Any] = []  # so that no identity is used twice

    @property
    def flow(self) -> Flow:
        """The flow seen so far."""
        return Flow.of(self._steps)

    @contextmanager
    def watching(self, args: Any, kwargs: Any) -> Iterator[None]:
        """Watch a forward on these inputs."""
        self._yield_of(Step(INPUT, ""), (args, kwargs))
        handles: list[Any] = [register_module_forward_pre_hook(self._looking_for_unregistered())]
        try:
            for name, module in self._model.named_modules():
                # modules of TorchScript take no hooks
                if not isinstance(module, torch.jit.ScriptModule):
                    whole = name in self._norms or is_whole(module)
                    entering, leaving = self._entering(name, whole=whole), self._leaving(name, whole=whole)
                    handles.append(module.register_forward_pre_hook(entering, prepend=True, with_kwargs=True))
                    handles.append(module.register_forward_hook(leaving, always_call=True))
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator, and record it unless it is a part of a step."""
        del types
        self._look_for_training()
        output = func(*args, **(kwargs or {}))
        if not self._whole:
            sources = self._sources((args, kwargs))
            if sources and next(named_tensors(output), None) is not None:
                name = self._running[-1] if self._running else ""
                self._yield_of(function_step(getattr(func, "__name__", ""), name, sources, args, kwargs or {}), output)
        return output

    def _entering(self, name: str, *, whole: bool) -> Any:
        def hook(module: nn.Module, args: object, kwargs: object) -> None:
            del module
            self._look_for_training()
            self._running.append(name)
            self._taken.append(self._sources((args, kwargs)) if whole else [])
            self._whole += whole

        return hook

    def _leaving(self, name: str, *, whole: bool) -> Any:
        def hook(module: nn.Module, args: object, output: object) -> None:
            del args  # hooks of the model's own may have replaced them
            self._look_for_training()
            self._running.pop()
            sources = self._taken.pop()
            self._whole -= whole
            if whole and not self._whole:
                self._yield_of(module_step(module, name, sources, norm=name in self._norms), output)

        return hook

    def _looking_for_unregistered(self) -> Any:
        thread = threading.get_ident()

        def hook(module: nn.Module, args: object) -> None:
            del args
            # a global hook sees all modules of all threads
            if threading.get_ident() == thread and module not in self._modules and _trains(module):
                found = (self._running[-1] if self._running else "", type(module).__name__)
                self.unregistered += [found] if found not in self.unregistered else []

        return hook

    def _look_for_training(self) -> None:
        if any(map(_TRAINING, self._flags)):
            found = [name for name, own in self._named.items() if own["training"] and name not in self.training]
            self.training += found

    def _sources(self, inputs: object) -> list[Step]:
        found = [self._produced.get(id(tensor)) for _, tensor in named_tensors(inputs)]
        return list(dict.fromkeys(step for step in found if step is not None))

    def _yield_of(self, step: Step, output: object) -> None:
        self._steps.append(step)
        for _, tensor in named_tensors(output):
            self._produced[id(tensor)] = step
            self._alive.append(tensor)
