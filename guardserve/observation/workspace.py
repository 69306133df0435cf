"""Reading all layers of a small forward into one buffer, to sum them up together afterwards.

On a CPU an operation costs tens of microseconds between the layers of a model, where caches hold other things, however
little it does. So each layer only copies its cell, and the sums of all layers are taken at once at the forward's end.
Where each layer has one position the copies wait instead, as they come to no more than sums would. But where several
samples have few channels of many positions, which are together, one operation sums a cell up in about the time that
another takes to copy it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from guardserve.observation.reading import Cell, Plan, Rows

MOST_VALUES = 2**20
"""Values that a buffer holds at most, 4 MB; where more would be read, an operation more or less is no matter."""

MOST_WAITING = 2**19
"""Values that may wait to be summed up."""

FEWEST_POSITIONS = 48
"""Positions of a channel from which on an activation of several samples is summed up at once, if all of it is read."""

FEWEST_CELL_POSITIONS = 256
"""Likewise where a cell of it is read, which must be copied first."""

MOST_CHANNELS = 128
"""Channels up to which it is."""

_LEAST_SIZE = 2**12

_KEPT_SHEETS = 16

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
        out: The part, viewed as ``(N, C, *positions)``.
        cells: What it takes next; none if that is all.
        turn: The forward that it has last taken something of.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    plan: Plan
    out: torch.Tensor
    cells: tuple[Cell, ...] = ()
    turn: int = -1

    def take(self, x: torch.Tensor, turn: int) -> bool:
        """Copy a cell of each sample, or tell that it does not take this."""
        if x.shape != self.shape or self.turn == turn or x.stride() != self.stride:
            return False
        self.turn = turn
        self._write(x)
        return True

    def _write(self, x: torch.Tensor) -> None:
        self._copy(x, self.out)

    def _copy(self, x: torch.Tensor, out: torch.Tensor) -> None:
        cells = self.cells
        if not cells:
            out.copy_(x)
        elif len(cells) == 1 and cells[0].rounds is None:
            cell = cells[0]
            out.copy_(x.as_strided(cell.size, cell.stride, x.storage_offset() + cell.offset))
        else:
            for cell in cells:
                part = out[cell.samples]
                if cell.rounds is not None:
                    part = part.view(cell.rounds, -1, *part.shape[1:])
                part.copy_(x.as_strided(cell.size, cell.stride, x.storage_offset() + cell.offset))


class _SummingSlot(Slot):
    """A layer's part of a buffer where sums are put: ``(2, N, C)``, means over positions and one over deviations."""

    def _write(self, x: torch.Tensor) -> None:
        samples, channels, *sizes = self.plan.size
        if self.plan.size == self.shape:
            values = x.float()
        else:
            values = x.new_empty(self.plan.size, dtype=torch.float32)
            self._copy(x, values)
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
        anchor: What is taken off, shape ``(sum of C,)``.
    """

    kind: _Kind
    places: list[Place]
    shape: tuple[int, int, int]
    part: slice
    columns: slice
    anchor: npt.NDArray[np.float32]

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
            kind = _SummingSlot if self.kind == "summed" else Slot
            yield place.index, kind(place.shape, place.stride, place.plan, out)

    def sum_up(self, buffer: npt.NDArray[np.float32], mean: _Array, variance: _Array) -> None:
        """Write down what a buffer shows, each of shape ``(N, sum of C)``; the buffer is used up."""
        values = buffer[self.part].reshape(self.shape)
        if self.kind == "summed":
            np.subtract(values[0], self.anchor, out=mean)
            np.divide(1, np.square(values[1]), out=variance)
            return
        share = np.float32(1 / (self.shape[2] if self.kind == "rows" else self.shape[0]))
        # from the first position on, which is not far from the mean, both are exact in one pass
        first = (values[:, :, 0] if self.kind == "rows" else values[0]).copy()
        np.subtract(first, self.anchor, out=mean)
        if share == 1:
            variance[:] = 0
            return
        if self.kind == "rows":
            values -= first[:, :, None]
            about = np.add.reduce(values, 2) * share
            np.einsum("ncp,ncp->nc", values, values, out=variance)
        else:
            values -= first
            about = _total(values) * share
            variance[:] = _total_of_squares(values)
        mean += about
        variance *= share
        variance -= np.square(about)
        np.maximum(variance, 0, out=variance)


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
        first = 0
        for (kind, count), members in kinds.items():
            anchor = torch.cat([place.anchor.flatten() for place in members]).numpy()
            shapes = {
                "summed": (2, self._samples, len(anchor)),
                "rows": (self._samples, len(anchor), count),
                "columns": (count, self._samples, len(anchor)),
            }
            part = slice(self.values, self.values + math.prod(shapes[kind]))
            self._groups.append(_Group(kind, members, shapes[kind], part, slice(first, first + len(anchor)), anchor))
            self.values, first = part.stop, first + len(anchor)
        self.size = max(_LEAST_SIZE, 1 << (self.values - 1).bit_length())
        self.flat = list(kinds) == [("columns", 1)]
        members = [place for group in self._groups for place in group.places]
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

    def inputs(self, buffer: npt.NDArray[np.float32]) -> npt.NDArray[np.float32] | None:
        """Return what entered the layers, in the order of :attr:`route`, if :attr:`flat`."""
        if not self.flat:
            return None
        group = self._groups[0]
        inputs: npt.NDArray[np.float32] = buffer[group.part].reshape(group.shape)[0]
        return inputs

    def rows(self, buffer: npt.NDArray[np.float32]) -> Rows:
        """Return what a forward's layers showed, in the order of :attr:`route`; the buffer is used up."""
        inputs = self.inputs(buffer)
        if inputs is not None:
            with np.errstate(invalid="ignore", over="ignore"):
                return Rows(inputs - self._groups[0].anchor, None)
        mean = np.empty((self._samples, self.channels), np.float32)
        variance = np.empty_like(mean)
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            for group in self._groups:
                group.sum_up(buffer, mean[:, group.columns], variance[:, group.columns])
        return Rows(mean, variance)


