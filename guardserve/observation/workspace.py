"""How all layers of a small forward are read into one buffer, and summed up together afterwards.

On a CPU an operation costs tens of microseconds between the layers of a model, where caches hold other things, however
little it does. So each layer only copies its cell, and the sums of all layers are taken at once: after the forward, and
where the copies are small enough to wait, for many forwards together. But where several samples have few channels of
many positions, which are together, one operation sums a cell up in about the time that another takes to copy it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from guardserve.observation.reading import Cell, Plan, Rows, paired

MOST_VALUES = 2**20
"""Values that a buffer holds at most, 4 MB; where more would be read, an operation more or less is no matter."""

FEWEST_POSITIONS = 48
"""Positions of a channel from which on an activation of several samples is summed up at once, if all of it is read."""

FEWEST_CELL_POSITIONS = 256
"""Likewise where a cell of it is read, which must be copied first."""

MOST_CHANNELS = 128
"""Channels up to which it is."""

_LEAST_SIZE = 2**12

_AT_ONCE = 64
"""Values that are added up one after the other at most: it rounds like this many additions."""

_FEW = 4
"""Fewer are added up one after the other in any case."""

_WIDE = 512
"""Values side by side from which on there is nothing to gain from more."""

_Array = npt.NDArray[np.float32]


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
    """A layer's part of a buffer.

    Attributes:
        shape: Shape of the activations that it takes.
        stride: Their strides.
        plan: Their plan.
        out: The part, viewed as ``(N, C, *positions)``; ``(2, N, C)`` if ``summing``.
        summing: Whether sums are put there: means over positions, and one over deviations.
        cells: What it takes next; none if that is all.
        turn: The forward that it has last taken something of.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    plan: Plan
    out: torch.Tensor
    summing: bool = False
    cells: tuple[Cell, ...] = ()
    turn: int = -1

    def take(self, x: torch.Tensor, turn: int) -> bool:
        """Copy a cell of each sample, or tell that it does not take this."""
        if x.shape != self.shape or self.turn == turn or x.stride() != self.stride:
            return False
        self.turn = turn
        if x.requires_grad:
            x = x.detach()
        cells = self.cells
        if self.summing:
            self._sum_up(x)
        elif not cells:
            self.out.copy_(x)
        elif len(cells) == 1 and cells[0].rounds is None:
            cell = cells[0]
            self.out.copy_(x.as_strided(cell.size, cell.stride, x.storage_offset() + cell.offset))
        else:
            for source, part in paired(cells, x, self.out):
                part.copy_(source)
        return True

    def _sum_up(self, x: torch.Tensor) -> None:
        samples, channels, *sizes = self.plan.size
        if self.plan.size == self.shape:
            values = x.float()
        else:
            values = x.new_empty(self.plan.size, dtype=torch.float32)
            for source, part in paired(self.cells, x, values):
                part.copy_(source)
        # with a group a channel: it is the one operation that finds both sums in one go
        count = math.prod(sizes)
        _, *sums = torch.native_group_norm(values, None, None, samples, channels, count, channels, 0.0)
        torch.stack(sums, out=self.out)


_Kind = Literal["summed", "rows", "columns"]
"""How layers are side by side: summed up at once, or with the positions of a channel together, or with its channels."""


