"""Average run lengths by simulation: streams drawn from pools of reference vectors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from guardserve.detection.chart import LAMBDAS, SHARES, Chart, Levels
from guardserve.detection.encoding import lengths, shorten
from guardserve.observation.features import Array

ARLS = np.geomspace(100, 100_000, 31)
"""The average run lengths whose thresholds are kept; those between are interpolated."""

STREAMS = 512
HORIZONS = (125, 250, 500, 1000, 2000)
"""Samples after which the largest evidence so far is looked at."""

BLOCK_SIZE = 200_000
"""Numbers that the charts of the streams simulated side by side remember: they stay in the processor's cache."""

PILOT_STREAMS = 128
PILOT_STEPS = 600

RUN = 5
"""Samples of a sequence that stay together in simulations, in units of the time over which they are alike."""

AUTOCORRELATED = 0.05
"""Autocorrelation below which samples of a sequence count as independent."""

FOLDS = 4
"""Parts that samples are shared out among, each to be whitened by what the others give.

With more of them a fold is too short for what a chart remembers, and streams show too little of the whitening's error;
with fewer, whitenings are fitted to so much less than all that they show too much of it.
"""

TAIL = 0.05
"""Share of the samples, the oddest, from which the tail of the chart without memory is extrapolated."""

UNSURE = (400, 200, 550)
"""Samples with which each chart's run length is aimed at twice as long as asked for: see :func:`prudence`.

The slow chart remembers more samples than a fold of a small reference holds, and suffers most from its mean's error;
what a small reference knows least of is how odd rare samples are, which the chart without memory looks at.
"""

UNKNOWN = 4
"""How many times longer than seen the tail is taken to be, beyond run lengths of as many samples as there are."""

PARTS = 8
"""Places of production's mean whose measurements are compared."""

STUDENT = 2.365
"""Standard errors that a 95 % interval reaches where eight (:data:`PARTS`) measurements tell the error: Student's t."""

