"""How much of the forwards' time monitoring takes, and how much is read to keep within a share of it."""

from __future__ import annotations

from guardserve.observation.record import Record
from guardserve.observation.taps import Taps

LEAST_VALUES, MOST_VALUES = 2**8, 2**20
"""Between these a budget moves how many values are read of each sample at each layer."""

MEMORY = 0.8
"""What the times before count for after another forward was timed."""


class Budget:
    """Follows the share of time that is spent, and halves or doubles what is read to keep to a limit.

    Args:
        taps: Where it is read.
        limit: Share of a forward's time that reading may take; None to leave the taps alone.
    """

    def __init__(self, taps: Taps, limit: float | None) -> None:
        self._taps = taps
        self._limit = limit
        self._spent = self._seconds = 0.0

    @property
    def share(self) -> float | None:
        """Share of the forwards' time spent on reading, over the last few that were timed; None before the first."""
        return self._spent / self._seconds if self._seconds else None

    def see(self, record: Record) -> None:
        """Take in a forward, which may have been timed."""
        if record.seconds is None:
            return
        self._spent = MEMORY * self._spent + record.spent
        self._seconds = MEMORY * self._seconds + record.seconds
        if self._limit is None or self._taps.values is None:
            return
        share, values = self._spent / self._seconds, self._taps.values
        if share > self._limit and values > LEAST_VALUES:
            self._taps.values = values // 2
        elif share < self._limit / 2 and values < MOST_VALUES:
            self._taps.values = 2 * values
        else:
            return
        self._spent = self._seconds = 0.0  # what was spent on reading more or less tells nothing now
