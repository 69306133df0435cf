"""A reference profile from the first requests: samples are taken as forwards pass, then fitted in the background."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from threading import Thread

import numpy as np

from guardserve.batchnorm import ObservationPoint
from guardserve.detection.collection import Collector
from guardserve.detection.reference import MIN_SAMPLES, WIDTH, ReferenceProfile, check_target
from guardserve.exceptions import ReferenceProfileError
from guardserve.observation.record import Record


class TrafficReference:
    """Makes a profile from the first samples that a monitored model is shown. One thread at a time may call it.

    Requests are taken as a sequence, whose samples may depend on those before them. What is taken for clean is what
    came: who starts it looks at the first requests.

    Args:
        samples: Finite samples to take.
        target_arl: Samples between false alarms for which to measure.
        seed: Of the simulations.

    Raises:
        ReferenceProfileError: If so few samples give no profile.
    """

    def __init__(self, samples: int, *, target_arl: float = 10_000, seed: int = 0) -> None:
        if samples < MIN_SAMPLES:
            raise ReferenceProfileError(f"a reference of {samples} samples: take at least {MIN_SAMPLES}, better 1000")
        check_target(target_arl)
        self.wanted = samples
        self._target_arl = target_arl
        self._rng = np.random.default_rng(seed)
        self._collector = Collector(WIDTH, self._rng, ordered=True, limit=samples)

    @property
    def samples(self) -> int:
        """Samples taken so far."""
        return self._collector.samples

    @property
    def full(self) -> bool:
        """Whether there are enough samples to fit."""
        return self.samples >= self.wanted

    def take(self, points: Sequence[ObservationPoint], records: Iterable[Record]) -> bool:
        """Take what forwards showed; those that did not pass the same layers as the first one are left out.

        Args:
            points: The observation points that the records' indices refer to.
            records: As the taps emit them.

        Returns:
            Whether there are enough samples now; more are left out.
        """
        for record in records:
            if self.full:
                break
            self._collector.take(points, record)
        return self.full

    def fit(self) -> ReferenceProfile:
        """Make the profile, which takes from seconds to a minute or two of one core.

        Raises:
            ReferenceProfileError: If there are too few samples.
        """
        return ReferenceProfile.of_data(self._collector.finish(), target_arl=self._target_arl, rng=self._rng)

    def fit_in_background(
        self, done: Callable[[Future[ReferenceProfile]], object] = lambda _: None
    ) -> Future[ReferenceProfile]:
        """Make the profile in a thread of its own, which does not keep the process from ending.

        Args:
            done: Called with the result in that thread, never in the caller's.
        """
        future: Future[ReferenceProfile] = Future()
        future.add_done_callback(done)

        def fit() -> None:
            try:
                future.set_result(self.fit())
            except BaseException as error:  # noqa: BLE001 - whoever asks for the result is told
                future.set_exception(error)

        future.set_running_or_notify_cancel()
        Thread(target=fit, name="guardserve-reference", daemon=True).start()
        return future
