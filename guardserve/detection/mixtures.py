"""How odd the samples of another mixture of classes are: what is odder, or less odd, is no mixture of clean samples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from guardserve.detection.chart import Levels
from guardserve.detection.encoding import lengths
from guardserve.observation.features import Array

LEAST_SPREAD = 0.01
"""Smallest standard deviation of oddness: a layer that is constant in the reference has none."""


@dataclass(frozen=True, eq=False)
class Mixtures:
    """Foretells how odd samples are on average, layer by layer, where only the shares of the classes have changed.

    Then every average is the same mixture of what it is in each class. The last layer of a trained model tells the
    classes apart, so how far its mean has moved tells the mixture, and with it the other averages: by a linear
    regression over clean samples. A changed input does not keep to it: noise and gain change how long vectors are
    where their mean has not moved at all.

    Attributes:
        centre: Mean oddness of clean samples, shape ``(layers,)``.
        spread: Its standard deviation between samples.
        slopes: What a unit of the last layer's mean vector adds, shape ``(layers, width)``.
    """

    centre: Array
    spread: Array
    slopes: Array

    @classmethod
    def fit(cls, vectors: Array, levels: Levels) -> Mixtures:
        """Fit to whitened vectors of clean samples that had no part in their whitening, ``(N, layers, width)``."""
        oddness = np.maximum(levels.oddness(lengths(vectors)), levels.floor)
        centre, last = oddness.mean(0), vectors[:, -1]
        slopes = (oddness - centre).T @ (last - last.mean(0)) / np.float32(len(vectors))
        return cls(centre, np.maximum(oddness.std(0), np.float32(LEAST_SPREAD)), slopes)

    def expected(self, last: Array) -> Array:
        """Return the mean oddness in each layer, given the mean of the last layer's vectors.

        That of no mixture is beyond 1, which is that of one clean sample in a thousand.
        """
        expected: Array = np.minimum(1, self.centre + self.slopes @ last)
        return expected
