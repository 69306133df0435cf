"""The detector: judges samples one by one against a reference profile, and remembers when it alarmed."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np

from guardserve.detection.calibration import ARLS
from guardserve.detection.chart import LAMBDAS, SHARES, Chart
from guardserve.detection.diagnosis import (
    LOOK_BACK,
    MovedChannel,
    ShiftAverage,
    describe,
    first_layer,
    moved_channels,
)
from guardserve.detection.encoding import shorten
from guardserve.detection.merging import Summarizer, Summary
from guardserve.detection.profile_file import Arrays
from guardserve.detection.reference import ReferenceProfile
from guardserve.exceptions import DetectorStateError, ReferenceMismatchError
from guardserve.observation.features import Array

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

CHUNK = 32
"""Samples that are encoded at once: their features stay in the processor's cache."""

ABSURD = 1e12
"""No part of a state comes near this; the squares of much larger ones overflow."""

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
        evidence: Largest evidence of a chart and layer after the last sample, as a share of what raises an alarm.
        threshold: Evidence from which on there is an alarm: 1.
        alarms: Number of alarms.
        alarm_at: The sample, counted from 1, at which the last alarm was raised; None before the first.
        layer: The earliest layer that left its null; None unless shifted.
        channels: Its channels that moved most.
        reading: What the shift looks like; empty before the first alarm.
        layers: Evidence of each layer after the last sample, by its name, in execution order, on the same scale: a
            layer that reaches 1 raises an alarm by itself.
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
    layers: Mapping[str, float]


