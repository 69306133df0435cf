"""The detector: judges samples one by one against a reference profile, and remembers when it alarmed."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Literal, TypeAlias

import numpy as np

from guardserve.monitor.calibration import ARLS
from guardserve.monitor.chart import LAMBDAS, Chart
from guardserve.monitor.diagnosis import (
    LOOK_BACK,
    MovedChannel,
    ShiftAverage,
    describe,
    lead_layer,
    moved_channels,
)
from guardserve.monitor.encoding import shorten
from guardserve.monitor.features import Array
from guardserve.monitor.reference import ReferenceProfile

State: TypeAlias = Literal["warming", "blind", "ok", "suspect", "shifted", "recovered"]

WARM = round(1 / min(LAMBDAS))
"""Samples before the state can be ``"ok"``: what the slowest chart remembers."""

CALM = 2 * WARM
"""Samples in a row below the level of suspicion that end a shift."""

RECOVERY = 10 * WARM

CALM_BEFORE_OK: Mapping[State, int] = {"warming": WARM, "suspect": CALM, "recovered": RECOVERY}
"""Calm samples in a row after which each state becomes ``"ok"``."""

SUSPICION = 10
"""Suspicion starts where clean data go this many times as often as they alarm."""

CHUNK = 8
"""Samples that are encoded at once: their features stay in the processor's cache."""

SCORES = 10_000
"""P-values kept until somebody drains them; older ones are dropped."""


@dataclass(frozen=True)
class Detection:
    """What a detector makes of the samples so far.

    Attributes:
        state: ``"warming"`` for the first samples, ``"ok"``, ``"suspect"`` while there is more evidence than usual,
            ``"shifted"`` from an alarm until the evidence has stayed low for some time, then ``"recovered"`` for a
            while.
        samples: Samples seen, those that could not be judged included.
        nonfinite_samples: Those of them that could not be judged, for NaN or infinity in a layer.
        evidence: Largest evidence of a chart and layer after the last sample.
        threshold: Evidence from which on there is an alarm.
        alarms: Number of alarms.
        alarm_at: The sample, counted from 1, at which the last alarm was raised; None before the first.
        layer: The earliest layer that left its null; None unless shifted.
        channels: Its channels that moved most.
        reading: What the shift looks like; empty before the first alarm.
    """

    state: State
    samples: int
    nonfinite_samples: int
    evidence: float
    threshold: float
    alarms: int
    alarm_at: int | None
    layer: str | None
    channels: tuple[MovedChannel, ...]
    reading: str


class Detector:
    """Charts one stream of samples. Not safe for several threads at once.

    Args:
        profile: The reference.
        target_arl: Samples between false alarms, on average.
    """

    def __init__(self, profile: ReferenceProfile, target_arl: float) -> None:
        self._profile = profile
        self.threshold = profile.threshold(target_arl)
        self._suspicion = profile.threshold(max(float(ARLS[0]), target_arl / SUSPICION))
        self.reset()

    def reset(self) -> None:
        """Forget every sample."""
        sketch = self._profile.sketch
        self._chart = Chart(1, sketch.dimensions, sketch.width)
        self._scores: deque[float] = deque(maxlen=SCORES)
        self._evidence = np.zeros((len(LAMBDAS), len(sketch.channels)), np.float32)
        self._state: State = "warming"
        self._samples = self._nonfinite = self._alarms = self._calm = 0
        self._alarm_at: int | None = None
        self._ended_at: int | None = None
        self._average: ShiftAverage | None = None
        self._lead = 0
        self._recent: deque[tuple[Array, Array]] = deque(maxlen=LOOK_BACK)

    def judge(self, features: Array) -> None:
        """Take samples in order, shape ``(N, F)``; rows with NaN or infinity are counted and change nothing else."""
        for start in range(0, len(features), CHUNK):
            self._judge_chunk(features[start : start + CHUNK])

    def _judge_chunk(self, features: Array) -> None:
        finite = [bool(good) for good in np.isfinite(features.sum(1))]
        if not all(finite):
            finite = [bool(np.isfinite(row).all()) for row in features]
        standardised, vectors = self._profile.encode(features if all(finite) else features[finite])
        p_values = self._profile.p_values(vectors).tolist()
        kept = shorten(vectors, self._profile.radius)
        row = 0
        for good in finite:
            self._samples += 1
            if not good:
                self._nonfinite += 1
                self._scores.append(math.nan)
                continue
            self._scores.append(p_values[row])
            self._recent.append((standardised[row], kept[row]))
            self._step()
            row += 1

    def drain(self) -> list[float]:
        """Return the p-values since the last call, oldest first: NaN for a sample that could not be judged."""
        scores = list(self._scores)
        self._scores.clear()
        return scores

    def last(self, count: int) -> list[float]:
        """Return the p-values of the last samples, at most :data:`SCORES` and none that :meth:`drain` has told."""
        return list(islice(reversed(self._scores), count))[::-1]

    def detection(self) -> Detection:
        """Summarise the samples so far."""
        shown = self._average is not None and self._alarm_at is not None
        reading = ""
        if self._average is not None and self._alarm_at is not None:
            end = self._samples if self._ended_at is None else self._ended_at
            reading = describe(
                self._average, self._profile, self._lead, end - self._alarm_at, over=self._ended_at is not None
            )
        return Detection(
            state=self._state,
            samples=self._samples,
            nonfinite_samples=self._nonfinite,
            evidence=float(self._evidence.max()),
            threshold=self.threshold,
            alarms=self._alarms,
            alarm_at=self._alarm_at,
            layer=self._profile.layers[self._lead] if shown else None,
            channels=moved_channels(self._average, self._profile, self._lead) if self._average is not None else (),
            reading=reading,
        )

    def _step(self) -> None:
        """Take the newest of the recent samples."""
        features, vectors = self._recent[-1]
        self._evidence = self._profile.levels.evidence(self._chart.step(vectors[None])[0])
        evidence = float(self._evidence.max())
        self._calm = 0 if evidence >= self._suspicion else self._calm + 1
        if self._state == "shifted":
            self._follow(features, vectors)
        elif evidence >= self.threshold:
            self._alarm()
        elif evidence >= self._suspicion and self._state in ("warming", "ok"):
            self._state = "suspect"
        elif self._calm >= CALM_BEFORE_OK.get(self._state, math.inf):
            self._state = "ok"

    def _alarm(self) -> None:
        self._state = "shifted"
        self._alarms += 1
        self._alarm_at, self._ended_at = self._samples, None
        features, vectors = zip(*self._recent, strict=True)
        self._average = ShiftAverage(np.stack(features), np.stack(vectors))
        self._lead = lead_layer(self._evidence)

    def _follow(self, features: Array, vectors: Array) -> None:
        """Refine the diagnosis while the shift shows; end it after enough calm samples."""
        if self._calm == 0 and self._average is not None:
            self._average.update(features, vectors)
            self._lead = lead_layer(self._evidence)
        if self._calm >= CALM:
            self._state = "recovered"
            self._ended_at = self._samples - CALM