@dataclass(slots=True)
class _Group:
    """Layers of one kind, of which equally many positions are read, side by side in a buffer.

    Attributes:
        kind: How they are side by side.
        places: The layers.
        shape: ``(2, N, sum of C)`` if they are summed up at once, ``(N, sum of C, positions)`` as rows,
            ``(positions, N, sum of C)`` as columns.
        part: Where they are in the buffer.
        columns: Where their channels are among those of all layers.
        share: What to multiply sums by to get means.
    """

    kind: _Kind
    places: list[Place]
    shape: tuple[int, int, int]
    part: slice
    columns: slice
    share: float

    def slots(self, buffer: torch.Tensor) -> Iterator[tuple[int, Slot]]:
        """Return the slot of each layer in a buffer, with the layer's index."""
        values = buffer[self.part].view(self.shape)
        widths = [len(place.anchor) for place in self.places]
        for place, width, end in zip(self.places, widths, accumulate(widths), strict=True):
            size = place.plan.size
            if self.kind == "rows":
                out = values[:, end - width : end].view(size)
            elif self.kind == "columns":
                out = values[:, :, end - width : end].view(*size[2:], *size[:2])
                out = out.permute(-2, -1, *range(len(size) - 2))
            else:
                out = values[:, :, end - width : end]
            yield place.index, Slot(place.shape, place.stride, place.plan, out, summing=self.kind == "summed")

    def sum_up(self, buffers: _Array, sums: _Sums) -> None:
        """Sum up the values of buffers, of shape ``(F, size)``, one for each forward; they are used up."""
        values, here = buffers[:, self.part].reshape(len(buffers), *self.shape), (..., self.columns)
        if self.kind == "summed":
            sums.first[here] = values[:, 0]
            np.divide(1, np.square(values[:, 1]), out=sums.squares[here])
            return
        # from the first position on, which is not far from the mean, both are exact in one pass
        first = sums.first[here]
        first[:] = values[..., 0] if self.kind == "rows" else values[:, 0]
        if self.share == 1:
            return
        if self.kind == "rows":
            values -= first[..., None]
            np.add.reduce(values, 3, out=sums.about[here])
            np.einsum("fncp,fncp->fnc", values, values, out=sums.squares[here])
        else:
            values -= first[:, None]
            sums.about[here] = _total(values)
            sums.squares[here] = _total(values, squared=True)


class _Sums:
    """What several forwards' layers come to, each of shape ``(F, N, sum of C)``.

    Attributes:
        first: The first position, or what else the others are deviations from.
        about: Deviations from it, summed up.
        squares: Their squares, likewise.
    """

    def __init__(self, forwards: int, samples: int, channels: int) -> None:
        self.first = np.empty((forwards, samples, channels), np.float32)
        self.about, self.squares = np.zeros_like(self.first), np.zeros_like(self.first)

    def rows(self, anchor: _Array, share: _Array) -> list[Rows]:
        """Return what each forward showed; they are used up."""
        mean, about, variance = self.first, self.about, self.squares
        mean -= anchor
        about *= share
        mean += about
        variance *= share
        variance -= np.square(about, out=about)
        np.maximum(variance, 0, out=variance)
        return list(map(Rows, mean, variance))


class Layout:
    """Which columns are whose, where all layers of a forward are side by side.

    Args:
        order: The layers, in the order in which they run.
        route: The layers, in the order in which they are side by side.
        widths: Channels of each of these.

    Attributes:
        channels: Channels of all.
    """

    def __init__(self, order: tuple[int, ...], route: tuple[int, ...], widths: tuple[int, ...]) -> None:
        self.order = order
        self.route = route
        self.widths = widths
        self.channels = sum(widths)

    def parts(self, rows: Rows) -> list[tuple[int, Rows]]:
        """Divide rows up into those of each layer."""
        ends = accumulate(self.widths)
        columns = [slice(end - width, end) for end, width in zip(ends, self.widths, strict=True)]
        variance = np.zeros_like(rows.mean) if rows.variance is None else rows.variance
        return [
            (index, Rows(rows.mean[:, part], variance[:, part]))
            for index, part in zip(self.route, columns, strict=True)
        ]


