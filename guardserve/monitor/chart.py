"""Multivariate EWMA charts over whitened vectors: they forget, so they have no drift of their own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from guardserve.monitor.features import Array

LAMBDAS = (0.05, 0.2)
"""Weight of the newest sample in each chart: the small one sees weak shifts, the large one strong ones at once."""


class Chart:
    """The charts of every layer, for any number of streams side by side.

    Lowry, Woodall, Champ and Rigdon (1992), "A multivariate exponentially weighted moving average control
    chart": ``w <- w + lam (f - w)`` and the statistic ``T = (|w|^2 (2 - lam) / lam - d) / sqrt(2 d)``, which is
    about 0 on average, and 1 wide, while the vectors ``f`` have mean 0 and covariance 1.

    Args:
        streams: Number of streams.
        dimensions: Dimensions that each layer really has.
        width: Dimensions that each layer is padded to.
    """

    def __init__(self, streams: int, dimensions: Sequence[int], width: int) -> None:
        self.state: Array = np.zeros((streams, len(LAMBDAS), len(dimensions), width), np.float32)
        self._factor = np.array([(2 - lam) / lam for lam in LAMBDAS], np.float32)[:, None]
        self._dimensions = np.array(dimensions, np.float32)
        self._width = np.sqrt(2 * self._dimensions)

    def step(self, vectors: Array) -> Array:
        """Take one vector of each layer and stream, shape ``(streams, layers, width)``.

        Returns:
            ``T``, shape ``(streams, charts, layers)``.
        """
        for chart, lam in enumerate(LAMBDAS):
            state = self.state[:, chart]
            state *= np.float32(1 - lam)
            state += np.float32(lam) * vectors
        statistic: Array = np.einsum("scld,scld->scl", self.state, self.state)
        statistic *= self._factor
        statistic -= self._dimensions
        statistic /= self._width
        return statistic
