"""Reading inside ``torch.compile``: the sums become part of the graph, and one operator hands them over at its end.

A compiled graph cannot run Python between its layers. So cells are chosen by tensors, which the operator moves on, and
what is read does not depend on anything that a graph would have to be compiled anew for.
"""

from __future__ import annotations

import functools
import itertools
import operator
import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from guardserve.batchnorm import CHANNEL_AXIS
from guardserve.observation.reading import Plan, Rows
from guardserve.observation.workspace import Layout

Deliver = Callable[[int, list[int], list[int], list[torch.Tensor]], None]

LayerSums = tuple[int, int, torch.Tensor, torch.Tensor]
"""Index, positions, totals and squares of a layer that ran."""

_graphs: dict[int, InGraph] = {}
_tokens = itertools.count()


class InGraph:
    """What compiled graphs know of a monitor, by a number that is a constant of theirs.

    A graph is guarded, at every forward, by all that it came to by way of the model's modules when it was made: by
    :meth:`place`, that is one constant for each layer.

    Args:
        deliver: Called with the number of samples, the layers in the order in which they ran, how many positions
            each read, and totals and squares: first those of each layer, then these.
        anchors: Those of the layers that can be read, by index.

    Attributes:
        token: The number.
        threads: What each thread has read.
        last: The layer that runs last, as far as is known: where a graph puts together what it read.
        bundles: How it has done so.
        elsewhere: Layers whose compiled code is on another device, where it is not read.
    """

    def __init__(self, deliver: Deliver, anchors: Mapping[int, torch.Tensor]) -> None:
        self.deliver = deliver
        self.token = next(_tokens)
        device = next((anchor.device for anchor in anchors.values() if not anchor.is_meta), torch.device("cpu"))
        # a graph is on one device; where a model is on several, those of another are not read in graphs
        anchors = {index: anchor for index, anchor in anchors.items() if anchor.device == device}
        turn = torch.zeros((), dtype=torch.int64, device=device)
        self.threads = _Threads(turn, torch.cat([torch.empty(0, device=device), *anchors.values()]))
        ends = accumulate(map(len, anchors.values()))
        self._columns = {
            index: (end - len(anchor), end) for (index, anchor), end in zip(anchors.items(), ends, strict=True)
        }
        self.last = max(anchors, default=0)
        self.bundles: list[Bundle] = []
        self.elsewhere: set[int] = set()
        _graphs[self.token] = self

    def place(self, index: int) -> str:
        """Return what one of its layers is found by: no number, which a graph may take for one that varies."""
        return f"{self.token} {index}"

    def close(self) -> None:
        """Be forgotten."""
        _graphs.pop(self.token, None)

    def columns(self, index: int) -> tuple[int, int]:
        """Return where a layer's channels begin and end among the anchors; nowhere if it cannot be read."""
        return self._columns.get(index, (0, 0))

    def bundle(self, route: tuple[tuple[int, int], ...]) -> int:
        """Return the number in ``bundles`` of how layers are put together, each with index and positions."""
        columns = [self.columns(index) for index, _ in route]
        self.bundles.append(Bundle(route, [stop - start for start, stop in columns]))
        return len(self.bundles) - 1


class Bundle(Layout):
    """How one tensor holds what a graph has read: the totals of several layers side by side, then their squares.

    Args:
        route: Index and positions of each layer.
        widths: Channels of each.

    Attributes:
        whole: Whether each of them ran once.
    """

    def __init__(self, route: tuple[tuple[int, int], ...], widths: Sequence[int]) -> None:
        order = tuple([index for index, _ in route])
        super().__init__(order, order, tuple(widths))
        self.whole = len(set(order)) == len(order)
        self._route = route
        self._share = np.repeat(np.array([1 / count for _, count in route], np.float32), widths)
        self._flat = all(count == 1 for _, count in route)

    def rows(self, sums: torch.Tensor) -> Rows:
        """Return what all layers showed; the sums are used up."""
        mean, variance = sums[:, : self.channels].numpy(), sums[:, self.channels :].numpy()
        if self._flat:
            return Rows(mean, None)
        mean *= self._share
        variance *= self._share
        return Rows(mean, variance)

    def divide(self, sums: torch.Tensor) -> list[LayerSums]:
        """Return what each layer showed."""
        parts = torch.split(sums, [*self.widths, *self.widths], 1)
        return [
            (index, count, total, squares)
            for (index, count), total, squares in zip(self._route, parts, parts[len(self._route) :], strict=False)
        ]


