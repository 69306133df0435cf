"""What is read of one activation: some positions of every sample and channel, others in each forward.

The positions of a layer are shared out among cells, spread over the activation. A forward reads one cell of each
sample in each layer, and all cells come in turn: over as many forwards as there are positions, each position is read
equally often. So means over forwards are those of all positions, and so is the variance over positions and samples
together; only single samples are known less exactly.

The samples of one forward are read in different cells. In the same one they would all see a bit of the left, or of the
right, and what they have in common by that would look like a shift to whoever takes them for independent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

VALUES = 8192
"""Values that are read of each sample at each layer, about, unless told otherwise.

Of MobileNetV2's 17,056 channels on a photo, the means over positions are then 0.15 running standard deviations off in
the middle layer and 0.4 in the worst (root mean square), where photos differ by 0.33; 0 on average over forwards.
"""

MIN_POSITIONS = 16
"""Positions that are read at least, however many channels a layer has."""

FEW_POSITIONS = 64
"""So few positions are all read, however many channels a layer has."""

_WIDEST = 16
"""Neighbouring columns read together, at most: a cache line of float32 where they are contiguous."""

_GOLDEN = (math.sqrt(5) - 1) / 2

_KEPT_CELLS = 1024

_CHUNK = 2**18

_MOST_SCRATCH = 2**22


@dataclass(slots=True)
class Reading:
    """What one layer showed when it ran, the deviations of its input ``x`` from the layer's anchor summed up.

    Attributes:
        index: The observation point.
        total: ``count`` times the mean over positions of ``x - anchor``, shape ``(N, C)``, ones may follow.
        squares: ``count`` times the variance over positions, likewise; None where there is one position.
        count: What to divide both by.
    """

    index: int
    total: torch.Tensor
    squares: torch.Tensor | None
    count: float

    @classmethod
    def of(cls, index: int, rows: Rows) -> Reading:
        """Make a reading of one layer's rows."""
        squares = None if rows.variance is None else torch.from_numpy(rows.variance)
        return cls(index, torch.from_numpy(rows.mean), squares, 1)


@dataclass(slots=True)
class Cell:
    """A view of some samples of an activation, each in a cell of its own.

    Attributes:
        samples: Which samples.
        size: Size of the view, ``(n, C, *positions)``; with ``rounds`` ``(rounds, n / rounds, C, *positions)``.
        stride: Its strides.
        offset: Its offset.
        count: Number of positions of each sample in it.
        rounds: How often the samples go through all cells, where that is more than once.
    """

    samples: slice
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    count: int
    rounds: int | None


