"""The memory that forwards of a model write down what they show in, and share one after the other."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from guardserve.observation.reading import Rows
from guardserve.observation.workspace import Workspace

MOST_WAITING = 2**19
"""Values of forwards that may wait to be looked at in this memory."""

_KEPT_SHEETS = 16


class Sheet:
    """Memory laid out for forwards of one shape: what one of them writes down.

    Attributes:
        workspace: How it is laid out.
        slots: The slot of each observation point; None where there is none.
        view: What they write, until it is given back.
    """

    def __init__(self, workspace: Workspace, memory: _Memory, shelf: _Shelf) -> None:
        self.workspace = workspace
        self.slots = workspace.slots(memory.values)
        self.view = workspace.view(memory.values)
        self._memory = memory
        self._shelf = shelf
        self._waiting = False

    def wait(self) -> bool:
        """Let what was written wait where it is, unless too much does: copied, it lets the memory be used again."""
        self._waiting = len(self._shelf.waiting) < self._shelf.most
        if self._waiting:
            self._shelf.waiting.append(None)
        return self._waiting

    def rows(self) -> Rows:
        """Return what was written, as arrays of their own."""
        return self.workspace.rows(self._memory.values)

    def give_back(self) -> None:
        """Let another forward have it."""
        if self._waiting:
            self._waiting = False
            self._shelf.waiting.pop()
        self._shelf.free.append(self._memory)


class Sheets:
    """The memory that all forwards of a model share, in any thread.

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
            memory = shelf.free.pop()
        except IndexError:
            memory = _Memory(size)
        sheet = memory.sheets.get(workspace)
        if sheet is None:
            if len(memory.sheets) >= _KEPT_SHEETS:
                memory.sheets.clear()
            sheet = memory.sheets[workspace] = Sheet(workspace, memory, shelf)
        return sheet


class _Shelf:
    """Memory of one size.

    Args:
        size: Number of values of each piece.

    Attributes:
        most: How many forwards may wait.
        free: The pieces that no forward has.
        waiting: As many items as forwards wait.
    """

    def __init__(self, size: int) -> None:
        self.most = MOST_WAITING // size
        self.free: list[_Memory] = []
        self.waiting: list[None] = []


class _Memory:
    """Memory of a sheet; what is not written to takes none.

    Attributes:
        values: The memory.
        sheets: Its layouts so far.
    """

    def __init__(self, size: int) -> None:
        self.values: npt.NDArray[np.float32] = np.empty(size, np.float32)
        self.sheets: dict[Workspace, Sheet] = {}
