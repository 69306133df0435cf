"""EvalGuard: inference in eval mode and without gradients, whatever the model's flags say."""

from __future__ import annotations

import functools
import logging
import threading
import time
import types
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, ParamSpec, TypeVar, get_args, overload

import torch
from torch import nn

from guardserve.batchnorm import batchnorm_layers
from guardserve.buffers import CONTENT_INTERVAL, BufferWatch
from guardserve.decoration import decorate
from guardserve.exceptions import NonFiniteOutputError, TrainingModeError
from guardserve.gradients import gradients
from guardserve.graphs import graph_norms
from guardserve.modes import EvalHold
from guardserve.nonfinite import NonFinite, find_nonfinite, is_finite
from guardserve.tracing import trace_nonfinite

P = ParamSpec("P")
R = TypeVar("R")

NonFinitePolicy = Literal["raise", "warn", "ignore"]
HazardPolicy = Literal["raise", "warn"]

_log = logging.getLogger(__name__)


class GuardWarning(RuntimeWarning):
    """The guard has met something that it cannot prevent, and goes on."""


class NonFiniteOutputWarning(GuardWarning):
    """A guarded model returned NaN or infinity, and the policy is ``"warn"``."""


class EvalGuard:
    """Runs a model in eval mode and without gradients, and gives every module its own flag back.

    The guard can be called, entered or used as a decorator, nested and from many threads at once::

        guard = EvalGuard(model)
        logits = guard(x)                   # one forward, its outputs checked for NaN and infinity

        with EvalGuard(model) as m:         # a block; m is the model
            features = m.features(x)

        @guard                              # a function, method, generator or coroutine function
        def predict(self, x): ...

    Each module's own ``training`` flag is kept and restored, not the root's, so BatchNorm layers that a
    fine-tuner froze stay frozen afterwards, also when the forward raises. While several threads are inside,
    the flags are restored when the last one leaves.

    A block that is entered turns gradients off for its thread; it must be left in the thread that entered
    it. Decorated generators and coroutines are guarded while they run and not while they are suspended.

    Args:
        model: The model, in any mode.
        on_nonfinite: What to do when an output of a call or of a decorated function holds NaN or infinity:
            ``"raise"`` a :class:`NonFiniteOutputError`, ``"warn"`` with a :class:`NonFiniteOutputWarning`,
            or ``"ignore"`` it. It is counted in any case.
        on_hazard: What to do about a model that eval mode cannot fix: ``"raise"`` a :class:`TrainingModeError`,
            or ``"warn"`` with a :class:`GuardWarning`, count it and go on. Such is one whose BatchNorm layers use
            their batch's statistics in eval mode too (``track_running_stats=False``, or a graph traced or exported
            in training mode): found when the guard is made. And one whose forward moves the running statistics
            all the same: found when it has. Any other buffer that a forward changes is warned of and counted. The
            first call is looked at for that, and then one every 0.1 s, or what came meanwhile in a longer hold.
        trace_interval: Seconds that must pass between two searches for the module where a non-finite value
            arose. Each search runs the model once more.
        inference_mode: Call the model under ``torch.inference_mode()`` rather than ``torch.no_grad()``. It is
            a little faster, but autograd can never use the outputs.

    Attributes:
        module: The model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        on_nonfinite: NonFinitePolicy = "raise",
        on_hazard: HazardPolicy = "raise",
        trace_interval: float = 0.0,
        inference_mode: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"EvalGuard needs a torch.nn.Module, got {type(model).__name__}: pass the model itself")
        for name, value, policy in (
            ("on_nonfinite", on_nonfinite, NonFinitePolicy),
            ("on_hazard", on_hazard, HazardPolicy),
        ):
            if value not in get_args(policy):
                raise ValueError(f"{name}={value!r}: use one of {', '.join(get_args(policy))}")
        self.module = model
        self._on_nonfinite = on_nonfinite
        self._on_hazard = on_hazard
        self._trace_interval = trace_interval
        self._next_trace = 0.0
        self._inference_mode = inference_mode
        self._counts: Counter[str] = Counter()
        self._calls = 0
        self._lock = threading.Lock()
        hazards = list(eval_hazards(model))
        if hazards:
            self._meet("hazards", "; ".join(hazards), len(hazards))
        self._hold = EvalHold(model)
        self._finalizer = weakref.finalize(self, self._hold.abandon)
        self._watch = BufferWatch(model)
        self._watched = self._hold.generation
        self._inside = 0

    @property
    def counts(self) -> Mapping[str, int]:
        """What the guard has met so far.

        ``calls``; ``nonfinite_outputs`` (calls with a non-finite output); ``nonfinite_values``;
        ``training_on_entry`` (calls or blocks that found a module training);
        ``training_during_forward`` (modules that were put in training mode inside a call or block);
        ``buffers_changed`` (buffers that a call or block changed); ``hazards`` (see ``on_hazard``).
        """
        with self._lock:
            counts = dict.fromkeys(COUNTS, 0) | self._counts | {"calls": self._calls}
            counts["training_during_forward"] += self._hold.interventions
        return counts

    def close(self) -> None:
        """Remove the guard's hooks from the model. It also happens when the guard is garbage."""
        if self._finalizer.detach() is not None:
            self._hold.close()

    @overload
    def __call__(self, function: Callable[P, R], /) -> Callable[P, R]: ...
    @overload
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, or decorate a function.

        Raises:
            NonFiniteOutputError: If an output holds NaN or infinity and the policy is ``"raise"``.
            TrainingModeError: If the forward moved running statistics and that policy is ``"raise"``.
        """
        if len(args) == 1 and not kwargs and isinstance(args[0], FUNCTIONS):
            return decorate(args[0], self, self.check)
        output = self.run(*args, **kwargs)
        self.check(output, trace=lambda: trace_nonfinite(self.module, *args, **kwargs))
        return output

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model in eval mode and without gradients, leaving its outputs to a later :meth:`check`."""
        self.acquire()
        try:
            with torch.inference_mode() if self._inference_mode else torch.no_grad():
                output = self.module(*args, **kwargs)
        except BaseException:
            self._release()  # the model's own error is the one to be seen
            raise
        self.release(calls=1)
        return output

    def __enter__(self) -> nn.Module:
        """Enter a block: eval mode, and gradients off in this thread."""
        self.acquire()
        gradients.disable()
        return self.module

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        """Leave the block, restoring the flags unless another holder is still inside."""
        try:
            if kind is None:
                self.release()
            else:
                self._release()
        finally:
            gradients.restore()

    def __reduce__(self) -> tuple[Callable[..., EvalGuard], tuple[nn.Module]]:
        """Copy and pickle as a fresh guard of the copied model."""
        options: dict[str, Any] = {
            "on_nonfinite": self._on_nonfinite,
            "on_hazard": self._on_hazard,
            "trace_interval": self._trace_interval,
            "inference_mode": self._inference_mode,
        }
        return functools.partial(EvalGuard, **options), (self.module,)

    def check(
        self, output: object, name: str = "output", trace: Callable[[], object] = lambda: None
    ) -> list[NonFinite]:
        """Apply the non-finite policy to an output that the guard's model has given.

        Args:
            output: Tensors, nested in any way.
            name: What to call it.
            trace: Called when one of them is non-finite, to name where it arose.

        Returns:
            The non-finite tensors, empty when all is well.

        Raises:
            NonFiniteOutputError: If there is one and the policy is ``"raise"``.
        """
        if isinstance(output, torch.Tensor) and is_finite(output):
            return []
        found = list(find_nonfinite(output, name))
        if not found:
            return found
        self._count("nonfinite_outputs")
        self._count("nonfinite_values", sum(bad.count for bad in found))
        if self._on_nonfinite == "ignore":
            return found
        origin, where = None, f"where it arose is looked for every {self._trace_interval:g} s only"
        if time.monotonic() >= self._next_trace:
            origin = trace()
            where = "where it arose was not found" if origin is None else f"it arose in {origin}"
            self._next_trace = time.monotonic() + self._trace_interval
        message = "; ".join([*map(str, found), where])
        if self._on_nonfinite == "raise":
            raise NonFiniteOutputError(message, found[0], getattr(origin, "module", None))
        warnings.warn(message, NonFiniteOutputWarning, stacklevel=3)
        return found

    def acquire(self) -> None:
        """Hold the model in eval mode until :meth:`release`: for a server's lifetime, so that a call finds it so."""
        found = self._hold.acquire()
        try:
            with self._lock:
                if self._watched != self._hold.generation:
                    self._watch, self._watched = BufferWatch(self.module), self._hold.generation
                elif self._inside == 0:
                    self._watch.mark()
                self._inside += 1
        except BaseException:
            self._hold.release()
            raise
        if found:
            self._count("training_on_entry")
            if self._counts["training_on_entry"] == 1:
                _log.warning(
                    "%s was in training mode (%s); the guard runs it in eval mode. Call .eval() once it is loaded",
                    type(self.module).__name__,
                    _some(self._hold.names(found)),
                )

    def release(self, calls: int = 0) -> None:
        """Let go of the model; the last holder gives every module its own flag back.

        Args:
            calls: Number of calls to count.

        Raises:
            TrainingModeError: If running statistics moved since :meth:`acquire` and the policy is ``"raise"``.
        """
        changed = self._release(calls)
        if changed:
            self._report_changed(changed)

    def _release(self, calls: int = 0) -> list[str]:
        """Let go; return the buffers that changed, which are counted."""
        flipped = self._hold.release()
        if flipped:
            self._count("training_during_forward", len(flipped))
            _log.warning("put in training mode during inference: %s", _some(self._hold.names(flipped)))
        with self._lock:
            self._inside -= 1
            changed = self._watch.changed()
            self._calls += calls
            if changed:
                self._counts["buffers_changed"] += len(changed)
        return changed

    def _report_changed(self, changed: list[str]) -> None:
        statistics = {f"{name}." for name, _ in batchnorm_layers(self.module)}
        moved = [name for name in changed if name[: name.rfind(".") + 1] in statistics]
        if moved:
            self._meet(
                "hazards",
                f"inference moved running statistics: {_some(moved)}. It was noticed now, and may have been any call "
                f"of the last {CONTENT_INTERVAL:g} s; what batch normalisation wrote is put back. Find what calls it "
                "with training=True on these layers",
            )
        others = [name for name in changed if name not in moved]
        if others:
            warnings.warn(f"inference changed buffers: {_some(others)}", GuardWarning, stacklevel=4)

    def _meet(self, what: str, message: str, by: int = 1) -> None:
        """Count a hazard and apply the policy to it."""
        self._count(what, by)
        if self._on_hazard == "raise":
            raise TrainingModeError(message)
        warnings.warn(message, GuardWarning, stacklevel=4)

    def _count(self, what: str, by: int = 1) -> None:
        with self._lock:
            self._counts[what] += by


FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)
"""What a guard takes for a function to decorate rather than for the model's input."""

COUNTS = (
    "calls",
    "nonfinite_outputs",
    "nonfinite_values",
    "training_on_entry",
    "training_during_forward",
    "buffers_changed",
    "hazards",
)


def eval_hazards(model: nn.Module) -> Iterator[str]:
    """Yield what makes a model use its batch's statistics in eval mode too, with the remedy."""
    for name, layer in batchnorm_layers(model):
        if layer.running_mean is None and layer.running_var is None:
            yield (
                f"{name or 'the model itself'} ({type(layer).__name__}) has no running statistics, so a sample's "
                "output depends on its batch mates: train it with track_running_stats=True, or use GroupNorm"
            )
    for norm in graph_norms(model):
        if norm.trains:
            yield (
                f"{norm.name} ({norm.operator}) was traced or exported in training mode and stays so: "
                "call model.eval() before tracing or exporting it, and make the file again"
            )


def _some(names: list[str], limit: int = 3) -> str:
    """Name the first few modules; the root has no name of its own."""
    shown = ", ".join(name or "the model itself" for name in names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