def _kind(place: Place) -> _Kind:
    """Tell how a layer is to be side by side with others."""
    count, (samples, channels, *_) = place.plan.count(), place.plan.size
    fewest = FEWEST_POSITIONS if place.plan.size == place.shape else FEWEST_CELL_POSITIONS
    if samples > 1 and channels <= MOST_CHANNELS and count >= fewest and _is_contiguous(place):
        return "summed"
    return "columns" if count == 1 or place.stride[1] == 1 else "rows"


def _is_contiguous(place: Place) -> bool:
    return torch.empty_strided(place.shape, place.stride, device="meta").is_contiguous()


def _total(values: _Array) -> _Array:
    """Add up along the first axis, no more than some of it one by one: rounding errors add up too."""
    few = _folded(values)
    if few is None:
        total: _Array = np.add.reduce(values, 0)
        return total
    total = _total(np.add.reduce(few, 0))
    total += np.add.reduce(values[few.shape[0] * few.shape[1] :], 0)
    return total


def _total_of_squares(values: _Array) -> _Array:
    """Add up the squares along the first axis, likewise."""
    few = _folded(values)
    if few is None:
        total: _Array = np.einsum("pnc,pnc->nc", values, values)
        return total
    total = _total(np.einsum("apnc,apnc->pnc", few, few))
    rest = values[few.shape[0] * few.shape[1] :]
    total += np.einsum("pnc,pnc->nc", rest, rest)
    return total


def _folded(values: _Array) -> _Array | None:
    """Divide the first axis in two, so that the first is short and what is behind it long: that is fast to add up."""
    length = min(math.isqrt(len(values)), _AT_ONCE)
    if length < _FEW or (len(values) <= _AT_ONCE and values[0].size >= _WIDE):
        return None
    parts = len(values) // length
    return values[: length * parts].reshape(length, parts, *values.shape[1:])


