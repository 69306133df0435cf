"""Finding the module in which a non-finite value arises."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from guardserve.modes import EvalHold
from guardserve.nonfinite import NonFinite, find_nonfinite

_state = threading.local()


def is_tracing() -> bool:
    """Tell whether this thread is re-running a forward only to look into it, so that a monitor leaves it out."""
    return getattr(_state, "tracing", False)


@dataclass(frozen=True)
class NonFiniteOrigin:
    """Where a non-finite value came from.

    Attributes:
        module: Qualified name of the first module whose output was non-finite while its inputs were finite;
            ``''`` is the model itself.
        kind: Class name of that module.
        output: The bad tensor of its output.
    """

    module: str
    kind: str
    output: NonFinite

    def __str__(self) -> str:
        return f"{self.module or 'the model itself'} ({self.kind})"


def trace_nonfinite(model: nn.Module, *args: Any, **kwargs: Any) -> NonFiniteOrigin | None:
    """Run a model once more, in eval mode and without gradients, and find where NaN or infinity arises.

    A module is to blame when its inputs are finite and its output is not. Children finish before their
    parents, so the innermost such module that ran first is named.

    Args:
        model: The model, in any mode; every module gets its own flag back.
        args: Positional inputs of the forward.
        kwargs: Keyword inputs of the forward.

    Returns:
        The origin, or None when every output was finite, when the inputs themselves were not, or when the
        forward raised before anything became non-finite.
    """
    origins: list[NonFiniteOrigin] = []
    hold = EvalHold(model)
    hold.acquire()
    try:
        # an operation that refuses NaN may raise after the origin was seen: the origin is what counts
        with suppress(Exception), _hooks(model, origins), torch.no_grad():
            model(*args, **kwargs)
    finally:
        hold.release()
        hold.close()
    return origins[0] if origins else None


@contextmanager
def _hooks(model: nn.Module, origins: list[NonFiniteOrigin]) -> Iterator[None]:
    """Hook every module that takes hooks; TorchScript's children do not."""
    handles = []
    _state.tracing = True
    try:
        for name, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule) or not name:
                handles.append(module.register_forward_hook(_watch(name, origins), with_kwargs=True))
        yield
    finally:
        _state.tracing = False
        for handle in handles:
            handle.remove()


def _watch(name: str, origins: list[NonFiniteOrigin]) -> Any:
    def hook(module: nn.Module, args: object, kwargs: object, output: object) -> None:
        if origins:
            return
        bad = next(find_nonfinite(output), None)
        if bad is not None and next(find_nonfinite((args, kwargs)), None) is None:
            origins.append(NonFiniteOrigin(name, type(module).__name__, bad))

    return hook
