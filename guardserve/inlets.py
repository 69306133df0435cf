"""Looking at what enters BatchNorm layers.

A forward hook puts its layer on torch's slow way to call it: ten microseconds more where caches hold other things, as
they do in the midst of a forward. But the first thing that a BatchNorm layer does with its input is to ask its own
``_check_input_dim`` whether it will do. So that is where to look, unless a layer's class has a forward of its own.
"""

from __future__ import annotations

import inspect
import threading
import types
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from guardserve.batchnorm import FusedBatchNorm, GraphBatchNorm
from guardserve.compiled import Glance, glance_at, look_in_graph, place_of_look

Look = Callable[[torch.Tensor], None]
"""Called with a layer's input."""

_CHECK = "_check_input_dim"
_ASKS_FIRST = _CHECK in _BatchNorm.forward.__code__.co_names

_RANKS: dict[object, tuple[int, ...] | None] = {
    nn.BatchNorm1d._check_input_dim: (2, 3),  # noqa: SLF001
    nn.BatchNorm2d._check_input_dim: (4,),  # noqa: SLF001
    nn.BatchNorm3d._check_input_dim: (5,),  # noqa: SLF001
    FusedBatchNorm._check_input_dim: None,  # noqa: SLF001
    GraphBatchNorm._check_input_dim: None,  # noqa: SLF001
}

_compiling = torch.compiler.is_dynamo_compiling

_LOCK = threading.RLock()  # the garbage collector may come upon a handle to remove while it is held


NOTHING: Mapping[str, Any] = types.MappingProxyType({})
"""What torch gives a hook that is removed while it is about to be called, instead of the arguments by name."""


class Handle(Protocol):
    """What ends something."""

    def remove(self) -> None:
        """End it; again it does nothing."""


def on_input(layer: nn.Module, look: Look, *, training: bool = False, glance: Glance | None = None) -> Handle:
    """Look at each input of a layer before anything else does, until the handle that is returned is removed.

    A deep copy or a pickle of the layer is not looked at; what enters a shallow copy counts as the layer's.

    Args:
        layer: The layer.
        look: What looks.
        training: Whether it need only look while the layer is in training mode.
        glance: A quicker look, called in its place where nobody else looks. It says whether that will do, also for the
            layer's own check: it takes inputs of the layer's :func:`ranks` only.
    """
    if not has_inlet(layer):
        return layer.register_forward_pre_hook(_Hook(look), with_kwargs=True)
    with _LOCK:
        inlet: Inlet = vars(layer).get(_CHECK) or Inlet(layer)
        if training:
            inlet.training_looks += (look,)
        else:
            inlet.looks += (look,)
            inlet.glances[look] = glance
        inlet.settle()
        vars(layer)[_CHECK] = inlet
    return _Handle(layer, inlet, look)


def ranks(layer: nn.Module) -> tuple[int, ...] | None:
    """Return the numbers of axes that a layer's own check lets pass, and that it looks at no more; None for any.

    Raises:
        KeyError: If nobody knows what its check does.
    """
    return _RANKS[getattr(type(layer), _CHECK, None)]


def has_inlet(layer: nn.Module) -> bool:
    """Tell whether a layer's input can be looked at without a hook."""
    asks = isinstance(layer, (FusedBatchNorm, GraphBatchNorm)) or (
        _ASKS_FIRST and getattr(type(layer), "forward", None) is _BatchNorm.forward
    )
    own, check = vars(layer), inspect.getattr_static(type(layer), _CHECK, None)
    return (
        asks
        and "forward" not in own
        and isinstance(check, types.FunctionType)
        and isinstance(own.get(_CHECK), (Inlet, type(None)))
    )


def looks_still(handle: Handle) -> bool:
    """Tell whether what :func:`on_input` returned still has its layer looked at, and nobody has put that aside."""
    if isinstance(handle, RemovableHandle):
        hooks = handle.hooks_dict_ref()
        return hooks is not None and handle.id in hooks
    return isinstance(handle, _Handle) and handle.looks


class Inlet:
    """Stands in for a layer's own check of its input, and looks at it first.

    Args:
        layer: The layer.

    Attributes:
        looks: Who looks at it.
        training_looks: Who does while the layer is in training mode.
        glances: Quicker ways of those who look.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.looks: tuple[Look, ...] = ()
        self.training_looks: tuple[Look, ...] = ()
        self.glances: dict[Look, Glance | None] = {}
        self._glance: Glance | None = None
        self._heeds_flag = False
        self._name = place_of_look(self)
        self._place = ""
        self._layer = layer
        takes_any = isinstance(layer, (FusedBatchNorm, GraphBatchNorm))
        self._check: Look | None = None if takes_any else getattr(type(layer), _CHECK).__get__(layer)

    def __call__(self, x: torch.Tensor) -> None:
        """Look at an input, and check it."""
        # a compiled forward is guarded, at each layer, by all that is asked here
        if self._heeds_flag and self._layer.training:
            for look in self.training_looks:
                look(x)
        if _compiling():
            look_in_graph(self._place, x)
        elif (glance := self._glance) is not None and glance(x):
            return
        else:
            self.look(x)
        if self._check is not None:
            self._check(x)

    def look(self, x: torch.Tensor) -> None:
        """Look at an input."""
        for look in self.looks:
            look(x)

    def settle(self) -> None:
        """Find out who looks: whether somebody does alone, and somebody at all."""
        self._glance = self.glances.get(self.looks[0]) if len(self.looks) == 1 else None
        self._heeds_flag = bool(self.training_looks)
        self._place = self._name if self.looks else ""
        glance_at(self._name, self._glance)

    def __reduce__(self) -> tuple[type[Inlet], tuple[nn.Module]]:
        return Inlet, (self._layer,)


class _Hook:
    """A forward hook for layers without an inlet; in a copy or a pickle of the model it does nothing."""

    def __init__(self, look: Look | None = None) -> None:
        self._look = look
        self._place = place_of_look(self) if look is not None else ""

    def __call__(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] = NOTHING) -> None:
        if args or kwargs:
            x = args[0] if args else next(iter(kwargs.values()))
            if _compiling():
                look_in_graph(self._place, x)
            else:
                self.look(x)

    def look(self, x: torch.Tensor) -> None:
        """Look at an input."""
        if self._look is not None:
            self._look(x)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


class _Handle:
    def __init__(self, layer: nn.Module, inlet: Inlet, look: Look) -> None:
        self._layer = layer
        self._inlet = inlet
        self._look = look
        self._forward = type(layer).forward

    @property
    def looks(self) -> bool:
        """Whether the layer still asks."""
        own = vars(self._layer)
        return own.get(_CHECK) is self._inlet and "forward" not in own and type(self._layer).forward is self._forward

    def remove(self) -> None:
        """Look no more."""
        inlet = self._inlet
        with _LOCK:
            inlet.looks = _without(inlet.looks, self._look)
            inlet.glances.pop(self._look, None)
            inlet.training_looks = _without(inlet.training_looks, self._look)
            inlet.settle()
            if not inlet.looks and not inlet.training_looks and vars(self._layer).get(_CHECK) is inlet:
                vars(self._layer).pop(_CHECK, None)  # the garbage collector may have come first


def _without(looks: tuple[Look, ...], look: Look) -> tuple[Look, ...]:
    return tuple([other for other in looks if other is not look])
