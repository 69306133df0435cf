"""Forward hooks that read what enters each BatchNorm layer, and little else.

The hot path is here: a few tensor operations a layer, no synchronisation, no judging.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from guardserve.batchnorm import ObservationPoint, batchnorm_layers, observation_points
from guardserve.graphs import graph_norms
from guardserve.monitor.reading import VALUES, Plan, Reading, Rows, read, side_by_side
from guardserve.nonfinite import named_tensors
from guardserve.tracing import is_tracing

TIMED = 16
"""One forward in so many is timed."""

_KEPT_PLANS = 64

_log = logging.getLogger(__name__)


class Record:
    """What one forward showed.

    Attributes:
        samples: Number of samples, as the model's own input has them; None when a part was called by itself.
        readings: What each layer showed, every time it ran, in the order in which they ran.
        turn: Number of the forward.
        values: Values read of each sample at each layer, about; None is all.
        ready: On an accelerator, the event after which the readings are there.
        seconds: If the forward was timed, when it began; at its end, how long it took.
        spent: If it was timed, the seconds of it that readings took.
        sink: Where the p-values of its samples go, if somebody waits for them.
    """

    __slots__ = ("_rows", "readings", "ready", "samples", "seconds", "sink", "spent", "turn", "values")

    def __init__(self, samples: int | None, turn: int, values: int | None) -> None:
        self.samples = samples
        self.turn = turn
        self.values = values
        self.readings: list[Reading] = []
        self.ready: torch.cuda.Event | None = None
        self.seconds: float | None = None
        self.spent = 0.0
        self.sink: list[float] | None = None
        self._rows: Rows | None = None

    @property
    def count(self) -> int:
        """Number of samples that it counts for."""
        return len(self.readings[0].total) if self.samples is None else self.samples

    @property
    def route(self) -> tuple[int, ...]:
        """The layers that ran, in order, as often as each did."""
        return tuple([reading.index for reading in self.readings])

    @property
    def whole(self) -> bool:
        """Whether each layer that ran did so once, with one row a sample."""
        return len(set(self.route)) == len(self.readings) and all(
            len(reading.total) == self.samples for reading in self.readings
        )

    def rows(self) -> Rows:
        """Return all readings as arrays, side by side; only if :attr:`whole`."""
        if self._rows is None:
            self._rows = self.rows_of(self.readings)
        return self._rows

    def rows_of(self, readings: Sequence[Reading]) -> Rows:
        """Return some of its readings, with equally many samples, as arrays side by side."""
        if self.ready is not None:
            self.ready.synchronize()
        return side_by_side(readings)


class Hook:
    """A forward hook that a copy or a pickle of the model leaves behind: there it does nothing."""

    def __init__(self, function: Callable[..., None] | None = None) -> None:
        self._function = function

    def __call__(self, *args: Any) -> None:
        """Run the hook."""
        if self._function is not None:
            self._function(*args)

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()


class _Tap:
    """Reads one layer."""

    def __init__(self, index: int, point: ObservationPoint) -> None:
        self.index = index
        self.point = point
        self.fault: str | None = None
        self._plans: dict[object, tuple[Plan, torch.Tensor]] = {}

    def read(self, x: torch.Tensor, record: Record) -> Reading | None:
        """Read an activation; None if there is nothing to read."""
        key = (x.shape, x.stride(), x.device, record.samples, record.values)
        planned = self._plans.get(key)
        if planned is None:
            planned = self._plan(x, record)
            if planned is None:
                return None
            if len(self._plans) >= _KEPT_PLANS:
                self._plans.clear()
            self._plans[key] = planned
        return read(self.index, x.detach() if x.requires_grad else x, planned[0], record.turn, planned[1])

    def _plan(self, x: torch.Tensor, record: Record) -> tuple[Plan, torch.Tensor] | None:
        if not self.point.takes(x):
            self.fault = "its input has not the shape that its statistics are for"
            return None
        if not x.numel():
            return None
        plan = Plan(x.shape, x.stride(), record.values, record.samples)
        return plan, self.point.anchor.to(x.device).reshape(-1, *[1 for _ in plan.axes])


class Taps:
    """The hooks of one monitor on one model.

    Args:
        model: The model.
        emit: Called with the record of each forward, in the thread that ran it.
        values: Values to read of each sample at each layer, about; None reads all. It may be changed at any time.

    Attributes:
        points: The observation points, in registration order; a reading refers to one by index.
        values: See above.
    """

    def __init__(self, model: nn.Module, emit: Callable[[Record], None], values: int | None = VALUES) -> None:
        self.points: list[ObservationPoint] = []
        self.values = values
        self._unobserved: dict[str, str] = {}
        self._emit = emit
        self._open = _Open()
        self._turns = itertools.count()
        self._taps: list[_Tap] = []
        self._handles: list[Any] = []
        try:
            self._attach(model)
        except BaseException:
            self.close()
            raise

    @property
    def unobserved(self) -> dict[str, str]:
        """Qualified names of BatchNorm layers that cannot be watched, each with the reason."""
        return self._unobserved | {tap.point.name: tap.fault for tap in self._taps if tap.fault is not None}

    def close(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _attach(self, model: nn.Module) -> None:
        self.points.extend(observation_points(model))
        for index, point in enumerate(self.points):
            tap = _Tap(index, point)
            self._taps.append(tap)
            hook = Hook(self._reader(tap))
            self._handles.append(point.layer.register_forward_pre_hook(hook, with_kwargs=True))
        observed = {point.name for point in self.points}
        for name, _ in batchnorm_layers(model):
            if name not in observed:
                self._unobserved[name] = "it keeps no running statistics (track_running_stats=False)"
        for norm in graph_norms(model):
            self._unobserved[norm.name] = "a traced or exported graph takes no hooks"
        if self.points:
            self._handles.append(model.register_forward_pre_hook(Hook(self._begin), with_kwargs=True))
            self._handles.append(model.register_forward_hook(Hook(self._end), always_call=True))

    def _reader(self, tap: _Tap) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        opened, clock = self._open, time.perf_counter

        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            del layer
            record = opened.record
            if record is None:
                self._read_alone(tap, args, kwargs)
            elif record is not _IGNORED:
                began = clock() if record.seconds else 0.0
                try:
                    x = args[0] if args else next(iter(kwargs.values()))
                    reading = tap.read(x, record)
                    if reading is not None:
                        record.readings.append(reading)
                except Exception as error:  # noqa: BLE001 - whatever it is, the answer is not to be lost with it
                    _excuse(tap, error)
                if began:
                    record.spent += clock() - began

        return hook

    def _read_alone(self, tap: _Tap, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read where a part of the model was called by itself."""
        if _looks_only():
            return
        record = Record(None, next(self._turns), self.values)
        try:
            x = args[0] if args else next(iter(kwargs.values()))
            reading = tap.read(x, record)
        except Exception as error:  # noqa: BLE001 - see above
            _excuse(tap, error)
        else:
            if reading is not None:
                record.readings.append(reading)
                self._finish(record)

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del model
        if _looks_only():
            self._open.record = _IGNORED
            return
        first = next((tensor for _, tensor in named_tensors((args, kwargs)) if tensor.ndim), None)
        record = Record(None if first is None else len(first), next(self._turns), self.values)
        if record.turn % TIMED == 0:
            record.seconds = time.perf_counter()
        self._open.record = record

    def _end(self, model: nn.Module, args: object, output: object) -> None:
        """Hand over the record; a forward that raised (its output is None) has seen no sample through."""
        del model, args
        record = self._open.record
        self._open.record = None
        if record is not None and record.readings and output is not None:
            self._finish(record)

    def _finish(self, record: Record) -> None:
        if record.readings[0].total.is_cuda:
            record.ready = torch.cuda.Event()
            record.ready.record()
        if record.seconds:
            record.seconds = time.perf_counter() - record.seconds
        self._emit(record)


class _Open(threading.local):
    """The record of the forward that this thread is in; None outside of one."""

    record: Record | None = None


_IGNORED = Record(0, 0, None)


def _looks_only() -> bool:
    """Tell whether a forward serves nobody: it is traced, or re-run to look into it."""
    return is_tracing() or torch.jit.is_tracing()  # type: ignore[no-untyped-call]


def _excuse(tap: _Tap, error: Exception) -> None:
    if tap.fault is None:
        _log.warning("BatchNorm layer %s cannot be monitored", tap.point.name, exc_info=error)
    tap.fault = f"it could not be read: {type(error).__name__}: {error}"
