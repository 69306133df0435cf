"""What one forward showed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from guardserve.observation.keys import Keys
from guardserve.observation.reading import Reading, Rows, Scratch, side_by_side
from guardserve.observation.sheets import Sheet
from guardserve.observation.workspace import Layout, Place

if TYPE_CHECKING:
    from guardserve.native import Slot

_CHANNELS = 2**13
"""What a model is taken to have, where nobody has counted."""


class Record:
    """What one forward showed.

    Attributes:
        samples: Number of samples, as the model's own input has them; None when a part was called by itself.
        turn: Number of the forward.
        values: Values read of each sample at each layer, about; None is all.
        readings: What layers showed, in the order in which they ran; empty if ``bundle`` has all of it.
        bundle: How what all layers showed is laid out side by side, if it is.
        ready: On an accelerator, the event after which the readings are there.
        seconds: If the forward was timed, when it began; at its end, how long it took.
        spent: If it was timed, the seconds of it that readings took.
        sink: Where the p-values of its samples go, if somebody waits for them.
        slots: Where layers write down what they show; None for one that makes a reading.
        taken: How many did.
        sheet: What has these slots.
        keys: What tells its samples apart, if somebody learns from them.
        key: What a workspace is to be kept by that this forward shows the need of.
        places: Where it read, to lay that out.
        scratch: What holds the readings until the forward is over.
    """

    taken = 0
    sheet: Sheet | None = None
    scratch: Scratch | None = None
    key: tuple[torch.Size, int | None, bool] | None = None
    keys: Keys | None = None
    bundle: Layout | None = None
    ready: torch.cuda.Event | None = None
    seconds: float | None = None
    spent = 0.0
    sink: list[float] | None = None
    _rows: Rows | None = None

    def __init__(self, samples: int | None, turn: int, values: int | None, slots: list[Slot | None]) -> None:
        self.samples = samples
        self.turn = turn
        self.values = values
        self.slots = slots
        self.readings: list[Reading] = []
        self.places: list[Place] = []

    @property
    def count(self) -> int:
        """Number of samples that it counts for."""
        return len(self.readings[0].total) if self.samples is None else self.samples

    @property
    def size(self) -> int:
        """Number of values that it comes to, about: one for each sample and channel."""
        return self.count * (_CHANNELS if self.bundle is None else self.bundle.channels)

    @property
    def order(self) -> tuple[int, ...]:
        """The layers that ran, in order, as often as each did."""
        return tuple([reading.index for reading in self.readings]) if self.bundle is None else self.bundle.order

    @property
    def route(self) -> tuple[int, ...]:
        """Those layers in the order in which :meth:`rows` has them."""
        return self.order if self.bundle is None else self.bundle.route

    @property
    def whole(self) -> bool:
        """Whether each layer that ran did so once, with one row a sample."""
        return self.bundle is not None or (
            len(set(self.order)) == len(self.readings)
            and all(len(reading.total) == self.samples for reading in self.readings)
        )

    def rows(self) -> Rows:
        """Return all readings as arrays, side by side; only if :attr:`whole`, and in one thread at a time."""
        rows = self._rows
        if rows is None:
            if self.ready is not None:
                self.ready.synchronize()
            rows = side_by_side(self.readings) if self.sheet is None else self.sheet.rows()
            self.take(rows)
        return rows

    def view(self) -> Rows:
        """Return what :meth:`rows` would, but perhaps no longer than this record is there: where it was written."""
        return self.rows() if self._rows is not None or self.sheet is None else self.sheet.view

    def take(self, rows: Rows) -> None:
        """Take what all layers showed."""
        self._rows = rows
        self._give_back()

    def rows_of(self, readings: list[Reading]) -> Rows:
        """Return some of its readings, with equally many samples, as arrays side by side."""
        if self.ready is not None:
            self.ready.synchronize()
        return side_by_side(readings)

    def parts(self) -> list[tuple[int, Rows]]:
        """Return what each layer showed each time that it ran, with its index."""
        if self.bundle is None:
            return [(reading.index, self.rows_of([reading])) for reading in self.readings]
        return self.bundle.parts(self.rows())

    def close(self) -> None:
        """End a forward: what was written down is all that it showed, or makes readings like the others."""
        sheet = self.sheet
        if sheet is not None:
            workspace = sheet.workspace
            if self.taken == len(workspace.order) and not self.readings:
                self.bundle = workspace
                if not sheet.wait():
                    self.rows()
                return
            if self.taken:  # it took another way
                taken = {i for i, slot in enumerate(self.slots) if slot is not None and slot.turn == self.turn}
                parts = [part for part in workspace.parts(sheet.rows()) if part[0] in taken]
                self.readings += [Reading.of(index, rows) for index, rows in parts]
            self._give_back()
        self._compact()

    def _compact(self) -> None:
        """Take the readings out of the thread's memory, side by side if they can be."""
        if len(self.readings) > 1 and self.whole and all(reading.total.is_cpu for reading in self.readings):
            widths = tuple(reading.total.shape[1] for reading in self.readings)
            self._rows, order = side_by_side(self.readings), self.order
            self.bundle, self.readings = Layout(order, order, widths), []
            return
        for reading in self.readings:
            if reading.total.is_cpu:
                reading.total = reading.total.clone()
                reading.squares = None if reading.squares is None else reading.squares.clone()

    def _give_back(self) -> None:
        sheet, self.sheet = self.sheet, None
        if sheet is not None:
            sheet.give_back()

    def __del__(self) -> None:
        """Give memory back that nobody asked for what is in it."""
        self._give_back()