@torch.library.custom_op("guardserve::hand_over", mutates_args=("turn",))
def hand_over(  # noqa: PLR0917 - operators take them by position
    readings: list[torch.Tensor], turn: torch.Tensor, token: int, samples: int, route: list[int], counts: list[int]
) -> None:
    """Deliver what a graph read, and have it read elsewhere the next time."""
    turn.add_(1)
    graph = _graphs.get(token)
    if graph is not None:
        # it may use their memory again
        graph.deliver(samples, route, counts, [reading.clone() for reading in readings])


def _grid(sizes: tuple[int, ...], channels: int, values: int | None) -> tuple[int, tuple[tuple[int, int], ...]]:
    """Return the step between cells, and the number and the length of each axis' parts: the whole if they differ."""
    plan = Plan((1, channels, *sizes), (1, *[1 for _ in sizes], 1), values)
    grid = [
        (len(axis.parts), len(axis.parts[0])) if len({len(part) for part in axis.parts}) == 1 else (1, size)
        for axis, size in zip(plan.parts, sizes, strict=True)
    ]
    return plan.step, tuple(grid)


def _find(token: int, index: int) -> tuple[int, int, bool]:
    """Return where a layer's anchors begin and end, and whether it runs last."""
    graph = _graphs[token]
    return (*graph.columns(index), index == graph.last)


def _bundle(token: int, route: tuple[tuple[int, int], ...]) -> int:
    """See :meth:`InGraph.bundle`."""
    return _graphs[token].bundle(route)


def _miss(token: int, index: int) -> None:
    _graphs[token].elsewhere.add(index)


for _function in (_grid, _find, _bundle, _miss):
    # what torch.compiler.assume_constant_result does, which imports the whole compiler: for seconds, and 100 MB
    vars(_function)["_dynamo_marked_constant"] = True


def read_layer(place: str, x: torch.Tensor) -> None:
    """Read in code that is being compiled.

    Args:
        place: See :meth:`InGraph.place`.
        x: What enters the layer.
    """
    token, index = map(int, place.split())
    traced, (start, stop, last) = _graphs[token].threads.traced, _find(token, index)
    if x.device != traced.anchors.device:
        _miss(token, index)
        return
    if not traced.open:
        return
    if stop == start or x.ndim <= CHANNEL_AXIS or x.shape[CHANNEL_AXIS] != stop - start:
        return
    total, squares, count = read_in_graph(x, traced.anchors[start:stop], traced.turn, traced.values)
    readings = traced.readings
    readings.append((index, count, total, squares))
    rows = x.shape[0]
    if (
        last
        and traced.sums is None
        and not traced.samples
        and all(total.is_cpu and total.shape[0] == rows for _, _, total, _ in readings)
    ):
        # the graph writes it there at once, and has one output instead of two for each layer
        traced.sums = torch.cat([reading[2] for reading in readings] + [reading[3] for reading in readings], 1)
        traced.bundle = _bundle(token, tuple([reading[:2] for reading in readings]))
        readings.clear()