class Sheet:
    """A buffer laid out for forwards of one shape: what one of them writes down.

    Attributes:
        workspace: How it is laid out.
        slots: The slot of each observation point; None where there is none.
    """

    def __init__(self, workspace: Workspace, buffer: _Buffer, shelf: _Shelf) -> None:
        self.workspace = workspace
        self.slots = workspace.slots(buffer.values)
        self._buffer = buffer
        self._shelf = shelf
        self._waiting = False
        self._turning: dict[Plan, list[Slot]] = {}
        for slot in self.slots:
            if slot is not None and slot.plan.size != slot.shape:
                self._turning.setdefault(slot.plan, []).append(slot)

    def turn_to(self, turn: int) -> list[Slot | None]:
        """Return the slots, for a forward: all are told at once what to take, as between layers caches are cold."""
        for plan, slots in self._turning.items():
            cells = plan.cells(turn)
            for slot in slots:
                slot.cells = cells
        return self.slots

    def wait(self) -> bool:
        """Let what was written wait to be summed up, unless it comes to more than its sums, or too much is waiting.

        Summing up takes many operations. Done by another thread, each would be handed the interpreter and hand it back.
        """
        self._waiting = self.workspace.flat and len(self._shelf.waiting) < self._shelf.most
        if self._waiting:
            self._shelf.waiting.append(None)
        return self._waiting

    def rows(self) -> Rows:
        """Sum up what was written; once."""
        return self.workspace.rows(self._buffer.array)

    def inputs(self) -> npt.NDArray[np.float32] | None:
        """Return what was written, ``(N, sum of C)``, if each layer has one position."""
        return self.workspace.inputs(self._buffer.array)

    def give_back(self) -> None:
        """Let another forward have it."""
        if self._waiting:
            self._waiting = False
            self._shelf.waiting.pop()
        self._shelf.free.append(self._buffer)


class Sheets:
    """The buffers that all forwards of a model share, in any thread.

    Appending to lists and popping from them is all that threads do with them at the same time.
    """

    def __init__(self) -> None:
        self._shelves: dict[int, _Shelf] = {}

    def take(self, workspace: Workspace) -> Sheet:
        """Return a sheet that no other forward has."""
        size = workspace.size
        shelf = self._shelves.get(size)
        if shelf is None:
            shelf = self._shelves.setdefault(size, _Shelf(size))
        try:
            buffer = shelf.free.pop()
        except IndexError:
            buffer = _Buffer(size)
        sheet = buffer.sheets.get(workspace)
        if sheet is None:
            if len(buffer.sheets) >= _KEPT_SHEETS:
                buffer.sheets.clear()
            with torch.inference_mode(mode=False), torch.no_grad():
                sheet = buffer.sheets[workspace] = Sheet(workspace, buffer, shelf)
        return sheet


class _Shelf:
    """Buffers of one size.

    Attributes:
        most: How many forwards may wait to be summed up.
        free: The buffers that no forward has.
        waiting: As many items as forwards wait.
    """

    def __init__(self, size: int) -> None:
        self.most = MOST_WAITING // size
        self.free: list[_Buffer] = []
        self.waiting: list[None] = []


class _Buffer:
    """Memory of a sheet; what is not written to takes none.

    Attributes:
        values: The memory.
        array: The same.
        sheets: Its layouts so far.
    """

    def __init__(self, size: int) -> None:
        with torch.inference_mode(mode=False):
            self.values = torch.empty(size, dtype=torch.float32, device="cpu")
        self.array: npt.NDArray[np.float32] = self.values.numpy()
        self.sheets: dict[Workspace, Sheet] = {}


def fits(places: Sequence[Place]) -> bool:
    """Tell whether the layers of a forward can share a buffer: small, on the CPU, in float32, with uniform cells."""
    return sum(math.prod(place.plan.size) for place in places) <= MOST_VALUES and all(
        place.plan.uniform and place.anchor.device.type == "cpu" and place.anchor.dtype is torch.float32
        for place in places
    )
