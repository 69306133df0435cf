"""Control charts over whitened vectors: they forget, so they have no drift of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from guardserve.detection.encoding import lengths
from guardserve.observation.features import Array

LAMBDAS = (0.05, 0.2)
"""Weight of the newest sample in each EWMA chart: the small one sees weak shifts, the large one strong ones soon."""

SHARES = (0.55, 0.35, 0.1)
"""Share of the false alarms that each EWMA chart may raise, and the last chart, which looks at one sample alone."""

REACH = 1.75
"""How many times longer than the median clean vector one counts in the charts with a memory.

Some layers have rare samples whose vectors are several times longer, one in a hundred with half of all variance. How
many of them a reference of 1,000 holds is chance, and run lengths would follow it. The median it knows well.
"""


class Chart:
    """The EWMA charts of every layer, for any number of streams side by side.

    Lowry, Woodall, Champ and Rigdon (1992), "A multivariate exponentially weighted moving average control
    chart": ``w <- w + lam (f - w)`` and the statistic ``T = (|w|^2 (2 - lam) / lam - d) / sqrt(2 d)``, which is
    about 0 on average, and 1 wide, while the vectors ``f`` have mean 0 and covariance 1. What is kept is
    ``w / lam``, for which ``f`` need not be scaled.

    Args:
        streams: Number of streams.
        dimensions: Dimensions that each layer really has.
        width: Dimensions that each layer is padded to.
    """

    def __init__(self, streams: int, dimensions: Sequence[int], width: int) -> None:
        self.state: Array = np.zeros((streams, len(LAMBDAS), len(dimensions), width), np.float32)
        self._factor = np.array([(2 - lam) * lam for lam in LAMBDAS], np.float32)[:, None]
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
            state += vectors
        return self._statistic(self.state)

    def run(self, vectors: Array, counts: Sequence[int] | None = None) -> Array:
        """Take vectors of one stream in order, shape ``(n, layers, width)``.

        Args:
            vectors: One a sample, or, where ``counts`` says so, the mean of several samples.
            counts: How many samples each vector stands for.

        Returns:
            ``T`` after each, shape ``(n, charts, layers)``. The mean of several samples moves ``w`` as far as they
            would, were they alike; ``T`` then varies less than after single samples, never more.
        """
        states = np.empty((len(vectors), *self.state.shape[1:]), np.float32)
        state, lam = self.state[0], np.array(LAMBDAS)[:, None, None]
        once = (1 - lam).astype(np.float32)
        for row, vector in enumerate(vectors):
            kept, step = once, vector
            if counts is not None:
                powers = (1 - lam) ** counts[row]
                kept, step = powers.astype(np.float32), ((1 - powers) / lam).astype(np.float32) * vector
            state = np.multiply(state, kept, out=states[row])
            state += step
        if len(vectors):
            self.state[0] = state
        return self._statistic(states)

    def _statistic(self, states: Array) -> Array:
        statistic: Array = np.einsum("scld,scld->scl", states, states)
        statistic *= self._factor
        statistic -= self._dimensions
        statistic /= self._width
        return statistic


@dataclass(frozen=True, eq=False)
class Levels:
    """What makes the statistics of all charts and layers comparable.

    The charts are those of :data:`LAMBDAS`, and one without memory, whose statistic is the logarithm of a
    vector's length.

    Attributes:
        median: In-control median of each, shape ``(charts, layers)``.
        high: In-control .999 quantile of each.
    """

    median: Array
    high: Array

    @cached_property
    def radius(self) -> Array:
        """Length that a layer's vector is cut to before it enters the charts with a memory: see :data:`REACH`."""
        radius: Array = np.float32(REACH) * np.exp(self.median[-1])
        return radius

    def evidence(self, statistic: Array) -> Array:
        """Return the EWMA charts' statistics ``(*, charts, layers)`` scaled so that ``median`` is 0, ``high`` 1."""
        evidence: Array = (statistic - self.median[:-1]) / self._reach[:-1]
        return evidence

    def oddness(self, length: Array) -> Array:
        """Return the lengths of vectors, shape ``(*, layers)``, on the scale of :meth:`evidence`."""
        oddness: Array = (np.log(length) - self.median[-1]) / self._reach[-1]
        return oddness

    @cached_property
    def floor(self) -> Array:
        """Least oddness that says something: that of length 1 in layers that are constant but for rounding.

        Other layers, whose longest vectors are longer than 1, have none.
        """
        floor: Array = np.where(self.high[-1] > 0, np.float32(-np.inf), self.oddness(np.ones_like(self.high[-1])))
        return floor

    def lengths(self, oddness: Array) -> Array:
        """Return the lengths of vectors that are so odd: the inverse of :meth:`oddness`."""
        length: Array = np.exp(self.median[-1] + oddness * self._reach[-1])
        return length

    @cached_property
    def _reach(self) -> Array:
        return self.high - self.median

    @classmethod
    def of_lengths(cls, vectors: Array) -> Levels:
        """Take those of the chart without memory from clean vectors; the others' are 0 and 1.

        Whitened vectors are about as long as the root of their dimensions. A layer that is constant but for rounding
        has shorter ones; the level of 1 keeps it silent.
        """
        median, high = np.log(np.quantile(lengths(vectors), [0.5, 0.999], axis=0))
        high = np.maximum(np.maximum(high, 0.0), median + 0.01)
        others = np.zeros((len(LAMBDAS), len(median)))
        return cls(
            np.concatenate([others, median[None]]).astype(np.float32),
            np.concatenate([others + 1, high[None]]).astype(np.float32),
        )

    def with_charts(self, median: Array, high: Array) -> Levels:
        """Return these with levels of the EWMA charts, each of shape ``(charts, layers)``."""
        high = np.maximum(high, median + 0.1)
        return Levels(
            np.concatenate([median, self.median[-1:]]).astype(np.float32),
            np.concatenate([high, self.high[-1:]]).astype(np.float32),
        )
