"""Summaries of a stream that several replicas share: they add up, and a detector judges the sum.

Each replica sums what its samples show over intervals of a clock that all share. Sums add up in any order, so the
sum over replicas is the summary that one replica would have made of all samples, and so is what a detector makes of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from guardserve.detection.encoding import shorten
from guardserve.detection.reference import ReferenceProfile
from guardserve.exceptions import ReferenceMismatchError
from guardserve.observation.features import Array

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]


INTERVAL = 1.0
"""Seconds of an interval of the monotonic clock, which all processes of a machine share."""


@dataclass(frozen=True, eq=False)
class Summary:
    """What the samples of some intervals show, added up within each.

    It grows with intervals and layers, not with samples.

    Attributes:
        digest: That of the reference profile.
        intervals: Numbers of the intervals, ascending, each once.
        samples: Samples of each.
        nonfinite: Those of them with NaN or infinity, which are part of no sum.
        features: Sums of standardised features, shape ``(K, F)``.
        vectors: Sums of whitened vectors cut to the radius, shape ``(K, layers, width)``.
        oddness: Largest oddness of a sample in each layer, shape ``(K, layers)``.
        oddness_sums: Sums of the samples' oddness in each layer, shape ``(K, layers)``.
    """

    digest: str
    intervals: Int64
    samples: Int64
    nonfinite: Int64
    features: Float64
    vectors: Float64
    oddness: Array
    oddness_sums: Float64

    @classmethod
    def of(cls, profile: ReferenceProfile, features: Array, intervals: Sequence[int]) -> Summary:
        """Summarise samples.

        Args:
            profile: The reference that all replicas have.
            features: Features of the samples, shape ``(N, F)``, in any order.
            intervals: The interval of each: the second of a shared clock, say, or a number that the router counts.
        """
        names, rows = np.unique(np.asarray(intervals, np.int64), return_inverse=True)
        finite = np.isfinite(features).all(1)
        standardised, vectors, length = profile.encode(features[finite])
        summary = cls(
            digest=profile.digest,
            intervals=names,
            samples=np.bincount(rows, minlength=len(names)).astype(np.int64),
            nonfinite=np.bincount(rows[~finite], minlength=len(names)).astype(np.int64),
            features=np.zeros((len(names), features.shape[1])),
            vectors=np.zeros((len(names), *vectors.shape[1:])),
            oddness=np.full((len(names), vectors.shape[1]), -np.inf, np.float32),
            oddness_sums=np.zeros((len(names), vectors.shape[1])),
        )
        oddness = profile.levels.oddness(length)
        np.add.at(summary.features, rows[finite], standardised)
        np.add.at(summary.vectors, rows[finite], shorten(vectors, profile.levels.radius, length))
        np.maximum.at(summary.oddness, rows[finite], oddness)
        np.add.at(summary.oddness_sums, rows[finite], oddness)
        return summary

    def merge(self, *others: Summary) -> Summary:
        """Return the summary of what all have seen together, in whatever order they are given.

        Raises:
            ReferenceMismatchError: If they were made with different profiles.
        """
        parts = (self, *others)
        if any(part.digest != self.digest for part in others):
            raise ReferenceMismatchError(
                "summaries made with different reference profiles do not add up: give all replicas the same one"
            )
        names, rows = np.unique(np.concatenate([part.intervals for part in parts]), return_inverse=True)

        def add(name: str) -> npt.NDArray[np.generic]:
            values = np.concatenate([getattr(part, name) for part in parts])
            total = np.zeros((len(names), *values.shape[1:]), values.dtype)
            np.add.at(total, rows, values)
            return total

        oddness = np.full((len(names), self.oddness.shape[1]), -np.inf, np.float32)
        np.maximum.at(oddness, rows, np.concatenate([part.oddness for part in parts]))
        sums = {name: add(name) for name in ("samples", "nonfinite", "features", "vectors", "oddness_sums")}
        return Summary(digest=self.digest, intervals=names, oddness=oddness, **sums)  # type: ignore[arg-type]


class Summarizer:
    """Adds up what samples show while a detector judges them, by the second in which it does.

    Args:
        profile: The detector's.
        clock: Seconds of a clock that all replicas share.
    """

    def __init__(self, profile: ReferenceProfile, clock: Callable[[], float] = time.monotonic) -> None:
        self._digest = profile.digest
        self._clock = clock
        self._parts: list[Summary] = []

    def add(self, nonfinite: int, features: Array, vectors: Array, oddness: Array) -> None:
        """Take samples.

        Args:
            nonfinite: Those that cannot be judged, as they have NaN or infinity.
            features: Standardised features of the others, shape ``(N, F)``.
            vectors: Their whitened vectors cut to the radius, shape ``(N, layers, width)``.
            oddness: Their oddness in each layer, shape ``(N, layers)``.
        """
        new = Summary(
            digest=self._digest,
            intervals=np.array([self._clock() // INTERVAL], np.int64),
            samples=np.array([len(features) + nonfinite]),
            nonfinite=np.array([nonfinite]),
            features=features.sum(0, dtype=np.float64, keepdims=True),
            vectors=vectors.sum(0, dtype=np.float64, keepdims=True),
            oddness=oddness.max(0, keepdims=True, initial=-np.inf),
            oddness_sums=oddness.sum(0, dtype=np.float64, keepdims=True),
        )
        if self._parts and self._parts[-1].intervals[0] == new.intervals[0]:
            new = self._parts.pop().merge(new)
        self._parts.append(new)

    def take(self) -> Summary | None:
        """Return what the samples since the last call show; None without any."""
        parts, self._parts = self._parts, []
        return parts[0].merge(*parts[1:]) if parts else None
