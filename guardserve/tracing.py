"""Finding the module, operator and channel in which a non-finite value arises."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from guardserve.batchnorm import CHANNEL_AXIS, has_running_stats, is_batchnorm
from guardserve.modes import EvalHold
from guardserve.nonfinite import NonFinite, find_nonfinite, is_finite, named_tensors

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
        operator: The first operator inside it that gave a non-finite value, such as ``aten.log``; None when it
            was not seen, as inside a compiled graph.
        channel: The first bad channel (index along axis 1); None for outputs of fewer than two axes.
        running_mean: Running mean of that channel, when the module is a BatchNorm layer.
        running_var: Running variance of that channel, likewise.
    """

    module: str
    kind: str
    output: NonFinite
    operator: str | None = None
    channel: int | None = None
    running_mean: float | None = None
    running_var: float | None = None

    def __str__(self) -> str:
        text = f"{self.module or 'the model itself'} ({self.kind})"
        if self.operator is not None:
            text += f" by {self.operator}"
        if self.channel is not None:
            text += f", first in channel {self.channel}"
        if self.running_var is not None:
            text += f", where running_mean is {self.running_mean:.4g} and running_var {self.running_var:.4g}"
        return text


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
    trace = _Trace()
    hold = EvalHold(model)
    hold.acquire()
    try:
        # an operation that refuses NaN may raise after the origin was seen: the origin is what counts
        with suppress(Exception), trace.hooks(model), torch.no_grad(), trace:
            model(*args, **kwargs)
    finally:
        hold.release()
        hold.close()
    return trace.origin


class _Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches operators and modules for the first non-finite value."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.origin: NonFiniteOrigin | None = None
        self._running: list[str] = []
        self._operators: list[tuple[str, str]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator, and note it if it made a non-finite value of anything finite."""
        del types
        output = func(*args, **(kwargs or {}))
        if self.origin is None and next(find_nonfinite(output), None) is not None:
            inputs = [tensor for _, tensor in named_tensors((args, kwargs or {}))]
            # a mere view of a bad parameter takes nothing finite
            if not inputs or any(is_finite(tensor) for tensor in inputs):
                self._operators.append((self._running[-1] if self._running else "", str(func.overloadpacket)))
        return output

    @contextmanager
    def hooks(self, model: nn.Module) -> Iterator[None]:
        """Hook every module that takes hooks; TorchScript's children do not."""
        handles: list[Any] = []
        _state.tracing = True
        try:
            for name, module in model.named_modules():
                if not isinstance(module, torch.jit.ScriptModule) or not name:
                    handles.append(module.register_forward_pre_hook(self._entering(name)))
                    handles.append(module.register_forward_hook(self._leaving(name), with_kwargs=True))
            yield
        finally:
            _state.tracing = False
            for handle in handles:
                handle.remove()

    def _entering(self, name: str) -> Any:
        def hook(module: nn.Module, args: object) -> None:
            del module, args
            self._running.append(name)

        return hook

    def _leaving(self, name: str) -> Any:
        def hook(module: nn.Module, args: object, kwargs: object, output: object) -> None:
            self._running.pop()
            if self.origin is not None:
                return
            bad = next(find_nonfinite(output), None)
            if bad is not None and next(find_nonfinite((args, kwargs)), None) is None:
                self.origin = self._blame(name, module, bad)

        return hook

    def _blame(self, name: str, module: nn.Module, bad: NonFinite) -> NonFiniteOrigin:
        inside = f"{name}." if name else ""
        operators = [operator for owner, operator in self._operators if owner == name or owner.startswith(inside)]
        channel = bad.first[CHANNEL_AXIS] if len(bad.first) > CHANNEL_AXIS else None
        mean = var = None
        if is_batchnorm(module) and has_running_stats(module) and channel is not None:
            mean = float(module.get_buffer("running_mean")[channel])
            var = float(module.get_buffer("running_var")[channel])
        operator = operators[0] if operators else None
        return NonFiniteOrigin(name, type(module).__name__, bad, operator, channel, mean, var)
