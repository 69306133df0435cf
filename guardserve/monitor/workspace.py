"""Reading all layers of a small forward into one buffer, to sum them up together at its end.

On a CPU an operation costs some microseconds however little it does, most of all between the layers of a model, where
caches hold other things. So each layer only copies its cell, and the sums of all layers are taken at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from guardserve.monitor.reading import Plan, Reading, Rows

MOST_VALUES = 2_000_000
"""Values that a buffer holds at most, 8 MB; where more would be read, an operation more or less is no matter."""


@dataclass(slots=True)
class Place:
    """Where a layer read in a forward: what a workspace is laid out by."""

    index: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    plan: Plan
    anchor: torch.Tensor


@dataclass(slots=True)
class Slot:
    """A layer's part of the buffer.

    Attributes:
        shape: Shape of the activations that it takes.
        stride: Their strides.
        plan: Their plan.
        anchor: What is taken off them, shape ``(C,)``.
        out: The part, ``(*positions, N, C)``.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    plan: Plan
    anchor: torch.Tensor
    out: torch.Tensor

    def take(self, x: torch.Tensor, turn: int) -> None:
        """Copy a cell of each sample."""
        if not self.plan.axes:
            torch.sub(x, self.anchor, out=self.out)
            return
        cells = self.plan.cells(turn)
        for cell in cells:
            view = x.as_strided(cell.turned_size, cell.turned_stride, x.storage_offset() + cell.offset)
            out = self.out if len(cells) == 1 else self.out[..., cell.samples, :]
            if cell.rounds is not None:
                out = out.view(*out.shape[:-2], cell.rounds, -1, out.shape[-1])
            torch.sub(view, self.anchor, out=out)


class Sums(NamedTuple):
    """What a forward's layers showed, summed up; see :class:`Reading`.

    Attributes:
        totals: For each number of positions, that many times the means of all layers that read so many.
        squares: Likewise for the variances.
    """

    totals: list[torch.Tensor]
    squares: list[torch.Tensor]


class Workspace:
    """The slots of all layers for forwards of one shape, in one thread.

    Args:
        places: Where the layers read, in the order in which they ran, each with the same number of samples.
        layers: How many observation points there are.
        buffer: Holds at least :data:`MOST_VALUES` values.

    Attributes:
        order: The layers, in the order in which they run.
        route: The layers, in the order in which they are side by side.
        widths: Channels of each of these.
        slots: The slot of each observation point; None where there is none.
    """

    def __init__(self, places: Sequence[Place], layers: int, buffer: torch.Tensor) -> None:
        self.order = tuple(place.index for place in places)
        self.slots: list[Slot | None] = [None] * layers
        self._groups: list[torch.Tensor] = []
        self._counts: list[int] = []
        by_count: dict[int, list[Place]] = {}
        for place in places:
            by_count.setdefault(place.plan.count(), []).append(place)
        self.route = tuple(place.index for members in by_count.values() for place in members)
        self.widths = tuple(len(place.anchor) for members in by_count.values() for place in members)
        start = 0
        for count, members in by_count.items():
            samples = members[0].plan.size[0]
            widths = [len(place.anchor) for place in members]
            group = buffer[start : start + count * samples * sum(widths)].view(count, samples, sum(widths))
            start += group.numel()
            self._groups.append(group)
            self._counts.append(count)
            for place, width, end in zip(members, widths, itertools.accumulate(widths), strict=True):
                size = place.plan.size
                part = group[:, :, end - width : end].view(*size[2:], *size[:2])
                self.slots[place.index] = Slot(place.shape, place.stride, place.plan, place.anchor.flatten(), part)
        share = np.repeat([1 / count for count in self._counts], [group.shape[2] for group in self._groups])
        self._share = share.astype(np.float32)

    def sums(self) -> Sums:
        """Sum up what all slots hold; they may be filled again afterwards."""
        totals, squares = [], []
        for count, group in zip(self._counts, self._groups, strict=True):
            if count == 1:
                totals.append(group[0].clone())
                squares.append(torch.zeros_like(totals[-1]))
                continue
            total = group.sum(0)
            totals.append(total)
            squares.append(group.sub_(total, alpha=1 / count).square_().sum(0))
        return Sums(totals, squares)

    def rows(self, sums: Sums) -> Rows:
        """Return what a forward's layers showed, in the order of :attr:`route`."""
        mean, variance = (torch.cat(part, 1).numpy() for part in sums)
        mean *= self._share
        variance *= self._share
        return Rows(mean, variance)

    def reading(self, index: int) -> Reading:
        """Sum up what one slot holds."""
        slot = self.slots[index]
        if slot is None:
            raise ValueError(f"layer {index} has no slot")
        count = slot.plan.count()
        deviation = slot.out.flatten(0, -3) if slot.out.ndim > 2 else slot.out[None]  # noqa: PLR2004
        total = deviation.sum(0)
        squares = (deviation - total / count).square().sum(0)
        return Reading(index, total, squares if count > 1 else None, count)


def fits(places: Sequence[Place]) -> bool:
    """Tell whether the layers of a forward can share a buffer: small, on the CPU, in float32, with uniform cells."""
    return sum(math.prod(place.plan.size) for place in places) <= MOST_VALUES and all(
        place.plan.uniform and place.anchor.device.type == "cpu" and place.anchor.dtype is torch.float32
        for place in places
    )