Thresholds = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RunLength:
    """An average run length, in samples, with its 95 % confidence interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Calibration:
    """What makes evidence of statistics.

    Attributes:
        levels: What makes the statistics of charts and layers comparable.
        thresholds: Evidence of each chart that gives an alarm, for each of :data:`ARLS`: shape ``(charts, arls)``.
        oddness: How odd each sample is by itself, shape ``(N,)``.
    """

    levels: Levels
    thresholds: Thresholds
    oddness: Array


@dataclass(frozen=True, eq=False)
class Pool:
    """Vectors that streams are drawn from.

    Attributes:
        vectors: Shape ``(N, layers, width)``, cut to the radius.
        oddness: How odd each sample is by itself, shape ``(N,)``.
        run: Samples that are drawn together because each depends on the ones before it; 1 if they are independent.
        folds: Parts of equal size, one behind the other, each whitened by what samples outside it gave. With more than
            one, every :data:`FOLDS` of them hold the same samples.
    """

    vectors: Array
    oddness: Array
    run: int = 1
    folds: int = 1

    @classmethod
    def of(cls, whitened: Array, levels: Levels, *, run: int = 1, folds: int = 1) -> Pool:
        """Make one of whitened vectors in the order in which they came."""
        length = lengths(whitened)
        run = max(1, min(run, len(whitened) // folds // 4))
        return cls(shorten(whitened, levels.radius, length), levels.oddness(length).max(1), run, folds)

    @property
    def cycle(self) -> int:
        """Samples of a fold, which a stream goes through before it comes to another one."""
        return len(self.vectors) // self.folds

    @property
    def samples(self) -> int:
        """Number of different samples; the first so many vectors are theirs."""
        return self.cycle * min(FOLDS, self.folds)

    def orders(self, streams: int, rng: np.random.Generator) -> Iterator[npt.NDArray[np.intp]]:
        """Yield, cycle by cycle for ever, which vectors each stream takes, shape ``(cycle, streams)``.

        A stream goes through a fold, then through another one, and takes no vector twice in a cycle: what a chart
        remembers are different samples then, as in production, and all whitened by what none of them had a part in.
        Vectors of one sample drawn twice look like a shift, and those that helped to whiten each other look less
        alike than fresh ones. Runs of samples stay together (a block bootstrap, Politis and Romano 1992).
        """
        size, turns = self.cycle, self.samples // self.cycle
        starts = np.arange(0, size, self.run)
        while True:
            first = rng.integers(self.folds // turns, size=streams) * turns
            for turn in rng.permuted(np.tile(np.arange(turns), (streams, 1)), axis=1).T:
                offset = rng.integers(0, size if self.folds == 1 else 1, (streams, 1))  # folds are made of whole runs
                drawn = rng.permuted(np.tile(starts, (streams, 1)), axis=1) + offset
                rows = (drawn[:, :, None] + np.arange(self.run)).reshape(streams, -1)[:, :size] % size
                yield np.ascontiguousarray((rows + ((first + turn) * size)[:, None]).T)

    def chance(self, count: int, samples: int, rng: np.random.Generator) -> Array:
        """Draw how far the mean of so many samples may be from that of all: by the bootstrap, ``count`` times."""
        size, shape = len(self.vectors), self.vectors.shape[1:]
        runs = math.ceil(samples / self.run)
        weights = np.zeros((count, size), np.float32)
        for row, starts in enumerate(rng.integers(0, size, (count, runs))):
            drawn = (starts[:, None] + np.arange(self.run)) % size
            weights[row] = np.bincount(drawn.ravel(), minlength=size) / drawn.size
        weights -= 1 / np.float32(size)
        distances: Array = (weights @ self.vectors.reshape(size, -1)).reshape(count, *shape)
        return distances

    def half(self, rng: np.random.Generator) -> Pool:
        """Return a random half; a stretch of a sequence."""
        size = len(self.vectors)
        rows = (
            (rng.integers(size) + np.arange(size // 2)) % size if self.run > 1 else rng.permutation(size)[: size // 2]
        )
        return replace(self, vectors=self.vectors[rows], oddness=self.oddness[rows])

    def moved(self, mean: Array) -> Pool:
        """Return the pool with another mean, of shape ``(layers, width)``."""
        return replace(self, vectors=self.vectors + (mean - self.vectors.mean(0)))

    def plausible_means(self, count: int, fitted: int, rng: np.random.Generator) -> Array:
        """Draw where the mean of production may be, shape ``(count, layers, width)``.

        The mean of ``m`` vectors is off by chance, which charts with a memory take for a shift. The whitening's centre
        is the mean of ``n`` other samples, and off by chance too. Given both, the mean of production is distributed
        about ``m / (n + m)`` of the pool's mean as the mean of ``n + m`` samples is about it.

        Args:
            count: How many.
            fitted: ``n``.
            rng: The source of chance.
        """
        size = len(self.vectors)
        means: Array = self.vectors.mean(0) * np.float32(size / (size + fitted)) + self.chance(
            count, size + fitted, rng
        )
        return means


def dependent_run(vectors: Array) -> int:
    """Return how many samples of a sequence of whitened vectors must stay together in simulations.

    That is :data:`RUN` times the time over which the vectors of a layer are alike, ``1 + 2 sum rho_k`` over their
    autocorrelations up to the first that is lost in noise, for the layer with the longest. Longer runs would show the
    charts too few different stretches.
    """
    square = np.einsum("nld,nld->l", vectors, vectors) / len(vectors)
    times = np.ones(len(square))
    alive = np.ones(len(square), bool)
    for lag in range(1, len(vectors) // 10):
        products = np.einsum("nld,nld->l", vectors[lag:], vectors[:-lag]) / (len(vectors) - lag)
        rho = products / np.maximum(square, np.finfo(np.float32).tiny)
        alive &= rho > AUTOCORRELATED
        if not alive.any():
            break
        times[alive] += 2 * rho[alive]
    return math.ceil(RUN * float(times.max()))


def simulate(
    pool: Pool, dimensions: Sequence[int], streams: int, steps: int, rng: np.random.Generator
) -> Iterator[tuple[Array, Array]]:
    """Run charts over streams from a pool, one step at a time.

    Yields:
        The statistics of the EWMA charts, shape ``(streams, charts, layers)``, and how odd the samples are by
        themselves, shape ``(streams,)``.
    """
    chart = Chart(streams, dimensions, pool.vectors.shape[2])
    vectors = np.empty((streams, *pool.vectors.shape[1:]), np.float32)
    for first, orders in zip(range(0, steps, pool.cycle), pool.orders(streams, rng), strict=False):
        # cycles through the same vectors have one mean, where those of as many fresh samples differ
        distance = pool.chance(streams, pool.cycle, rng) if pool.folds == 1 else None
        for order in orders[: steps - first]:
            np.take(pool.vectors, order, axis=0, out=vectors, mode="clip")
            if distance is not None:
                vectors += distance
            yield chart.step(vectors), pool.oddness[order]


def calibrate(folds: Array, dimensions: Sequence[int], rng: np.random.Generator, run: int = 1) -> Calibration:
    """Find levels and thresholds, given vectors of shape ``(folds, N, layers, width)``: see :class:`Pool`."""
    vectors = np.concatenate(folds)
    levels = Levels.of_lengths(vectors)
    pool = Pool.of(vectors, levels, run=run, folds=len(folds))
    levels = levels.with_charts(*chart_levels(pool, dimensions, rng))
    return Calibration(levels, find_thresholds(pool, dimensions, levels, rng), pool.oddness[: pool.samples])


def chart_levels(pool: Pool, dimensions: Sequence[int], rng: np.random.Generator) -> Array:
    """Find the in-control median and .999 quantile of the EWMA charts' statistics: shape ``(2, charts, layers)``."""
    seen = [
        statistic
        for step, (statistic, _) in enumerate(simulate(pool, dimensions, PILOT_STREAMS, PILOT_STEPS, rng))
        if step >= PILOT_STEPS // 6 and step % 4 == 0
    ]
    levels: Array = np.quantile(np.concatenate(seen), [0.5, 0.999], axis=0)
    return levels


