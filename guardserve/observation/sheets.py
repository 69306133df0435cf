"""The buffers that the layers of small forwards are read into, and which of them are summed up together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch

from guardserve.observation.reading import Plan, Rows
from guardserve.observation.workspace import Slot, Workspace

MOST_WAITING = 2**19
"""Values that may wait to be summed up."""

FEWEST_WAITING = 4
"""Forwards from which on it is worth their memory to sum them up together."""

MOST_TOGETHER = 32
"""Forwards that are summed up together at most."""

_KEPT_SHEETS = 16

_Array = npt.NDArray[np.float32]


class Sheet:
    """A buffer laid out for forwards of one shape: what one of them writes down.

    Attributes:
        workspace: How it is laid out.
        slots: The slot of each observation point; None where there is none.
        buffer: The buffer.
        turning: The slots that take another cell in each forward, by the plan by which they do.
    """

    def __init__(self, workspace: Workspace, buffer: _Buffer, shelf: _Shelf) -> None:
        self.workspace = workspace
        self.slots = workspace.slots(buffer.values)
        self.buffer = buffer
        self._shelf = shelf
        self._waiting = False
        self.turning: dict[Plan, list[Slot]] = {}
        for slot in self.slots:
            if slot is not None and slot.plan.size != slot.shape:
                self.turning.setdefault(slot.plan, []).append(slot)

    def wait(self) -> bool:
        """Let what was written wait to be summed up, unless that would take too much memory for what it saves.

        Summing up takes many operations, as many for one forward as for several that are alike.
        """
        worth = self.workspace.flat or self._shelf.most >= FEWEST_WAITING
        self._waiting = worth and len(self._shelf.waiting) < self._shelf.most
        if self._waiting:
            self._shelf.waiting.append(None)
        return self._waiting

    def inputs(self) -> _Array | None:
        """Return what was written, ``(N, sum of C)``, if each layer has one position."""
        return self.workspace.inputs(self.buffer.block[self.buffer.row])

    def give_back(self) -> None:
        """Let another forward have it."""
        if self._waiting:
            self._waiting = False
            self._shelf.waiting.pop()
        self._shelf.free.append(self.buffer)


class Sheets:
    """The buffers that all forwards of a model share, in any thread.

    Appending to lists and popping from them is all that threads do with them at the same time.
    """

    def __init__(self) -> None:
        self._shelves: dict[int, _Shelf] = {}

    def take(self, workspace: Workspace, turn: int) -> Sheet:
        """Return a sheet that no other forward has.

        All of its slots are told at once what to take in this turn, as between layers caches are cold.
        """
        size = workspace.size
        shelf = self._shelves.get(size)
        if shelf is None:
            shelf = self._shelves.setdefault(size, _Shelf(size))
        try:
            buffer = shelf.free.pop()
        except IndexError:
            buffer = shelf.make()
        sheet = buffer.sheets.get(workspace)
        if sheet is None:
            if len(buffer.sheets) >= _KEPT_SHEETS:
                buffer.sheets.clear()
            with torch.inference_mode(mode=False), torch.no_grad():
                sheet = buffer.sheets[workspace] = Sheet(workspace, buffer, shelf)
        for plan, slots in sheet.turning.items():
            cells = plan.cells(turn)
            for slot in slots:
                slot.cells = cells
        return sheet


class _Shelf:
    """Buffers of one size.

    Args:
        size: Number of values of each.

    Attributes:
        most: How many forwards may wait to be summed up.
        free: The buffers that no forward has.
        waiting: As many items as forwards wait.
    """

    def __init__(self, size: int) -> None:
        self.most = MOST_WAITING // size
        self.free: list[_Buffer] = []
        self.waiting: list[None] = []
        self._size = size

    def make(self) -> _Buffer:
        """Make a buffer, and where many may wait, others beside it."""
        count = self.most if self.most >= FEWEST_WAITING else 1
        with torch.inference_mode(mode=False), torch.no_grad():
            block = torch.empty(min(count, MOST_TOGETHER), self._size, dtype=torch.float32, device="cpu")
            array = block.numpy()
            buffer, *others = [_Buffer(values, array, row) for row, values in enumerate(block)]
        self.free += reversed(others)
        return buffer


class _Buffer:
    """Memory of a sheet; what is not written to takes none.

    Attributes:
        values: The memory.
        block: It and others, of shape ``(buffers, size)``.
        row: Which of these it is.
        sheets: Its layouts so far.
    """

    def __init__(self, values: torch.Tensor, block: _Array, row: int) -> None:
        self.values = values
        self.block = block
        self.row = row
        self.sheets: dict[Workspace, Sheet] = {}


def sum_up(sheets: Iterable[Sheet]) -> Iterator[tuple[Sheet, Rows]]:
    """Sum up what was written in sheets, those together that are laid out alike and side by side in memory; once."""
    ordered = sorted(sheets, key=lambda sheet: (id(sheet.workspace), id(sheet.buffer.block), sheet.buffer.row))
    for _, run in groupby(enumerate(ordered), key=_run):
        alike = [sheet for _, sheet in run]
        first = alike[0].buffer
        yield from zip(alike, alike[0].workspace.rows(first.block[first.row :][: len(alike)]), strict=True)


def _run(ranked: tuple[int, Sheet]) -> tuple[int, int, int]:
    """Tell what sheets have in common that follow each other."""
    rank, sheet = ranked
    return id(sheet.workspace), id(sheet.buffer.block), sheet.buffer.row - rank
