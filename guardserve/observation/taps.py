"""Forward hooks that read what enters each BatchNorm layer, and little else.

The hot path is here: a few tensor operations a layer, no synchronisation, no judging.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from typing_extensions import Self

from guardserve.batchnorm import ObservationPoint, batchnorm_layers, observation_points
from guardserve.compiled import Glance, enter_in_graph, fake_mode, leave_in_graph, place_of_forwards, skip, uncompiled
from guardserve.graphs import SCRIPT_OPERATORS, GraphMarks, graph_norms
from guardserve.inlets import NOTHING, Look, looks_still, on_input, ranks
from guardserve.nonfinite import named_tensors
from guardserve.observation.keys import sample_keys
from guardserve.observation.reading import VALUES, Plan, Scratch, plan_for, read
from guardserve.observation.record import Record
from guardserve.observation.sheets import Sheets
from guardserve.observation.workspace import NATIVE, Place, Workspace, fits
from guardserve.tracing import this_thread

if NATIVE:
    from guardserve.native import Glance as _Glance
    from guardserve.native import begin, end

if TYPE_CHECKING:
    from guardserve.native import Slot

MOST_MISSES = 8
"""Forwards in a row that do not fit their workspace before another is made."""

TIMED = 16
"""One forward in so many is timed."""

_KEPT_PLANS = 64

_Key = tuple[torch.Size, int | None, bool]

_Faults = dict[int, tuple[int, str]]
"""Why layers cannot be read, by their index, and in which turn that was found."""

_LOST = "its forward, its check of the input or its hooks were replaced since: attach the monitor again"

_compiling = torch.compiler.is_dynamo_compiling
_tracing_state = torch._C._get_tracing_state  # noqa: SLF001 - torch.jit.is_tracing asks it

_transform = torch._C._functorch.peek_interpreter_stack  # noqa: SLF001 - of torch.func: its tensors have no memory

_log = logging.getLogger(__name__)


def _nothing(*_args: object) -> None: ...


class RootHook(functools.partial[None]):
    """A hook on the model itself; in a copy or a pickle of the model it does nothing."""

    def __new__(cls, function: Callable[..., None] = _nothing) -> Self:
        """Make one of a function that is :func:`uncompiled`."""
        return super().__new__(cls, function)

    @property
    def __name__(self) -> str:
        """What ``torch.jit.script`` asks of hooks first, and nobody else needs."""
        raise AttributeError("a monitored model cannot be scripted: close its monitor, and script it then")

    def __reduce__(self) -> tuple[type[RootHook], tuple[()]]:
        return RootHook, ()


class _Tap:
    """Reads one layer.

    Attributes:
        look: What is called with its input.
    """

    look: Look

    def __init__(self, index: int, point: ObservationPoint, faults: _Faults) -> None:
        self.index = index
        self.point = point
        self._faults = faults
        self._plans: dict[object, tuple[Plan, torch.Tensor]] = {}

    def read(self, x: torch.Tensor, record: Record) -> None:
        """Read an activation that has no slot to be written down in."""
        if x.is_meta:
            return
        if x.requires_grad:
            x = x.detach()
        key = (x.shape, x.stride(), x.device, record.samples, record.values)
        planned = self._plans.get(key)
        if planned is None:
            if not self.point.takes(x):
                self._faults[self.index] = record.turn, "its input has not the shape that its statistics are for"
                return
            if not x.numel():
                return
            planned = self._plan(x, record)
            if len(self._plans) >= _KEPT_PLANS:
                self._plans.clear()
            self._plans[key] = planned
        record.readings.append(read(self.index, x, planned[0], record.turn, planned[1], scratch=record.scratch))
        if record.key is not None:
            record.places.append(Place(self.index, x.shape, x.stride(), *planned))

    def excuse(self, error: Exception, turn: int) -> None:
        """Take down why an input could not be read."""
        if self.index not in self._faults:
            _log.warning("BatchNorm layer %s cannot be monitored", self.point.name, exc_info=error)
        reason = next(iter(str(error).splitlines()), "")
        self._faults[self.index] = turn, f"it could not be read: {type(error).__name__}: {reason}"

    def _plan(self, x: torch.Tensor, record: Record) -> tuple[Plan, torch.Tensor]:
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
        self._faults: _Faults = {}
        self._owner = object()
        self._place = place_of_forwards(self)
        self._open = _Open()
        self._emit = emit
        self._forwards = itertools.count()
        self._turns: dict[_Key | None, Iterator[int]] = {}
        self._no_slots: list[Slot | None] = []
        self._gave_up = False
        self._order: tuple[int, ...] = ()  # the layers of the last forward
        self._workspaces: dict[_Key, Workspace | None] = {}
        self._sheets = Sheets()
        self._taps: list[_Tap] = []
        self._handles: list[Any] = []
        self._marks: GraphMarks | None = None
        if not NATIVE:
            _log.info(
                "monitoring takes longer than need be: install guardserve again where there is a C compiler "
                "(pip install --force-reinstall --no-cache-dir)"
            )
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
            | {self.points[index].name: fault for index, (_, fault) in sorted(self._faults.copy().items())}
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
            tap = _Tap(index, point, self._faults)
            self._taps.append(tap)
            tap.look = self._reader(tap)
            self._handles.append(on_input(point.layer, tap.look, glance=self._glance(tap)))
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
            self._model = weakref.ref(model)
            self._handles.append(model.register_forward_pre_hook(RootHook(self._begin), with_kwargs=True))
            self._handles.append(model.register_forward_hook(RootHook(self._end), always_call=True))

    def _reader(self, tap: _Tap) -> Look:
        opened, clock = self._open, time.perf_counter
        index = tap.index

        def look(x: torch.Tensor) -> None:
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
                        if record.scratch is None:
                            record.scratch = opened.scratch
                            record.scratch.rewind()
                        tap.read(x, record)
                except Exception as error:  # noqa: BLE001 - whatever it is, the answer is not to be lost with it
                    tap.excuse(error, record.turn)
                if began:
                    record.spent += clock() - began

        skip(look)
        return look

    def _glance(self, tap: _Tap) -> Glance | None:
        """Return the quick way to a layer's slot, if there may be one."""
        if not NATIVE:
            return None
        try:
            allowed = ranks(tap.point.layer)
        except KeyError:
            return None
        return _Glance(self._owner, tap.index, *[] if allowed is None else [allowed]).at

    def _read_alone(self, tap: _Tap, x: torch.Tensor) -> None:
        """Read where a part of the model was called by itself."""
        if _looks_only():
            return
        record = Record(None, self._turn(None), self.values, self._no_slots)
        try:
            tap.read(x, record)
            if record.readings:
                self._faults.pop(tap.index, None)
                self._finish(record)
        except Exception as error:  # noqa: BLE001 - see above
            tap.excuse(error, record.turn)

    @uncompiled
    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] = NOTHING) -> None:
        """Open a record: though the model be compiled, as its forward is a graph's root, or in a larger graph."""
        if _compiling():
            self._begin_in_graph(args, kwargs)
            return
        opened = self._open
        if opened.record is not None and _calls(model) > 1:  # else it is one that was given up
            opened.depth += 1
            return
        opened.in_graph = 0  # a graph that began a forward need not be the one that ended it
        self._begin_anew(args, kwargs, keyed=True)

    def enter(self, inputs: Sequence[torch.Tensor], *, whole: bool) -> None:
        """Open a record where a graph that the forward is part of says so."""
        opened, model = self._open, self._model()
        if opened.record is not None and model is not None and _calls(model):
            opened.depth += 1
        else:
            self._begin_anew(tuple(inputs), {}, keyed=whole)

    def _begin_anew(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, keyed: bool) -> None:
        opened = self._open
        if opened.record is not None and opened.record.sheet is not None:
            end(self._owner)
        opened.depth = 0
        if _looks_only():
            opened.record = _IGNORED
            return
        try:
            opened.record = self._opened(args, kwargs, keyed=keyed and self.keyed)
        except Exception as error:  # noqa: BLE001 - whatever it is, the answer is not to be lost with it
            opened.record = _IGNORED
            self._give_up(error)

    def _opened(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, keyed: bool) -> Record:
        """Make the record of a forward."""
        began, timed = time.perf_counter(), next(self._forwards) % TIMED == 0
        first = args[0] if args and type(args[0]) is torch.Tensor else None
        if first is None or not first.ndim:
            first = next((tensor for _, tensor in named_tensors((args, kwargs)) if tensor.ndim), None)
        if first is None:
            record = Record(None, self._turn(None), self.values, self._no_slots)
        else:
            shape, values = first.shape, self.values
            key = shape, values, first.is_cpu
            turn = self._turn(key)
            record = Record(shape[0], turn, values, self._no_slots)
            if keyed:
                record.keys = sample_keys((tensor for _, tensor in named_tensors((args, kwargs))), shape[0])
            workspace = self._workspaces.get(key)
            if workspace is not None:
                record.sheet = sheet = self._sheets.take(workspace)
                record.slots = sheet.slots
                begin(self._owner, record, sheet.slots, turn, timed)
            elif key not in self._workspaces:
                record.key = key
        if timed:
            record.seconds = began
            record.spent = time.perf_counter() - began
        return record

    def _turn(self, key: _Key | None) -> int:
        """Count forwards of one shape: what they read turns by that, also where those of several come in turns."""
        turns = self._turns.get(key)
        if turns is None:
            if len(self._turns) >= _KEPT_PLANS:
                self._turns.clear()
                self._workspaces.clear()  # their slots know the turns that they had
            turns = self._turns.setdefault(key, itertools.count())
        return next(turns)

    @uncompiled
    def _end(self, model: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """Hand over the record; a forward that raised (its output is None, as a good one's may be) saw none through."""
        del model, args
        if _compiling():
            self._end_in_graph()
            return
        self._open.in_graph = 0
        self._end_now(given_up=output is None and sys.exc_info()[0] is not None)

    def leave(self) -> None:
        """End one that was entered."""
        self._end_now(given_up=False)

    def _end_now(self, *, given_up: bool) -> None:
        opened = self._open
        if opened.depth:
            opened.depth -= 1
            return
        record = opened.record
        opened.record = None
        if record is not None and record.sheet is not None:
            taken, spent = end(self._owner)
            record.taken += taken
            record.spent += spent
        if record is None or record is _IGNORED or given_up:
            return
        try:
            self._close(record)
        except Exception as error:  # noqa: BLE001 - see above
            self._give_up(error)

    def _close(self, record: Record) -> None:
        """End a record, and hand it over if it shows anything."""
        began = time.perf_counter() if record.seconds else 0.0
        if record.key is not None:
            self._lay_out(record, record.key)
        elif record.sheet is not None:
            self._heed(record.sheet.workspace, fits=record.taken == len(record.sheet.workspace.order))
        record.close()
        bundle = record.bundle
        self._order = record.order if bundle is None else bundle.order
        for index in set(self._faults).intersection(self._order) if self._faults else ():
            if self._faults.get(index, (record.turn,))[0] != record.turn:  # others may clear it too
                self._faults.pop(index, None)
        if bundle is not None or record.readings:
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
        if not record.places:
            return
        self._workspaces[key] = workspace = None
        if len(record.places) > 1 and record.whole and fits(record.places):
            workspace = Workspace(record.places, len(self.points))
        self._workspaces[key] = workspace

    def _heed(self, workspace: Workspace, *, fits: bool) -> None:
        """Forget a workspace that forwards do not fit any more, one after the other, as when they are compiled."""
        workspace.misses = 0 if fits else workspace.misses + 1
        if workspace.misses == MOST_MISSES:
            for key in [key for key, value in self._workspaces.copy().items() if value is workspace]:
                self._workspaces.pop(key, None)

    def _finish(self, record: Record) -> None:
        if record.readings and record.readings[0].total.is_cuda:
            record.ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            record.ready.record()
        if record.seconds:
            record.seconds = time.perf_counter() - record.seconds
        self._emit(record)

    def _begin_in_graph(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Begin a forward that is part of a larger graph; the model may call itself in it."""
        opened = self._open
        opened.in_graph += 1
        if opened.in_graph == 1:
            enter_in_graph(self._place, (*args, *kwargs.values()))

    def _end_in_graph(self) -> None:
        """End such a forward."""
        opened = self._open
        opened.in_graph -= 1
        if opened.in_graph == 0:
            leave_in_graph(self._place)


class _Open(threading.local):
    """What a thread has of its own: the record of the forward that it is in, and memory.

    The model may call itself: ``depth`` times within that forward, ``in_graph`` times in what is being compiled.
    """

    def __init__(self) -> None:
        self.record: Record | None = None
        self.depth = self.in_graph = 0
        self.scratch = Scratch()


_IGNORED = Record(0, 0, None, [])


def _looks_only() -> bool:
    """Tell whether a forward of this thread serves nobody: traced, exported, transformed, or re-run to look into it."""
    return this_thread.tracing or _tracing_state() is not None or fake_mode() is not None or _transform() is not None


def _calls(model: nn.Module) -> int:
    """Return how many calls of a model this thread is in."""
    frame, calls = inspect.currentframe(), 0
    while frame is not None:
        calls += frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is model  # noqa: SLF001
        frame = frame.f_back
    return calls
