"""Reading all layers of a small forward into one buffer, to sum them up together afterwards.

On a CPU an operation costs tens of microseconds between the layers of a model, where caches hold other things, however
little it does. So each layer only copies its cell. The sums of all layers are taken at once, by whoever asks for them
first, or at the forward's end where too much is waiting for that. But where several samples have few channels of many
positions, which are together, one operation sums a cell up in about the time that another takes to copy it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from guardserve.observation.reading import Cell, Plan, Rows

MOST_VALUES = 2**22
"""Values that a buffer holds at most, 16 MB; where more would be read, an operation more or less is no matter."""

MOST_WAITING = 2**20
"""Values that may wait to be summed up; a forward that has more of them takes longer than that by far."""

MOST_SMALL_WAITING = 32
"""Forwards that may, of those with so few values that it is their number that costs memory."""

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
        out: The part, ``(*positions, N, C)``.
        cells: What it takes next, unless that is all.
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
            out.copy_(x.as_strided(cell.turned_size, cell.turned_stride, x.storage_offset() + cell.offset))
        else:
            for cell in cells:
                part = out[..., cell.samples, :]
                if cell.rounds is not None:
                    part = part.view(*part.shape[:-2], cell.rounds, -1, part.shape[-1])
                part.copy_(x.as_strided(cell.turned_size, cell.turned_stride, x.storage_offset() + cell.offset))


class _SummingSlot(Slot):
    """A layer's part of a buffer where sums are put: ``(2, N, C)``, means over positions and one over deviations."""

    def _write(self, x: torch.Tensor) -> None:
        samples, channels, *sizes = self.plan.size
        if self.plan.size == self.shape:
            values = x.float()
        else:
            values = x.new_empty(self.plan.size, dtype=torch.float32)
            self._copy(x, values.permute(*range(2, values.ndim), 0, 1))
        # with a group a channel: it is the one operation that finds both sums in one go
        count = math.prod(sizes)
        _, *sums = torch.native_group_norm(values, None, None, samples, channels, count, channels, 0.0)
        torch.stack(sums, out=self.out)


@dataclass(slots=True)
class _Group:
    """Layers of which equally many positions are read, or that are summed up at once, side by side in a buffer.

    Attributes:
        places: The layers.
        summed: Whether they are summed up at once.
        shape: ``(positions, N, sum of C)``; ``(2, N, sum of C)`` if they are.
        part: Where they are in the buffer.
        columns: Where their channels are among those of all layers.
        anchor: What is taken off, shape ``(sum of C,)``.
    """

    places: list[Place]
    summed: bool
    shape: tuple[int, int, int]
    part: slice
    columns: slice
    anchor: npt.NDArray[np.float32]


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
        kinds: dict[tuple[int, bool], list[Place]] = {}
        for place in places:
            summed = _is_summed(place)
            kinds.setdefault((2 if summed else place.plan.count(), summed), []).append(place)
        first = 0
        for (height, summed), members in kinds.items():
            anchor = torch.cat([place.anchor.flatten() for place in members]).numpy()
            shape = (height, self._samples, len(anchor))
            part = slice(self.values, self.values + math.prod(shape))
            self._groups.append(_Group(members, summed, shape, part, slice(first, first + len(anchor)), anchor))
            self.values, first = part.stop, first + len(anchor)
        self.size = max(_LEAST_SIZE, 1 << (self.values - 1).bit_length())
        self.flat = list(kinds) == [(1, False)]
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
            values = buffer[group.part].view(group.shape)
            widths = [len(place.anchor) for place in group.places]
            for place, width, end in zip(group.places, widths, accumulate(widths), strict=True):
                out, size = values[:, :, end - width : end], place.plan.size
                if group.summed:
                    slots[place.index] = _SummingSlot(place.shape, place.stride, place.plan, out)
                else:
                    out = out.view(*size[2:], *size[:2])
                    slots[place.index] = Slot(place.shape, place.stride, place.plan, out)
        return slots

    def rows(self, buffer: npt.NDArray[np.float32]) -> Rows:
        """Return what a forward's layers showed, in the order of :attr:`route`.

        The buffer is used up; if :attr:`flat`, its memory is theirs.
        """
        if self.flat:
            (group,) = self._groups
            values = buffer[group.part].reshape(group.shape)[0]
            with np.errstate(invalid="ignore", over="ignore"):
                values -= group.anchor
            return Rows(values, None)
        mean = np.empty((self._samples, self.channels), np.float32)
        variance = np.zeros_like(mean)
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            for group in self._groups:
                values, columns = buffer[group.part].reshape(group.shape), group.columns
                if group.summed:
                    np.subtract(values[0], group.anchor, out=mean[:, columns])
                    np.divide(1, np.square(values[1]), out=variance[:, columns])
                    continue
                first, rest, share = values[0], values[1:], np.float32(1 / len(values))
                mean[:, columns] = first - group.anchor
                if not len(rest):
                    continue
                # from the first position on, which is not far from the mean, both are exact in one pass
                rest -= first
                about = _total(rest) * share
                mean[:, columns] += about
                squares = np.multiply(_total_of_squares(rest), share, out=variance[:, columns])
                squares -= np.square(about)
                np.maximum(squares, 0, out=squares)
        return Rows(mean, variance)