class Detector:
    """Charts one stream of samples. Not safe for several threads at once.

    Attributes:
        profile: The reference.
        summarizer: What else is shown what :meth:`judge` takes, if anything.

    Args:
        profile: The reference.
        target_arl: Samples between false alarms, on average.
    """

    threshold = 1.0
    """Evidence from which on there is an alarm."""

    def __init__(self, profile: ReferenceProfile, target_arl: float) -> None:
        self.profile = profile
        self.summarizer: Summarizer | None = None
        self._alarming = profile.threshold(target_arl)
        self._suspicious = profile.threshold(max(float(ARLS[0]), target_arl / SUSPICION)) / self._alarming
        self._rows = np.empty((LOOK_BACK + CHUNK, 2 * sum(profile.sketch.channels)), np.float32)
        self.reset()

    def reset(self) -> None:
        """Forget every sample."""
        if self.summarizer is not None:
            self.summarizer.take()
        sketch = self.profile.sketch
        self._chart = Chart(1, sketch.dimensions, sketch.width)
        self._scores: deque[float] = deque(maxlen=SCORES)
        self._evidence = np.zeros((len(SHARES), len(sketch.channels)), np.float32)
        self._relative = 0.0
        self._state: State = "warming"
        self._samples = self._nonfinite = self._alarms = self._calm = 0
        self._alarm_at: int | None = None
        self._ended_at: int | None = None
        self._average: ShiftAverage | None = None
        self._lead = 0
        self._end = 0
        """Rows that are filled with standardised features; the last of them are the most recent samples'."""
        self._recent: deque[Array] = deque(maxlen=LOOK_BACK)
        """Vectors of the most recent samples, each of shape ``(layers, width)``."""
        self._recent_oddness: deque[Array] = deque(maxlen=LOOK_BACK)

    def judge(self, features: Array) -> list[float]:
        """Take samples in order, shape ``(N, F)``; rows with NaN or infinity are counted and change nothing else.

        Returns:
            Their p-values: 0, odder than any, for one with NaN or infinity in a layer.
        """
        p_values = [p for i in range(0, len(features), CHUNK) for p in self._judge_chunk(features[i : i + CHUNK])]
        self._scores.extend(p_values)
        return p_values

    def judge_summary(self, summary: Summary) -> None:
        """Take the samples of a summary, interval by interval, which come after all that were taken before.

        An interval is judged at its end, by the means of its samples. Where each interval has one sample, decisions
        are those of :meth:`judge`; where it has more, false alarms come less often, and there are no p-values.

        Raises:
            ReferenceMismatchError: If the summary was made with another profile.
        """
        if summary.digest != self.profile.digest:
            raise ReferenceMismatchError("the summary was made with another reference profile than the detector's")
        for start in range(0, len(summary.intervals), CHUNK):
            rows = slice(start, start + CHUNK)
            samples, nonfinite = summary.samples[rows], summary.nonfinite[rows]
            counts = samples - nonfinite
            positions = self._samples + np.cumsum(samples)
            self._samples += int(samples.sum())
            self._nonfinite += int(nonfinite.sum())
            seen = counts > 0
            each = 1 / counts[seen]
            features = self._room(len(each))
            features[:] = summary.features[rows][seen] * each[:, None]
            vectors = (summary.vectors[rows][seen] * each[:, None, None]).astype(np.float32)
            statistic = self._chart.run(vectors, counts[seen].tolist())
            evidence = np.concatenate(
                [self.profile.levels.evidence(statistic), summary.oddness[rows][seen][:, None]], axis=1
            )
            average = (summary.oddness_sums[rows][seen] * each[:, None]).astype(np.float32)
            self._follow(features, vectors, average, evidence, positions[seen].tolist(), counts[seen].tolist())

    def drain(self) -> list[float]:
        """Return the p-values since the last call, oldest first."""
        scores = list(self._scores)
        self._scores.clear()
        return scores

    def detection(self) -> Detection:
        """Summarise the samples so far."""
        layer, reading = None, ""
        channels: tuple[MovedChannel, ...] = ()
        if self._average is not None and self._alarm_at is not None:
            end = self._samples if self._ended_at is None else self._ended_at
            lead = self._average.lead(self.profile)
            lead = self._lead if lead is None else lead
            layer, channels = self.profile.layers[lead], moved_channels(self._average, self.profile, lead)
            reading = describe(self._average, self.profile, lead, end - self._alarm_at, over=self._ended_at is not None)
        return Detection(
            state=self._state,
            samples=self._samples,
            nonfinite_samples=self._nonfinite,
            evidence=self._relative,
            threshold=self.threshold,
            alarms=self._alarms,
            alarm_at=self._alarm_at,
            layer=layer,
            channels=channels,
            reading=reading,
            layers=dict(zip(self.profile.layers, self._layer_evidence(), strict=True)),
        )

    def _layer_evidence(self) -> list[float]:
        """Return each layer's largest evidence of a chart after the last sample, as a share of what alarms."""
        relative: list[float] = (self._evidence / self._alarming[:, None]).max(0).tolist()
        return relative

    def _judge_chunk(self, features: Array) -> list[float]:
        with np.errstate(invalid="ignore", over="ignore"):
            finite = np.isfinite(features.sum(1))
        if not finite.all():
            finite = np.isfinite(features).all(1)
            features = features[finite]
        standardised, vectors, length = self.profile.encode(features, self._room(len(features)))
        levels = self.profile.levels
        oddness = levels.oddness(length)
        found = iter(self.profile.p_values(oddness.max(1)).tolist())
        p_values = [next(found) if good else 0.0 for good in finite]
        vectors_cut = shorten(vectors, levels.radius, length)
        if self.summarizer is not None:
            self.summarizer.add(len(finite) - len(features), standardised, vectors_cut, oddness)
        statistic = self._chart.run(vectors_cut)
        evidence = np.concatenate([levels.evidence(statistic), oddness[:, None]], axis=1)
        positions = self._samples + 1 + np.flatnonzero(finite)
        self._samples += len(finite)
        self._nonfinite += len(finite) - len(features)
        self._follow(standardised, vectors, oddness, evidence, positions.tolist(), [1] * len(positions))
        return p_values

    def _room(self, count: int) -> Array:
        """Return rows for the features of the next samples, behind those of the most recent ones."""
        if self._end + count > len(self._rows):
            kept = min(self._end, LOOK_BACK)
            self._rows[:kept] = self._rows[self._end - kept : self._end]
            self._end = kept
        self._end += count
        return self._rows[self._end - count : self._end]

    def _follow(  # noqa: PLR0917 - one row of each for each
        self,
        features: Array,
        vectors: Array,
        oddness: Array,
        evidence: Array,
        positions: list[int],
        counts: list[int],
    ) -> None:
        """Move from state to state, row by row: what encodes it, where in the stream it ends, what samples it has."""
        relative = evidence.max(2) / self._alarming
        suspicious = (relative >= self._suspicious).any(1).tolist()
        largest = relative.max(1).tolist()
        shifted: list[int] = []
        for row, position in enumerate(positions):
            self._calm = 0 if suspicious[row] else self._calm + counts[row]
            if self._state == "shifted":
                if suspicious[row]:
                    shifted.append(row)
                elif self._calm >= CALM:
                    self._state = "recovered"
                    self._ended_at = position - self._calm
            elif largest[row] >= self.threshold:
                self._alarm(features, vectors, oddness, row, position)
                self._lead = first_layer(evidence[row])
                shifted.clear()
            elif suspicious[row] and self._state in ("warming", "ok"):
                self._state = "suspect"
            elif self._calm >= CALM_BEFORE_OK.get(self._state, math.inf):
                self._state = "ok"
        if shifted and self._average is not None:
            self._average.update(features[shifted], vectors[shifted], oddness[shifted])
            self._average.compare(self._distances(vectors, counts)[shifted])
            self._lead = first_layer(evidence[shifted[-1]])
        if positions:
            self._evidence, self._relative = evidence[-1], largest[-1]
            self._recent.extend(vectors[-LOOK_BACK:])
            self._recent_oddness.extend(oddness[-LOOK_BACK:])

    def _distances(self, vectors: Array, counts: list[int]) -> Array:
        """Return how far samples are from the ones before them, squared, in what is expected of clean ones."""
        before = np.concatenate([(self._recent[-1] if self._recent else vectors[0])[None], vectors[:-1]])
        expected = 2 * sum(self.profile.sketch.dimensions) / np.array(counts, np.float32)
        squares: Array = np.square(vectors - before).sum((1, 2)) / expected
        return squares

    def _alarm(self, features: Array, vectors: Array, oddness: Array, row: int, position: int) -> None:
        self._state = "shifted"
        self._alarms += 1
        self._alarm_at, self._ended_at = position, None
        recent = np.stack([*self._recent, *vectors[: row + 1]][-LOOK_BACK:])
        odd = np.stack([*self._recent_oddness, *oddness[: row + 1]][-LOOK_BACK:])
        end = self._end - len(features) + row + 1
        self._average = ShiftAverage(self._rows[end - len(recent) : end], recent, odd)

    def state_dict(self) -> Arrays:
        """Return all that the detector remembers, as arrays; p-values that nobody has drained are left behind."""
        channels, (layers, width) = self._rows.shape[1], self._chart.state.shape[2:]
        average = self._average
        return {
            "chart": self._chart.state[0].copy(),
            "evidence": self._evidence.copy(),
            "recent_features": self._rows[self._end - len(self._recent) : self._end].copy(),
            "recent_vectors": np.array(self._recent, np.float32).reshape(-1, layers, width),
            "recent_oddness": np.array(self._recent_oddness, np.float32).reshape(-1, layers),
            "average_features": np.zeros(channels, np.float32) if average is None else average.features.copy(),
            "average_vectors": np.zeros((layers, width), np.float32) if average is None else average.vectors.copy(),
            "average_oddness": np.zeros(layers, np.float32) if average is None else average.oddness.copy(),
            "numbers": np.array(
                [
                    get_args(State).index(self._state),
                    self._samples,
                    self._nonfinite,
                    self._alarms,
                    self._calm,
                    -1 if self._alarm_at is None else self._alarm_at,
                    -1 if self._ended_at is None else self._ended_at,
                    self._lead,
                    0 if average is None else average.count,
                ],
                np.int64,
            ),
            "reals": np.array([self._relative, 0.0 if average is None else average.noise]),
            "compared": np.array([0.0, 0.0] if average is None else [average.compared, average.repeating]),
        }

    def load_state_dict(self, state: Arrays) -> None:
        """Go on from where another detector with the same profile was.

        Raises:
            DetectorStateError: If the arrays are not those of :meth:`state_dict`, or of another profile.
        """
        self._check(state)
        self.reset()
        numbers = [int(number) for number in state["numbers"]]
        self._state = get_args(State)[numbers[0]]
        self._samples, self._nonfinite, self._alarms, self._calm = numbers[1:5]
        self._alarm_at, self._ended_at = (None if number < 0 else number for number in numbers[5:7])
        self._lead = numbers[7]
        self._relative = float(state["reals"][0])
        self._chart.state[0] = state["chart"]
        self._evidence = state["evidence"].copy()
        self._recent.extend(state["recent_vectors"].copy())
        self._recent_oddness.extend(state["recent_oddness"].copy())
        self._room(len(self._recent))[:] = state["recent_features"]
        if numbers[8] > 0:
            averages = (state[f"average_{name}"][None] for name in ("features", "vectors", "oddness"))
            self._average = ShiftAverage(*averages)
            self._average.count, self._average.noise = numbers[8], float(state["reals"][1])
            self._average.compared, self._average.repeating = int(state["compared"][0]), float(state["compared"][1])

    def _check(self, state: Arrays) -> None:
        expected = self.state_dict()
        for name, own in expected.items():
            array = state.get(name)
            recent = name.startswith("recent")
            if array is None or array.dtype != own.dtype or array.shape[recent:] != own.shape[recent:]:
                seen = "missing" if array is None else f"{array.dtype} of shape {array.shape}"
                raise DetectorStateError(f"the detector's state does not fit the profile: its {name} is {seen}")
            if array.dtype.kind == "f" and not (np.abs(array) < ABSURD).all():
                raise DetectorStateError(
                    f"the detector's state is damaged: its {name} holds NaN or {ABSURD:g} and more"
                )
        numbers, rows = state["numbers"], {len(state[name]) for name in expected if name.startswith("recent")}
        limits = [len(get_args(State)) - 1, *[2**62] * 6, len(self.profile.layers) - 1, 2**62]
        fits = (numbers >= [*[0] * 5, -1, -1, 0, 0]).all() and (numbers <= limits).all()
        if not fits or (state["compared"] < 0).any() or len(rows) > 1 or max(rows) > LOOK_BACK:
            raise DetectorStateError(f"the detector's state is damaged: its numbers are {numbers.tolist()}")
