"""Finding the module, operator and channel in which a non-finite value arises."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from guardserve.batchnorm import CHANNEL_AXIS, has_running_stats, is_batchnorm
from guardserve.modes import EvalHold
from guardserve.nonfinite import NonFinite, find_nonfinite, is_finite, named_tensors

_LOCK = threading.Lock()


class _Thread(threading.local):
    """What is known of each thread.

    Attributes:
        tracing: Whether it is re-running a forward only to look into it, so that a monitor leaves it out.
    """

    tracing = False


this_thread = _Thread()


@contextmanager
def unmonitored() -> Iterator[None]:
    """Leave the forwards of this thread out of what a monitor sees."""
    before, this_thread.tracing = this_thread.tracing, True
    try:
        yield
    finally:
        this_thread.tracing = before


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
    model = getattr(model, "_orig_mod", model)  # a compiled model's own code tells more than its graph
    with _LOCK:
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
    """Watches operators and modules for the first non-finite value that is not used up again.

    An attention mask of minus infinity is no fault: the softmax that takes it gives finite values, and with
    that everything noted before is forgotten.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Say no: torch would import its compiler, for seconds, at the first operator."""
        return False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.origin: NonFiniteOrigin | None = None
        self._names: dict[nn.Module, str] = {}
        self._running: list[tuple[str, bool]] = []
        self._operators: list[tuple[str, str]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator, and note it if it made a non-finite value of anything finite."""
        del types
        output = func(*args, **(kwargs or {}))
        operator = str(func.overloadpacket)
        outputs = _floating(output)
        if outputs and not operator.startswith(("aten.empty", "aten.new_empty")):
            inputs = _floating((args, kwargs or {}))
            if all(map(is_finite, outputs)):
                if not all(map(is_finite, inputs)):
                    self.origin = None
                    self._operators.clear()
            # a mere view of a bad parameter takes nothing finite
            elif not inputs or any(map(is_finite, inputs)):
                self._operators.append((self._running[-1][0] if self._running else "", operator))
        return output

    @contextmanager
    def hooks(self, model: nn.Module) -> Iterator[None]:
        """Watch the modules of a model as they run in this thread.

        The hooks are torch's global ones and know their thread: hooks on the modules themselves would run in
        other threads' forwards as well.
        """
        thread = threading.get_ident()
        self._names = {module: name for name, module in model.named_modules()}

        def entering(module: nn.Module, *_: object) -> None:
            if threading.get_ident() == thread and module in self._names:
                self._running.append((self._names[module], bool(self._operators)))

        def leaving(module: nn.Module, args: object, output: object) -> None:
            if threading.get_ident() == thread and module in self._names:
                name = self._names[module]
                while self._running:  # more than one where the model caught an exception
                    left, came_late = self._running.pop()
                    if left == name:
                        self._leave(name, module, args, output, came_late=came_late)
                        break

        handles = [register_module_forward_pre_hook(entering), register_module_forward_hook(leaving)]
        try:
            with unmonitored():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _leave(self, name: str, module: nn.Module, args: object, output: object, *, came_late: bool) -> None:
        """Blame a module that gave a non-finite value for finite inputs.

        Keyword inputs do not reach a global hook: then, an operator that was noted before tells.
        """
        if self.origin is not None:
            return
        bad = next(find_nonfinite(output), None)
        taken = _floating(args)
        if bad is not None and (all(map(is_finite, taken)) if taken else not came_late):
            self.origin = self._blame(name, module, bad)

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


def _floating(value: object) -> list[torch.Tensor]:
    return [t for _, t in named_tensors(value) if t.is_floating_point() or t.is_complex()]