def _is_summed(place: Place) -> bool:
    """Tell whether a layer is summed up at once."""
    if not torch.empty_strided(place.shape, place.stride, device="meta").is_contiguous():
        return False
    samples, channels, *_ = place.plan.size
    fewest = FEWEST_POSITIONS if place.plan.size == place.shape else FEWEST_CELL_POSITIONS
    return samples > 1 and channels <= MOST_CHANNELS and place.plan.count() >= fewest


def _total(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Add up along the first axis, no more than some of it one by one: rounding errors add up too."""
    parts = len(values) // _AT_ONCE
    if parts <= 1:
        first: npt.NDArray[np.float32] = np.add.reduce(values, 0)
        return first
    whole = values[: parts * _AT_ONCE].reshape(parts, _AT_ONCE, *values.shape[1:])
    total = _total(np.add.reduce(whole, 1))
    total += np.add.reduce(values[parts * _AT_ONCE :], 0)
    return total


def _total_of_squares(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Add up the squares along the first axis, likewise."""
    parts = len(values) // _AT_ONCE
    if parts <= 1:
        few: npt.NDArray[np.float32] = np.einsum("pnc,pnc->nc", values, values)
        return few
    whole = values[: parts * _AT_ONCE].reshape(parts, _AT_ONCE, *values.shape[1:])
    total = _total(np.einsum("apnc,apnc->anc", whole, whole))
    rest = values[parts * _AT_ONCE :]
    total += np.einsum("pnc,pnc->nc", rest, rest)
    return total


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
        self._turning = [slot for slot in self.slots if slot is not None and slot.plan.axes]

    def turn_to(self, turn: int) -> list[Slot | None]:
        """Return the slots, for a forward: all are told at once what to take, as between layers caches are cold."""
        for slot in self._turning:
            slot.cells = slot.plan.cells(turn)
        return self.slots

    def wait(self) -> bool:
        """Let what was written wait to be summed up, unless too much is waiting."""
        self._waiting = len(self._shelf.waiting) < self._shelf.most
        if self._waiting:
            self._shelf.waiting.append(None)
        return self._waiting

    @property
    def urgent(self) -> bool:
        """Whether most of what may wait does."""
        return 4 * len(self._shelf.waiting) >= 3 * self._shelf.most

    def rows(self) -> Rows:
        """Sum up what was written; once."""
        return self.workspace.rows(self._buffer.array)

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
        self.most = min(MOST_WAITING, MOST_SMALL_WAITING * size if size == _LEAST_SIZE else MOST_WAITING) // size
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
