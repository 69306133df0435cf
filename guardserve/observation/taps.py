"""Forward hooks that read what enters each BatchNorm layer, and little else.

The hot path is here: a few tensor operations a layer, no synchronisation, no judging.
"""

from __future__ import annotations

import itertools
import logging
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from guardserve.batchnorm import CHANNEL_AXIS, ObservationPoint, batchnorm_layers, observation_points
from guardserve.graphs import SCRIPT_OPERATORS, GraphMarks, graph_norms
from guardserve.inlets import NOTHING, Look, looks_still, on_input
from guardserve.nonfinite import named_tensors
from guardserve.observation.compiled import (
    Inbox,
    Traced,
    exporting,
    faked,
    hand_over,
    per_sample,
    read_in_graph,
    uncompiled,
)
from guardserve.observation.keys import sample_keys
from guardserve.observation.reading import VALUES, Plan, Reading, Scratch, plan_for, read
from guardserve.observation.record import Record
from guardserve.observation.sheets import Sheets
from guardserve.observation.workspace import Place, Slot, Workspace, fits
from guardserve.tracing import is_tracing

TIMED = 16
"""One forward in so many is timed."""

_KEPT_PLANS = 64

_Key = tuple[torch.Size, int | None, bool]

_LOST = "its forward, its check of the input or its hooks were replaced since: attach the monitor again"

_tracing_state = torch._C._get_tracing_state  # noqa: SLF001 - torch.jit.is_tracing asks it

_log = logging.getLogger(__name__)


class RootHook:
    """A hook on the model itself, which runs as it is, though the model be compiled: its forward is a graph's root.

    Only where the model is part of a larger graph, the hook is too. In a copy or a pickle of the model it does nothing.
    """

    def __init__(self, function: Callable[..., None] | None = None) -> None:
        self._function = function

    @property
    def __name__(self) -> str:
        """What ``torch.jit.script`` asks of hooks first, and nobody else needs."""
        raise AttributeError("a monitored model cannot be scripted: close its monitor, and script it then")

    @uncompiled
    def __call__(self, *args: Any) -> None:
        """Run the hook."""
        if self._function is not None:
            self._function(*args)

    def __reduce__(self) -> tuple[type[RootHook], tuple[()]]:
        return RootHook, ()