def largest_evidence(
    pool: Pool,
    dimensions: Sequence[int],
    levels: Levels,
    *,
    streams: int,
    horizons: Sequence[int],
    rng: np.random.Generator,
) -> npt.NDArray[np.float64]:
    """Return the largest evidence that each chart has shown in each stream up to each horizon.

    Returns:
        Shape ``(horizons, charts, streams)``, the chart without memory being the last one.
    """
    found: list[npt.NDArray[np.float64]] = []
    block = max(8, BLOCK_SIZE // (len(LAMBDAS) * pool.vectors[0].size))
    for first in range(0, streams, block):
        count = min(block, streams - first)
        largest = np.full((len(SHARES), count), -np.inf)
        rows = []
        for step, (statistic, oddness) in enumerate(simulate(pool, dimensions, count, max(horizons), rng)):
            np.maximum(largest[:-1], levels.evidence(statistic).max(2).T, out=largest[:-1])
            np.maximum(largest[-1], oddness, out=largest[-1])
            if step + 1 in horizons:
                rows.append(largest.copy())
        found.append(np.stack(rows))
    return np.concatenate(found, axis=2)


def prudence(samples: int) -> npt.NDArray[np.float64]:
    """Return how many times longer than asked for run lengths are aimed at, for each chart.

    What a reference says of its population is uncertain, the more so the smaller it is.
    """
    return 1 + (np.array(UNSURE) / samples) ** 4


def find_thresholds(pool: Pool, dimensions: Sequence[int], levels: Levels, rng: np.random.Generator) -> Thresholds:
    """Find the evidence of each chart that gives an alarm, for each of :data:`ARLS`: shape ``(charts, arls)``.

    Run lengths of a forgetting chart are close to exponential: ``P(no alarm by L) = exp(-L / ARL)``. Each chart gets
    its part of the alarms (:data:`SHARES`). Thresholds are set for longer run lengths than they are named after, by
    the factor :func:`prudence`.
    """
    aims = np.outer(prudence(pool.samples), ARLS)
    largest = largest_evidence(pool, dimensions, levels, streams=STREAMS, horizons=HORIZONS, rng=rng)
    thresholds = np.empty(aims.shape)
    for chart in range(len(LAMBDAS)):
        for column, aim in enumerate(aims[chart]):
            row = max([i for i, horizon in enumerate(HORIZONS) if horizon <= 2 * aim])
            thresholds[chart, column] = np.quantile(largest[row, chart], math.exp(-HORIZONS[row] * SHARES[chart] / aim))
    thresholds[-1] = tail_thresholds(pool.oddness[: pool.samples], aims[-1])
    return np.maximum.accumulate(np.maximum(thresholds, 0.05), axis=1)


def tail_thresholds(oddness: Array, aims: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Find how odd a single sample must be to raise an alarm by itself, for each run length that is aimed at.

    What is beyond the oddest :data:`TAIL` is taken as exponential, which for logarithms is Hill's estimator (1975),
    with its mean one standard error longer than it is seen. It must be odder than all of the reference, too, and the
    odder the fewer samples there are for the run length: of data that hold one freak in some thousands, a small
    reference knows nothing.
    """
    ordered = np.sort(oddness.astype(np.float64))
    size, count = len(ordered), max(10, round(TAIL * len(ordered)))
    start = ordered[-count - 1]
    mean = float((ordered[-count:] - start).mean()) * (1 + 1 / math.sqrt(count))
    extrapolated = start + mean * np.log(np.maximum(1.0, count / size * aims / SHARES[-1]))
    unknown = UNKNOWN * mean * np.log(np.maximum(1.0, aims / size))
    beyond: npt.NDArray[np.float64] = np.maximum(extrapolated, ordered[-1]) + unknown
    return beyond


def measure(
    held_out: Pool,
    fitted: int,
    dimensions: Sequence[int],
    levels: Levels,
    *,
    thresholds: npt.NDArray[np.float64],
    target_arl: float,
    rng: np.random.Generator,
) -> RunLength:
    """Measure the average run length on vectors that took no part in fitting or thresholds.

    Its interval covers the simulation, and the chance that picked these samples and those that the whitening was
    ``fitted`` to: streams differ in where the mean of production is, and the spread between streams from random halves
    of the samples is what one would find between fresh sets of samples.
    """
    horizons = [horizon for horizon in HORIZONS if horizon <= 2 * target_arl]
    streams = STREAMS // (2 * PARTS)

    def alarms(pool: Pool) -> npt.NDArray[np.int64]:
        largest = largest_evidence(pool, dimensions, levels, streams=streams, horizons=horizons, rng=rng)
        alarmed: npt.NDArray[np.int64] = (largest >= thresholds[:, None]).any(1).sum(1)
        return alarmed

    means = held_out.plausible_means(PARTS, fitted, rng)
    counts = np.sum([alarms(held_out.moved(mean)) for mean in means], axis=0)
    some_left = np.flatnonzero(counts <= 0.8 * streams * PARTS)
    row = int(some_left[-1]) if len(some_left) else 0
    total, horizon = int(counts[row]), horizons[row]
    mean_length = mean_run_length(total, streams * PARTS, horizon)
    halves = [int(alarms(held_out.half(rng).moved(mean))[row]) for mean in means]
    logs = np.log([mean_run_length(count, streams, horizon) for count in halves])
    error = max(STUDENT * float(logs.std(ddof=1)), 1.96 / math.sqrt(total + 0.5))
    return RunLength(mean_length, mean_length * math.exp(-error), mean_length * math.exp(error))


def mean_run_length(alarms: int, streams: int, horizon: int) -> float:
    """Estimate the mean of exponential run lengths from how many of the streams ended by the horizon."""
    return -horizon / math.log1p(-(alarms + 0.5) / (streams + 1))