@dataclass(frozen=True)
class Axis:
    """How the indices of one axis of positions are shared out.

    Attributes:
        parts: The indices of each part.
        part_of: The part that each index is in.
    """

    parts: tuple[range, ...]
    part_of: tuple[int, ...]

    @classmethod
    def strided(cls, size: int, count: int) -> Axis:
        """Let every ``count``-th index make a part."""
        return cls(tuple(range(part, size, count) for part in range(count)), tuple(i % count for i in range(size)))

    @classmethod
    def blocks(cls, size: int, count: int) -> Axis:
        """Let neighbours make a part; sizes differ by one at most."""
        ends = [part * size // count for part in range(count + 1)]
        parts = tuple(range(start, end) for start, end in pairwise(ends))
        return cls(parts, tuple(i for i, part in enumerate(parts) for _ in part))


@lru_cache(maxsize=256)
def share_out(sizes: tuple[int, ...], target: int) -> tuple[Axis, ...]:
    """Share positions out to cells of about ``target``.

    If the axes can be divided evenly, a cell is blocks of the last axis, spread over all of the others. Otherwise all
    samples of a forward have to read the same cell, so that one is a grid over all axes, which is alike everywhere.
    """
    even = min(
        product(*(_divisors(size) for size in sizes)),
        key=lambda lengths: _oddity(lengths, target, blocks=len(sizes) > 1),
    )
    if not 1 / 2 <= math.prod(even) / target <= 2:  # noqa: PLR2004 - about as many
        return tuple(Axis.strided(size, count) for size, count in zip(sizes, _counts(sizes, target), strict=True))
    counts = [size // length for size, length in zip(sizes, even, strict=True)]
    *others, last = [*zip(sizes, counts, strict=True)]
    axes = [Axis.strided(size, count) for size, count in others]
    return (*axes, Axis.blocks(*last) if others else Axis.strided(*last))


def _oddity(lengths: tuple[int, ...], target: int, *, blocks: bool) -> tuple[float, float]:
    """Rank ways to divide axes: by how far a cell is from the target, then by how far it is from a square."""
    away = abs(math.log(math.prod(lengths) / target)) + (10.0 if blocks and lengths[-1] > _WIDEST else 0.0)
    return round(2 * away), max(lengths) / min(lengths)


def _counts(sizes: tuple[int, ...], target: int) -> list[int]:
    """Share out axes that cannot be divided evenly; parts then differ by one in length."""
    *others, width = sizes
    if not others:
        return [max(1, round(width / target))]
    wide = min(width, max(1, min(_WIDEST, round(math.sqrt(target))), target // math.prod(others)))
    counts = [round(width / wide)]
    left = target * counts[0] / width
    for size in reversed(others):
        counts.insert(0, min(size, max(1, round(size / max(1.0, left)))))
        left *= counts[0] / size
    return counts


def _divisors(size: int) -> list[int]:
    return [length for length in range(1, size + 1) if size % length == 0]


class Plan:
    """The cells of activations of one shape and layout.

    Args:
        shape: Of the activation, ``(rows, C, *positions)``.
        stride: Its strides.
        values: Values to read of each sample, about; None reads all.
        samples: Number of samples N, when it is known. If the model has laid k rows out of each (frames, crops),
            one sample after the other, they count as its positions.

    Attributes:
        axes: The axes of positions in a cell's view.
        positions: Number of positions.
        parts: How each axis is shared out.
        size: Size of what is read, ``(N, C, *positions)``, if its cells are of the same size.
        step: How far the position that chooses the cell moves from turn to turn.
        uniform: Whether its cells are of the same size.
        strips: Where strips of positions begin in a uniform cell, int64, their length, and their step.
        outer: How far samples are from each other, in values.
        row: How many cells lie in a row, each as far behind the one before: those of the last axes.
        rowed: How many of these axes.
        hop: How many cells on in the row the next sample reads.
        behind: How far these are from each other.
    """

    def __init__(
        self, shape: Sequence[int], stride: Sequence[int], values: int | None, samples: int | None = None
    ) -> None:
        rows, channels, *sizes = shape
        outer, channel, *strides = stride
        each = rows // samples if samples and rows > samples and rows % samples == 0 else 1
        if each > 1:
            sizes, strides = [each, *sizes], [outer, *strides]
        self.positions = math.prod(sizes)
        self.axes = tuple(range(2, 2 + len(sizes)))
        self._size = (rows // each, channels)
        self.outer, self._apart = outer * each, channel
        self._strides = tuple(strides)
        least = self.positions if self.positions <= FEW_POSITIONS else MIN_POSITIONS
        target = self.positions if values is None else max(least, values // max(1, channels))
        self.parts = (
            share_out(tuple(sizes), target)
            if target < self.positions
            else tuple(Axis.blocks(size, 1) for size in sizes)
        )
        self._axes = [(max(1, len(axis.part_of)), len(axis.parts), axis.part_of) for axis in self.parts]
        step = round(self.positions * _GOLDEN)
        while math.gcd(step, max(1, self.positions)) > 1:
            step += 1
        self.step = step
        self.uniform = all(len({len(part) for part in axis.parts}) == 1 for axis in self.parts)
        self.size = (*self._size, *[len(axis.parts[0]) for axis in self.parts])
        self.rowed = self._find_rowed() if self.uniform else 0
        self.row = math.prod(len(axis.parts) for axis in self.parts[len(self.parts) - self.rowed :])
        self.behind = self._view(1)[0] - self._view(0)[0] if self.row > 1 else 0
        self.hop = self._find_hop()
        self.strips = self._find_strips()
        self._cells: dict[int, tuple[Cell, ...]] = {}

    def cells(self, turn: int) -> tuple[Cell, ...]:
        """Return what is read in a forward, all samples in order: cells from that of some position on."""
        index = self._index(turn)
        cells = self._cells.get(index)
        if cells is None:
            if len(self._cells) >= _KEPT_CELLS:
                self._cells.clear()
            cells = self._cells[index] = tuple(self._make(index))
        return cells

    def sharing(self) -> bytes:
        """Return how each axis is shared out.

        That is its size, its number of parts, the part that each index is in, and how far each part is from the first,
        int64.
        """
        numbers: list[int] = []
        for axis, stride in zip(self.parts, self._strides, strict=True):
            offsets = [part.start * stride for part in axis.parts]
            numbers += [len(axis.part_of), len(axis.parts), *axis.part_of, *offsets]
        return np.array(numbers, np.int64).tobytes()

    def _index(self, turn: int) -> int:
        """Return which cell is the first sample's in a forward."""
        positions = max(1, self.positions)
        place, index = turn % positions * self.step % positions, 0
        for size, count, part_of in self._axes:
            place, i = divmod(place, size)
            index = index * count + part_of[i]
        return index

    def count(self, turn: int = 0) -> int:
        """Return how many positions of each sample are read in a forward."""
        return self.cells(turn)[0].count

    def _find_rowed(self) -> int:
        if len(self.parts) > 1 and self._strides[-2] == self._strides[-1] * len(self.parts[-1].part_of):
            return 2
        return min(1, len(self.parts))

    def _find_strips(self) -> tuple[bytes, int, int]:
        """Return where strips of positions begin in a uniform cell, int64, their length, and their step."""
        _, size, stride = self._view(0)
        *others, (length, step) = _merged(zip(size, stride, strict=True))
        starts = np.zeros(1, np.int64)
        for count, apart in others:
            starts = np.add.outer(starts, np.arange(count) * apart).ravel()
        return starts.tobytes(), length, step

    def _find_hop(self) -> int:
        """Return how far on in the row the next sample reads: together, they spread over it and its columns."""
        if self.row == 1:
            return 0
        hop = max(1, self.row // max(1, self._size[0]))
        while math.gcd(hop, len(self.parts[-1].parts)) > 1:
            hop -= 1
        return hop

    def _make(self, index: int) -> Iterator[Cell]:
        """Share the samples out to the cells of a row, as evenly as can be, beginning with a given one."""
        row, hop, behind, (samples, channels) = self.row, self.hop, self.behind, self._size
        first, start = index - index % row, index % row
        base, size, stride = self._view(first)
        outer, taken = self.outer, 0
        while taken < samples:
            place = (start + taken * hop) % row
            offset = taken * outer + base + place * behind
            step = outer + hop * behind
            left = samples - taken
            if row == 1:
                count, rounds = left, None
            elif place == 0 and hop == 1 and left >= 2 * row:
                rounds = left // row
                count = rounds * row
            else:
                count, rounds = min(left, (row - 1 - place) // hop + 1), None
            lead = (count,) if rounds is None else (rounds, row)
            lead_stride = (step,) if rounds is None else (row * outer, step)
            lead, lead_stride = (*lead, channels), (*lead_stride, self._apart)
            yield Cell(
                slice(taken, taken + count),
                lead + size,
                lead_stride + stride,
                offset,
                math.prod(size),
                rounds,
            )
            taken += count

    def _view(self, index: int) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """Return the offset, the size and the strides of a cell's positions."""
        chosen: list[range] = []
        for axis in reversed(self.parts):
            index, part = divmod(index, len(axis.parts))
            chosen.insert(0, axis.parts[part])
        offset = sum(part.start * step for part, step in zip(chosen, self._strides, strict=True))
        stride = tuple(part.step * step for part, step in zip(chosen, self._strides, strict=True))
        return offset, tuple(len(part) for part in chosen), stride


def _merged(axes: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Take axes of positions, each a size and a stride, together where one goes on where the next one ends."""
    merged = [(1, 1)]
    for size, stride in axes:
        before, far = merged[-1]
        if size != 1 and before != 1 and far != size * stride:
            merged.append((size, stride))
        elif size != 1:
            merged[-1] = (before * size, stride)
    return merged


@lru_cache(maxsize=256)
def plan_for(shape: tuple[int, ...], stride: tuple[int, ...], values: int | None, samples: int | None) -> Plan:
    """Return the plan of activations, the same one for all layers where these are alike: see :class:`Plan`."""
    return Plan(shape, stride, values, samples)


class Scratch:
    """Memory for what a thread reads in a forward on the CPU, until the next :meth:`rewind`.

    Allocated between a model's activations it would scatter these, and their memory would grow by a half.
    """

    def __init__(self) -> None:
        self._work = torch.empty(0)
        self._chunks: list[torch.Tensor] = []
        self._chunk = self._used = 0

    def rewind(self) -> None:
        """Begin a forward: what was handed out may be handed out again."""
        self._chunk = self._used = 0

    def work(self, count: int) -> torch.Tensor:
        """Return memory that is good until it is asked for again."""
        if len(self._work) < count:
            self._work = _memory(count)
        return self._work[:count]

    def result(self, count: int) -> torch.Tensor:
        """Return memory that stays until the forward is over."""
        while self._chunk < len(self._chunks) and len(self._chunks[self._chunk]) < self._used + count:
            self._chunk, self._used = self._chunk + 1, 0
        if self._chunk == len(self._chunks):
            self._chunks.append(_memory(max(_CHUNK, count)))
        start, self._used = self._used, self._used + count
        return self._chunks[self._chunk][start : self._used]


def _memory(count: int) -> torch.Tensor:
    with torch.inference_mode(mode=False):
        return torch.empty(count, dtype=torch.float32, device="cpu")


def read(
    index: int, x: torch.Tensor, plan: Plan, turn: int, anchor: torch.Tensor, *, scratch: Scratch | None = None
) -> Reading:
    """Read an activation.

    The anchor, near the mean if the layer fits, is taken off first. Like the second pass over the deviations, it
    keeps float32 exact where the mean is thousands of times the deviation.

    Args:
        index: The observation point.
        x: Input of its layer, any floating dtype and memory format, not on an autograd graph.
        plan: The plan for its shape and strides.
        turn: The number of the forward.
        anchor: At least float32, shape ``(C, 1, ...)`` with as many ones as the plan has axes.
        scratch: Memory to use on the CPU, and for what is returned too.
    """
    count = plan.count(turn)
    few = plan.uniform and math.prod(plan.size) <= _MOST_SCRATCH
    if scratch is not None and few and x.is_cpu and anchor.dtype is torch.float32:
        return Reading(index, *_read_into(scratch, x, plan, turn, anchor), count)
    deviation = _deviation(x, plan, turn, anchor)
    if count == 1:
        return Reading(index, deviation, None, 1)
    axes = plan.axes
    if x.is_cuda:  # one kernel for both; on a CPU it takes many times as long as the sums
        variance, mean = torch.var_mean(deviation, axes, correction=0)
        return Reading(index, mean, variance, 1)
    total = deviation.sum(axes, keepdim=True)
    return Reading(index, total, deviation.sub_(total, alpha=1 / count).square_().sum(axes), count)


def _read_into(
    scratch: Scratch, x: torch.Tensor, plan: Plan, turn: int, anchor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the sums that :func:`read` takes, in memory that is there."""
    count, size = plan.count(turn), plan.size
    deviation = _arranged((scratch.result if count == 1 else scratch.work)(math.prod(size)), x, size)
    _subtract(x, plan, turn, anchor, deviation)
    if count == 1:
        return deviation, None
    rows, axes = math.prod(size[:2]), plan.axes
    total = scratch.result(rows).view(*size[:2], *[1 for _ in axes])
    torch.sum(deviation, axes, keepdim=True, out=total)
    squares = scratch.result(rows).view(size[:2])
    torch.sum(deviation.sub_(total, alpha=1 / count).square_(), axes, out=squares)
    return total, squares


def _deviation(x: torch.Tensor, plan: Plan, turn: int, anchor: torch.Tensor) -> torch.Tensor:
    """Return how far what is read is from the anchor, ``(N, C, *positions)``."""
    cells, start = plan.cells(turn), x.storage_offset()
    if len(cells) == 1 and cells[0].rounds is None:
        return x.as_strided(cells[0].size, cells[0].stride, start + cells[0].offset) - anchor
    deviation = _arranged(x.new_empty(math.prod(plan.size), dtype=anchor.dtype), x, plan.size)
    _subtract(x, plan, turn, anchor, deviation)
    return deviation


def _arranged(memory: torch.Tensor, x: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """View memory as what is read of an activation, with channels together where they are so there."""
    if x.stride(1) != 1:
        return memory.view(size)
    rows, channels, *positions = size
    return memory.view(rows, *positions, channels).movedim(-1, 1)


def _subtract(x: torch.Tensor, plan: Plan, turn: int, anchor: torch.Tensor, deviation: torch.Tensor) -> None:
    """Write down how far what is read is from the anchor."""
    for values, out in paired(plan.cells(turn), x, deviation):
        torch.sub(values, anchor, out=out)


def paired(cells: Iterable[Cell], x: torch.Tensor, whole: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield views of an activation, each with where that belongs in ``(N, C, *positions)``."""
    start = x.storage_offset()
    for cell in cells:
        part = whole[cell.samples]
        if cell.rounds is not None:
            part = part.view(cell.rounds, -1, *part.shape[1:])
        yield x.as_strided(cell.size, cell.stride, start + cell.offset), part


class Rows(NamedTuple):
    """Readings of one or more layers as arrays on the CPU.

    Attributes:
        mean: Mean over positions of each sample's deviation from the anchor, shape ``(N, sum of C)``.
        variance: Its variance over positions, likewise; None where each layer has one position.
    """

    mean: npt.NDArray[np.floating[Any]]
    variance: npt.NDArray[np.floating[Any]] | None


def side_by_side(readings: Sequence[Reading]) -> Rows:
    """Put the readings of layers with equally many samples side by side."""
    totals = [reading.total.flatten(1) for reading in readings]
    mean = torch.cat(totals, 1).cpu().numpy()
    variance = None
    if any(reading.squares is not None for reading in readings):
        squares = [
            torch.zeros_like(total) if reading.squares is None else reading.squares
            for reading, total in zip(readings, totals, strict=True)
        ]
        variance = torch.cat(squares, 1).cpu().numpy()
    if any(reading.count != 1 for reading in readings):
        share = np.repeat([1 / reading.count for reading in readings], [total.shape[1] for total in totals])
        mean *= share.astype(mean.dtype)
        if variance is not None:
            variance *= share.astype(mean.dtype)
    return Rows(mean, variance)