class _Tap:
    """Reads one layer."""

    def __init__(self, index: int, point: ObservationPoint) -> None:
        self.index = index
        self.point = point
        self.fault: str | None = None
        self.anchor = point.anchor if point.readable else None
        self._plans: dict[object, tuple[Plan, torch.Tensor]] = {}

    def read(self, x: torch.Tensor, record: Record) -> None:
        """Read an activation that has no slot to be written down in."""
        if x.requires_grad:
            x = x.detach()
        key = (x.shape, x.stride(), x.device, record.samples, record.values)
        planned = self._plans.get(key)
        if planned is None:
            planned = self._plan(x, record)
            if planned is None:
                return
            if len(self._plans) >= _KEPT_PLANS:
                self._plans.clear()
            self._plans[key] = planned
        record.readings.append(read(self.index, x, planned[0], record.turn, planned[1], scratch=record.scratch))
        if record.key is not None:
            record.places.append(Place(self.index, x.shape, x.stride(), *planned))

    def _plan(self, x: torch.Tensor, record: Record) -> tuple[Plan, torch.Tensor] | None:
        if not self.point.takes(x):
            self.fault = "its input has not the shape that its statistics are for"
            return None
        if not x.numel():
            return None
        plan = plan_for(x.shape, x.stride(), record.values, record.samples)
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
        keyed: Whether records say what tells their samples apart, which costs a hash of the input.
    """

    def __init__(self, model: nn.Module, emit: Callable[[Record], None], values: int | None = VALUES) -> None:
        self.points: list[ObservationPoint] = []
        self.values = values
        self.keyed = False
        self._unobserved: dict[str, str] = {}
        self._emit = emit
        self._open = _Open()
        self._turns = itertools.count()
        self._no_slots: list[Slot | None] = []
        self._gave_up = False
        self._order: tuple[int, ...] = ()  # the layers of the last forward
        self._workspaces: dict[_Key, Workspace | None] = {}
        self._sheets = Sheets()
        self._taps: list[_Tap] = []
        self._handles: list[Any] = []
        self._marks: GraphMarks | None = None
        try:
            self._attach(model)
        except BaseException:
            self.close()
            raise

    @property
    def unobserved(self) -> dict[str, str]:
        """Qualified names of BatchNorm layers that cannot be watched, each with the reason."""
        taps = zip(self._taps, self._handles, strict=False)  # no handles are left of closed ones
        # a forward that was put around a layer's own still has it seen
        lost = [tap for tap, handle in taps if not looks_still(handle) and tap.index not in self._order]
        return (
            self._unobserved
            | {tap.point.name: _LOST for tap in lost}
            | {tap.point.name: tap.fault for tap in self._taps if tap.fault is not None}
        )

    def close(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._marks is not None:
            self._marks.close()

    def _attach(self, model: nn.Module) -> None:
        model = getattr(model, "_orig_mod", model)  # hooks of a compiled model are those of what it was made from
        self.points.extend(observation_points(model))
        self._marks = GraphMarks(model)
        self.points.extend(ObservationPoint(name, layer) for name, layer in self._marks.layers.items())
        self._no_slots += [None] * len(self.points)
        for index, point in enumerate(self.points):
            tap = _Tap(index, point)
            self._taps.append(tap)
            self._handles.append(on_input(point.layer, self._reader(tap)))
        observed = {point.name for point in self.points}
        for name, _ in batchnorm_layers(model):
            if name not in observed:
                self._unobserved[name] = "it keeps no running statistics (track_running_stats=False)"
        for norm in graph_norms(model):
            if norm.name not in observed:
                self._unobserved[norm.name] = (
                    "it is in a TorchScript graph, which takes no hooks: export the model with torch.export instead"
                    if norm.operator in SCRIPT_OPERATORS
                    else "its constants are no attributes of the graph's module"
                )
        if self.points:
            with torch.inference_mode(mode=False):
                device = next((tap.anchor.device for tap in self._taps if tap.anchor is not None), torch.device("cpu"))
                self._turn = torch.zeros((), dtype=torch.int64, device=device)
            deliver = weakref.WeakMethod(self._deliver)
            self._inbox = Inbox(lambda *delivered: None if (method := deliver()) is None else method(*delivered))
            self._handles.append(model.register_forward_pre_hook(RootHook(self._begin), with_kwargs=True))
            self._handles.append(model.register_forward_hook(RootHook(self._end), always_call=True))

    def _reader(self, tap: _Tap) -> Look:
        opened, clock, compiling = self._open, time.perf_counter, torch.compiler.is_dynamo_compiling
        index = tap.index

        def look(layer: nn.Module, x: torch.Tensor) -> None:
            del layer
            if compiling():
                self._read_in_graph(tap, x)
                return
            record = opened.record
            if record is None:
                self._read_alone(tap, x)
            elif record is not _IGNORED:
                began = clock() if record.seconds else 0.0
                try:
                    slot = record.slots[index]
                    if slot is not None and slot.take(x, record.turn):
                        record.taken += 1
                    else:
                        tap.read(x, record)
                except Exception as error:  # noqa: BLE001 - whatever it is, the answer is not to be lost with it
                    _excuse(tap, error)
                if began:
                    record.spent += clock() - began

        return look

    def _read_alone(self, tap: _Tap, x: torch.Tensor) -> None:
        """Read where a part of the model was called by itself."""
        if _looks_only():
            return
        record = Record(None, next(self._turns), self.values, self._no_slots)
        try:
            tap.read(x, record)
            if record.readings:
                self._finish(record)
        except Exception as error:  # noqa: BLE001 - see above
            _excuse(tap, error)

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] = NOTHING) -> None:
        del model
        if torch.compiler.is_dynamo_compiling():
            self._begin_in_graph(args, kwargs)
            return
        opened = self._open
        if _looks_only():
            opened.record = _IGNORED
            return
        try:
            opened.record = self._opened(args, kwargs)
        except Exception as error:  # noqa: BLE001 - whatever it is, the answer is not to be lost with it
            opened.record = _IGNORED
            self._give_up(error)
        opened.traced.clear()
        opened.traced.open = True

    def _opened(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Record:
        """Make the record of a forward."""
        began, turn = time.perf_counter(), next(self._turns)
        first = args[0] if args and type(args[0]) is torch.Tensor else None
        if first is None or not first.ndim:
            first = next((tensor for _, tensor in named_tensors((args, kwargs)) if tensor.ndim), None)
        if first is None:
            record = Record(None, turn, self.values, self._no_slots)
        else:
            shape, values = first.shape, self.values
            record = Record(shape[0], turn, values, self._no_slots)
            if self.keyed:
                record.keys = sample_keys((tensor for _, tensor in named_tensors((args, kwargs))), shape[0])
            key = shape, values, first.is_cpu
            workspace = self._workspaces.get(key)
            if workspace is not None:
                record.sheet = sheet = self._sheets.take(workspace)
                record.slots = sheet.turn_to(turn)
            elif key not in self._workspaces:
                record.key = key
        record.scratch = self._open.scratch
        record.scratch.rewind()
        if turn % TIMED == 0:
            record.seconds = began
            record.spent = time.perf_counter() - began
        return record

    def _end(self, model: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """Hand over the record; a forward that raised (its output is None, as a good one's may be) saw none through."""
        del model, args
        if torch.compiler.is_dynamo_compiling():
            self._end_in_graph()
            return
        opened = self._open
        record = opened.record
        opened.record = None
        opened.traced.open = False
        if record is None or record is _IGNORED or (output is None and sys.exc_info()[0] is not None):
            return
        try:
            self._close(record)
        except Exception as error:  # noqa: BLE001 - see above
            self._give_up(error)

    def _close(self, record: Record) -> None:
        """End a record, and hand it over if it shows anything."""
        began = time.perf_counter() if record.seconds else 0.0
        traced = self._open.traced
        if traced.readings:
            self._unpack(record, traced.readings)
            self._turn.add_(1)
        if record.key is not None:
            self._lay_out(record, record.key)
        record.close()
        self._order = record.order
        if record.readings or record.bundle is not None:
            if record.seconds:
                record.spent += time.perf_counter() - began
            self._finish(record)

    def _give_up(self, error: Exception) -> None:
        """Leave a forward out; the first one is told of."""
        if not self._gave_up:
            self._gave_up = True
            _log.warning("a forward cannot be monitored, and others may be left out too", exc_info=error)

    def _lay_out(self, record: Record, key: _Key) -> None:
        """Make a workspace for forwards like this one, if they can have one."""
        workspace = None
        if len(record.places) > 1 and record.whole and fits(record.places):
            workspace = Workspace(record.places, len(self.points))
        if len(self._workspaces) >= _KEPT_PLANS:
            self._workspaces.clear()
        self._workspaces[key] = workspace

    def _finish(self, record: Record) -> None:
        if record.readings and record.readings[0].total.is_cuda:
            record.ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            record.ready.record()
        if record.seconds:
            record.seconds = time.perf_counter() - record.seconds
        self._emit(record)

    def _read_in_graph(self, tap: _Tap, x: torch.Tensor) -> None:
        """Read in code that is being compiled."""
        traced, anchor = self._open.traced, tap.anchor
        if not traced.open or anchor is None:
            return
        if x.ndim > CHANNEL_AXIS and x.shape[CHANNEL_AXIS] == anchor.shape[0]:
            total, squares, count = read_in_graph(x, anchor, self._turn, self.values)
            traced.readings.append((tap.index, count, total, squares))

    def _begin_in_graph(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Begin a forward that is part of a larger graph."""
        traced = self._open.traced
        traced.clear()
        for value in () if exporting() else (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor) and value.ndim and not traced.open:
                traced.samples.append(value.shape[0])
                traced.open = True

    def _end_in_graph(self) -> None:
        """Hand over what such a forward read."""
        traced = self._open.traced
        if traced.readings:
            route, counts = [reading[0] for reading in traced.readings], [reading[1] for reading in traced.readings]
            readings = [reading[2] for reading in traced.readings] + [reading[3] for reading in traced.readings]
            hand_over(readings, self._turn, self._inbox.token, traced.samples[0], route, counts)
        traced.clear()

    def _deliver(self, samples: int, route: list[int], counts: list[int], readings: list[torch.Tensor]) -> None:
        """Receive what a graph read that the whole forward is part of."""
        if not _looks_only():
            record = Record(samples, next(self._turns), self.values, self._no_slots)
            self._unpack(record, zip(route, counts, readings, readings[len(route) :], strict=False))
            self._finish(record)

    def _unpack(self, record: Record, readings: Iterable[tuple[int, int, torch.Tensor, torch.Tensor]]) -> None:
        """Take what compiled code read into a record."""
        for index, count, total, squares in readings:
            if len(total):
                merged = per_sample(total, squares, count, record.samples or len(total))
                record.readings.append(Reading(index, *merged))


class _Open(threading.local):
    """What a thread has of its own: the record of the forward that it is in, what compiled code read of it, memory."""

    def __init__(self) -> None:
        self.record: Record | None = None
        self.traced = Traced()
        self.scratch = Scratch()


_IGNORED = Record(0, 0, None, [])


def _looks_only() -> bool:
    """Tell whether a forward of this thread serves nobody: it is traced or exported, or re-run to look into it."""
    return is_tracing() or _tracing_state() is not None or faked()


def _excuse(tap: _Tap, error: Exception) -> None:
    if tap.fault is None:
        _log.warning("BatchNorm layer %s cannot be monitored", tap.point.name, exc_info=error)
    tap.fault = f"it could not be read: {type(error).__name__}: {error}"
