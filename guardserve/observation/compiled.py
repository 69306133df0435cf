"""Reading inside ``torch.compile``: the sums become part of the graph, and one operator hands them over at its end.

A compiled graph cannot run Python between its layers. So cells are chosen by tensors, which the operator moves on, and
what is read does not depend on anything that a graph would have to be compiled anew for.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Callable
from typing import Any

import torch

from guardserve.observation.reading import Plan

Deliver = Callable[[int, list[int], list[int], list[torch.Tensor]], None]

_FAKE, _mode_of = torch._C._TorchDispatchModeKey.FAKE, torch._C._get_dispatch_mode  # noqa: SLF001

_receivers: weakref.WeakValueDictionary[int, Inbox] = weakref.WeakValueDictionary()
_tokens = itertools.count()


class Inbox:
    """Where a compiled graph delivers what it read, found by a number that is a constant of the graph.

    Args:
        deliver: Called with the number of samples, the layers in the order in which they ran, how many positions
            each read, and totals and squares: first those of each layer, then these.

    Attributes:
        token: The number.
    """

    def __init__(self, deliver: Deliver) -> None:
        self.deliver = deliver
        self.token = next(_tokens)
        _receivers[self.token] = self


@torch.library.custom_op("guardserve::hand_over", mutates_args=("turn",))
def hand_over(  # noqa: PLR0917 - operators take them by position
    readings: list[torch.Tensor], turn: torch.Tensor, token: int, samples: int, route: list[int], counts: list[int]
) -> None:
    """Deliver what a graph read, and have it read elsewhere the next time."""
    turn.add_(1)
    inbox = _receivers.get(token)
    if inbox is not None:
        # the graph may use their memory again
        inbox.deliver(samples, route, counts, [reading.clone() for reading in readings])


def _grid(sizes: tuple[int, ...], channels: int, values: int | None) -> tuple[int, tuple[tuple[int, int], ...]]:
    """Return the step between cells, and the number and the length of each axis' parts: the whole if they differ."""
    plan = Plan((1, channels, *sizes), (1, *[1 for _ in sizes], 1), values)
    grid = [
        (len(axis.parts), len(axis.parts[0])) if len({len(part) for part in axis.parts}) == 1 else (1, size)
        for axis, size in zip(plan.parts, sizes, strict=True)
    ]
    return plan.step, tuple(grid)


# what torch.compiler.assume_constant_result does, which imports the whole compiler: for seconds, and 100 MB
_grid._dynamo_marked_constant = True  # type: ignore[attr-defined]  # noqa: SLF001


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


def faked() -> bool:
    """Tell whether this thread computes with tensors that hold nothing, as ``torch.export`` does."""
    return _mode_of(_FAKE) is not None


class Traced:
    """What a thread has read in compiled code of the forward that it is in.

    Attributes:
        open: Whether it is in one.
        samples: Its number of samples, if the whole forward is in one graph.
        readings: Index, positions, totals and squares of each layer that ran.
    """

    def __init__(self) -> None:
        self.open = False
        self.samples: list[int] = []
        self.readings: list[tuple[int, int, torch.Tensor, torch.Tensor]] = []

    def clear(self) -> None:
        """Empty it."""
        self.open = False
        self.samples.clear()
        self.readings.clear()


def uncompiled(method: Callable[..., None]) -> Callable[..., None]:
    """Keep a method, and what it calls, from being compiled by itself; where it is called in a graph it is traced.

    It is like ``torch.compiler.disable``, which would import the whole compiler, and break a larger graph.
    """
    frames: Any = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)  # noqa: SLF001 - see above
    if not hasattr(frames, "set_code_exec_strategy"):  # torch before 2.7
        disabled: Callable[..., None] = torch.compiler.disable(method)  # type: ignore[no-untyped-call]
        return disabled
    skip = frames._FrameAction.SKIP  # noqa: SLF001
    frames.set_code_exec_strategy(method.__code__, frames._FrameExecStrategy(skip, skip))  # noqa: SLF001
    return method
