"""Average run lengths by simulation: streams drawn from a pool of reference vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from guardserve.monitor.chart import Chart
from guardserve.monitor.features import Array

ARLS = np.geomspace(100, 100_000, 31)
"""The average run lengths whose thresholds are kept; those between are interpolated."""

STREAMS = 512
HORIZONS = (125, 250, 500, 1000, 2000)
"""Samples after which the largest evidence so far is looked at."""

PILOT_STREAMS = 128
PILOT_STEPS = 600

HALVES = 16
"""Random halves of the held-out samples whose measurements are compared."""


@dataclass(frozen=True, eq=False)
class Levels:
    """What makes the statistics of all charts and layers comparable.

    Attributes:
        median: In-control median of each, shape ``(charts, layers)``.
        high: In-control .999 quantile of each.
    """

    median: Array
    high: Array

    def evidence(self, statistic: Array) -> Array:
        """Return statistics of shape ``(*, charts, layers)`` on a scale where ``median`` is 0 and ``high`` is 1."""
        return (statistic - self.median) / (self.high - self.median)


@dataclass(frozen=True)
class RunLength:
    """An average run length, in samples, with its 95 % confidence interval."""

    mean: float
    low: float
    high: float


def simulate(
    pools: Sequence[Array],
    dimensions: Sequence[int],
    streams: int,
    steps: int,
    *,
    rng: np.random.Generator,
    see: Callable[[slice, int, Array], None],
) -> None:
    """Run charts over streams that take the vectors of one pool, shape ``(N, layers, width)``, in random order.

    A stream takes no vector twice before it has taken them all, so what a chart remembers are different samples,
    as in production: if the pool's samples took no part in the whitening, the stream is distributed as one in
    production is. Drawing with replacement would take the chance mean and covariance of a small pool for those
    of its population, and so make alarms look more frequent than they are.

    The streams are shared out among the pools. ``see`` gets a block of streams, the step from 1, and the
    statistics of shape ``(block, charts, layers)``.
    """
    block = math.ceil(streams / len(pools))
    for start, pool in zip(range(0, streams, block), pools, strict=True):
        count = min(block, streams - start)
        chart = Chart(count, dimensions, pool.shape[2])
        for step in range(steps):
            if step % len(pool) == 0:
                order = rng.permuted(np.tile(np.arange(len(pool)), (count, 1)), axis=1)
            see(slice(start, start + count), step + 1, chart.step(pool[order[:, step % len(pool)]]))


def find_levels(pools: Sequence[Array], dimensions: Sequence[int], rng: np.random.Generator) -> Levels:
    """Find the in-control levels of every statistic."""
    seen: list[Array] = []

    def see(_: slice, step: int, statistic: Array) -> None:
        if step > PILOT_STEPS // 6 and step % 4 == 0:
            seen.append(statistic)

    simulate(pools, dimensions, PILOT_STREAMS, PILOT_STEPS, rng=rng, see=see)
    median, high = np.quantile(np.concatenate(seen), [0.5, 0.999], axis=0)
    return Levels(median.astype(np.float32), np.maximum(high, median + 0.1).astype(np.float32))


def largest_evidence(
    pools: Sequence[Array],
    dimensions: Sequence[int],
    levels: Levels,
    *,
    streams: int,
    horizons: Sequence[int],
    rng: np.random.Generator,
) -> npt.NDArray[np.float64]:
    """Return the largest evidence of each stream up to each horizon, shape ``(horizons, streams)``."""
    largest = np.full(streams, -np.inf)
    found = np.zeros((len(horizons), streams))

    def see(block: slice, step: int, statistic: Array) -> None:
        evidence = levels.evidence(statistic).max((1, 2))
        largest[block] = np.maximum(largest[block], evidence)
        if step in horizons:
            found[list(horizons).index(step), block] = largest[block]

    simulate(pools, dimensions, streams, max(horizons), rng=rng, see=see)
    return found


def prudence(samples: int) -> float:
    """Return how many times longer than asked for run lengths are aimed at: 1.3 for 700 samples, 1.1 for 2,000.

    Without it, true run lengths were measured between 0.6 and 2.4 times the target from 750 samples, and between
    0.2 and 4 times from 200, over profiles of the digits model made from fresh samples.
    """
    return 1.1 + (300 / samples) ** 2


def find_thresholds(
    pools: Sequence[Array], dimensions: Sequence[int], levels: Levels, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Find the evidence that is exceeded once in each of :data:`ARLS` samples on average.

    Run lengths of a forgetting chart are close to exponential: ``P(no alarm by L) = exp(-L / ARL)``. What the
    vectors say of their population is uncertain, the more so the fewer they are: to err towards fewer alarms,
    thresholds are set for longer run lengths than they are named after, by the factor :func:`prudence`.
    """
    factor = prudence(sum(len(pool) for pool in pools))
    largest = largest_evidence(pools, dimensions, levels, streams=STREAMS, horizons=HORIZONS, rng=rng)
    thresholds = []
    for arl in ARLS:
        row = max([i for i, horizon in enumerate(HORIZONS) if horizon <= 2 * arl])
        thresholds.append(np.quantile(largest[row], math.exp(-HORIZONS[row] / (arl * factor))))
    return np.maximum.accumulate(np.array(thresholds))


def measure(
    held_out: Array,
    dimensions: Sequence[int],
    levels: Levels,
    *,
    threshold: float,
    target_arl: float,
    rng: np.random.Generator,
) -> RunLength:
    """Measure the average run length on vectors that took no part in fitting or thresholds.

    Its interval covers both the simulation and the chance that picked these samples: the spread between streams
    that draw from random halves of the samples is what one would find between fresh sets of samples.
    """
    horizon = max([HORIZONS[0], *(horizon for horizon in HORIZONS if horizon <= 2 * target_arl)])

    def alarms(pool: Array) -> int:
        largest = largest_evidence([pool], dimensions, levels, streams=streams, horizons=[horizon], rng=rng)
        return int((largest[0] >= threshold).sum())

    streams = STREAMS // HALVES
    halves = [alarms(held_out[rng.permutation(len(held_out))[: len(held_out) // 2]]) for _ in range(HALVES)]
    logs = np.log([_mean_run_length(count, streams, horizon) for count in halves])
    error = 1.96 * math.sqrt(max(float(logs.var(ddof=1)), 1 / (sum(halves) + 0.5)))
    mean = _mean_run_length(sum(halves), streams * HALVES, horizon)
    return RunLength(mean, mean * math.exp(-error), mean * math.exp(error))


def _mean_run_length(alarms: int, streams: int, horizon: int) -> float:
    """Estimate the mean of exponential run lengths from how many of the streams ended by the horizon."""
    return -horizon / math.log1p(-(alarms + 0.5) / (streams + 1))
