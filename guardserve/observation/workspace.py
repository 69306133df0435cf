"""How what the layers of a forward show is laid out side by side, in memory that each layer's slot writes it to.

A slot sums up a layer in one pass of compiled code. Where that was not built (there was no C compiler when guardserve
was installed) layers are read by operations of torch's, which takes several times as long.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from guardserve.observation.reading import Plan, Rows

try:
    from guardserve.native import Cells, Slot, add_up, begin, end, merge_moments  # noqa: F401 - all or none is used
except ImportError:
    NATIVE = False
else:
    NATIVE = True

MOST_VALUES = 2**22
"""Values that a forward may show at most to be laid out so, 16 MB; an operation more or less is then no matter."""

MOST_AXES = 8
"""Axes of an activation that the part in C reads, at most: ``native.h`` has the same."""

_LEAST_SIZE = 2**12

_Array = npt.NDArray[np.float32]


@dataclass(slots=True)
class Place:
    """Where a layer read in a forward: what a workspace is laid out by."""

    index: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    plan: Plan
    anchor: torch.Tensor


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
    """How memory is laid out for forwards of one shape: means, and variances behind them, of shape ``(N, sum of C)``.

    Args:
        places: Where the layers read, in the order in which they ran, each with the same number of samples.
        layers: How many observation points there are.

    Attributes:
        size: Number of values of memory for it.
        misses: Forwards in a row that did not fit.
    """

    misses = 0

    def __init__(self, places: Sequence[Place], layers: int) -> None:
        order = tuple(place.index for place in places)
        super().__init__(order, order, tuple(len(place.anchor) for place in places))
        self._places = places
        self._layers = layers
        self._samples = places[0].plan.size[0]
        flat = all(place.plan.count() == 1 for place in places)
        self._shape = (1 if flat else 2, self._samples, self.channels)
        self.size = max(_LEAST_SIZE, 1 << (math.prod(self._shape) - 1).bit_length())
        self._anchor = torch.cat([place.anchor.flatten() for place in places]).numpy()
        self._cells = {place.index: _cells(place.shape, place.stride, place.plan) for place in places}

    def slots(self, memory: _Array) -> list[Slot | None]:
        """Lay out memory: return the slot of each observation point, None where there is none."""
        slots: list[Slot | None] = [None] * self._layers
        means, *variances = self._view(memory)
        for place, width, end in zip(self._places, self.widths, accumulate(self.widths), strict=True):
            here = slice(end - width, end)
            slots[place.index] = Slot(
                cells=self._cells[place.index],
                anchor=self._anchor[here].ctypes.data,
                mean=means[:, here].ctypes.data,
                variance=variances[0][:, here].ctypes.data if variances else 0,
                row=self.channels,
                memory=(memory, self._anchor),
            )
        return slots

    def rows(self, memory: _Array) -> Rows:
        """Return what was written to memory, as arrays of their own."""
        mean, variance = self.view(memory)
        return Rows(mean.copy(), None if variance is None else variance.copy())

    def view(self, memory: _Array) -> Rows:
        """Return arrays that show what is written to memory."""
        return Rows(*self._view(memory), *[None] * (2 - self._shape[0]))

    def _view(self, memory: _Array) -> _Array:
        return memory[: math.prod(self._shape)].reshape(self._shape)


@lru_cache(maxsize=256)
def _cells(shape: tuple[int, ...], stride: tuple[int, ...], plan: Plan) -> Cells:
    """Make what slots go by, the same one for all layers where these are alike."""
    strips, length, step = plan.strips
    return Cells(
        shape=tuple(shape),
        stride=stride,
        samples=plan.size[0],
        outer=plan.outer,
        strips=strips,
        length=length,
        step=step,
        axes=plan.sharing(),
        rowed=plan.rowed,
        positions=plan.positions,
        turning=plan.step,
        row=plan.row,
        hop=plan.hop,
        behind=plan.behind,
    )


def fits(places: Sequence[Place]) -> bool:
    """Tell whether the layers of a forward can be laid out side by side: on the CPU, in float32, with uniform cells."""
    return (
        NATIVE
        and 2 * sum(math.prod(place.plan.size[:2]) for place in places) <= MOST_VALUES
        and all(
            place.plan.uniform
            and len(place.shape) <= MOST_AXES
            and place.anchor.device.type == "cpu"
            and place.anchor.dtype is torch.float32
            for place in places
        )
    )