class Workspace(Layout):
    """How a buffer is laid out for forwards of one shape.

    Args:
        places: Where the layers read, in the order in which they ran, each with the same number of samples.
        layers: How many observation points there are.

    Attributes:
        values: Number of values that a forward reads.
        size: Number of values of a buffer for it.
        flat: Whether each layer has one position.
    """

    def __init__(self, places: Sequence[Place], layers: int) -> None:
        self.values = 0
        self._layers = layers
        self._samples = places[0].plan.size[0]
        self._groups: list[_Group] = []
        kinds: dict[tuple[_Kind, int], list[Place]] = {}
        for place in places:
            kinds.setdefault((_kind(place), place.plan.count()), []).append(place)
        for (kind, count), members in kinds.items():
            first = self._groups[-1].columns.stop if self._groups else 0
            channels = sum(len(place.anchor) for place in members)
            shape = {
                "summed": (2, self._samples, channels),
                "rows": (self._samples, channels, count),
                "columns": (count, self._samples, channels),
            }[kind]
            part, columns = slice(self.values, self.values + math.prod(shape)), slice(first, first + channels)
            self._groups.append(_Group(kind, members, shape, part, columns, 1 if kind == "summed" else 1 / count))
            self.values = part.stop
        self.size = max(_LEAST_SIZE, 1 << (self.values - 1).bit_length())
        self.flat = list(kinds) == [("columns", 1)]
        members = [place for group in self._groups for place in group.places]
        self._anchor = torch.cat([place.anchor.flatten() for place in members]).numpy()
        shares = [np.full(group.columns.stop - group.columns.start, group.share) for group in self._groups]
        self._share = np.concatenate(shares, dtype=np.float32)
        super().__init__(
            tuple(place.index for place in places),
            tuple(place.index for place in members),
            tuple(len(place.anchor) for place in members),
        )

    def slots(self, buffer: torch.Tensor) -> list[Slot | None]:
        """Lay out a buffer: return the slot of each observation point, None where there is none."""
        slots: list[Slot | None] = [None] * self._layers
        for group in self._groups:
            for index, slot in group.slots(buffer):
                slots[index] = slot
        return slots

    def inputs(self, buffer: _Array) -> _Array | None:
        """Return what entered the layers, in the order of :attr:`route`, if :attr:`flat`."""
        if not self.flat:
            return None
        group = self._groups[0]
        inputs: _Array = buffer[group.part].reshape(group.shape)[0]
        return inputs

    def rows(self, buffers: _Array) -> list[Rows]:
        """Return what each forward's layers showed, in the order of :attr:`route`.

        Args:
            buffers: One for each forward, of shape ``(F, size)``; they are used up.
        """
        sums = _Sums(len(buffers), self._samples, self.channels)
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            if self.flat:
                return [Rows(inputs - self._anchor, None) for inputs in map(self.inputs, buffers) if inputs is not None]
            for group in self._groups:
                group.sum_up(buffers, sums)
            return sums.rows(self._anchor, self._share)


def _kind(place: Place) -> _Kind:
    """Tell how a layer is to be side by side with others."""
    count, (samples, channels, *_) = place.plan.count(), place.plan.size
    fewest = FEWEST_POSITIONS if place.plan.size == place.shape else FEWEST_CELL_POSITIONS
    if samples > 1 and channels <= MOST_CHANNELS and count >= fewest and _is_contiguous(place):
        return "summed"
    return "columns" if count == 1 or place.stride[1] == 1 else "rows"


def _is_contiguous(place: Place) -> bool:
    return torch.empty_strided(place.shape, place.stride, device="meta").is_contiguous()


def _total(values: _Array, *, squared: bool = False) -> _Array:
    """Add values, or their squares, up along the second axis.

    No more than some of them one by one: rounding errors add up too.
    """
    few = _folded(values)
    if few is None:
        return _added_up(values, squared=squared)
    total = _total(_added_up(few, squared=squared))
    rest = values[:, few.shape[1] * few.shape[2] :]
    if rest.size:
        total += _added_up(rest, squared=squared)
    return total


def _added_up(values: _Array, *, squared: bool) -> _Array:
    total: _Array = np.einsum("fp...,fp...->f...", values, values) if squared else np.add.reduce(values, 1)
    return total


def _folded(values: _Array) -> _Array | None:
    """Divide the second axis in two, so that the first is short and what is behind it long: that is fast to add up."""
    forwards, count, *sizes = values.shape
    length = _length(count)
    if length < _FEW or (count <= _AT_ONCE and math.prod(sizes) >= _WIDE):
        return None
    parts = count // length
    return values[:, : length * parts].reshape(forwards, length, parts, *sizes)


@lru_cache(maxsize=256)
def _length(count: int) -> int:
    """Return how many of so many values to add up one after the other: the most that leave no rest, if they will do."""
    most = min(math.isqrt(count), _AT_ONCE)
    return next((length for length in range(most, max(_FEW, most // 4), -1) if count % length == 0), most)


def fits(places: Sequence[Place]) -> bool:
    """Tell whether the layers of a forward can share a buffer: small, on the CPU, in float32, with uniform cells."""
    return sum(math.prod(place.plan.size) for place in places) <= MOST_VALUES and all(
        place.plan.uniform and place.anchor.device.type == "cpu" and place.anchor.dtype is torch.float32
        for place in places
    )