def read_in_graph(
    x: torch.Tensor, anchor: torch.Tensor, turn: torch.Tensor, values: int | None
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Read a cell of an activation as :func:`reading.read` does, in operations that a compiler can fuse.

    Returns:
        ``count`` times the mean and the variance over positions, each ``(rows, C)``, and ``count``.
    """
    x = x.detach()
    sizes = tuple(operator.index(size) for size in x.shape[2:])  # what is no symbol can be a constant
    if not sizes:
        deviation = x - anchor
        return deviation, torch.zeros_like(deviation), 1
    step, grid = _grid(sizes, x.shape[1], values)
    place, count = turn * step, 1
    for axis, (size, (parts, length)) in enumerate(zip(sizes, grid, strict=True)):
        count *= length
        index = place % size
        place = place // size
        if parts == 1:
            continue
        within = torch.arange(length, device=x.device)
        x = x.index_select(2 + axis, index % parts + within * parts)  # a grid: all samples read the same cell
    axes = tuple(range(2, 2 + len(sizes)))
    deviation = x - anchor.reshape(-1, *[1 for _ in sizes])
    total = deviation.sum(axes, keepdim=True)
    # in two passes: the first position may be far from the mean, and graphs add up one value after the other
    return total.flatten(1), (deviation - total / count).square().sum(axes), count


def per_sample(
    total: torch.Tensor, squares: torch.Tensor, count: int, samples: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Merge the rows that a model has laid out of each sample, one sample after the other."""
    rows = len(total)
    if rows <= samples or rows % samples:
        return total, squares, count
    each = rows // samples
    totals, within = (part.reshape(samples, each, -1) for part in (total, squares))
    mean = totals.mean(1, keepdim=True)
    between = (totals - mean).square().sum(1) / count
    return totals.sum(1), within.sum(1) + between, count * each


def exporting() -> bool:
    """Tell whether a program is being exported: nobody is served by that."""
    is_exporting: Callable[[], bool] | None = getattr(torch.compiler, "is_exporting", None)
    return is_exporting is not None and is_exporting()


fake_mode = functools.partial(torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey.FAKE)  # noqa: SLF001
"""Returns something where this thread computes with tensors that hold nothing, as ``torch.export`` does."""


class Traced:
    """What a thread has read in compiled code of the forward that it is in.

    Args:
        turn: What chooses the cells.
        anchors: Those of all layers, side by side.

    Attributes:
        open: Whether it is in one.
        depth: How often the model has called itself within a larger graph.
        values: Values to read of each sample at each layer, about; None reads all.
        samples: Its number of samples, if the whole forward is in one graph.
        readings: What was read, but for what is in ``sums``.
        sums: What was put together.
        bundle: The number of how it was.
    """

    def __init__(self, turn: torch.Tensor, anchors: torch.Tensor) -> None:
        self.turn = turn
        self.anchors = anchors
        self.values: int | None = None
        self.samples: list[int] = []
        self.readings: list[LayerSums] = []
        self.bundle = self.depth = 0
        self.clear()

    def clear(self) -> None:
        """Empty it."""
        self.open, self.depth = False, 0
        self.samples.clear()
        self.readings.clear()
        self.sums: torch.Tensor | None = None


class _Threads(threading.local):
    def __init__(self, turn: torch.Tensor, anchors: torch.Tensor) -> None:
        self.traced = Traced(turn, anchors)


def uncompiled(method: Callable[..., None]) -> Callable[..., None]:
    """Keep a method, and what it calls, from being compiled by itself; where it is called in a graph it is traced.

    It is like ``torch.compiler.disable``, which would import the whole compiler, and break a larger graph.
    """
    if not skip(method):
        disabled: Callable[..., None] = torch.compiler.disable(method)  # type: ignore[no-untyped-call]
        return disabled
    return method


def skip(function: Callable[..., None]) -> bool:
    """Have the compiler pass over a function and what it calls, but not within a graph; torch before 2.7 cannot."""
    frames: Any = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)  # noqa: SLF001 - public has none
    if not hasattr(frames, "set_code_exec_strategy"):
        return False
    action = frames._FrameAction.SKIP  # noqa: SLF001
    frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(action, action))  # noqa: SLF001
    return True
