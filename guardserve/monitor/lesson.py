"""Learning from what is served: a reference profile of the first samples."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from guardserve.detection.reference import ReferenceProfile
from guardserve.detection.traffic import TrafficReference
from guardserve.observation.record import Record
from guardserve.observation.taps import Taps


class Lesson:
    """The reference profile that is being made of what a monitor sees.

    Args:
        samples: See :meth:`Monitor.learn`, as for the others.
        target_arl: See there.
        learned: See there.
    """

    def __init__(self, samples: int, target_arl: float, learned: Callable[[ReferenceProfile], object]) -> None:
        self.target_arl = target_arl
        self.learned = learned
        self._samples = samples
        self._traffic: TrafficReference | None = TrafficReference(samples, target_arl=target_arl)

    def restart(self) -> None:
        """Forget the samples, unless there were enough."""
        if self._traffic is not None:
            self._traffic = TrafficReference(self._samples, target_arl=self.target_arl)

    def take(self, taps: Taps, batch: list[Record], done: Callable[[Future[ReferenceProfile]], object]) -> None:
        """Take what forwards showed, and make the profile once that is enough."""
        if self._traffic is not None and self._traffic.take(taps.points, batch):
            taps.keyed = False
            self._traffic.fit_in_background(done)
            self._traffic = None
